"""The clip that others are held against: the best of N that one model made for one prompt.

Source: RewardDance, 2509.08826, sec. 3.3: N = 16 samples of the model before RLHF, ranked by the number of comparisons each wins; the top ones serve
as references.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reelhf.errors import UserError

if TYPE_CHECKING:
    from rewards.generative import GenerativeReward


@torch.no_grad()
def comparisons(model: GenerativeReward, frames: Tensor, fps: float, prompt: Any) -> Tensor:
    """Logit [N, N, D] that clip i beats clip j of frames [N, 3, F, H, W]; antisymmetric, 0 on the diagonal."""
    count = len(frames)
    out = torch.zeros(count, count, len(model.dimensions), device=frames.device)
    selection = model.select(frames.shape[2], fps)
    for i in range(count - 1):
        others = frames[i + 1 :]
        beats = model.score(
            frames[i : i + 1].expand_as(others),
            selection=selection,
            fps=fps,
            prompts=[prompt] * len(others),
            reference=others,
        ).values
        out[i, i + 1 :], out[i + 1 :, i] = beats, -beats
    return out


def win_counts(beats: Tensor) -> Tensor:
    """How many of the others each clip beats, in each dimension: [N, D] of logits [N, N, D]; an invalid comparison is no win."""
    return (beats > 0).sum(dim=1)


def best_of(
    model: GenerativeReward, frames: Tensor, fps: float, prompt: Any, *, keep: int = 1
) -> list[int]:
    """The `keep` clips of frames [N, 3, F, H, W] that win most comparisons over all dimensions, the best first."""
    beats = comparisons(model, frames, fps, prompt)
    wins = win_counts(beats).sum(1).double()
    margin = beats.nan_to_num().mean((1, 2)).double()  # decides between equal counts
    return (wins + margin.sigmoid() / 2).argsort(descending=True)[:keep].tolist()


def choose_references(reward: Path, clips: Path, out: Path) -> Path:
    """Keep, for each caption of a folder of clips, the one of its clips that beats most others, in a copy of the reward at `out`.

    Args:
        reward: a generative reward that asks against a reference.
        clips: captioned clips (`reelhf.clips`), several per caption, made by the model that is to be improved.
    """
    from reelhf.clips import load_clip_folder
    from reelhf.progress import track
    from reelhf.video import read_video
    from rewards.checkpoint import load_reward, one_model
    from rewards.generative import GenerativeReward

    model = one_model(load_reward(reward), reward)
    if not isinstance(model, GenerativeReward) or not model.compares:
        raise UserError(
            f"{reward} judges a clip by itself; expected a reward that asks against_reference"
        )
    by_caption: dict[str, list[Path]] = {}
    for entry in load_clip_folder(clips):
        by_caption.setdefault(entry.caption, []).append(entry.path)
    for caption, paths in track(
        by_caption.items(), label="choose references", total=len(by_caption)
    ):
        read = [read_video(path) for path in paths]
        shapes = {tuple(frames.shape) for frames, _ in read}
        if len(shapes) > 1:
            raise UserError(
                f"the clips of {caption!r} differ in length or size: {sorted(shapes)}; expected one model's clips"
            )
        frames = torch.stack([frames for frames, _ in read])
        (best,) = best_of(model, frames.float() / 255, read[0][1], caption)
        model.keep_reference(caption, frames[best])
    return model.save(Path(out))
