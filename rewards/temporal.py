"""What moves, how, and how far that is from what a prompt asks: the reading of a video encoder's states over time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TemporalProbe(nn.Module):
    """Queries attend within each tubelet time; what they find, and where, is read as level, velocity, speed and unrest over time.

    RoPE leaves no absolute place in the encoder's states, and a path is places over times: so the place of each patch
    is added before pooling. Velocity is change per second, not per clip: the same frames shown twice as fast move twice as fast.
    Speed is its size, whichever way: "slowly" is linear in it and not in the velocity.
    Where: the mean place under each attention map (spatial soft-argmax, 1509.06113 sec. IV), whose path over time is in half sides of the
    frame and the same wherever in the frame it lies. The last `course` features are few and in units: these paths, and how much of what is
    found changes. Verdicts are too few to read the wide rest, which words are learned from: on the toy world it costs agreement with people.
    """

    FREQUENCIES = (0.5, 1.0, 2.0)

    def __init__(self, hidden_size: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.num_queries, self.num_heads = num_queries, num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_size) * 0.5)
        self.place = nn.Linear(2 * (1 + 2 * len(self.FREQUENCIES)), hidden_size)
        self.mix = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size),
            nn.GELU(),
            nn.Linear(2 * hidden_size, hidden_size),
        )
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.course = 6 * num_queries * num_heads + 2 * num_queries
        self.features = 4 * num_queries * hidden_size + self.course

    def places(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Coordinates in [-1, 1] and their sines and cosines, [rows * columns, 2 + 4 * frequencies]."""
        axes = [(torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in (rows, columns)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        waves = [f(torch.pi * k * grid) for k in self.FREQUENCIES for f in (torch.sin, torch.cos)]
        return torch.cat([grid, *waves], dim=1)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int], interval: Tensor) -> Tensor:
        """Tokens [B, T * h * w, H] on a grid (T, h, w), `interval` [B] seconds between times -> features [B, 4 * Q * H + course]."""
        times, rows, columns = grid
        batch = len(tokens)
        tokens = self.norm(tokens).view(batch * times, rows * columns, -1)
        place = self.places(rows, columns, tokens.device).to(tokens.dtype)
        tokens = self.mix(tokens + self.place(place))

        def split(x: Tensor) -> Tensor:
            """[N, L, H] -> [N, heads, L, H / heads], never less than float32."""
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = map(split, self.key_value(tokens).chunk(2, dim=-1))
        query = split(self.queries.expand(batch * times, -1, -1))
        # a path's second difference is smaller than what bfloat16 rounds off its places
        with torch.autocast(tokens.device.type, enabled=False):
            attention = (query @ key.mT / math.sqrt(key.shape[-1])).softmax(dim=-1)
            found = (attention @ value).transpose(1, 2).reshape(batch, times, -1)
            spots = (attention @ place[:, :2].to(attention.dtype)).reshape(batch, times, -1, 2)
        whole = found.unflatten(-1, (self.num_queries, -1)) / math.sqrt(tokens.shape[-1])
        change = over_time(whole, interval)[2:]
        wide, paths = over_time(found[..., None], interval), over_time(spots, interval)
        return torch.cat([part.flatten(1) for part in (*wide, *paths, *change)], dim=1)


def over_time(read: Tensor, interval: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Readings [B, T, N, C] `interval` [B] seconds apart -> level and velocity [B, N, C], speed and unrest [B, N].

    Velocity is the least-squares slope per second, speed its length, unrest the mean length of the second difference.
    """
    times = read.shape[1]
    velocity, unrest = torch.zeros_like(read[:, 0]), torch.zeros_like(read[:, 0, :, 0])
    if times > 1:
        step = torch.arange(times, device=read.device) - (times - 1) / 2
        slope = (read * step[:, None, None]).sum(1) / step.square().sum()
        velocity = slope / interval[:, None, None]
    if times > 2:
        unrest = length(read[:, 2:] - 2 * read[:, 1:-1] + read[:, :-2]).mean(1)
    return read.mean(1), velocity, length(velocity), unrest


def length(x: Tensor) -> Tensor:
    """Euclidean length over the last axis, with a slope at 0."""
    return (x.square().sum(-1) + 1e-6).sqrt()


class PromptAim(nn.Module):
    """How far a clip's motion is from what the prompt asks: both become points in one small space.

    Words alone are one-sided: nothing is ever too fast for "quickly". Near a point there is too little and too much. Far from it all is
    wrong alike, so the distance counts by its logarithm, as in the Cauchy likelihood.
    """

    def __init__(self, features: int, vocab_size: int, hidden_size: int, size: int = 16) -> None:
        super().__init__()
        self.shown = nn.Sequential(
            nn.Linear(features, hidden_size), nn.GELU(), nn.Linear(hidden_size, size)
        )
        self.asked = nn.Sequential(
            nn.Linear(vocab_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, size),
        )

    def forward(self, features: Tensor, words: Tensor) -> Tensor:
        """Features [B, H] and weighted words of the prompt [B, V] -> log(1 + mean squared distance) [B, 1]."""
        gap = self.shown(features) - self.asked(F.normalize(words, dim=1) * words.shape[1] ** 0.25)
        return gap.square().mean(1, keepdim=True).log1p()
