"""Several fine-tuned generators made one: the weighted average of their denoisers.

Seedance 1.0 (2506.09113, sec. 3) fine-tunes one model per curated subset and merges them, without saying how; plain averaging of
weights is the usual reading (model soups, 2203.05482). It holds for models fine-tuned from one parent: the sweep shows whether it does.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reelhf.errors import UserError
from reelhf.hashing import weight_hashes
from reelhf.run import verify

if TYPE_CHECKING:
    from generator.checkpoint import DiTGenerator

WEIGHTS_FILE, CARD_FILE = "denoiser.safetensors", "generator.json"
MERGE_CARD = "merge.json"
"""In a merged generator's folder: its parents, their weights, the sweep's table."""


@dataclass(frozen=True)
class ScoredMerge:
    """One point of a sweep."""

    weights: tuple[float, ...]
    """Of each parent; they add up to one."""
    loss: float
    """Velocity error on the scoring clips, lower is better (`generator.training.denoiser.validation_loss`)."""


def normalised_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Weights of `count` parents that add up to one; None means all alike.

    Raises: UserError for another number of weights, a negative one, or a sum of zero.
    """
    if weights is None:
        return (1 / count,) * count
    if len(weights) != count:
        raise UserError(f"{len(weights)} weights for {count} generators; give one for each")
    total = math.fsum(weights)
    if min(weights) < 0 or not total > 0 or not math.isfinite(total):
        raise UserError(
            f"weights {', '.join(f'{w:g}' for w in weights)}; expected none below zero and a sum above it"
        )
    return tuple(weight / total for weight in weights)


def average_states(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """sum_i weights_i * states_i per tensor, summed in float32 and returned in each tensor's own type.

    Entries that are no floats (counters) are taken from the first.
    """
    merged = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            merged[name] = first.clone()
            continue
        total = torch.zeros(first.shape, dtype=torch.float32)
        for state, weight in zip(states, weights, strict=True):
            total.add_(state[name].float(), alpha=weight)
        merged[name] = total.to(first.dtype)
    return merged


def weight_grid(count: int, parts: int) -> Iterator[tuple[float, ...]]:
    """Every way to deal `parts` equal shares to `count` parents: C(parts + count - 1, count - 1) points, the corners among them."""
    for bars in itertools.combinations(range(parts + count - 1), count - 1):
        edges = (-1, *bars, parts + count - 1)
        yield tuple((high - low - 1) / parts for low, high in itertools.pairwise(edges))


def check_mergeable(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The cards of generator folders that differ in nothing but their denoiser's weights.

    Raises: UserError naming the first folder that is damaged, or that differs from the first and in what.
    """
    if len(folders) < 2:
        raise UserError(f"{len(folders)} generator to merge; expected at least 2")
    cards = []
    for folder in folders:
        if not (folder / CARD_FILE).is_file():
            raise UserError(f"{folder} is not a generator folder: it has no {CARD_FILE}")
        verify(folder)
        cards.append(json.loads((folder / CARD_FILE).read_text(encoding="utf-8")))
    for folder, card in zip(folders[1:], cards[1:], strict=True):
        for key in ("format", "role", "architecture", "spec", "frame_shape", "fps"):
            if card[key] != cards[0][key]:
                raise UserError(
                    f"{folder} and {folders[0]} cannot be merged: their {key} differs ({_difference(cards[0][key], card[key])})"
                )
        for part in ("vae", "text"):
            if weight_hashes(folder / part) != weight_hashes(folders[0] / part):
                raise UserError(
                    f"{folder} and {folders[0]} cannot be merged: they have another {part}; merge generators of one parent"
                )
    return cards


def _difference(first: Any, second: Any) -> str:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
        return ", ".join(f"{key}: {first.get(key)} and {second.get(key)}" for key in keys)
    return f"{first} and {second}"


def merge_generators(
    folders: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    sweep: int | None = None,
    clips: Path | None = None,
    max_clips: int = 256,
) -> list[ScoredMerge]:
    """Write the weighted average of the generators in `folders` to `out`.

    Args:
        folders: generators of one parent: same architecture, size, VAE and text encoder. The first one's sampler is kept.
        weights: one per generator, scaled to add up to one; all alike by default. Not with `sweep`.
        sweep: in place of weights, score every mixture in steps of 1 / sweep on `clips` and keep the best.
        clips: captioned clips that none of the parents was trained on; with weights they only add a score.
    Returns: what was scored, best first; empty without clips.
    """
    from safetensors.torch import load_file

    from generator.checkpoint import DiTGenerator, load_generator
    from reelhf.progress import track

    folders, out = [Path(folder) for folder in folders], Path(out)
    check_mergeable(folders)
    if sweep is not None and (weights is not None or clips is None):
        raise UserError("a sweep finds the weights by scoring on clips: give --clips, no --weights")
    if sweep is not None and sweep < 1:
        raise UserError(f"sweep {sweep}; expected at least 1 part")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose a new folder for the merged generator")
    points = (
        [normalised_weights(weights, len(folders))]
        if sweep is None
        else list(weight_grid(len(folders), sweep))
    )
    states = [load_file(folder / WEIGHTS_FILE) for folder in folders]
    backbone = load_generator(folders[0])
    assert isinstance(backbone, DiTGenerator)
    scored: list[ScoredMerge] = []
    if clips is not None:
        score = clip_score(backbone, clips, max_clips)
        for point in track(points, label="scoring merges"):
            backbone.denoiser.load_state_dict(average_states(states, point))
            scored.append(ScoredMerge(point, score()))
        scored.sort(key=lambda one: one.loss)
    best = scored[0].weights if scored else points[0]
    backbone.denoiser.load_state_dict(average_states(states, best))
    card = {
        "parents": [str(folder) for folder in folders],
        "weights": list(best),
        "scored": [{"weights": list(one.weights), "loss": one.loss} for one in scored],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / MERGE_CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    backbone.save(out)  # seals the folder, this card included
    return scored


def clip_score(backbone: DiTGenerator, clips: Path, max_clips: int) -> Any:
    """() -> velocity error of the backbone's present denoiser on clips, encoded once, at fixed noise and sigmas."""
    from generator.training.denoiser import validation_loss
    from generator.training.latents import encode_clips
    from reelhf.clips import load_folder_windows

    if backbone.role == "refiner":
        raise UserError("a refiner's merges are not scored here: give --weights, without --clips")
    windows = load_folder_windows(
        clips, frame_shape=backbone.frame_shape, fps=backbone.fps, max_windows=max_clips, seed=0
    )
    data = encode_clips(backbone, windows)
    weights = torch.ones(backbone.spec.channels)

    @torch.no_grad()
    def score() -> float:
        return validation_loss(backbone, backbone.denoiser, data, weights)

    return score
