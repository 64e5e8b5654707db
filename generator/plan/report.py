"""A plan as text: the figures, then the verdict."""

from __future__ import annotations

from collections.abc import Iterator

from generator.plan.devices import KEPT_FREE
from generator.plan.flops import forward_flops, full_attention_flops, training_flops
from generator.plan.memory import state_bytes
from generator.plan.networks import NetworkPlan, network_remedies
from generator.plan.planner import MIN_TRACED_WIDTH, Plan, remedies
from generator.plan.stages import StagedPlan, staged_remedies
from reelhf.tables import format_table

LABEL_WIDTH = 12
HOURS_PER_DAY = 24


def report(plan: Plan | StagedPlan | NetworkPlan, name: str) -> str:
    """Everything `reelhf plan` says."""
    if isinstance(plan, StagedPlan):
        return "\n".join(_staged(plan, name))
    if isinstance(plan, NetworkPlan):
        return "\n".join(_network(plan, name))
    return "\n".join(
        (*_what(plan, name), "", *_memory(plan), "", *_time(plan), "", *_verdict(plan))
    )


def _what(plan: Plan, name: str) -> Iterator[str]:
    config, architecture, grid = plan.config, plan.architecture, plan.grid
    size = architecture, grid, plan.text_tokens
    recomputed = architecture.model_copy(update={"checkpointing": True})
    kept = architecture.model_copy(update={"checkpointing": False})
    forward, full = forward_flops(*size), full_attention_flops(*size)
    window = architecture.window_for(grid.height, grid.width)
    slots = grid.frames * window[0] * window[1]
    layers = f"{2 * architecture.num_pairs} layers of full attention"
    if architecture.layers == "factorised":
        layers = f"{architecture.num_pairs} spatial and as many temporal layers, windows of {window[0]}x{window[1]} ({slots:,} tokens)"
    yield (
        f"plan of {name}: {config.stage}, {config.num_frames} frames of {config.width}x{config.height} "
        f"at {config.fps:g} fps, on {plan.devices} x {plan.device.name}"
    )
    yield ""
    yield _line(
        "model",
        f"{_count(plan.num_parameters)} parameters: width {architecture.width}, {architecture.num_heads} heads of "
        f"{architecture.width // architecture.num_heads}, {layers}",
    )
    yield _line(
        "tokens",
        f"{grid.tokens:,} a clip ({grid.frames} x {grid.height} x {grid.width}), {plan.text_tokens} of text",
    )
    parts = (forward.linear, forward.spatial_attention, forward.temporal_attention)
    shares = [f"{part / forward.total:.1%}" for part in parts]
    yield _line(
        "forward",
        f"{_flops(forward.total)} a clip: linear layers {shares[0]}, attention in frames {shares[1]}, through time {shares[2]}",
    )
    yield _line(
        "",
        f"{_flops(full.total)} with full attention at this width and depth, {full.total / forward.total:.1f} times as many",
    )
    yield _line(
        "training",
        f"{_flops(training_flops(kept, *size[1:]))} a clip and step, "
        f"{_flops(training_flops(recomputed, *size[1:]))} with layers recomputed (architecture.checkpointing=true)",
    )


def _memory(plan: Plan) -> Iterator[str]:
    memory, device, config = plan.memory, plan.device, plan.config
    number = "bfloat16" if config.bf16 else "float32"
    recomputed = {
        False: "kept",
        True: "recomputed",
        "attention": "recomputed but for attention's outputs",
    }[plan.architecture.checkpointing]
    master = " and float32 master weights" if plan.zero_stage else ""
    digits = 2 if memory.peak >= 1e9 else 3
    yield (
        f"memory of one device in GB, of {device.memory_gb:g} ({device.title}) with {KEPT_FREE:.0%} kept free"
    )
    rows = (
        (memory.states.weights, f"weights, {number}"),
        (memory.states.gradients, "gradients"),
        (memory.states.optimizer, f"optimizer: Adam's moments{master}"),
        (memory.states.average, "averaged weights, float32, whole on every device"),
        (memory.buffers, "DeepSpeed's buckets and gathered weights"),
        (memory.activations, f"activations of {_clips(plan.micro_batch)}, {recomputed}"),
        (memory.evaluation, f"validation and samples: {_clips(plan.evaluated_clips)}, one pass"),
        (memory.update, "optimizer's step"),
        (memory.peak, f"at most, in {memory.reason}"),
    )
    for value, text in rows:
        yield f"{value / 1e9:>10.{digits}f}  {text}"
    yield "  activations, validation and the optimizer's step come one after another: only the largest counts"
    by_stage = []
    for stage in range(4):
        states = state_bytes(
            plan.num_parameters, zero_stage=stage, devices=plan.devices, bf16=config.bf16
        )
        mark = "*" if stage == plan.zero_stage else ""
        by_stage.append(f"ZeRO-{stage}{mark} {states.total / 1e9:.{digits}f}")
    yield f"  states by stage: {', '.join(by_stage)}   (* this config)"


def _time(plan: Plan) -> Iterator[str]:
    config = plan.config
    peak = plan.device.peak_flops(config.bf16)
    yield (
        f"time, if {plan.utilisation:.0%} of {peak / 1e12:g} TFLOP/s are reached "
        "(assumed; nothing for communication, data, saving)"
    )
    hours = config.num_steps * plan.step_seconds / 3600
    yield _line(
        "step",
        f"{_seconds(plan.step_seconds)} for {_clips(config.batch_size)}, {plan.clips_per_device} a device; "
        f"MFU {plan.mfu:.1%}, {plan.clips_per_device * plan.grid.tokens / plan.step_seconds:,.0f} tokens/s a device",
    )
    yield _line(
        "run",
        f"{config.num_steps:,} steps: {_hours(hours)}, {hours * plan.devices:,.1f} device-hours",
    )
    yield _line(
        "sample",
        f"{_seconds(plan.sample_seconds)} a clip on one device: {plan.evaluations_per_sample} evaluations, without decoding",
    )


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.devices == 1 and plan.config.zero_stage:
        yield "note: on one device ZeRO splits nothing"
    if plan.device.name != "cpu" and plan.architecture.width < MIN_TRACED_WIDTH:
        yield f"note: at width {plan.architecture.width} a GPU waits for launches; it will not reach {plan.utilisation:.0%}"
    if plan.device.name != "cpu" and not plan.config.bf16:
        yield "note: float32 leaves the tensor cores idle; bf16=true is several times faster"
    if plan.config.stage == "refiner":
        yield "note: a refiner takes its base's architecture; plan it with the same architecture.* as its base"
    yield "note: the VAE, the text encoder and decoded pixels come on top; channels and text width follow them"
    peak, usable = plan.memory.peak / 1e9, plan.device.usable_bytes / 1e9
    if plan.fits:
        yield f"fits: {peak:.1f} of {usable:.1f} GB a device"
        return
    yield f"DOES NOT FIT: {peak:.1f} of {usable:.1f} GB a device, in {plan.memory.reason}"
    for remedy in remedies(plan):
        yield f"  -> {remedy}"


def _staged(plan: StagedPlan, name: str) -> Iterator[str]:
    """A line per stage, then the verdict."""
    config, worst = plan.config, plan.worst
    trained = ""
    if worst.num_trained != worst.num_parameters:
        trained = f", {_count(worst.num_trained)} of them in adapters"
    shared = ""
    if config.sequence_parallel > 1:
        shared = f", {config.sequence_parallel} of which share each clip"
    yield f"plan of {name}: {config.stage} in {len(plan.stages)} stages, on {plan.devices} x {plan.device.name}{shared}"
    yield ""
    yield _line(
        "model",
        f"{_count(worst.num_parameters)} parameters{trained}; {plan.text_tokens} tokens of text",
    )
    rows = []
    for stage, one in plan.stages:
        size = one.config
        rows.append(
            [
                stage,
                f"{size.num_frames}x{size.height}x{size.width}",
                f"{one.grid.tokens:,}",
                f"{one.micro_batch} x {config.micro_batches // plan.groups}",
                f"{one.memory.states.total / 1e9:.3g}",
                f"{one.memory.activations / 1e9:.3g}",
                f"{one.memory.peak / 1e9:.3g}",
                "yes" if one.fits else "NO",
                _seconds(one.step_seconds),
                f"{one.mfu:.1%}",
                _hours(size.num_steps * one.step_seconds / 3600),
            ]
        )
    columns = [
        "stage",
        "fullest bucket",
        "tokens",
        "clips x passes",
        "states",
        "activations",
        "at most, GB",
        "fits",
        "step",
        "MFU",
        "all steps",
    ]
    yield ""
    yield from format_table(columns, rows).splitlines()
    yield ""
    peak = plan.device.peak_flops(config.bf16) / 1e12
    yield f"time, if {plan.utilisation:.0%} of {peak:g} TFLOP/s are reached (assumed; nothing for communication, data, saving): {_hours(plan.seconds / 3600)} in all"
    yield "note: a stage's fullest bucket is the one with most latent positions in a micro-batch; the others' micro-batches take about as long"
    if config.lora is not None:
        yield "note: frozen weights and their average stay; only adapters have gradients and moments"
    if config.text_tuning is not None:
        yield "note: the text encoder trains along: its weights, gradients and moments come on top"
    yield "note: the VAE, the text encoder and decoded pixels come on top"
    most, usable = worst.memory.peak / 1e9, plan.device.usable_bytes / 1e9
    if plan.fits:
        yield f"fits: {most:.1f} of {usable:.1f} GB a device"
        return
    bad = ", ".join(stage for stage, one in plan.stages if not one.fits)
    yield f"DOES NOT FIT: {most:.1f} of {usable:.1f} GB a device (stages: {bad}), in {worst.memory.reason}"
    for remedy in staged_remedies(plan):
        yield f"  -> {remedy}"


def _network(plan: NetworkPlan, name: str) -> Iterator[str]:
    """Of a VAE or a text encoder."""
    config, states = plan.config, plan.states
    networks = " and ".join(
        f"{_count(count)} of the {part}" for part, count in plan.networks.items()
    )
    yield f"plan of {name}: {config.stage}, on {plan.devices} x {plan.device.name}"
    yield ""
    yield _line("parameters", networks)
    yield f"memory of one device in GB, of {plan.device.memory_gb:g} ({plan.device.title}) with {KEPT_FREE:.0%} kept free"
    rows = [
        (states.weights, "weights, float32"),
        (states.gradients, "gradients"),
        (states.optimizer, "optimizer: Adam's moments"),
        (states.average, "averaged weights"),
        (plan.buffers, "DeepSpeed's buckets and gathered weights"),
        *((cost.peak, part) for part, cost in plan.passes.items()),
        (plan.peak, "at most: the passes come one after another"),
    ]
    for value, text in rows:
        yield f"{value / 1e9:>10.3f}  {text}"
    yield ""
    yield _line(
        "step",
        f"{_seconds(plan.step_seconds)} for {config.batch_size} samples, {_flops(plan.flops_per_step)} a device, if {plan.utilisation:.0%} of the peak are reached",
    )
    yield _line(
        "run", f"{config.num_steps:,} steps: {_hours(config.num_steps * plan.step_seconds / 3600)}"
    )
    peak, usable = plan.peak / 1e9, plan.device.usable_bytes / 1e9
    if plan.fits:
        yield f"fits: {peak:.2f} of {usable:.1f} GB a device"
        return
    yield f"DOES NOT FIT: {peak:.1f} of {usable:.1f} GB a device"
    for remedy in network_remedies(plan):
        yield f"  -> {remedy}"


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL_WIDTH}}{text}"


def _clips(count: int) -> str:
    return f"{count} clip{'s' * (count != 1)}"


def _count(value: float) -> str:
    return f"{value / 1e9:.2f} billion" if value >= 1e9 else f"{value / 1e6:.2f} million"


def _flops(value: float) -> str:
    return f"{value / 1e12:,.1f} TFLOP" if value >= 1e11 else f"{value / 1e9:,.2f} GFLOP"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _hours(value: float) -> str:
    if value >= 2 * HOURS_PER_DAY:
        return f"{value / HOURS_PER_DAY:.1f} days"
    return f"{value:.1f} hours" if value >= 1 else f"{value * 60:.1f} minutes"
