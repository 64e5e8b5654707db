"""What trainers share: the samples of a step however they are split, and a loop that goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from reelhf import training
from reelhf.config import Config
from reelhf.engine import EngineConfig, OptimizerConfig
from reelhf.errors import UserError
from reelhf.run import RunFolder, read_metrics
from reelhf.training import BatchSplit, ShuffledEpochs, TrainLoop, run_identity


class LineConfig(Config):
    num_steps: int = 6
    save_every: int = 4
    optimizer: OptimizerConfig = OptimizerConfig(lr=0.1)
    slope: float = 2.0


def fit_line(config: LineConfig, out: Path, ema_decay: float | None = None) -> TrainLoop[nn.Linear]:
    torch.manual_seed(0)
    loop = TrainLoop(
        RunFolder.open(out, config),
        config,
        nn.Linear(1, 1),
        EngineConfig(micro_batch_size=4),
        ema_decay=ema_decay,
        identity=run_identity(config),
    )
    for step in loop.steps("fitting a line"):
        x = torch.randn(4, 1, generator=torch.Generator().manual_seed(step))
        loss = (loop.engine(x) - config.slope * x).square().mean()
        update = loop.update(loss)
        loop.end_step(step, {"loss": loss.item(), **update})
    return loop


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_the_processes_and_micro_batches_of_a_step_make_up_its_samples(num_processes, monkeypatch):
    monkeypatch.setattr(training, "world_size", lambda: num_processes)
    positions = []
    for process in range(num_processes):
        monkeypatch.setattr(training, "rank", lambda process=process: process)
        split = BatchSplit(12, accumulation_steps=2)
        assert split.micro_batch_size == 12 // (2 * num_processes)
        positions += [*split.positions(5, 0), *split.positions(5, 1)]
    assert positions == list(range(60, 72))


def test_a_batch_that_cannot_be_split_says_what_can(monkeypatch):
    monkeypatch.setattr(training, "world_size", lambda: 2)
    with pytest.raises(UserError, match=r"7 cannot be split over 2 processes; use a multiple of 2"):
        BatchSplit(7)
    with pytest.raises(UserError, match=r"processes x 4 accumulation steps; use a multiple of 8"):
        BatchSplit(12, accumulation_steps=4)


def test_every_epoch_holds_all_items_in_another_order_wherever_one_begins():
    shuffled = ShuffledEpochs(10, seed=3)
    epochs = [[shuffled[10 * epoch + i] for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert ShuffledEpochs(10, seed=3)[17] == epochs[1][7]
    assert [ShuffledEpochs(10, seed=4)[i] for i in range(10)] != epochs[0]


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_loop_that_stopped_ends_as_one_that_did_not(ema_decay, tmp_path):
    whole = fit_line(LineConfig(), tmp_path / "whole", ema_decay)
    fit_line(LineConfig(num_steps=3), tmp_path / "parts", ema_decay)
    parts = fit_line(LineConfig(), tmp_path / "parts", ema_decay)
    assert (whole.first_step, parts.first_step) == (0, 3)
    for ours, theirs in (
        (whole.engine.module, parts.engine.module),
        (whole.averaged, parts.averaged),
    ):
        assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(whole.averaged.weight, whole.engine.module.weight) == (ema_decay is None)
    losses = [[row["loss"] for row in read_metrics(tmp_path / run)] for run in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert sorted(path.name for path in (tmp_path / "whole/checkpoints").iterdir()) == [
        "step_000004",
        "step_000006",
    ]


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    done = fit_line(LineConfig(), tmp_path)
    again = fit_line(LineConfig(), tmp_path)
    assert again.first_step == 6
    assert torch.equal(done.averaged.weight, again.averaged.weight)


def test_a_run_that_learns_something_else_is_not_resumed(tmp_path):
    fit_line(LineConfig(), tmp_path)
    with pytest.raises(UserError, match="other settings or other clips; choose another --out"):
        fit_line(LineConfig(slope=3.0), tmp_path)
    assert run_identity(LineConfig(), "a") != run_identity(LineConfig(), "b")
    assert run_identity(LineConfig(slope=3.0), free=frozenset({"slope"})) == run_identity(
        LineConfig(), free=frozenset({"slope"})
    )


def test_the_model_of_a_run_lies_in_its_folder(tmp_path):
    loop = fit_line(LineConfig(num_steps=1), tmp_path)
    folder = loop.save_model("line", lambda path: path.mkdir())
    assert folder == tmp_path / "line" and folder.is_dir()
