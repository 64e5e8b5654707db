"""What a denoiser trains on: every clip once per epoch, the same samples in any split, the tasks that were asked for."""

from __future__ import annotations

import pytest
import torch

from generator.base import Task
from generator.training.denoiser import DenoiserTrainConfig
from generator.training.latents import (
    BatchStream,
    GivenFramesConfig,
    LatentSet,
    TaskMixConfig,
    text_task,
)
from reelhf.errors import UserError


def config(**changes: object) -> DenoiserTrainConfig:
    return DenoiserTrainConfig(num_frames=5, height=32, width=32).model_copy(update=changes)


@pytest.fixture
def latent_set(tiny_generator) -> LatentSet:
    condition = tiny_generator().encode_prompts([f"prompt {index}" for index in range(10)])
    latents = torch.arange(10.0).view(10, 1, 1, 1, 1).expand(10, 8, 2, 2, 2).contiguous()
    return LatentSet(latents, condition, [f"prompt {index}" for index in range(10)])


def test_an_epoch_shows_every_clip_once_and_the_next_one_in_another_order(latent_set):
    stream = BatchStream(config(batch_size=5, tasks=TaskMixConfig(text_to_image=0.0)), latent_set)
    seen = [
        [
            clip[0, 0, 0, 0].item()
            for step in steps
            for batch in stream.micro_batches(step)
            for clip in batch.clean
        ]
        for steps in ((0, 1), (2, 3))
    ]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(10))
    assert seen[0] != seen[1]


def test_micro_batches_are_the_batch_in_pieces(latent_set):
    """Same clips, noise and sigmas whatever the accumulation: randomness belongs to the position in the stream."""
    for step in range(3):
        (whole,) = BatchStream(config(batch_size=6), latent_set).micro_batches(step)
        parts = list(
            BatchStream(
                config(batch_size=6, gradient_accumulation_steps=3), latent_set
            ).micro_batches(step)
        )
        for name in ("clean", "noise", "sigma"):
            assert torch.equal(
                getattr(whole, name), torch.cat([getattr(part, name) for part in parts])
            )
    with pytest.raises(UserError, match="use a multiple of 4"):
        BatchStream(config(batch_size=6, gradient_accumulation_steps=4), latent_set)


def test_the_task_mix_is_what_was_asked_for(latent_set):
    always = config(
        batch_size=4, tasks=TaskMixConfig(text_to_image=0.0, image_to_video=1.0), prompt_dropout=1.0
    )
    (batch,) = BatchStream(always, latent_set).micro_batches(0)
    assert torch.equal(batch.task.condition_latents[:, :, 0], batch.clean[:, :, 0])
    assert not batch.condition.mask.any()
    images = config(
        batch_size=4, tasks=TaskMixConfig(text_to_image=1.0, image_to_video=1.0), prompt_dropout=0.0
    )
    (batch,) = BatchStream(images, latent_set).micro_batches(0)
    assert batch.clean.shape == (4, 8, 1, 2, 2)
    assert not batch.task.condition_mask.any()
    assert batch.condition.mask.any(1).all()


def test_a_given_first_frame_is_clean_and_masked_and_the_others_are_zero():
    clean = torch.randn(2, 8, 3, 2, 2)
    known = torch.tensor([[True, False, False], [False] * 3])
    task = Task.given(clean, known)
    assert torch.equal(task.condition_latents[0, :, 0], clean[0, :, 0])
    assert task.condition_mask.flatten(2).sum().item() == 4
    assert not task.condition_latents[0, :, 1:].any()
    assert not task.condition_latents[1].any()
    nothing = text_task(clean)
    assert not nothing.condition_latents.any()
    assert not nothing.condition_mask.any()


def test_frames_are_given_in_the_shares_asked_for():
    draws = torch.randn(4000, 1 + 5, generator=torch.Generator().manual_seed(0))
    only_first = GivenFramesConfig().known(draws)
    assert only_first[:, 0].all()
    assert not only_first[:, 1:].any()
    known = GivenFramesConfig(first=1, last=2, both=1, any=4).known(draws)
    rows = known.long() @ (1 << torch.arange(5))
    # of 8 parts: first 1, last 2, both 1; and 4 of any, a 32nd of which looks like each of those and like nothing
    for pattern, share in ((1, 1 + 4 / 32), (16, 2 + 4 / 32), (17, 1 + 4 / 32), (0, 4 / 32)):
        assert (rows == pattern).float().mean().item() == pytest.approx(share / 8, abs=0.025)
    with pytest.raises(ValueError, match="all 0; expected one above"):
        GivenFramesConfig(first=0)


def test_a_trained_batch_is_given_what_the_mix_says(latent_set):
    tasks = TaskMixConfig(text_to_image=0.0, image_to_video=1.0, given={"first": 0, "last": 1})
    (batch,) = BatchStream(config(batch_size=4, tasks=tasks), latent_set).micro_batches(0)
    assert torch.equal(batch.task.condition_latents[:, :, -1], batch.clean[:, :, -1])
    assert not batch.task.condition_mask[:, :, :-1].any()


def test_a_quarter_of_the_clips_at_most_validates_and_one_clip_is_too_few(latent_set):
    validation, training = latent_set.split(4)
    assert (len(validation), len(training)) == (2, 8)
    assert validation.captions + training.captions == latent_set.captions
    with pytest.raises(UserError, match="expected at least 2"):
        latent_set.rows([0]).split(4)
