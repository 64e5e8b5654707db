"""What the trainers share, so that each reads as a page: the samples of a step, and a run that starts, goes on and is kept.

    run = RunFolder.open(out, config)
    loop = TrainLoop(run, config, model, EngineConfig(micro_batch_size=8), ema_decay=0.9, identity=...)
    for step in loop.steps("training the model"):
        loss = ...  # one number
        update = loop.update(loss)
        loop.end_step(step, {"loss": mean_over_processes(loss), **update})
    return loop.save_model("model", loop.averaged.save)

Everything random about a sample is drawn from a generator seeded by its position in an endless stream of samples
(`position_seed`), so a resumed run continues bit for bit, N processes equal one, and no RNG state has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from reelhf.config import Config
from reelhf.engine import (
    Ema,
    Engine,
    EngineConfig,
    OptimizerConfig,
    all_reduce_sum,
    barrier,
    device,
    gathered_parameters,
    is_main,
    rank,
    world_size,
)
from reelhf.errors import UserError
from reelhf.hashing import content_hash
from reelhf.progress import track
from reelhf.run import RunFolder

KEPT_CHECKPOINTS = 2
SEED_STRIDE = 2_000_003
"""Separates the positions of neighbouring seeds."""

M = TypeVar("M", bound=nn.Module)


def position_seed(seed: int, position: int) -> int:
    """Seed of one position of a run's stream (a sample, a step or an epoch)."""
    return seed * SEED_STRIDE + position


class BatchSplit:
    """How the samples of a step, consecutive positions of the stream, are split over processes and micro-batches."""

    def __init__(self, batch_size: int, *, accumulation_steps: int = 1) -> None:
        parts = world_size() * accumulation_steps
        if batch_size % parts:
            accumulated = f" x {accumulation_steps} accumulation steps" * (accumulation_steps > 1)
            raise UserError(
                f"batch_size {batch_size} cannot be split over {world_size()} processes{accumulated}; "
                f"use a multiple of {parts}"
            )
        self.batch_size, self.accumulation_steps = batch_size, accumulation_steps
        self.micro_batch_size = batch_size // parts

    def positions(self, step: int, part: int = 0) -> range:
        """This process's samples of micro-batch `part` of a step, both counted from 0."""
        parts_before = rank() * self.accumulation_steps + part
        first = step * self.batch_size + parts_before * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class ShuffledEpochs:
    """Which of `count` items stands at a position of the stream: all of them in every epoch, each time in another order."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._order: dict[int, list[int]] = {}  # of the epoch asked for last

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if epoch not in self._order:
            generator = torch.Generator().manual_seed(position_seed(self.seed, epoch))
            self._order = {epoch: torch.randperm(self.count, generator=generator).tolist()}
        return self._order[epoch][offset]


def mean_over_processes(value: Tensor) -> float:
    """Mean of a scalar that every process has; all of them call it."""
    return all_reduce_sum(value).item() / world_size()


def run_identity(config: Config, *data: Any, free: frozenset[str] = frozenset()) -> str:
    """Hash of what must not change between two attempts at a run.

    Args:
        data: what the run learns from, as `content_hash` takes it.
        free: keys of the config that may change beside `num_steps` and `save_every`.
    """
    changeable = {"num_steps", "save_every", *free}
    return content_hash(config.model_dump(mode="json", exclude=changeable), *data)


def save_state(
    folder: Path,
    engine: Engine,
    ema: Ema | None,
    client: dict[str, Any],
    others: Mapping[str, Engine] | None = None,
    averages: Mapping[str, Ema] | None = None,
) -> None:
    """Weights, optimizer, average and `client` as one checkpoint; every rank calls it inside `RunFolder.save_checkpoint`.

    `others`: further engines of the run, each into a folder of its name; `averages`: of their weights, `<name>_ema.pt`.
    """
    engine.save(folder / "engine", client)
    for name, other in (others or {}).items():
        other.save(folder / name, {})
    if ema is not None and is_main():
        torch.save(ema.state_dict(), folder / "ema.pt")
    for name, average in (averages or {}).items():
        if is_main():
            torch.save(average.state_dict(), folder / f"{name}_ema.pt")


def load_state(
    folder: Path,
    engine: Engine,
    ema: Ema | None,
    others: Mapping[str, Engine] | None = None,
    averages: Mapping[str, Ema] | None = None,
    *,
    any_world_size: bool = False,
) -> dict[str, Any]:
    """Restore what `save_state` wrote; this rank's `client`, or on another number of processes rank 0's (`Engine.load`)."""
    client = engine.load(folder / "engine", any_world_size=any_world_size)
    for name, other in (others or {}).items():
        other.load(folder / name, any_world_size=any_world_size)
    kept = {"ema": ema} if ema is not None else {}
    for name, average in (
        kept | {f"{name}_ema": a for name, a in (averages or {}).items()}
    ).items():
        state = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
        average.load_state_dict(state)
    return client


class LoopConfig(Protocol):
    """What a trainer's config says of its loop."""

    @property
    def num_steps(self) -> int: ...
    @property
    def save_every(self) -> int: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...


class TrainLoop(Generic[M]):
    """One module in training: engine, averaged weights, and the checkpoints they go on from.

    Args:
        ema_decay: of the averaged weights; None keeps no average.
        identity: see `run_identity`.
        others: further engines of the run by name, such as an opponent's: saved and restored with it, stepped by the caller.
        averages: of their weights, by the same names; moved by the caller.
        learning_rate: of each step, counted from 0; the optimizer's own warmup and rate by default.
    Raises: UserError if the run folder holds a run of another identity or architecture.
    """

    def __init__(
        self,
        run: RunFolder,
        config: LoopConfig,
        module: M,
        engine_config: EngineConfig,
        *,
        identity: str,
        ema_decay: float | None = None,
        others: Mapping[str, Engine] | None = None,
        averages: Mapping[str, Ema] | None = None,
        learning_rate: Callable[[int], float] | None = None,
    ) -> None:
        self.run, self.config, self.identity = run, config, identity
        self.others, self.averages = others, averages
        module.to(device())
        # before the engine, because ZeRO-3 splits the weights
        self.ema = None if ema_decay is None else Ema(module, ema_decay)
        self.engine = Engine(module, config.optimizer, engine_config, learning_rate=learning_rate)
        self.resumed: dict[str, Any] = {}
        """What `end_step` was given as `kept` with the checkpoint that this attempt goes on from."""
        self.first_step = self._resume()
        """Steps that earlier attempts made."""

    @property
    def averaged(self) -> M:
        """What is measured and kept: the averaged weights, or those in training where there is no average."""
        return cast(M, self.engine.module if self.ema is None else self.ema.module)

    def steps(self, label: str) -> Iterator[int]:
        """The steps that are left, counted from 0, with their progress on stderr."""
        return track(range(self.first_step, self.config.num_steps), label=label)

    def update(self, loss: Tensor) -> dict[str, float]:
        """Backward of one micro-batch; with the last one of a step, weights and average move and `Engine.step` reports."""
        self.engine.backward(loss)
        metrics = self.engine.step()
        if metrics and self.ema is not None:
            self.ema.update(self.engine.module)
        return metrics

    def is_last(self, step: int) -> bool:
        return step + 1 == self.config.num_steps

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps, and after the last one, happens after this one."""
        return (step + 1) % every == 0 or self.is_last(step)

    def end_step(
        self,
        step: int,
        metrics: Mapping[str, float],
        *,
        kept: Mapping[str, Any] | None = None,
        save: bool = False,
    ) -> None:
        """One line of metrics.jsonl, numbered from 1; a checkpoint when due.

        Args:
            kept: state of the trainer's own, the same on every process, that belongs into the checkpoint.
            save: a checkpoint even if none is due.
        """
        self.run.log(step + 1, metrics)
        if save or self.is_due(step, self.config.save_every):
            client = {"identity": self.identity, **({"kept": dict(kept)} if kept else {})}
            self.run.save_checkpoint(
                step + 1,
                lambda folder: save_state(
                    folder, self.engine, self.ema, client, self.others, self.averages
                ),
                keep=KEPT_CHECKPOINTS,
            )

    def save_model(self, name: str, write: Callable[[Path], object]) -> Path:
        """Have rank 0 write what the run was for, as folder `name` of the run folder; every rank returns once it is there."""
        folder = self.run.path / name
        whole = gathered_parameters(self.engine.module) if self.ema is None else nullcontext()
        with whole:  # without an average it is the weights in training that are kept
            if is_main():
                write(folder)
        barrier()
        return folder

    def _resume(self) -> int:
        latest = self.run.latest_checkpoint()
        if latest is None:
            return 0
        step, folder = latest
        client = load_state(
            folder, self.engine, self.ema, self.others, self.averages, any_world_size=True
        )
        self.resumed = client.get("kept", {})
        if client["identity"] != self.identity:
            raise UserError(
                f"{self.run.path} holds a run with other settings or other clips; choose another --out, or delete it"
            )
        return step
