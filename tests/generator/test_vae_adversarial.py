"""Discriminators, perceptual distances and how they are weighed; a short training with all of them, which resumes bit-equal."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from torch import nn

from generator.training.adversary import AdversarialConfig
from generator.training.crops import CropStream, SizedClips, frames_at
from generator.training.discriminators import (
    DiscriminatorConfig,
    HybridDiscriminator,
    PatchDiscriminator,
    adversarial_loss,
    generator_hinge_loss,
    hinge_loss,
    smallest_side,
)
from generator.training.perceptual import PerceptualConfig, feature_matching_loss
from generator.training.vae import VAETrainConfig, train_vae
from generator.training.vae_losses import (
    adaptive_weight,
    head_inputs,
    last_layer_norms,
    pulled,
)
from generator.vae import VideoVAE
from reelhf.engine import OptimizerConfig
from reelhf.errors import UserError
from reelhf.run import read_metrics
from tests.generator.test_training_vae_text import VAE_CONFIG, _cut_back_to

SMALL = DiscriminatorConfig(image_width=16, image_layers=2, video_width=16, video_layers=2)
ADVERSARIAL = VAE_CONFIG.model_copy(
    update={
        "adversarial": AdversarialConfig(
            weight=0.5,
            start_step=2,
            discriminators=SMALL,
            optimizer=OptimizerConfig(lr=2e-3, betas=(0.5, 0.9), weight_decay=0.0),
        ),
        "perceptual": PerceptualConfig(weight=0.1),
        "image_fraction": 0.25,
        "optimizer": OptimizerConfig(lr=2e-4, weight_decay=0.0),  # slow enough to be caught
        "num_steps": 60,
        "save_every": 40,
        "batch_size": 8,
    }
)


def test_the_hinge_is_zero_beyond_its_margins_and_one_at_no_opinion():
    assert hinge_loss(torch.tensor([1.0, 7.0]), torch.tensor([-1.0, -2.0])) == 0
    assert hinge_loss(torch.zeros(3), torch.zeros(5)) == 1
    assert hinge_loss(torch.tensor([-1.0]), torch.tensor([2.0])) == pytest.approx((2 + 3) / 2)


def test_the_generator_gains_where_the_logits_rise():
    logits = torch.tensor([0.3, -2.0], requires_grad=True)
    generator_hinge_loss(logits).backward()
    assert logits.grad.tolist() == [-0.5, -0.5]
    assert adversarial_loss([torch.ones(3), torch.zeros(2, 2)]) == -0.5


@pytest.mark.parametrize("dims", [2, 3])
def test_every_convolution_has_a_spectral_norm_of_at_most_one(dims):
    torch.manual_seed(0)
    network = PatchDiscriminator(dims, 8, 3).eval()
    convolutions = [*network.layers, network.head]
    for conv in convolutions:
        with torch.no_grad():
            conv.parametrizations.weight.original.mul_(50)
        conv.train()
        for _ in range(30):  # one power iteration per forward pass
            weight = conv.weight
        largest = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
        assert largest.item() == pytest.approx(1, abs=0.02)
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d) for m in network.modules())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_logit_needs_the_side_it_says(layers):
    side = smallest_side(layers)
    for dims, shape in ((2, (1, 3)), (3, (1, 3, 5))):
        logits, features = PatchDiscriminator(dims, 4, layers)(torch.rand(*shape, side, side))
        assert logits.shape[-2:] == (1, 1) and len(features) == layers
        with pytest.raises(RuntimeError):
            PatchDiscriminator(dims, 4, layers)(torch.rand(*shape, side // 2, side // 2))


def test_only_the_clip_network_sees_motion_and_images_have_none():
    torch.manual_seed(0)
    network = HybridDiscriminator(SMALL).eval()
    clip = torch.rand(1, 3, 5, 32, 32)
    shuffled = clip[:, :, [0, 3, 2, 1, 4]]  # the picked frame stays
    picks = torch.tensor([2])
    said, other = network.verdict(clip, picks), network.verdict(shuffled, picks)
    assert torch.equal(said.logits[0], other.logits[0])
    assert not torch.allclose(said.logits[1], other.logits[1])
    assert len(network.verdict(clip[:, :, :1], torch.tensor([0])).logits) == 1


def test_picked_frames_are_those_of_their_own_clip():
    clips = torch.arange(2 * 3 * 4).view(2, 3, 4, 1, 1).float()
    picked = frames_at(clips, torch.tensor([[3, 0], [1, 1]]))
    assert picked.shape == (2, 3, 2, 1, 1)
    assert torch.equal(picked[0, :, 0], clips[0, :, 3]) and torch.equal(
        picked[0, :, 1], clips[0, :, 0]
    )
    assert torch.equal(picked[1, :, 0], clips[1, :, 1])


def test_the_adaptive_weight_is_the_ratio_of_norms_up_to_its_limit():
    two, four, nothing = torch.tensor(2.0), torch.tensor(4.0), torch.tensor(0.0)
    assert adaptive_weight(two, four, limit=10).item() == pytest.approx(0.5)
    assert adaptive_weight(four, nothing, limit=10) == 10
    assert adaptive_weight(nothing, four, limit=10) == 0


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_norms_at_the_last_layer_are_those_of_the_whole_network(chunk, num_frames):
    torch.manual_seed(0)
    vae = VideoVAE(VAE_CONFIG.vae)
    frames = torch.rand(2, 3, num_frames, 32, 32)
    noise = torch.randn(2, 24, 1 + num_frames // 4, 2, 2)
    with head_inputs(vae.decoder) as seen:
        reconstruction, _ = vae(frames, noise, checkpoint_chunk=chunk)
    losses = [(reconstruction - frames).square().mean(), reconstruction.sin().mean()]
    head = vae.decoder.head
    weights = [head.first.weight, *([head.later.weight] if num_frames > 1 else [])]
    expected, cotangents = [], []
    for loss in losses:
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        expected.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        cotangents += torch.autograd.grad(loss, reconstruction, retain_graph=True)
    norms = last_layer_norms(head, seen, cotangents)
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-9)
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_a_pull_has_the_gradient_of_the_loss_it_came_from():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    direct = torch.autograd.grad(layer(inputs).pow(3).mean(), layer.weight)[0]
    output = layer(inputs)
    leaf = output.detach().requires_grad_(True)
    (cotangent,) = torch.autograd.grad(leaf.pow(3).mean(), leaf)
    through = torch.autograd.grad(pulled(output, cotangent), layer.weight)[0]
    torch.testing.assert_close(through, direct)


def test_feature_matching_is_relative_to_what_was_seen():
    real = [[torch.full((2, 3), 2.0), torch.full((1, 4), -5.0)], [torch.ones(2)]]
    assert feature_matching_loss(real, real) == 0
    fake = [[1.5 * feature for feature in network] for network in real]
    assert feature_matching_loss(real, fake).item() == pytest.approx(0.5)
    seen = [[torch.rand(3, requires_grad=True)]]
    rebuilt = [[torch.rand(3, requires_grad=True)]]
    feature_matching_loss(seen, rebuilt).backward()
    assert seen[0][0].grad is None and rebuilt[0][0].grad is not None


def test_discriminators_that_learn_tell_noise_from_a_clip():
    torch.manual_seed(0)
    network = HybridDiscriminator(SMALL)
    real = torch.full((4, 3, 5, 16, 16), 0.5)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    picks, losses = torch.zeros(4, dtype=torch.long), []
    for _ in range(40):
        fake = (real + 0.2 * torch.randn_like(real)).clamp(0, 1)
        loss, parts = network(real, fake, picks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert parts["real_logit"] > parts["fake_logit"]


@pytest.fixture(scope="module")
def adversarial_run(tiny_clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("adversarial")
    train_vae(ADVERSARIAL, tiny_clips, out)
    return out


def test_adversarial_training_starts_when_told_and_its_weights_are_used(adversarial_run):
    rows = read_metrics(adversarial_run)[1:]
    assert all("discriminator/loss" not in row for row in rows[:2])
    started = rows[2:]
    for row in started:
        assert 0 < row["adversarial/weight"] <= 50 and row["discriminator/skipped"] == 0
        assert row["perceptual/discriminator_features"] > 0
    losses = [row["discriminator/loss"] for row in started]
    margins = [row["discriminator/real_logit"] - row["discriminator/fake_logit"] for row in started]
    assert losses[0] == pytest.approx(1, abs=0.1)  # no opinion yet
    assert median(losses[-15:]) < median(losses[:5]) - 0.02
    assert median(margins[-15:]) > median(margins[:5]) + 0.02
    assert rows[-1]["held_out/psnr"] > 12
    assert 0 < rows[-1]["held_out/ssim"] < 1 and rows[-1]["held_out/flicker"] > 0


def test_an_adversarial_run_resumes_bit_equal(adversarial_run, tiny_clips, tmp_path):
    resumed = _cut_back_to(adversarial_run, tmp_path / "resumed", 40)
    train_vae(ADVERSARIAL, tiny_clips, resumed)
    whole, again = (VideoVAE.load(run / "vae").state_dict() for run in (adversarial_run, resumed))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    names = ("loss", "discriminator/loss", "adversarial/weight", "discriminator/fake_logit")
    lines = [
        [[row.get(n) for n in names] for row in read_metrics(run)]
        for run in (adversarial_run, resumed)
    ]
    assert lines[0] == lines[1]


def test_without_weight_no_discriminator_is_built(adversarial_run, tiny_clips, tmp_path):
    none = {"adversarial": AdversarialConfig(), "perceptual": PerceptualConfig(), "num_steps": 2}
    train_vae(ADVERSARIAL.model_copy(update=none), tiny_clips, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("checkpoints/*/discriminators"))
    assert list(adversarial_run.glob("checkpoints/*/discriminators"))


def test_the_terms_change_what_is_learned(tiny_clips, tmp_path):
    """From the same start, with the same crops and noise."""
    base = ADVERSARIAL.model_copy(update={"num_steps": 3})
    none = base.model_copy(
        update={"adversarial": AdversarialConfig(), "perceptual": PerceptualConfig()}
    )
    name, weights = "decoder.head.later.weight", []
    for index, config in enumerate((none, base)):
        folder = train_vae(config, tiny_clips, tmp_path / str(index))
        weights.append(VideoVAE.load(folder).state_dict()[name])
    losses = [[row.get("loss") for row in read_metrics(tmp_path / i)] for i in ("0", "1")]
    assert losses[0][1:3] == losses[1][1:3]  # the two steps before the discriminators begin
    assert losses[0][3] < losses[1][3]
    assert not torch.equal(*weights)


def test_recomputed_chunks_train_the_same_weights(tiny_clips, tmp_path):
    folders = [
        train_vae(
            VAE_CONFIG.model_copy(update={"checkpoint_chunk": chunk}),
            tiny_clips,
            tmp_path / str(chunk),
        )
        for chunk in (None, 1)
    ]
    kept, recomputed = (VideoVAE.load(folder).state_dict() for folder in folders)
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, recomputed[name], rtol=1e-3, atol=1e-4)


def test_images_are_mixed_in_by_step_and_everything_else_stays():
    frames = torch.randint(0, 256, (4, 3, 5, 64, 64), dtype=torch.uint8)
    half = frames[..., ::2, ::2].contiguous()
    config = ADVERSARIAL.model_copy(update={"image_fraction": 0.5})
    streams = [
        CropStream(c, SizedClips.of(frames), SizedClips.of(half))
        for c in (config, config.model_copy(update={"image_fraction": 0.0}))
    ]
    images = 0
    for step in range(40):
        (mixed, foreground, noise), (clips, *_) = (stream.batch(step) for stream in streams)
        if streams[0].is_image_step(step):
            images += 1
            assert mixed.shape[2] == foreground.shape[2] == noise.shape[2] == 1
            picks = streams[0].picks(step, 1, 5)
            assert torch.equal(mixed, frames_at(clips, picks))
        else:
            assert torch.equal(mixed, clips)
    assert 10 < images < 30
    assert not any(streams[1].is_image_step(step) for step in range(40))


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"perceptual": {"weight": 1.0}}, "give adversarial.weight above 0"),
        ({"perceptual": {"weight": 1.0, "kind": "lpips"}}, "needs both files, features and linear"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(update, words):
    with pytest.raises(ValueError, match=words):
        VAETrainConfig.model_validate({**VAE_CONFIG.model_dump(), **update})


def test_crops_too_small_for_the_discriminators_are_one_clear_line(tiny_clips, tmp_path):
    deep = AdversarialConfig(weight=1.0, discriminators=DiscriminatorConfig(image_layers=5))
    config = VAE_CONFIG.model_copy(update={"adversarial": deep})
    with pytest.raises(
        UserError, match="crops of 32 pixels are too small for these discriminators, which need 64"
    ):
        train_vae(config, tiny_clips, tmp_path / "out")
