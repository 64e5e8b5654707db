"""`reelhf plan`: FLOPs as torch counts them, memory as an allocator sees it, and a verdict that can be acted on."""

from __future__ import annotations

import gc
import json
import shlex

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from generator.blocks import SpatialBlock
from generator.dit import DiT, DiTConfig
from generator.plan.devices import DEVICES, find_device
from generator.plan.flops import (
    LatentGrid,
    forward_flops,
    full_attention_flops,
    full_layer_flops,
    model_flops,
    spatial_layer_flops,
    temporal_layer_flops,
    training_flops,
)
from generator.plan.memory import (
    BUCKET_ELEMENTS,
    GATHERED_ELEMENTS,
    buffer_bytes,
    count_parameters,
    dit_inputs,
    meta_dit,
    peak_bytes,
    state_bytes,
    trace_peak_bytes,
    update_bytes,
)
from generator.plan.planner import PRESETS, SIZES, Plan, read_training_config
from reelhf.cli import main
from reelhf.engine import Ema, Engine, EngineConfig, OptimizerConfig

SMALL = DiTConfig(width=96, num_heads=4, num_pairs=3, text_width=64)
GRID = LatentGrid(5, 9, 10)
TEXT = 20
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_ON_CPU = {  # torch's counter knows the kernels of GPUs; the CPU's does the same
    CPU_ATTENTION: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def counted_forward(config: DiTConfig, grid: LatentGrid, *, batch: int = 1) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_dit(config)(*dit_inputs(config, grid, TEXT, batch=batch))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_pairs": 1},
        {"low_res": True, "channels": 16},
        {"mlp_ratio": 2.7, "text_mlp_ratio": 3.1},
        {"window": (4, 3), "num_heads": 8},
        {"window": (20, 20)},
        {"layers": "full"},
    ],
)
@pytest.mark.parametrize("grid", [GRID, LatentGrid(1, 7, 3)])
def test_flops_of_a_forward_pass_are_those_that_torch_counts(changes, grid):
    config = SMALL.model_copy(update=changes)
    assert forward_flops(config, grid, TEXT).total == counted_forward(config, grid)


def test_flops_of_a_batch_are_those_of_its_clips():
    # but for the places of the tokens, which a batch shares: within 1 %
    counted = counted_forward(SMALL, GRID, batch=3)
    assert 3 * forward_flops(SMALL, GRID, TEXT).total == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True, "attention"])
def test_flops_of_a_training_step_are_those_that_torch_counts(checkpointing):
    config = SMALL.model_copy(update={"width": 192, "checkpointing": checkpointing})
    model = DiT(config)
    inputs = dit_inputs(config, GRID, TEXT, device="cpu")
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        model(*inputs).square().mean().backward()
    assert training_flops(config, GRID, TEXT) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_mfu_counts_three_forward_passes_whatever_is_recomputed():
    again = SMALL.model_copy(update={"checkpointing": True})
    assert model_flops(again, GRID, TEXT) == model_flops(SMALL, GRID, TEXT)
    assert model_flops(SMALL, GRID, TEXT) == 3 * forward_flops(SMALL, GRID, TEXT).total
    extra = training_flops(again, GRID, TEXT) / training_flops(SMALL, GRID, TEXT)
    assert 1.25 < extra < 4 / 3


def test_a_layer_of_full_attention_is_a_spatial_layer_over_one_long_frame():
    width, tokens = SMALL.width, GRID.tokens
    with torch.device("meta"):
        block = SpatialBlock(width, 4, SMALL.mlp_ratio, SMALL.text_mlp_ratio)
        arguments = (
            torch.zeros(1, 1, tokens, width),
            torch.zeros(1, TEXT, width),
            torch.zeros(1, 1, 1, 6, width),
            torch.zeros(1, 1, 6, width),
            torch.zeros(1, 1, tokens, 12),
            torch.zeros(TEXT, 12),
            torch.ones(1, 1, TEXT, dtype=torch.bool),
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(*arguments)
    assert full_layer_flops(SMALL, GRID, TEXT).total == counter.get_total_flops()


def test_closed_forms_where_windows_tile_the_frame():
    """With d, r, T, S, L, N, M of the module's docstring."""
    config = DiTConfig(
        width=64, num_heads=2, mlp_ratio=4, text_mlp_ratio=4, window=(4, 4), text_width=64
    )
    d, r, grid, length = 64, 4, LatentGrid(3, 8, 12), 10
    frames, positions, tokens, slots = 3, 96, 288, 3 * 16
    spatial = spatial_layer_flops(config, grid, length)
    temporal = temporal_layer_flops(config, grid, shifted=False)
    full = full_layer_flops(config, grid, length)
    assert spatial.linear == (8 + 4 * r) * d**2 * (tokens + length)
    assert spatial.spatial_attention == 4 * d * frames * (positions + length) ** 2
    assert temporal.linear == (8 + 4 * r) * d**2 * tokens
    assert temporal.temporal_attention == 4 * d * tokens * slots
    assert full.spatial_attention == 4 * d * (tokens + length) ** 2


@pytest.mark.parametrize(
    ("size", "tokens", "factorised", "full", "ratio"),
    [
        ("480p", 48_360, 431, 1_455, 3.4),
        ("720p", 109_120, 1_015, 6_211, 6.1),
        ("1080p", 252_960, 2_608, 30_488, 11.7),
    ],
)
def test_factorised_attention_saves_what_was_worked_out_by_hand(
    size, tokens, factorised, full, ratio
):
    """Width 3072, 18 pairs, MLPs of 4 d, 512 text tokens, in TFLOP."""
    config = DiTConfig(
        width=3072, num_heads=24, num_pairs=18, text_mlp_ratio=4.0, text_width=3584, window=(4, 4)
    )
    grid = LatentGrid(31, *(side // 16 for side in SIZES[size]))
    assert grid.tokens == tokens
    ours, theirs = forward_flops(config, grid, 512), full_attention_flops(config, grid, 512)
    assert ours.total / 1e12 == pytest.approx(factorised, rel=0.01)
    assert theirs.total / 1e12 == pytest.approx(full, rel=0.01)
    assert theirs.total / ours.total == pytest.approx(ratio, rel=0.01)


def test_parameters_are_those_of_the_real_model():
    for config in (SMALL, SMALL.model_copy(update={"low_res": True})):
        assert count_parameters(config) == sum(p.numel() for p in DiT(config).parameters())


@pytest.mark.parametrize("checkpointing", [False, True, "attention"])
@pytest.mark.parametrize("training", [False, True])
def test_traced_memory_without_storage_is_that_of_a_real_pass(checkpointing, training):
    config = SMALL.model_copy(update={"checkpointing": checkpointing})
    on_meta, on_cpu = (
        trace_peak_bytes(config, GRID, TEXT, training=training, bf16=False, batch=2, device=device)
        for device in ("meta", "cpu")
    )
    assert on_meta == pytest.approx(on_cpu, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True, "attention"])
def test_traced_memory_is_what_the_allocator_hands_out(checkpointing):
    config = SMALL.model_copy(update={"checkpointing": checkpointing})
    model, inputs = DiT(config), dit_inputs(config, GRID, TEXT, batch=2, device="cpu")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        (model(*inputs) - inputs[0]).square().mean().backward()
    now = peak = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    traced = trace_peak_bytes(config, GRID, TEXT, training=True, bf16=False, batch=2)
    assert traced == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True, "attention"])
@pytest.mark.parametrize("num_pairs", [6, 9])
def test_memory_of_a_deep_model_follows_from_shallow_ones(num_pairs, checkpointing):
    config = SMALL.model_copy(update={"num_pairs": num_pairs, "checkpointing": checkpointing})
    traced = trace_peak_bytes(config, GRID, TEXT, training=True, bf16=True)
    assert peak_bytes(config, GRID, TEXT, training=True, bf16=True) == traced


def test_memory_of_a_batch_is_that_of_its_clips():
    one, three = (
        trace_peak_bytes(SMALL, GRID, TEXT, training=True, bf16=True, batch=b) for b in (1, 3)
    )
    assert three == pytest.approx(3 * one, rel=0.03)


def test_tracing_leaves_attention_as_it_was():
    before = torch.nn.functional.scaled_dot_product_attention
    trace_peak_bytes(SMALL, GRID, TEXT, training=True, bf16=True)
    assert torch.nn.functional.scaled_dot_product_attention is before


@pytest.mark.parametrize(
    ("zero_stage", "bf16", "bytes_per_parameter"),
    [  # weights, gradients, moments and master weights, over 8 devices
        (0, False, (4, 4, 8)),
        (1, False, (4, 4, 12 / 8)),
        (0, True, (2, 2, 12 / 8)),  # the engine runs it as ZeRO-1
        (1, True, (2, 2, 12 / 8)),
        (2, True, (2, 2 / 8, 12 / 8)),
        (3, True, (2 / 8, 2 / 8, 12 / 8)),
    ],
)
def test_states_are_split_as_zero_splits_them(zero_stage, bf16, bytes_per_parameter):
    states = state_bytes(1000, zero_stage=zero_stage, devices=8, bf16=bf16)
    each = (states.weights, states.gradients, states.optimizer)
    assert [part / 1000 for part in each] == pytest.approx(bytes_per_parameter)
    assert states.average == 4000
    assert states.total == sum(each) + 4000


def storages() -> dict[int, torch.UntypedStorage]:
    """Of every tensor that Python can reach."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage._cdata: storage for storage in found}


@pytest.mark.parametrize(
    ("zero_stage", "bf16"), [(0, False), (0, True), (1, False), (2, True), (3, True)]
)
def test_planned_states_are_what_the_engine_holds_on_one_process(zero_stage, bf16):
    before = storages()  # kept alive, so that no address is used again
    model = DiT(SMALL.model_copy(update={"width": 192}))
    num_parameters = sum(p.numel() for p in model.parameters())
    average = Ema(model, 0.9)
    config = EngineConfig(zero_stage=zero_stage, bf16=bf16, micro_batch_size=1)
    engine = Engine(model, OptimizerConfig(lr=1e-3), config)
    inputs = dit_inputs(SMALL, LatentGrid(2, 4, 4), TEXT, device="cpu")
    for step in range(2):  # Adam's moments are born with the first step
        loss = engine(*inputs).float().square().mean()
        engine.backward(loss)
        if step == 0:
            engine.step()
    sizes = [storage.nbytes() for key, storage in storages().items() if key not in before]
    size = 2 if bf16 else 4
    held = sum(sizes) - (size * BUCKET_ELEMENTS if size * BUCKET_ELEMENTS in sizes else 0)
    states = state_bytes(num_parameters, zero_stage=zero_stage, devices=1, bf16=bf16)
    assert held == pytest.approx(states.total, rel=0.02)
    assert average.module is not model


def test_what_deepspeed_needs_beside_the_states():
    assert buffer_bytes(10**7, zero_stage=0, bf16=False) == 0
    assert buffer_bytes(10**7, zero_stage=2, bf16=True) == 2 * 500_000_000
    assert buffer_bytes(10**7, zero_stage=3, bf16=True) == 2 * (500_000_000 + 10**7)
    assert buffer_bytes(7 * 10**9, zero_stage=3, bf16=True) == 2 * 1_500_000_000
    assert update_bytes(800, zero_stage=0, devices=8, bf16=False) == 4 * 800
    assert update_bytes(800, zero_stage=2, devices=8, bf16=True) == 8 * 100
    assert update_bytes(800, zero_stage=3, devices=8, bf16=True) == 2 * 800  # gathered to average


def test_deepspeed_still_has_the_buffers_that_are_planned():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig()
    assert defaults.reduce_bucket_size == BUCKET_ELEMENTS
    assert defaults.max_live_parameters == GATHERED_ELEMENTS


def planned(name: str, *keys: str, device: str = "h100", devices: int = 1, size: str | None = None):
    config = read_training_config([name, *keys], size)
    return Plan(config, find_device(device), devices, 512, 0.4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", SIZES)
def test_every_preset_is_planned_at_every_size(preset, size):
    plan = planned(preset, size=size, devices=1 if preset == "tiny" else 8)
    assert (plan.config.height, plan.config.width) == SIZES[size]
    billions = {"tiny": (0.003, 0.006), "1b": (0.95, 1.1), "7b": (6.5, 7.2)}[preset]
    assert billions[0] < plan.num_parameters / 1e9 < billions[1]
    window = plan.architecture.window
    assert window[0] * window[1] >= 12
    assert plan.memory.peak > plan.memory.states.total > 0
    assert plan.step_seconds > 0


def test_step_time_is_flops_over_what_the_devices_reach():
    one, eight = (planned("1b", devices=n) for n in (1, 8))
    executed = training_flops(one.architecture, one.grid, 512)
    assert one.step_seconds == pytest.approx(64 * executed / (0.4 * 989.4e12))
    assert eight.step_seconds == pytest.approx(one.step_seconds / 8)
    assert one.mfu == pytest.approx(0.4 * model_flops(one.architecture, one.grid, 512) / executed)


def test_float32_is_planned_at_the_float32_peak():
    fast, slow = planned("1b"), planned("1b", "bf16=false")
    assert slow.step_seconds / fast.step_seconds == pytest.approx(989.4 / 66.9)


def test_the_plan_of_a_refiner_has_its_input():
    keys = ("architecture.width=128", "architecture.num_heads=4", "architecture.num_pairs=2")
    base = planned("configs/generator/base_toy.yaml", *keys)
    refiner = planned("configs/generator/refiner_toy.yaml", *keys)
    assert refiner.num_parameters - base.num_parameters == 48 * 128


def test_a_device_is_found_in_any_case_and_has_room_kept_free():
    assert find_device("H200") is DEVICES["h200"]
    for device in DEVICES.values():
        assert device.usable_bytes < 1e9 * device.memory_gb
        assert device.bf16_tflops >= device.fp32_tflops


def run(capsys, *words: str) -> str:
    main(["plan", *words])
    return capsys.readouterr().out


def figures(capsys, *words: str) -> dict:
    return json.loads(run(capsys, *words, "--json"))


def test_the_report_says_what_it_costs_and_that_it_fits(capsys):
    out = run(capsys, "1b", "--size", "480p", "--device", "h200", "--devices", "8")
    for expected in ("1.04 billion parameters", "48,360 a clip", "ZeRO-2*", "38% of 989.4 TFLOP/s"):
        assert expected in out
    assert out.splitlines()[-1].startswith("fits: ")


def test_the_figures_add_up(capsys):
    plan = figures(capsys, "7b", "--devices", "64", "--utilisation", "0.5")
    flops, memory = plan["flops"], plan["memory"]
    assert plan["tokens"] == 48_360
    parts = [
        flops[f"forward_{kind}"] for kind in ("linear", "spatial_attention", "temporal_attention")
    ]
    assert flops["forward"] == pytest.approx(sum(parts))
    states = sum(value for name, value in memory.items() if name.startswith("states_"))
    beside = max(memory[moment] for moment in ("activations", "update", "evaluation"))
    largest = max(states + memory["buffers"] + beside, memory["start"])
    assert memory["peak"] == pytest.approx(largest)
    assert plan["fits"] == (memory["peak"] <= memory["usable"])
    assert plan["time"]["assumed_utilisation"] == 0.5


@pytest.mark.parametrize(
    "words",
    [
        ("1b", "architecture.checkpointing=false"),
        ("1b", "--device", "4090", "gradient_accumulation_steps=1"),
        ("7b", "--device", "h100"),
        ("1b", "num_validation=32", "num_samples=4"),
        ("tiny", "--device", "4090", "--size", "1080p", "bf16=false", "num_validation=64"),
        ("7b", "--size", "720p", "--device", "h100", "--devices", "64"),
    ],
)
def test_a_remedy_makes_it_fit(capsys, words):
    """Each one is pasted behind the same command."""
    plan = figures(capsys, *words)
    assert not plan["fits"]
    assert plan["remedies"]
    for remedy in plan["remedies"]:
        change = shlex.split(remedy.partition(": ")[2].partition(" or ")[0])
        assert figures(capsys, *words, *change)["fits"], remedy


def test_what_cannot_fit_says_why(capsys):
    out = run(capsys, "7b", "--device", "4090", "--devices", "8")
    assert "DOES NOT FIT" in out
    assert "a narrower model is needed" in out


def test_help_teaches(capsys):
    out = run(capsys, "--help")
    for expected in ("tiny, 1b, 7b", "reelhf plan 7b", "--utilisation", "--json", "480p"):
        assert expected in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no config to plan: give a preset (tiny, 1b, 7b)"),
        (("zero_stage=3",), "no config to plan"),
        (("3b",), "no preset '3b'; expected tiny, 1b, 7b"),
        (("nowhere/base.yaml",), "no config file at nowhere/base.yaml"),
        (("configs/rlhf/toy_base.yaml",), "no `stage:`"),
        (("1b", "--device", "h300"), "Did you mean 'h"),
        (("1b", "--devices", "0"), "--devices 0: expected 1 or more"),
        (("1b", "--devices", "7"), "use a multiple of 56"),
        (("1b", "--size", "4k"), "expected 480p (480x832)"),
        (("1b", "--text-tokens", "0"), "--text-tokens 0"),
        (("1b", "--utilisation", "1.5"), "above 0, at most 1"),
        (("1b", "num_frames=120"), "use 117 or 121"),
        (("1b", "height=500"), "use 496 or 512"),
        (("1b", "zero_stagee=2"), "Did you mean 'zero_stage'?"),
        (("1b", "zero_stage=4"), "key 'zero_stage' is 4"),
        (("1b", "architecture.num_heads=5"), "width 1536 over 5 heads"),
    ],
)
def test_bad_input_is_one_line(capsys, words, said):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *words])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert said in error
    assert "\n" not in error
