"""A temporally causal video autoencoder: 4 x 16 x 16 pixels become one latent position of 48 channels.

The first frame is coded alone and each later latent frame covers four frames, so F = 1 + 4n frames give T = 1 + n latents and
an image is a clip of one frame (Seedance 1.0, arXiv 2506.09113, 2.1; MAGVIT-v2, arXiv 2310.05737). Two paths are added:

* a linear shortcut fitted in closed form within seconds: the encoder projects patches (1 x 16 x 16 pixels of the first frame,
  4 x 16 x 16 of later ones) on their principal components, the decoder is a regression of patches on the latents around them;
* a learned residual path of causal convolutions on two grids: fine tokens (4 x 4 pixels) and the latent grid (16 x 16).

All time mixing is causal convolution along the latent axis, and every normalisation is per position, so nothing leaks from later
to earlier frames and any chunking gives the same result. Streaming state is a flat tuple of tensors that `decode` and
`encode_chunk` take and return; nothing is kept on the module.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generator.base import BackboneSpec
from reelhf.config import Config
from reelhf.errors import UserError

StreamState = tuple[Tensor, ...]
"""One tensor per causal convolution, in forward order: its last input frame, [B, width, 1, h, w]."""

WEIGHTS_NAME, CONFIG_NAME = "vae.safetensors", "vae.json"
RIDGE = 1e-3
"""Penalty of the decoder's linear fit, relative to the unit variance of its inputs."""
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -12.0, 4.0


class VAEConfig(Config):
    """Widths of the learned residual path; the compression itself is fixed at (4, 16, 16)."""

    channels: PositiveInt = 48
    """Latent channels."""
    fine_size: PositiveInt = 4
    """Side in pixels of a fine token; divides 16."""
    encoder_fine_width: PositiveInt = 64
    """Channels on the fine grid of the encoder."""
    encoder_fine_blocks: NonNegativeInt = 1
    encoder_width: PositiveInt = 128
    """Channels on the latent grid of the encoder."""
    encoder_blocks: NonNegativeInt = 2
    decoder_width: PositiveInt = 128
    """Channels on the latent grid of the decoder."""
    decoder_blocks: NonNegativeInt = 2
    decoder_fine_width: PositiveInt = 64
    """Channels on the fine grid of the decoder: most of the cost of a reward gradient."""
    decoder_fine_blocks: NonNegativeInt = 2


class Posterior(NamedTuple):
    """Gaussian over un-normalised latents, each [B, C, T, h, w]."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + noise * (0.5 * self.log_variance).exp()

    def kl(self) -> Tensor:
        """Divergence from N(0, 1) in nats per latent element, a scalar."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).mean()


def patchify(frames: Tensor, frames_per_patch: int, size: int) -> Tensor:
    """[B, c, F, H, W] -> [B, c * frames_per_patch * size^2, F / frames_per_patch, H / size, W / size]."""
    batch, channels, num_frames, height, width = frames.shape
    frames = frames.reshape(
        batch,
        channels,
        num_frames // frames_per_patch,
        frames_per_patch,
        height // size,
        size,
        width // size,
        size,
    )
    return frames.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def unpatchify(patches: Tensor, frames_per_patch: int, size: int) -> Tensor:
    """Inverse of `patchify`."""
    batch, features, time, height, width = patches.shape
    patches = patches.reshape(
        batch,
        features // (frames_per_patch * size * size),
        frames_per_patch,
        size,
        size,
        time,
        height,
        width,
    )
    patches = patches.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return patches.reshape(batch, -1, time * frames_per_patch, height * size, width * size)


class ChannelNorm(nn.Module):
    """RMS over the channels of one position: it mixes neither space nor time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean(1, keepdim=True) + 1e-6)
        return hidden * scale * self.weight.view(1, -1, 1, 1, 1)


class Stream:
    """Walks the causal convolutions of one call, handing each its past and collecting its new state."""

    def __init__(self, state: StreamState | None) -> None:
        self.incoming = list(state) if state is not None else None
        self.outgoing: list[Tensor] = []

    def with_past(self, hidden: Tensor) -> Tensor:
        """Prepend the last frame of the chunk before (zeros at the start of a clip): [B, width, 1 + T, h, w]."""
        past = (
            torch.zeros_like(hidden[:, :, :1])
            if self.incoming is None
            else self.incoming[len(self.outgoing)]
        )
        hidden = torch.cat([past, hidden], dim=2)
        self.outgoing.append(hidden[:, :, -1:])
        return hidden


class CausalBlock(nn.Module):
    """hidden + W(silu(causal conv(norm(hidden)))): 3 x 3 in space, this and the previous latent frame in time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv = nn.Conv3d(width, width, (2, 3, 3), padding=(0, 1, 1))
        self.out = nn.Conv3d(width, width, 1)

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        return hidden + self.out(F.silu(self.conv(stream.with_past(self.norm(hidden)))))


class FrameLinear(nn.Module):
    """One linear map for the first frame of a clip, another for groups of later frames; same output width.

    With `to_patch=False` it reads pixels: first [B, 3 * s^2] and later [B, 3 * 4 * s^2] features per position -> width.
    """

    def __init__(self, first_in: int, later_in: int, first_out: int, later_out: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(first_in, first_out, 1)
        self.later = nn.Conv3d(later_in, later_out, 1)


class PixelsToTokens(FrameLinear):
    """Frames [B, 3, F, H, W] -> tokens [B, width, T, H / size, W / size]."""

    def __init__(self, size: int, group: int, width: int) -> None:
        super().__init__(3 * size**2, 3 * group * size**2, width, width)
        self.size, self.group = size, group

    def forward(self, frames: Tensor, starts_clip: bool) -> Tensor:
        tokens = []
        if starts_clip:
            tokens.append(self.first(patchify(frames[:, :, :1], 1, self.size)))
            frames = frames[:, :, 1:]
        if frames.shape[2]:
            tokens.append(self.later(patchify(frames, self.group, self.size)))
        return torch.cat(tokens, dim=2)


class TokensToPixels(FrameLinear):
    """Tokens [B, width, T, h, w] -> frames [B, 3, F, h * size, w * size]."""

    def __init__(self, size: int, group: int, width: int) -> None:
        super().__init__(width, width, 3 * size**2, 3 * group * size**2)
        self.size, self.group = size, group

    def forward(self, tokens: Tensor, starts_clip: bool) -> Tensor:
        frames = []
        if starts_clip:
            frames.append(unpatchify(self.first(tokens[:, :, :1]), 1, self.size))
            tokens = tokens[:, :, 1:]
        if tokens.shape[2]:
            frames.append(unpatchify(self.later(tokens), self.group, self.size))
        return torch.cat(frames, dim=2)


class LappedPatches(nn.Module):
    """Latents -> frames, linearly: a patch is read from the 3 x 3 latents around it, of this and the previous latent frame.

    A patch that knows its neighbours has fewer seams than one decoded alone, at the price of a wider matrix.
    """

    def __init__(self, channels: int, group: int, size: int) -> None:
        super().__init__()
        self.group, self.size = group, size
        self.first = nn.Conv3d(channels, 3 * size**2, (1, 3, 3), padding=(0, 1, 1))
        self.later = nn.Conv3d(channels, 3 * group * size**2, (2, 3, 3), padding=(0, 1, 1))

    def forward(self, latents: Tensor, stream: Stream) -> Tensor:
        starts_clip = stream.incoming is None
        latents = stream.with_past(latents)  # [B, C, 1 + T, h, w]
        frames = []
        if starts_clip:
            latents = latents[:, :, 1:]
            frames.append(unpatchify(self.first(latents[:, :, :1]), 1, self.size))
        if latents.shape[2] > 1:
            frames.append(unpatchify(self.later(latents), self.group, self.size))
        return torch.cat(frames, dim=2)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig, spec: BackboneSpec) -> None:
        super().__init__()
        group, size = spec.temporal_ratio, spec.spatial_ratio
        self.fold = size // config.fine_size
        self.shortcut = PixelsToTokens(size, group, config.channels)
        self.tokens = PixelsToTokens(config.fine_size, group, config.encoder_fine_width)
        self.fine = nn.ModuleList(
            CausalBlock(config.encoder_fine_width) for _ in range(config.encoder_fine_blocks)
        )
        self.down = nn.Conv3d(config.encoder_fine_width * self.fold**2, config.encoder_width, 1)
        self.coarse = nn.ModuleList(
            CausalBlock(config.encoder_width) for _ in range(config.encoder_blocks)
        )
        self.norm = ChannelNorm(config.encoder_width)
        self.head = nn.Conv3d(config.encoder_width, 2 * config.channels, 1)

    def forward(self, frames: Tensor, state: StreamState | None) -> tuple[Posterior, StreamState]:
        starts_clip, stream = state is None, Stream(state)
        frames = frames - 0.5  # centred
        hidden = self.tokens(frames, starts_clip)  # [B, fine width, T, H / 4, W / 4]
        for block in self.fine:
            hidden = block(hidden, stream)
        hidden = self.down(patchify(hidden, 1, self.fold))  # [B, width, T, h, w]
        for block in self.coarse:
            hidden = block(hidden, stream)
        residual, log_variance = self.head(F.silu(self.norm(hidden))).chunk(2, dim=1)
        mean = self.shortcut(frames, starts_clip) + residual
        return Posterior(mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)), tuple(
            stream.outgoing
        )


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig, spec: BackboneSpec) -> None:
        super().__init__()
        group, size = spec.temporal_ratio, spec.spatial_ratio
        self.fold = size // config.fine_size
        self.shortcut = LappedPatches(config.channels, group, size)
        self.widen = nn.Conv3d(config.channels, config.decoder_width, 1)
        self.coarse = nn.ModuleList(
            CausalBlock(config.decoder_width) for _ in range(config.decoder_blocks)
        )
        self.up = nn.Conv3d(config.decoder_width, config.decoder_fine_width * self.fold**2, 1)
        self.tokens = PixelsToTokens(config.fine_size, group, config.decoder_fine_width)
        self.fine = nn.ModuleList(
            CausalBlock(config.decoder_fine_width) for _ in range(config.decoder_fine_blocks)
        )
        self.norm = ChannelNorm(config.decoder_fine_width)
        self.head = TokensToPixels(config.fine_size, group, config.decoder_fine_width)

    def forward(self, latents: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        starts_clip, stream = state is None, Stream(state)
        frames = self.shortcut(latents, stream)  # [B, 3, F, H, W], centred
        hidden = self.widen(latents)
        for block in self.coarse:
            hidden = block(hidden, stream)
        # the fine path sees the linear reconstruction of its neighbours, so it can mend the seams between patches
        hidden = unpatchify(self.up(hidden), 1, self.fold) + self.tokens(frames, starts_clip)
        for block in self.fine:
            hidden = block(hidden, stream)
        frames = frames + self.head(F.silu(self.norm(hidden)), starts_clip)
        return frames + 0.5, tuple(stream.outgoing)


class PatchBasis(NamedTuple):
    """A linear code of patches: z = (x - mean) @ analysis, x ~ mean + z @ synthesis."""

    mean: Tensor
    """[features]"""
    analysis: Tensor
    """[features, channels]"""
    synthesis: Tensor
    """[channels, features]"""

    def encode(self, patches: Tensor) -> Tensor:
        return (patches - self.mean) @ self.analysis

    def rotated(self, rotation: Tensor) -> PatchBasis:
        """The same code in other axes: z' = z @ rotation, with `rotation` [channels, channels] orthogonal."""
        return PatchBasis(self.mean, self.analysis @ rotation, rotation.T @ self.synthesis)


def _whitened_pca(patches: Tensor, channels: int, seed: int) -> PatchBasis:
    """The `channels` strongest principal components of patches [N, features], scaled to unit variance."""
    mean = patches.mean(0)
    with torch.random.fork_rng(
        devices=[]
    ):  # pca_lowrank draws its test vectors from the global generator
        torch.manual_seed(seed)
        rank = min(channels + 16, *patches.shape)
        _, scale, basis = torch.pca_lowrank(patches - mean, q=rank, center=False, niter=3)
    if rank < channels:
        raise UserError(
            f"{len(patches)} training patches are too few for {channels} latent channels"
        )
    std = (scale[:channels] / len(patches) ** 0.5).clamp_min(
        1e-4
    )  # flat clips have fewer than `channels` components
    basis = basis[:, :channels]
    return PatchBasis(mean, basis / std, (basis * std).T)


def _neighbourhoods(latents: Tensor) -> Tensor:
    """The 3 x 3 positions around each, zeros outside the frame: [B, C, T, h, w] -> [B, C * 9, T, h, w]."""
    batch, _, time, height, width = latents.shape
    around = F.unfold(latents.transpose(1, 2).flatten(0, 1), 3, padding=1)
    return around.reshape(batch, time, -1, height, width).transpose(1, 2)


def _sample_rows(patches: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """At most `limit` positions of [B, features, T, h, w] as rows [N, features]."""
    rows = patches.movedim(1, -1).flatten(0, -2)
    return rows[torch.randperm(len(rows), generator=generator)[:limit]]


class VideoVAE(nn.Module):
    """Frames [B, 3, F, H, W] in [0, 1] <-> latents [B, C, T, h, w], normalised per channel."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or VAEConfig()
        self.spec = BackboneSpec(channels=self.config.channels)
        if self.spec.spatial_ratio % self.config.fine_size:
            raise UserError(
                f"fine_size {self.config.fine_size}: it must divide {self.spec.spatial_ratio}"
            )
        self.encoder = Encoder(self.config, self.spec)
        self.decoder = Decoder(self.config, self.spec)
        self.register_buffer("latent_mean", torch.zeros(self.config.channels))
        self.register_buffer("latent_std", torch.ones(self.config.channels))
        with (
            torch.no_grad()
        ):  # the residual path starts small beside the shortcut, with a narrow posterior
            for head in (self.encoder.head, self.decoder.head.first, self.decoder.head.later):
                head.weight.mul_(0.1)
                assert head.bias is not None
                head.bias.zero_()
            self.encoder.head.bias[self.config.channels :] = -6.0

    def posterior(
        self, frames: Tensor, state: StreamState | None = None
    ) -> tuple[Posterior, StreamState]:
        """Un-normalised posterior of a chunk of frames; without a state the chunk starts a clip."""
        num_frames = frames.shape[2] + (state is not None)  # a later chunk has 4n frames
        self.spec.check(num_frames, *frames.shape[3:])
        return self.encoder(frames, state)

    def shortcut(self, frames: Tensor) -> Tensor:
        """Reconstruction of whole clips by the linear paths alone."""
        latents = self.encoder.shortcut(frames - 0.5, True)
        return self.decoder.shortcut(latents, Stream(None)) + 0.5

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """The training pass: (reconstruction, posterior) of whole clips; `noise` [B, C, T, h, w] samples the posterior."""
        posterior, _ = self.posterior(frames)
        reconstruction, _ = self.decoder(posterior.sample(noise), None)
        return reconstruction, posterior

    def encode_chunk(
        self, frames: Tensor, state: StreamState | None = None
    ) -> tuple[Tensor, StreamState]:
        """Streaming `encode`: 1 + 4n frames first, then 4n with the state that the chunk before returned."""
        posterior, state = self.posterior(frames, state)
        return (posterior.mean - self._per_channel(self.latent_mean)) / self._per_channel(
            self.latent_std
        ), state

    def encode(self, frames: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [0, 1] -> the posterior's mean, normalised, [B, C, T, h, w].

        Raises: UserError unless F = 1 + 4n and H, W are multiples of 16.
        """
        return self.encode_chunk(frames)[0]

    def decode(
        self,
        latents: Tensor,
        state: StreamState | None = None,
        *,
        checkpoint_chunk: int | None = None,
    ) -> tuple[Tensor, StreamState]:
        """Normalised latents [B, C, T, h, w] -> (frames [B, 3, F, H, W], NOT clamped to [0, 1]; state).

        Streaming: without a state the chunk starts a clip (F = 4T - 3), with one it goes on (F = 4T). Differentiable in
        the latents and in the state; any chunking gives the same frames and gradients.

        Args:
            checkpoint_chunk: latent frames per chunk whose activations are recomputed in the backward pass instead of kept
                (non-reentrant checkpointing); None keeps them all.
        """
        latents = latents * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)
        if checkpoint_chunk is None:
            return self.decoder(latents, state)
        frames = []
        for chunk in latents.split(checkpoint_chunk, dim=2):
            decoded, state = checkpoint(self.decoder, chunk, state, use_reentrant=False)
            frames.append(decoded)
        assert state is not None
        return torch.cat(frames, dim=2), state

    def reconstruct(self, frames: Tensor) -> Tensor:
        """Whole clips through the posterior's mean, not clamped."""
        return self.decode(self.encode(frames))[0]

    @torch.no_grad()
    def init_shortcut(
        self, clips: Sequence[Tensor], *, max_patches: int = 6144, seed: int = 0
    ) -> None:
        """Fit both linear shortcuts in closed form: the encoder's by PCA, the decoder's by regression on its latents.

        PCA latents are whitened, so that they start with unit variance.

        The first frame's basis is rotated (orthogonal Procrustes) so that a patch at rest has nearly the same latent in
        the first and in later frames.

        Args:
            clips: batches [N, 3, F, H, W] in [0, 1], F = 1 + 4n with n >= 1, of every size that will be used.
        """
        generator = torch.Generator().manual_seed(seed)
        group, size, channels = (
            self.spec.temporal_ratio,
            self.spec.spatial_ratio,
            self.config.channels,
        )
        first, later = [], []
        for frames in clips:
            self.spec.check(*frames.shape[2:])
            first.append(
                _sample_rows(patchify(frames[:, :, :1] - 0.5, 1, size), max_patches, generator)
            )
            later.append(
                _sample_rows(patchify(frames[:, :, 1:] - 0.5, group, size), max_patches, generator)
            )
        first_basis = _whitened_pca(torch.cat(first), channels, seed)
        later_basis = _whitened_pca(torch.cat(later), channels, seed)

        # a first-frame patch [3 * 1 * s * s] held for four frames [3 * 4 * s * s]
        at_rest = (
            torch.cat(first).unflatten(1, (3, 1, size * size)).expand(-1, -1, group, -1).flatten(1)
        )
        left, _, right = torch.linalg.svd(
            first_basis.encode(torch.cat(first)).T @ later_basis.encode(at_rest)
        )
        first_basis = first_basis.rotated(left @ right)

        for name, basis in (("first", first_basis), ("later", later_basis)):
            encoder = getattr(self.encoder.shortcut, name)
            encoder.weight.copy_(basis.analysis.T[:, :, None, None, None])
            encoder.bias.copy_(-basis.mean @ basis.analysis)
        self._fit_decoder_shortcut(clips, max_patches, generator)

    def _fit_decoder_shortcut(
        self, clips: Sequence[Tensor], max_patches: int, generator: torch.Generator
    ) -> None:
        """Ridge regression of patches on the latents around them."""
        group, size = self.spec.temporal_ratio, self.spec.spatial_ratio
        shortcut = self.decoder.shortcut
        sums: dict[str, list[Tensor]] = {"first": [], "later": []}
        for frames in clips:
            frames = frames - 0.5
            latents = self.encoder.shortcut(frames, True)
            around = _neighbourhoods(latents)  # [B, 9 * C, T, h, w]
            pairs = {
                "first": (around[:, :, :1], patchify(frames[:, :, :1], 1, size)),
                "later": (
                    torch.cat([around[:, :, :-1], around[:, :, 1:]], dim=1),
                    patchify(frames[:, :, 1:], group, size),
                ),
            }
            for name, (inputs, patches) in pairs.items():
                rows = torch.cat([inputs, torch.ones_like(inputs[:, :1]), patches], dim=1)
                sums[name].append(_sample_rows(rows, max_patches, generator))
        for name, batches in sums.items():
            conv = getattr(shortcut, name)
            rows = torch.cat(batches)
            inputs, patches = rows[:, : -conv.out_channels], rows[:, -conv.out_channels :]
            gram = inputs.T @ inputs
            gram.diagonal().add_(RIDGE * len(rows))
            weights = torch.linalg.solve(gram, inputs.T @ patches)  # [taps * 9 * C + 1, features]
            taps = weights[:-1].T.unflatten(1, (conv.kernel_size[0], conv.in_channels, 3, 3))
            conv.weight.copy_(taps.transpose(1, 2))
            conv.bias.copy_(weights[-1])

    @torch.no_grad()
    def set_latent_statistics(self, latents: Sequence[Tensor]) -> None:
        """Store the mean and std per channel of un-normalised latents, batches [N, C, T, h, w] of any sizes."""
        by_channel = torch.cat([batch.transpose(0, 1).flatten(1) for batch in latents], dim=1)
        self.latent_mean.copy_(by_channel.mean(1))
        self.latent_std.copy_(by_channel.std(1).clamp_min(1e-4))

    def save(self, directory: str | Path) -> Path:
        """Write `vae.json` and `vae.safetensors`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_NAME).write_text(
            json.dumps(self.config.model_dump(mode="json"), indent=2) + "\n"
        )
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()
        }
        save_file(tensors, directory / WEIGHTS_NAME)
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> VideoVAE:
        """Read a folder written by `save`, in eval mode and frozen."""
        directory = Path(directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise UserError(f"{directory} is not a VAE folder: {name} is missing")
        vae = cls(VAEConfig.model_validate_json((directory / CONFIG_NAME).read_text()))
        vae.load_state_dict(load_file(directory / WEIGHTS_NAME))
        return vae.eval().requires_grad_(False)

    @staticmethod
    def _per_channel(values: Tensor) -> Tensor:
        return values.view(1, -1, 1, 1, 1)
