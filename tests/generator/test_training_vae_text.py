"""Training of VAE and text encoder on a folder of rendered clips: what is learned, logged and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from generator.text import TextEncoder, TextEncoderConfig
from generator.training.crops import foreground_distance, held_out_clips
from generator.training.text import TextTrainConfig, train_text_encoder
from generator.training.vae import VAETrainConfig, train_vae
from generator.training.vae_losses import VAELossConfig, vae_loss
from generator.vae import VAEConfig, VideoVAE
from reelhf.engine import OptimizerConfig
from reelhf.errors import UserError
from reelhf.run import read_metrics

VAE_CONFIG = VAETrainConfig(
    vae=VAEConfig(
        channels=24,
        encoder_fine_width=8,
        encoder_width=16,
        encoder_blocks=1,
        decoder_width=16,
        decoder_blocks=1,
        decoder_fine_width=16,
        decoder_fine_blocks=1,
    ),
    num_frames=5,
    height=64,
    width=64,
    num_steps=6,
    batch_size=4,
    num_held_out=4,
    save_every=3,
)
TEXT_CONFIG = TextTrainConfig(
    text=TextEncoderConfig(hidden_size=32, num_layers=2, mlp_size=48, vocab_size=400),
    optimizer=OptimizerConfig(lr=5e-3),
    num_steps=16,
    batch_size=8,
    save_every=8,
)


@pytest.fixture(scope="module")
def vae_run(tiny_clips, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vae_run")
    train_vae(VAE_CONFIG, tiny_clips, out)
    return out


def _cut_back_to(run: Path, copy: Path, step: int) -> Path:
    """A run as a kill after the checkpoint of `step` would have left it."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name != f"step_{step:06d}":
            shutil.rmtree(checkpoint)
    return copy


def test_vae_training_reports_foreground_beside_the_whole_frame(vae_run):
    metrics = read_metrics(vae_run)
    assert [row["step"] for row in metrics] == list(range(7))
    assert metrics[0]["shortcut/psnr"] > 15
    last = metrics[-1]
    assert last["loss"] > 0
    assert last["held_out/psnr"] > last["held_out/foreground_psnr"] > 10
    assert last["held_out/half_size_foreground_psnr"] > 8


def test_trained_latents_have_unit_scale_at_both_sizes(vae_run, tiny_clips):
    from reelhf.clips import load_clip_folder, load_windows

    vae = VideoVAE.load(vae_run / "vae")
    for size in (64, 32):
        windows = load_windows(
            load_clip_folder(tiny_clips),
            num_frames=5,
            fps=8.0,
            size=(size, size),
            max_windows=24,
            seed=0,
        )
        latents = vae.encode(windows.frames.float() / 255)
        assert 0.7 < latents.std() < 1.4


def test_a_resumed_vae_run_ends_bit_equal(vae_run, tiny_clips, tmp_path):
    resumed = _cut_back_to(vae_run, tmp_path / "resumed", 3)
    train_vae(VAE_CONFIG, tiny_clips, resumed)
    whole, again = VideoVAE.load(vae_run / "vae"), VideoVAE.load(resumed / "vae")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    losses = [[line.get("loss") for line in read_metrics(run)] for run in (vae_run, resumed)]
    assert losses[0] == losses[1]


def test_a_run_of_another_configuration_is_not_resumed(vae_run, tiny_clips, tmp_path):
    copy = _cut_back_to(vae_run, tmp_path / "copy", 3)
    with pytest.raises(UserError, match="other settings or other clips"):
        train_vae(VAE_CONFIG.model_copy(update={"seed": 1}), tiny_clips, copy)


def test_foreground_is_what_differs_from_the_median_colour():
    clip = torch.full((1, 3, 2, 8, 8), 0.5)
    clip[:, 0, :, :2, :2] = 0.9
    distance = foreground_distance(clip)
    assert distance[0, 0, 0, 0, 0] == pytest.approx(0.4) and distance[0, 0, 0, 5, 5] == 0


def test_the_loss_weighs_foreground_errors_more_and_vanishes_at_the_clip():
    clip, zero = torch.rand(1, 3, 5, 16, 16), torch.zeros(())
    foreground = torch.zeros(1, 1, 5, 16, 16)
    foreground[..., :8] = 1.0
    config = VAELossConfig(foreground=3.0, edge=0.5)
    assert vae_loss(clip, clip, zero, foreground, config) == 0
    wrong_there, wrong_elsewhere = clip.clone(), clip.clone()
    wrong_there[..., :8] += 0.1
    wrong_elsewhere[..., 8:] += 0.1
    errors = [
        vae_loss(wrong, clip, zero, foreground, VAELossConfig(foreground=3.0))
        for wrong in (wrong_there, wrong_elsewhere)
    ]
    assert errors[0] == pytest.approx(4 * errors[1].item(), rel=1e-4)


def test_text_training_lowers_the_loss_and_resumes_bit_equal(tiny_clips, tmp_path):
    folder = train_text_encoder(TEXT_CONFIG, tiny_clips, tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["held_out/loss"] < 0.8 * metrics[0]["loss"]
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    resumed = _cut_back_to(tmp_path / "run", tmp_path / "resumed", 8)
    again = TextEncoder.load(train_text_encoder(TEXT_CONFIG, tiny_clips, resumed))
    for name, tensor in TextEncoder.load(folder).state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_run_of_no_steps_keeps_the_shortcuts_and_says_what_they_do(tiny_clips, tmp_path):
    train_vae(VAE_CONFIG.model_copy(update={"num_steps": 0}), tiny_clips, tmp_path / "vae")
    (figures,) = read_metrics(tmp_path / "vae")
    assert figures["shortcut/psnr"] > 15
    assert figures["held_out/psnr"] == pytest.approx(figures["shortcut/psnr"], abs=1e-3)
    none = TEXT_CONFIG.model_copy(update={"num_steps": 0})
    TextEncoder.load(train_text_encoder(none, tiny_clips, tmp_path / "text"))
    (figures,) = read_metrics(tmp_path / "text")
    assert figures["held_out/loss"] > 0


@pytest.mark.parametrize(
    ("windows", "count", "held"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 2, {0, 1}),  # one window per clip: the first ones
        ([0] * 19 + [1] * 5, 6, {1}),  # one clip has nearly all
        ([0, 1, 0, 1, 2, 0, 2, 1, 2, 3], 2, {3}),
        ([0] * 4 + [1] * 3 + [2] * 4, 2, {1}),  # all too long: the shortest
        ([0] * 5 + [1] * 5, 2, set()),  # that would be half
        ([0] * 8, 2, set()),
    ],
)
def test_no_clip_that_dominates_is_held_out(windows, count, held):
    assert held_out_clips(windows, count) == held
