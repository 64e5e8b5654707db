"""Plans of what is not one denoiser at one size: stages, refiners in stages, adapters, VAEs, text encoders."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from generator.plan.devices import find_device
from generator.plan.flops import model_flops, training_flops
from generator.plan.memory import count_parameters, count_trained, peak_bytes, state_bytes
from generator.plan.networks import NetworkPlan
from generator.plan.planner import read_training_config
from generator.plan.stages import StagedPlan, buckets_of
from generator.training.discriminators import HybridDiscriminator
from generator.training.lora import LoraSettings, adaptable, add_lora
from generator.vae import VideoVAE
from reelhf.cli import main
from tests.generator.test_plan import GRID, SMALL, TEXT, dit_inputs, meta_dit

STAGES = "configs/generator/stages_toy.yaml"
REFINER = "configs/generator/refiner_stages_toy.yaml"
VAE = "configs/generator/vae_adversarial.yaml"
SCALED = [  # the toy's stages at a size that fills a GPU
    *("architecture.width=1536", "architecture.num_heads=12", "architecture.num_pairs=12"),
    *("bf16=true", "stages.2.buckets.area=399360", "stages.2.buckets.num_frames=[121]"),
    *("stages.3.buckets.area=399360", "stages.3.buckets.num_frames=[121]"),
]


def figures(capsys, *words: str) -> dict:
    main(["plan", *words, "--json"])
    return json.loads(capsys.readouterr().out)


def staged(*words: str, device: str = "h100", devices: int = 1) -> StagedPlan:
    config = read_training_config(words, None)
    return StagedPlan(config, find_device(device), devices, 64, 0.5)


def test_a_line_per_stage_and_a_verdict(capsys):
    main(["plan", STAGES, "--device", "cpu", "--text-tokens", "64"])
    said = capsys.readouterr().out
    for name in ("pictures", "small clips", "large clips", "continued"):
        (line,) = [line for line in said.splitlines() if line.startswith(name)]
        assert " yes " in line
    assert said.splitlines()[-1].startswith("fits: ")


def test_a_stage_is_planned_by_its_fullest_bucket():
    plan = staged(STAGES)
    sizes = [(p.config.frame_shape, p.micro_batch) for _, p in plan.stages]
    assert sizes[0] == ((1, 32, 32), 32)  # pictures only: 128 positions of 4
    assert sizes[2] == ((9, 64, 64), 16)  # 768 positions of 48
    buckets = buckets_of(plan.config.stages[2].buckets, images=True)
    assert [str(bucket) for bucket in buckets] == ["1x64x64", "5x64x64", "9x64x64"]
    steps = [p.step_seconds * p.config.num_steps for _, p in plan.stages]
    assert plan.seconds == pytest.approx(sum(steps))


def test_devices_take_the_micro_batches_of_a_step():
    one, two = staged(STAGES), staged(STAGES, devices=2)
    for (_, alone), (_, shared) in zip(one.stages, two.stages, strict=True):
        assert shared.step_seconds == pytest.approx(alone.step_seconds / 2)
        assert shared.memory.activations == alone.memory.activations
    halves = staged(STAGES, "sequence_parallel=2", "micro_batches=1", devices=2)
    for (_, alone), (_, shared) in zip(one.stages, halves.stages, strict=True):
        assert shared.memory.activations == alone.memory.activations / 2


def test_a_staged_refiner_has_its_input():
    refiner = staged(REFINER).worst
    base = staged(REFINER, "stage=base", "stages.0.low_res=null").worst
    assert refiner.num_parameters - base.num_parameters == 48 * 192


@pytest.mark.parametrize(
    "words",
    [
        (*SCALED, "stages.2.micro_batch_tokens=500000"),
        (*SCALED, "--device", "4090"),
        (*SCALED, "--devices", "8", "micro_batches=8", "stages.3.micro_batch_tokens=200000"),
    ],
)
def test_a_remedy_makes_every_stage_fit(capsys, words):
    plan = figures(capsys, STAGES, *words)
    assert not plan["fits"]
    for remedy in plan["remedies"]:
        change = shlex.split(remedy.partition(": ")[2].partition(" or ")[0])
        assert figures(capsys, STAGES, *words, *change)["fits"], remedy


def test_adapters_have_gradients_and_moments_and_the_rest_has_not():
    lora = LoraSettings(rank=4)
    real = torch.nn.ModuleList([meta_dit(SMALL)])[0]
    add_lora(real, lora, adaptable(real))
    sizes = [p.numel() for p in real.parameters() if p.requires_grad]
    assert count_trained(SMALL, lora) == sum(sizes) > 0
    whole = count_parameters(SMALL)
    assert count_parameters(SMALL, lora) == whole + sum(sizes)
    states = state_bytes(100, zero_stage=2, devices=2, bf16=True, trained=10)
    assert (states.weights, states.gradients, states.optimizer) == (200, 10, 60)
    assert peak_bytes(SMALL, GRID, TEXT, training=True, bf16=False, lora=lora) > 0


def test_flops_of_adapters_are_those_that_torch_counts():
    def counted(lora: LoraSettings | None) -> int:
        model = meta_dit(SMALL, lora=lora)
        with FlopCounterMode(display=False) as counter:
            model(*dit_inputs(SMALL, GRID, TEXT)).sum().backward()
        return counter.get_total_flops()

    saved = counted(None) - counted(LoraSettings(rank=1))
    planned = training_flops(SMALL, GRID, TEXT) - training_flops(
        SMALL, GRID, TEXT, adapters_only=True
    )
    assert saved == pytest.approx(planned, rel=0.05)
    ratio = model_flops(SMALL, GRID, TEXT, adapters_only=True) / model_flops(SMALL, GRID, TEXT)
    assert ratio == pytest.approx(2 / 3)


def test_a_plan_of_adapters_says_so(capsys):
    main(["plan", STAGES, "lora.rank=8", "--device", "cpu", "--text-tokens", "64"])
    said = capsys.readouterr().out
    assert "of them in adapters" in said
    assert "only adapters have gradients and moments" in said
    full, adapted = (
        staged(STAGES).worst.memory.states,
        staged(STAGES, "lora.rank=8").worst.memory.states,
    )
    assert adapted.optimizer < 0.4 * full.optimizer


def test_a_vae_is_counted_with_its_discriminators(capsys):
    plan = figures(capsys, VAE, "--device", "h100", "batch_size=2")
    config = read_training_config([VAE], None)
    discriminators = HybridDiscriminator(config.adversarial.discriminators)
    assert plan["parameters"] == {
        "VAE": sum(p.numel() for p in VideoVAE(config.vae).parameters()),
        "discriminators": sum(p.numel() for p in discriminators.parameters()),
    }
    passes = plan["passes"]
    assert list(passes) == [
        *("forward and backward", "pull of the discriminators", "their own turn", "held-out clips"),
    ]
    step = sum(cost["flops"] for name, cost in passes.items() if name != "held-out clips")
    assert plan["time"]["step"] == pytest.approx(step / (0.38 * 66.9e12))
    twice = figures(capsys, VAE, "--device", "h100", "batch_size=4", "--devices", "2")
    for name, cost in twice["passes"].items():
        assert cost["flops"] == passes[name]["flops"]
        assert cost["peak"] == pytest.approx(passes[name]["peak"], rel=0.01)


def test_recomputed_chunks_need_less_and_compute_more():
    def cost(*words: str):
        config = read_training_config(
            [
                "configs/generator/vae_toy.yaml",
                "num_frames=17",
                "crop=128",
                "height=256",
                "width=256",
                "batch_size=2",
                *words,
            ],
            None,
        )
        plan = NetworkPlan(config, find_device("cpu"), 1, 64, 0.5)
        return plan.passes["forward and backward"]

    kept, recomputed = cost(), cost("checkpoint_chunk=1")
    assert recomputed.peak < 0.6 * kept.peak
    assert 1.1 < recomputed.flops / kept.flops < 1.5


@pytest.mark.slow
def test_a_vae_that_does_not_fit_is_told_what_to_change(capsys):
    words = (VAE, "--device", "4090", "crop=256", "height=512", "width=512", "checkpoint_chunk=null", "batch_size=64", "num_held_out=1")  # fmt: skip
    plan = figures(capsys, *words)
    assert not plan["fits"]
    change = shlex.split(plan["remedies"][0])
    assert figures(capsys, *words, *change)["fits"]


def test_a_text_encoder_is_planned(capsys):
    main(["plan", "configs/generator/text_toy.yaml", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "of the text encoder" in said and said.splitlines()[-1].startswith("fits: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((STAGES, "--size", "480p"), "has stages, and each has sizes of its own"),
        ((STAGES, "--devices", "3"), "micro_batches 2 cannot be split over 3 devices"),
        ((STAGES, "sequence_parallel=2"), "sequence_parallel 2 does not divide 1 devices"),
        ((VAE, "--devices", "3"), "batch_size 8 cannot be split over 3 devices"),
        (("configs/generator/text_toy.yaml", "text.path=nowhere"), "not a readable language model"),
    ],
)
def test_bad_input_is_one_line(capsys, words, said):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *words])
    error = capsys.readouterr().err.strip()
    assert (exit_.value.code, error.startswith("error: "), "\n" in error) == (2, True, False)
    assert said in error
