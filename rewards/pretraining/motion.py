"""Pre-training of the motion model: masked latent prediction and words, then right against wrong motion for the caption."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from reelhf.graded import GradedClips
from rewards.degrade import drift
from rewards.motion import MotionReward
from rewards.pretraining.batches import batches
from rewards.pretraining.config import PretrainConfig
from rewards.pretraining.muon import CosineMuon
from rewards.pretraining.pairs import (
    generated_clips,
    graded_pairs,
    ranking_loss,
    spoil_lightly,
    spoiled_pair,
)

WRONG_MOTION, WRONG_SPEED, DRIFT = 0.3, 0.2, 0.3
"""Shares of the pairs that teach the motion reward; in the rest both copies are spoiled in some way, the second more."""
MOST_OCTAVES = 1.3
"""How much too fast or too slow a clip is shown at most, as a power of two."""


def wrong_motion(frames: Tensor, generator: Generator) -> Tensor:
    """The same clips [B, 3, F, H, W] moving otherwise: backwards, turned or stopped; one way per clip."""
    num_frames, square = frames.shape[2], frames.shape[-1] == frames.shape[-2]
    ways = [
        lambda clip: clip.flip(1),
        lambda clip: clip.flip(2, 3),
        lambda clip: clip.transpose(2, 3) if square else clip.flip(2, 3),
        lambda clip: clip.transpose(2, 3).flip(2, 3) if square else clip.flip(2, 3),
        lambda clip: clip[:, num_frames // 2 :][:, :1].expand_as(clip),
    ]
    kinds = torch.randint(len(ways), (len(frames),), generator=generator).tolist()
    return torch.stack([ways[kind](clip) for kind, clip in zip(kinds, frames, strict=True)])


def worse_motion(frames: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two versions of each clip [B, 3, F, H, W] that differ in motion: (better, worse, by how much [B], rate of the worse [B]).

    The worse moves otherwise than the caption says, or the right way too fast or too slowly, or drifts or is spoiled further than
    the better. Too fast is as wrong as too slow: shown at `rate` times its frames per second, a clip's own pictures say both.
    """
    better, worse, margin = spoiled_pair(frames, "motion_quality", generator)
    kind = torch.rand(len(frames), generator=generator)
    low, high = torch.rand(2, len(frames), generator=generator).sort(dim=0).values
    low = low * (torch.rand(len(frames), generator=generator) < 0.6)
    octaves = MOST_OCTAVES * (2 * torch.rand(len(frames), generator=generator) - 1)
    ends = torch.tensor([WRONG_MOTION, WRONG_SPEED, DRIFT]).cumsum(0)
    other, hurried, drifting = (
        (kind < end) & (kind >= end - share)
        for end, share in zip(ends, (WRONG_MOTION, WRONG_SPEED, DRIFT), strict=True)
    )
    for chosen, first, second, gap in (
        (other, frames, wrong_motion(frames, generator), torch.ones(len(frames))),
        (hurried, frames, frames, octaves.abs()),
        (drifting, drift(frames, low, generator), drift(frames, high, generator), high - low),
    ):
        where = chosen.view(-1, 1, 1, 1, 1)
        better, worse = torch.where(where, first, better), torch.where(where, second, worse)
        margin = torch.where(chosen, gap, margin)
    return better, worse, margin, 2 ** (octaves * hurried)


def pretrain_motion(
    model: MotionReward,
    config: PretrainConfig,
    frames: Tensor,
    captions: list[str],
    graded: Sequence[GradedClips] = (),
) -> None:
    """Masked latent prediction (V-JEPA 2, 2506.09985 eq. 1) and the probe's ranking of motions for a caption."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    teacher = copy.deepcopy(model.backbone.encoder).requires_grad_(False)
    optimizer = CosineMuon(model, config.motion_stage)
    prompts = model.encode_prompts(captions)
    model.train()
    stage = config.motion_stage
    judged = graded_pairs(graded, model, stage.batch_size, generator)
    texts = [model.encode_prompts(clips.captions) for clips in graded]
    own = generated_clips(graded, texts, stage.batch_size, generator)
    for step, batch in enumerate(batches(frames, stage, generator, "pre-train motion")):
        right = [prompts[i] for i in batch.index.tolist()]
        if step < stage.num_steps * config.masked_share:
            seen = spoil_lightly(batch.frames, config.spoil, generator)
            masked = masked_prediction_loss(model, teacher, seen, generator)
            fps = torch.full((len(right),), config.fps)
            words = model.words(model.features(seen, fps))
            optimizer.step(masked + model.words.loss(words, right))
            follow(teacher, model.backbone.encoder)
            continue
        pair = next(judged, None) if step % 2 else None
        if pair is None:
            source = next(own, None) if step % 4 == 0 else None
            clips, right = (batch.frames, right) if source is None else source
            better, worse, margin, rate = worse_motion(clips, generator)
            seen = spoil_lightly(torch.cat([better, worse]), config.spoil, generator)
        else:
            right, margin = pair.prompts, pair.margin
            seen, rate = torch.cat([pair.nearer, pair.further]), torch.ones(len(margin))
        both = config.fps * torch.cat([torch.ones(len(rate)), rate])
        values, words = model.values_and_words(seen, both, right + right)
        first, second = values[:, 0].chunk(2)
        loss = model.words.loss(words.chunk(2)[0], right)
        optimizer.step(loss + ranking_loss(first, second, margin))


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, *, rate: float = 0.02) -> None:
    """Move the teacher a little towards the student: an exponential moving average of its weights."""
    for target, source in zip(teacher.parameters(), student.parameters(), strict=True):
        target.lerp_(source, rate)


def masked_prediction_loss(
    model: MotionReward, teacher: nn.Module, frames: Tensor, generator: Generator
) -> Tensor:
    """L1 between the predictor's guess and the teacher's layer-normed states at tubelets hidden from the student.

    The hidden part is one random half of the patches, through all time, painted over with the mean colour.
    """
    pixels = model.pixels(frames)  # [B, F, 3, h, w]
    patch = model.settings.patch_size
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    times = pixels.shape[1] // model.backbone.config.tubelet_size
    hidden = torch.randperm(rows * columns, generator=generator)[: rows * columns // 2]
    plane = torch.zeros(rows * columns)
    plane[hidden] = 1
    paint = plane.view(rows, columns).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    mask = plane.bool().repeat(times)
    context = (~mask).nonzero().T.expand(len(frames), -1)
    target = mask.nonzero().T.expand(len(frames), -1)
    with torch.no_grad():
        wanted = teacher(pixel_values_videos=pixels).last_hidden_state[:, mask]
        wanted = F.layer_norm(wanted, wanted.shape[-1:])
    out = model.backbone(pixels * (1 - paint), context_mask=[context], target_mask=[target])
    return F.l1_loss(out.predictor_output.last_hidden_state, wanted)
