"""Memory of one device in training: what ZeRO keeps of weights and optimizer, and what a forward and backward pass needs.

States are closed forms, read off DeepSpeed's ZeRO optimizers and our engine. Activations are not a formula: the very modules run
forward and backward on meta tensors, which have shapes and no storage, while every live tensor is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from generator.dit import DiT, DiTConfig
from generator.plan.flops import LatentGrid
from generator.training.lora import LoraSettings, adaptable, add_lora

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`: a buffer of as many gradients, allocated whole at every backward pass."""
GATHERED_ELEMENTS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: at most so many weights lie whole on a device under ZeRO-3."""
TRACED_PAIRS = 4
"""Deeper models are extrapolated from two shallow ones: every further two pairs (one shifted window each) add the same."""


@dataclass(frozen=True)
class StateBytes:
    """What lies on a device from one step to the next."""

    weights: float
    gradients: float
    optimizer: float
    """Both moments of Adam, and the float32 master weights where there are any."""
    average: float
    """The averaged weights: float32 and whole on every device, at every stage."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average


def effective_stage(zero_stage: int, bf16: bool) -> int:
    """The engine runs ZeRO-0 in bfloat16 as ZeRO-1, which has float32 master weights."""
    return max(zero_stage, 1 if bf16 else 0)


def state_bytes(
    num_parameters: int,
    *,
    zero_stage: int,
    devices: int,
    bf16: bool,
    trained: int | None = None,
) -> StateBytes:
    """ZeRO (1910.02054, section 5) with our engine's types; every ZeRO stage from 1 keeps float32 master weights.

    `trained`: how many of the parameters are; all of them by default.
    """
    trained = num_parameters if trained is None else trained
    stage, size = effective_stage(zero_stage, bf16), 2 if bf16 else 4
    master = 0 if stage == 0 else 4 * trained
    return StateBytes(
        weights=size * num_parameters / (devices if stage >= 3 else 1),
        gradients=size * trained / (devices if stage >= 2 else 1),
        optimizer=(8 * trained + master) / (devices if stage >= 1 else 1),
        average=4 * num_parameters,
    )


def buffer_bytes(num_parameters: int, *, zero_stage: int, bf16: bool) -> float:
    """DeepSpeed's own while gradients flow: the bucket it reduces them in, and under ZeRO-3 the gathered weights."""
    stage, size = effective_stage(zero_stage, bf16), 2 if bf16 else 4
    bucket = BUCKET_ELEMENTS if stage else 0
    gathered = min(num_parameters, GATHERED_ELEMENTS) if stage >= 3 else 0
    return size * (bucket + gathered)


def update_bytes(num_parameters: int, *, zero_stage: int, devices: int, bf16: bool) -> float:
    """Beside the states while the optimizer steps, when activations are gone.

    The gradient of this device's share in float32 and the root of Adam's second moment; then, under ZeRO-3, the
    weights gathered whole for their average.
    """
    stage = effective_stage(zero_stage, bf16)
    share = num_parameters / (devices if stage else 1)
    step = (4 if stage == 0 else 8) * share
    gathered = (2 if bf16 else 4) * num_parameters if stage >= 3 else 0
    return max(step, gathered)


def start_bytes(num_parameters: int) -> float:
    """At the start, before ZeRO splits anything: the weights in float32 and their average, whole."""
    return 8.0 * num_parameters


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations make on one kind of device, now and at most; `known` tensors are not counted."""

    def __init__(self, device: str, known: list[Tensor]) -> None:
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self._live = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live:  # a view, or written in place
            return
        self._live.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """On meta tensors torch falls back to attention that writes the scores out; a device would not."""
    of_torch = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return of_torch(query, key, value, *args, **kwargs)

    # a torch function mode would be left before the backward pass, where checkpointing runs layers again
    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = of_torch


def meta_dit(
    config: DiTConfig, dtype: torch.dtype = torch.float32, lora: LoraSettings | None = None
) -> DiT:
    """The denoiser without storage, with adapters if there are any."""
    return new_dit(config, dtype, "meta", lora)


def new_dit(config: DiTConfig, dtype: torch.dtype, device: str, lora: LoraSettings | None) -> DiT:
    with torch.device(device):
        model = DiT(config)
        if lora is not None:
            add_lora(model, lora, adaptable(model))
    return model.to(dtype)


@lru_cache(maxsize=64)
def count_parameters(config: DiTConfig, lora: LoraSettings | None = None) -> int:
    return sum(parameter.numel() for parameter in meta_dit(config, lora=lora).parameters())


@lru_cache(maxsize=64)
def count_trained(config: DiTConfig, lora: LoraSettings | None = None) -> int:
    """Of the parameters those that are trained."""
    model = meta_dit(config, lora=lora)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def dit_inputs(
    config: DiTConfig, grid: LatentGrid, text_tokens: int, *, batch: int = 1, device: str = "meta"
) -> tuple[Tensor, ...]:
    """Arguments of `DiT.forward` for clips of this size; numbers are 0, every text token exists."""
    latents = torch.zeros(batch, config.channels, *grid, device=device)
    return (
        latents,
        torch.zeros(batch, device=device),
        torch.zeros(batch, text_tokens, config.text_width, device=device),
        torch.ones(batch, text_tokens, dtype=torch.bool, device=device),
        torch.zeros_like(latents),
        torch.zeros_like(latents[:, :1]),
        *((torch.zeros_like(latents),) if config.low_res else ()),
    )


def trace_peak_bytes(
    config: DiTConfig,
    grid: LatentGrid,
    text_tokens: int,
    *,
    training: bool,
    bf16: bool,
    batch: int = 1,
    device: str = "meta",
    lora: LoraSettings | None = None,
) -> int:
    """Most bytes alive at once beside weights, their gradients and the inputs, in one pass over `batch` clips.

    Args:
        training: forward and backward; otherwise a forward pass without gradients.
        device: "meta"; "cpu" computes for real, with the attention torch has there.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    config = config.model_copy(
        update={"attention": "sdpa"}
    )  # lengths of sequences are numbers, which meta tensors lack
    model = new_dit(config, dtype, device, lora)
    inputs = dit_inputs(config, grid, text_tokens, batch=batch, device=device)
    for parameter in model.parameters():  # gradients are states: here they leave as they arrive
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    live = LiveBytes(device, [*model.parameters(), *inputs])
    with fused_attention(), torch.set_grad_enabled(training), live:
        velocity = model(*inputs)
        if training:
            (velocity - inputs[0]).square().mean().backward()
    return live.peak


@lru_cache(maxsize=256)
def peak_bytes(
    config: DiTConfig,
    grid: LatentGrid,
    text_tokens: int,
    *,
    training: bool,
    bf16: bool,
    lora: LoraSettings | None = None,
) -> float:
    """`trace_peak_bytes` of one clip at any depth, in about a second; a batch needs as many times as much."""

    def traced(num_pairs: int) -> int:
        shallow = config.model_copy(update={"num_pairs": num_pairs})
        return trace_peak_bytes(shallow, grid, text_tokens, training=training, bf16=bf16, lora=lora)

    if config.num_pairs <= TRACED_PAIRS:
        return traced(config.num_pairs)
    few = TRACED_PAIRS - 2 + config.num_pairs % 2  # as even or odd as the model
    first, second = traced(few), traced(few + 2)
    return second + (second - first) * (config.num_pairs - few - 2) / 2
