"""Pre-training of the vision-language model: words and spoiled bodies, then captioning and right against swapped captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reelhf.graded import GradedClips
from rewards.foundational import FoundationalReward
from rewards.pretraining.batches import batches
from rewards.pretraining.config import PretrainConfig
from rewards.pretraining.muon import CosineMuon
from rewards.pretraining.pairs import (
    graded_pairs,
    ranking_loss,
    recoloured,
    spoil_lightly,
    spoiled_pair,
    swapped_captions,
)


def pretrain_foundational(
    model: FoundationalReward,
    config: PretrainConfig,
    frames: Tensor,
    captions: list[str],
    graded: Sequence[GradedClips] = (),
) -> None:
    """Words and spoiled bodies first, by the vision tower alone; then captioning, and right against swapped captions."""
    generator = torch.Generator().manual_seed(config.seed)
    stage = config.foundational_stage
    optimizer = CosineMuon(model, stage)
    prompts = model.encode_prompts(captions)
    rows = {name: i for i, name in enumerate(model.dimensions)}
    model.train()
    judged = graded_pairs(graded, model, stage.batch_size, generator)
    for step, batch in enumerate(batches(frames, stage, generator, "pre-train foundational")):
        selection = model.select(frames.shape[2], config.fps, generator)
        pair = next(judged, None) if step % 2 else None
        if pair is None:
            right = [prompts[i] for i in batch.index.tolist()]
            clip = selection.apply(batch.frames)
            less, more, margin = spoiled_pair(clip, "structural_stability", generator)
            seen = spoil_lightly(torch.cat([less, more]), config.spoil, generator)
        else:
            right, margin = pair.prompts, pair.margin
            seen = selection.apply(torch.cat([pair.nearer, pair.further]))
        if step < stage.num_steps * config.words_share:
            _, _, summary = model.see(seen)
            loss = model.words.loss(model.words_of(summary), right + right)
            if "structural_stability" in rows:
                first, second = model.sight["structural_stability"](summary)[:, 0].chunk(2)
                loss = loss + ranking_loss(first, second, margin)
            optimizer.step(loss)
            continue
        # a copy keeps to the prompt less: by another caption, by other colours, or because the generator made it anew
        texts, worse_by = right + right, margin
        second_is_worse = torch.ones(len(right), dtype=torch.bool)
        matched = torch.ones(len(seen), 1, dtype=torch.bool)
        if pair is None:  # who keeps to it less has nothing to do with who is spoiled
            second_is_worse = torch.rand(len(right), generator=generator) < 0.5
            if step % 4:
                worse_by = torch.ones(len(right))
                wrong = swapped_captions(batch.index, prompts, generator)
                matched = torch.cat([second_is_worse, ~second_is_worse])[:, None]
                both = zip(texts, wrong + wrong, matched[:, 0].tolist(), strict=True)
                texts = [own if keep else other for own, other, keep in both]
            else:
                seen, worse_by = recoloured(less, more, second_is_worse, generator)
        fps = torch.full((len(seen),), config.fps * seen.shape[2] / frames.shape[2])
        values, log_probs, is_prompt, words = model.values_and_log_probs(seen, fps, texts)
        loss = -(log_probs * matched).sum() / (is_prompt * matched).sum()
        loss = loss + 0.3 * model.words.loss(words, right + right)
        first, second = values.chunk(2)
        if "prompt_following" in rows:
            row = rows["prompt_following"]
            better = torch.where(second_is_worse, first[:, row], second[:, row])
            worse = torch.where(second_is_worse, second[:, row], first[:, row])
            loss = loss + ranking_loss(better, worse, worse_by)
        if "structural_stability" in rows:
            row = rows["structural_stability"]
            loss = loss + ranking_loss(first[:, row], second[:, row], margin)
        optimizer.step(loss)
