"""The training engine: DeepSpeed, the same code on one process or many, on a CPU or on GPUs.

What DeepSpeed 0.19 demands, each with a test in `tests/reelhf/test_engine_deepspeed.py`:

- `Engine.backward(loss)`, never `loss.backward()`: the latter breaks as soon as the module ran twice in a step;
- one backward per step: sum the losses first (ZeRO-3 refuses a second pass over one graph);
- activation checkpointing with `use_reentrant=False`;
- under ZeRO-3 every rank makes the same number of forward calls;
- a frozen network that gradients pass through stays a plain module, never a second engine;
- a checkpoint of DeepSpeed's own is loaded on as many processes as wrote it; `reelhf.engine_state` writes ours.

Gradients are averaged over ranks. With unequal numbers of valid samples per rank, the mean over all of them is
`loss = local_sum * global_mean_scale(local_count)`: gradients then do not depend on the number of processes.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, distributed, nn

from reelhf.config import Config
from reelhf.engine_state import INDEX, EngineState
from reelhf.errors import UserError

PROCESS_GROUP_TIMEOUT = timedelta(
    hours=2
)  # a rank may wait for another's long rollout or reward call
MAX_NAMES_SHOWN = 3

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is first imported


class OptimizerConfig(Config):
    """AdamW, with a linear warmup to a constant rate."""

    lr: PositiveFloat
    """Learning rate after the warmup."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises linearly from 0."""


class EngineConfig(Config):
    """How DeepSpeed spreads the work."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What is split over the ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights."""
    bf16: bool = False
    """Weights and activations in bfloat16 with float32 master weights."""
    micro_batch_size: PositiveInt
    """Samples per rank and forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Backward passes per optimizer step."""
    param_persistence_threshold: int = Field(100_000, ge=0)
    """ZeRO-3 keeps parameters of fewer elements whole on every rank."""


def init_distributed() -> None:
    """Join the process group a launcher described, or make one of a single process. May be called again."""
    if distributed.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it even when there is no launcher
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group(backend, timeout=PROCESS_GROUP_TIMEOUT)
    else:  # a store in memory: no port that could be taken
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    _import_deepspeed().init_distributed(
        dist_backend=backend, timeout=PROCESS_GROUP_TIMEOUT, verbose=False
    )


def rank() -> int:
    """This process's number, 0 without a launcher."""
    return (
        distributed.get_rank() if distributed.is_initialized() else int(os.environ.get("RANK", "0"))
    )


def world_size() -> int:
    """Number of processes, 1 without a launcher."""
    if distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Where this process computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    """Wait until every process is here."""
    if distributed.is_initialized() and world_size() > 1:
        distributed.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over processes, as a new tensor without gradient."""
    total = tensor.detach().clone()
    if distributed.is_initialized() and world_size() > 1:
        distributed.all_reduce(total)
    return total


def global_mean_scale(local_count: int | Tensor, *, gradient_accumulation_steps: int = 1) -> float:
    """Factor that turns this rank's sum of losses into one whose averaged gradient is the global mean's.

    DeepSpeed divides gradients by the number of ranks and of accumulation steps; this undoes both and divides
    by the number of valid samples everywhere. Every rank must call it.

    Args:
        local_count: valid samples on this rank, over all micro-batches of the optimizer step.
    Returns: `world_size * gradient_accumulation_steps / global count`, 0 when no sample is valid.
    """
    count = all_reduce_sum(
        torch.as_tensor(local_count, dtype=torch.float64, device=device())
    ).item()
    return world_size() * gradient_accumulation_steps / count if count else 0.0


class Engine:
    """One module, one AdamW, one backward per step.

    Args:
        module: moved to `device()`; under ZeRO-3 its weights are split, see `full_state_dict`.
        parameters: what is trained; by default every parameter that requires a gradient.
        learning_rate: of each step, counted from 0; by default a linear warmup to the optimizer's constant rate.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        *,
        parameters: Iterable[nn.Parameter] | None = None,
        learning_rate: Callable[[int], float] | None = None,
    ) -> None:
        init_distributed()
        module.to(device())
        trained = [p for p in (parameters or module.parameters()) if p.requires_grad]
        if not trained:
            raise ValueError("no parameter to train: all of them are frozen")
        self.config = config
        self._optimizer_config = optimizer
        self._learning_rate = learning_rate
        self._losses: list[Tensor] = []
        """Since the last step, for the message that names one that is not finite."""
        # both before ZeRO-3 empties the tensors
        self._watch = _FiniteWatch(module, trained)
        ids = {id(p) for p in trained}
        named = {name: p for name, p in module.named_parameters() if id(p) in ids}
        shapes = {name: list(p.shape) for name, p in named.items()}
        self._adamw = _RefusableAdamW(
            trained,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self._engine, *_ = _import_deepspeed().initialize(
            model=module,
            optimizer=self._adamw,
            model_parameters=trained,
            config=_deepspeed_config(optimizer, config),
            dist_init_required=False,
        )
        self._trained = trained
        self._state = EngineState(self._engine, self._adamw, named, shapes, config.zero_stage)
        self.steps = 0
        """Optimizer steps so far, refused ones included."""
        self.skipped = 0
        """Steps refused because of a gradient that was not finite."""

    @property
    def module(self) -> nn.Module:
        """The module under DeepSpeed; call it directly where its gradient is not trained."""
        module: nn.Module = self._engine.module
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar loss; ranks are averaged."""
        self._losses.append(loss.detach())
        self._engine.backward(loss)

    def step(self) -> dict[str, float]:
        """Update the weights if this backward pass completed an accumulation.

        A gradient that is not finite on any rank refuses the step on all: weights and moments stay, and the
        losses and parameters are named on stderr.

        Returns: `grad_norm` before clipping (nan when refused), `lr`, and `skipped` (1 when refused, else 0);
            empty between accumulation boundaries.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return {}
        lr = self._set_learning_rate()
        bad_names, bad_anywhere = self._watch.take()
        self._adamw.refuse = bad_anywhere
        norm = self._plain_gradient_norm()
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        self.steps += 1
        losses, self._losses = self._losses, []
        if bad_anywhere:
            self.skipped += 1
            where = _listing(bad_names) or "another rank"
            values = [loss.item() for loss in losses]
            bad_losses = [
                f"the loss of micro-batch {number} of {len(values)} is {value:g}, and "
                for number, value in enumerate(values, start=1)
                if not math.isfinite(value)
            ]
            print(
                f"step {self.steps} refused: {''.join(bad_losses[:1])}the gradient is not finite in {where}",
                file=sys.stderr,
            )
            norm = float("nan")
        return {"grad_norm": norm, "lr": lr, "skipped": float(bad_anywhere)}

    def full_state_dict(self) -> dict[str, Tensor]:
        """The module's weights, whole and on the CPU, on every rank; all ranks call it."""
        with gathered_parameters(self.module):
            return {name: t.detach().cpu().clone() for name, t in self.module.state_dict().items()}

    def save(self, folder: str | Path, client_state: dict[str, Any]) -> None:
        """Write weights, optimizer and this rank's `client_state`; all ranks call it with the same folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rest = {
            name: t for name, t in self._full_state().items() if name not in self._state.trained
        }
        self._state.save(folder, rest, rank())
        torch.save(
            {"client": client_state, "steps": self.steps, "skipped": self.skipped},
            folder / f"client_rank_{rank():03d}.pt",
        )
        if is_main():
            layout = {"world_size": world_size(), "zero_stage": self.config.zero_stage}
            (folder / "engine.json").write_text(json.dumps(layout) + "\n", encoding="utf-8")
        barrier()

    def load(self, folder: str | Path, *, any_world_size: bool = False) -> dict[str, Any]:
        """Restore what `save` wrote and return this rank's `client_state`; all ranks call it.

        Args:
            any_world_size: on another number of processes, every rank gets the client state of rank 0. Right where it holds
                nothing of a rank's own, such as the state of its random numbers.
        Raises: UserError if the folder holds no checkpoint, or one of another architecture, ZeRO stage or number of processes.
        """
        folder = Path(folder)
        layout_file = folder / "engine.json"
        if not layout_file.is_file():
            raise UserError(
                f"{folder} holds no training state; expected a folder such as checkpoints/step_000010."
            )
        saved = json.loads(layout_file.read_text(encoding="utf-8"))
        here = {"world_size": world_size(), "zero_stage": self.config.zero_stage}
        moved = saved["world_size"] != here["world_size"]
        if saved["zero_stage"] != here["zero_stage"] or (moved and not any_world_size):
            same = "zero_stage" if any_world_size else "number of processes and zero_stage"
            raise UserError(
                f"{folder} was saved with {_layout(saved)}, this run has {_layout(here)}; "
                f"resume with the same {same}."
            )
        if not (folder / INDEX).is_file():
            raise UserError(
                f"{folder} was written by an older version, in DeepSpeed's own format; finish that run with it."
            )
        self._load_rest(self._state.load(folder))
        file = folder / f"client_rank_{0 if moved else rank():03d}.pt"
        state = torch.load(file, weights_only=False)
        self.steps, self.skipped = state["steps"], state["skipped"]
        client: dict[str, Any] = state["client"]
        return client

    def _full_state(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers, whole; trained parameters as they are here."""
        frozen = [p for n, p in self.module.named_parameters() if n not in self._state.trained]
        with gathered_parameters(nn.ParameterList(frozen)):
            return {name: t.detach().cpu().clone() for name, t in self.module.state_dict().items()}

    @torch.no_grad()
    def _load_rest(self, rest: dict[str, Tensor]) -> None:
        """Frozen parameters and buffers; a frozen parameter that ZeRO-3 split is as it was when the module was built."""
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if name in rest and not hasattr(tensor, "ds_id"):
                tensor.copy_(rest[name])

    def _set_learning_rate(self) -> float:
        if self._learning_rate is not None:
            lr = self._learning_rate(self.steps)
        else:
            warmup = self._optimizer_config.warmup_steps
            lr = self._optimizer_config.lr * min(1.0, (self.steps + 1) / warmup if warmup else 1.0)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        for group in self._adamw.param_groups:
            group["lr"] = lr
        return lr

    def _plain_gradient_norm(self) -> float | None:
        """The norm where DeepSpeed reports none: ZeRO-0 in float32."""
        if self.config.zero_stage or self.config.bf16:
            return None
        gradients = [p.grad for p in self._trained if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


class Ema:
    """Exponential moving average of a module's floating-point weights, in float32; buffers are copied.

    Make it before the `Engine` under ZeRO-3, which splits the weights; every rank calls `update`.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"expected 0 <= decay < 1, got {decay}")
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self._averages = dict(self.module.named_parameters())
        self._buffers = dict(self.module.named_buffers())

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present weights."""
        with gathered_parameters(module):
            for name, parameter in module.named_parameters():
                average = self._averages[name]
                average.lerp_(parameter.to(average), 1 - self.decay)
        for name, buffer in module.named_buffers():
            self._buffers[name].copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights."""
        state: dict[str, Tensor] = self.module.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the averaged weights."""
        self.module.load_state_dict(state)


@contextmanager
def gathered_parameters(module: nn.Module) -> Iterator[None]:
    """Whole parameters inside the block, whatever the ZeRO stage; all ranks enter it."""
    parameters = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, the accelerator included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of every generator `seed_everything` seeds, for this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class _RefusableAdamW(torch.optim.AdamW):
    """AdamW that leaves weights and moments alone while `refuse` is set; ZeRO's own bookkeeping goes on."""

    refuse = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return None if self.refuse else super().step(closure)


class _FiniteWatch:
    """Notes which parameters received a gradient with inf or nan since the last `take`, before any reduction."""

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        names = {id(p): name for name, p in module.named_parameters()}
        self._names: list[str] = []
        self._finite: list[Tensor] = []
        for index, parameter in enumerate(parameters):
            parameter.register_hook(self._hook(names.get(id(parameter), f"parameter {index}")))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            self._names.append(name)
            self._finite.append(torch.isfinite(gradient.detach().float().sum()))

        return note

    def take(self) -> tuple[list[str], bool]:
        """This rank's offenders, and whether any rank has one."""
        bad: list[str] = []
        if self._finite:
            finite = torch.stack(self._finite).tolist()
            bad = [name for name, ok in zip(self._names, finite, strict=True) if not ok]
        self._names, self._finite = [], []
        anywhere = all_reduce_sum(torch.tensor(float(len(bad)), device=device())).item() > 0
        return bad, anywhere


def _deepspeed_config(optimizer: OptimizerConfig, config: EngineConfig) -> dict[str, Any]:
    # ZeRO-0 in bfloat16 would have no float32 master weights; ZeRO-1 has, and computes the same
    zero: dict[str, Any] = {"stage": max(config.zero_stage, 1 if config.bf16 else 0)}
    if config.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": config.param_persistence_threshold,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": optimizer.grad_clip,
        "bf16": {"enabled": config.bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # our AdamW subclass is torch's with a switch
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _import_deepspeed() -> Any:
    """DeepSpeed without its log lines, and without the C++ kernel it would compile on a CPU for inference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # torch announces a rename in functions that DeepSpeed calls at every ZeRO-2 and ZeRO-3 step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # inference_all_reduce only; building it takes a compiler and a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _layout(layout: dict[str, int]) -> str:
    return f"{layout['world_size']} process(es) at zero_stage {layout['zero_stage']}"


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    rest = len(names) - MAX_NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
