"""The engine on one process: accumulation, warmup, refusal, resume; averages and random states."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from reelhf import engine as floor
from reelhf.engine import Ema, Engine, EngineConfig, OptimizerConfig
from reelhf.errors import UserError
from tests.reelhf.engine_cases import run_case


def linear(**changes):
    floor.seed_everything(0)
    optimizer = OptimizerConfig(**{"lr": 0.1, "grad_clip": 0.0, **changes})
    return Engine(nn.Linear(3, 1), optimizer, EngineConfig(micro_batch_size=2)), torch.randn(2, 3)


def test_one_process_is_rank_0_of_1_without_a_launcher():
    floor.init_distributed()
    floor.init_distributed()
    assert (floor.rank(), floor.world_size(), floor.is_main()) == (0, 1, True)
    assert torch.equal(floor.all_reduce_sum(torch.ones(2)), torch.ones(2))


def test_the_scale_of_a_global_mean():
    assert floor.global_mean_scale(4) == 0.25
    assert floor.global_mean_scale(torch.tensor(4), gradient_accumulation_steps=2) == 0.5
    assert floor.global_mean_scale(0) == 0.0


def test_step_reports_the_norm_before_clipping_and_the_rate():
    engine, x = linear(grad_clip=1e-3)
    engine.backward(100 * engine(x).sum())
    report = engine.step()
    expected = torch.cat([100 * x.sum(0), torch.tensor([200.0])]).norm().item()
    assert report == {"grad_norm": pytest.approx(expected, rel=1e-5), "lr": 0.1, "skipped": 0.0}


def test_the_rate_warms_up_linearly_then_stays():
    engine, x = linear(warmup_steps=4)
    rates = []
    for _ in range(6):
        engine.backward(engine(x).sum())
        rates.append(engine.step()["lr"])
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("stage", [0, 2])
def test_accumulating_two_halves_equals_the_whole_batch(stage):
    def train(parts):
        floor.seed_everything(0)
        config = EngineConfig(
            micro_batch_size=8 // parts, gradient_accumulation_steps=parts, zero_stage=stage
        )
        engine = Engine(nn.Linear(3, 1), OptimizerConfig(lr=0.1), config)
        reports = []
        for step in range(3):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            for part in x.chunk(parts):
                engine.backward((engine(part) ** 2).mean())
                reports.append(engine.step())
        return engine, reports

    whole, whole_reports = train(1)
    halves, reports = train(2)
    assert reports[0::2] == [{}, {}, {}]
    assert [r["grad_norm"] for r in reports[1::2]] == pytest.approx(
        [r["grad_norm"] for r in whole_reports], rel=1e-5
    )
    assert torch.allclose(whole.module.weight, halves.module.weight, atol=1e-6)
    assert halves.steps == 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_is_refused_named_and_counted(stage, capsys):
    floor.seed_everything(0)
    config = EngineConfig(micro_batch_size=2, zero_stage=stage, param_persistence_threshold=0)
    engine = Engine(
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), OptimizerConfig(lr=0.1), config
    )
    x = torch.randn(2, 3)
    engine.backward(engine(x).mean())
    engine.step()
    before = engine.full_state_dict()
    engine.backward(engine(x).mean() * float("inf"))
    report = engine.step()
    assert report["skipped"] == 1
    assert report["grad_norm"] != report["grad_norm"]
    assert engine.skipped == 1
    said = capsys.readouterr().err
    assert (
        "step 2 refused: the loss of micro-batch 1 of 1 is -inf, and the gradient is not finite in"
        in said
    )
    for name, value in engine.full_state_dict().items():
        assert torch.equal(value, before[name])
    engine.backward(engine(x).mean())
    assert engine.step()["skipped"] == 0
    assert not torch.equal(engine.full_state_dict()["0.weight"], before["0.weight"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_steps_save_load_three_steps_equals_six(stage, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["engine_cases.py", str(tmp_path / "results.json")])
    result = run_case(f"resume:{stage}")
    assert result["resumed"] == result["straight"]
    assert result["weights_equal"]
    assert result["client_is_mine"]


def test_warmup_and_refusals_survive_a_resume(tmp_path):
    engine, x = linear(warmup_steps=4)
    engine.backward(engine(x).sum() * float("nan"))
    engine.step()
    engine.save(tmp_path / "state", {"cursor": 7})
    engine, x = linear(warmup_steps=4)
    assert engine.load(tmp_path / "state") == {"cursor": 7}
    engine.backward(engine(x).sum())
    assert engine.step()["lr"] == pytest.approx(0.05)
    assert (engine.steps, engine.skipped) == (2, 1)


def test_loading_the_wrong_folder_says_what_is_wrong(tmp_path):
    engine, _ = linear()
    with pytest.raises(UserError, match="holds no training state"):
        engine.load(tmp_path)
    engine.save(tmp_path / "state", {})
    other = Engine(
        nn.Linear(3, 1), OptimizerConfig(lr=0.1), EngineConfig(micro_batch_size=2, zero_stage=2)
    )
    with pytest.raises(
        UserError, match=r"zero_stage 0, this run has 1 process\(es\) at zero_stage 2"
    ):
        other.load(tmp_path / "state")


def test_only_the_named_parameters_are_trained():
    floor.seed_everything(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    engine = Engine(
        module,
        OptimizerConfig(lr=0.1),
        EngineConfig(micro_batch_size=2),
        parameters=module[1].parameters(),
    )
    before = engine.full_state_dict()
    engine.backward(engine(torch.randn(2, 3)).sum())
    engine.step()
    after = engine.full_state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["1.weight"], after["1.weight"])
    with pytest.raises(ValueError, match="no parameter to train"):
        Engine(
            module.requires_grad_(False), OptimizerConfig(lr=0.1), EngineConfig(micro_batch_size=2)
        )


def test_ema_is_the_textbook_average_and_copies_buffers():
    module = nn.BatchNorm1d(2)
    ema = Ema(module, decay=0.9)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.running_mean.fill_(5.0)
    ema.update(module)
    assert torch.allclose(ema.module.weight, torch.tensor(0.9 * 1.0 + 0.1 * 2.0))
    assert torch.equal(ema.module.running_mean, module.running_mean)
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert not ema.module.training
    restored = Ema(nn.BatchNorm1d(2), decay=0.9)
    restored.load_state_dict(ema.state_dict())
    assert torch.equal(restored.module.weight, ema.module.weight)
    with pytest.raises(ValueError, match="decay"):
        Ema(module, decay=1.0)


def test_ema_and_full_weights_see_through_zero_3():
    def trained(stage):
        floor.seed_everything(0)
        module = nn.Linear(3, 1)
        ema = Ema(module, decay=0.5)
        config = EngineConfig(micro_batch_size=2, zero_stage=stage, param_persistence_threshold=0)
        engine = Engine(module, OptimizerConfig(lr=0.1), config)
        engine.backward(engine(torch.ones(2, 3)).sum())
        engine.step()
        ema.update(engine.module)
        return engine.full_state_dict(), ema.state_dict()

    plain, split = trained(0), trained(3)
    for a, b in zip(plain, split, strict=True):
        for name in ("weight", "bias"):
            assert torch.allclose(a[name], b[name])


def test_the_random_state_comes_back():
    floor.seed_everything(5)
    state = floor.rng_state()
    draws = [(random.random(), np.random.rand(), torch.rand(1).item()) for _ in range(2)]
    floor.set_rng_state(state)
    assert [(random.random(), np.random.rand(), torch.rand(1).item()) for _ in range(2)] == draws
    floor.seed_everything(5)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == draws[0]
