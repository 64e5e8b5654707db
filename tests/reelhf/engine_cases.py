"""Training cases that run the same on one process or two; `torchrun engine_cases.py OUT CASE...` writes their results.

The toy: a policy is called four times per step (as a sampler calls a denoiser), a frozen reward model scores what
comes out, and the loss is minus the reward, over a global batch of eight samples split over the ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reelhf.config import Config
from reelhf.engine import (
    Engine,
    EngineConfig,
    OptimizerConfig,
    global_mean_scale,
    is_main,
    rank,
    seed_everything,
    world_size,
)
from reelhf.errors import UserError
from reelhf.run import RunFolder

GLOBAL_BATCH = 8
CALLS = 4
OPTIMIZER = OptimizerConfig(lr=3e-3, grad_clip=0.5, weight_decay=0.1)


class Policy(nn.Module):
    """A residual map `[B, 8] -> [B, 8]`; `remat` checkpoints it without or with reentrance."""

    def __init__(self, remat: str | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.remat = remat

    def forward(self, x: Tensor) -> Tensor:
        if self.remat and torch.is_grad_enabled():
            return x + checkpoint(self.body, x, use_reentrant=self.remat == "reentrant")
        return x + self.body(x)


def make(remat: str | None = None) -> tuple[Policy, nn.Module]:
    seed_everything(0)
    policy = Policy(remat)
    reward = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).requires_grad_(False)
    return policy, reward


def batch(step: int) -> Tensor:
    """This rank's share of the global batch, whatever the number of ranks."""
    generator = torch.Generator().manual_seed(step)
    samples = torch.randn(GLOBAL_BATCH, 8, generator=generator)
    share = GLOBAL_BATCH // world_size()
    return samples[rank() * share : (rank() + 1) * share]


def sample(policy: Any, x: Tensor, graded: int = CALLS) -> Tensor:
    """Call the policy four times, the last `graded` of them with gradient."""
    for call in range(CALLS):
        with torch.set_grad_enabled(call >= CALLS - graded):
            x = policy(x)
    return x


def start(stage: int, *, bf16: bool = False, remat: str | None = None) -> tuple[Engine, nn.Module]:
    policy, reward = make(remat)
    # persistence 0: ZeRO-3 really splits even these small weights
    config = EngineConfig(
        micro_batch_size=GLOBAL_BATCH // world_size(),
        zero_stage=stage,
        bf16=bf16,
        param_persistence_threshold=0,
    )
    return Engine(policy, OPTIMIZER, config), reward


def mean_over_ranks(loss: Tensor) -> float:
    from reelhf.engine import all_reduce_sum

    return all_reduce_sum(loss.float()).item() / world_size()


def train(
    engine: Engine,
    reward: nn.Module,
    steps: range,
    *,
    graded: int = CALLS,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    losses = []
    for step in steps:
        loss = -reward(sample(engine, batch(step).to(dtype), graded).float()).mean()
        engine.backward(loss)
        engine.step()
        losses.append(mean_over_ranks(loss))
    return losses


def reference(steps: int, graded: int = CALLS) -> list[float]:
    """The same training by hand, without DeepSpeed, on the whole batch."""
    policy, reward = make()
    adamw = torch.optim.AdamW(
        policy.parameters(),
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )
    losses = []
    for step in range(steps):
        x = torch.randn(GLOBAL_BATCH, 8, generator=torch.Generator().manual_seed(step))
        loss = -reward(sample(policy, x, graded)).mean()
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER.grad_clip)
        adamw.step()
        losses.append(loss.item())
    return losses


def case_plain(stage: int) -> Any:
    return train(*start(stage), range(20))


def case_bf16(stage: int) -> Any:
    return train(*start(stage, bf16=True), range(5), dtype=torch.bfloat16)


def case_last_step_only(stage: int) -> Any:
    return train(*start(stage), range(5), graded=1)


def case_checkpointed(stage: int) -> Any:
    return train(*start(stage, remat="non-reentrant"), range(5))


def case_unequal_valid(stage: int) -> Any:
    """Samples 0 and 5 are invalid: three valid ones on each of two ranks would hide an error, so 1 is as well."""
    engine, reward = start(stage)
    valid = torch.ones(GLOBAL_BATCH)
    valid[[0, 1, 5]] = 0
    share = GLOBAL_BATCH // world_size()
    mine = valid[rank() * share : (rank() + 1) * share]
    norms = []
    for step in range(5):
        values = reward(sample(engine, batch(step)))[:, 0]
        engine.backward(-(values * mine).sum() * global_mean_scale(mine.sum()))
        norms.append(engine.step()["grad_norm"])
    return norms


def case_nan_on_one_rank(stage: int) -> Any:
    engine, reward = start(stage)
    before = engine.full_state_dict()
    loss = -reward(sample(engine, batch(0))).mean()
    if rank() == world_size() - 1:
        loss = loss * float("nan")
    engine.backward(loss)
    report = engine.step()
    after = engine.full_state_dict()
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    losses = train(engine, reward, range(1, 4))
    return {"skipped": report["skipped"], "unchanged": unchanged, "losses": losses}


class NoConfig(Config):
    pass


def case_resume(stage: int) -> Any:
    """Losses of 6 steps against 3 + save + a new engine + 3, through a run folder."""
    engine, reward = start(stage)
    straight = train(engine, reward, range(6))
    weights = engine.full_state_dict()
    run = RunFolder.open(Path(sys.argv[1]).parent / f"run_{stage}", NoConfig())
    engine, reward = start(stage)
    train(engine, reward, range(3))
    run.save_checkpoint(3, lambda folder: engine.save(folder, {"rank": rank()}))
    seed_everything(99)
    engine, reward = start(stage)
    checkpoint_found = run.latest_checkpoint()
    assert checkpoint_found is not None
    client = engine.load(checkpoint_found[1])
    resumed = train(engine, reward, range(3, 6))
    again = engine.full_state_dict()
    return {
        "straight": straight[3:],
        "resumed": resumed,
        "weights_equal": all(torch.equal(weights[name], again[name]) for name in weights),
        "client_is_mine": client == {"rank": rank()},
        "steps": engine.steps,
    }


def case_start(stage: int) -> Any:
    """Three steps and a checkpoint beside the results, for another number of processes to go on from; then three more."""
    engine, reward = start(stage)
    train(engine, reward, range(3))
    engine.save(Path(sys.argv[1]).parent / f"moved_{stage}", {"rank": rank()})
    return train(engine, reward, range(3, 6))


def case_loss_backward(stage: int) -> Any:
    engine, reward = start(stage)
    loss = -reward(sample(engine, batch(0))).mean()
    loss.backward()
    engine.step()
    return "accepted"


def case_two_backwards(stage: int) -> Any:
    engine, reward = start(stage)
    values = sample(engine, batch(0))
    engine._engine.backward(values.mean(), retain_graph=True)
    engine._engine.backward(-reward(values).mean())
    engine.step()
    return "accepted"


def case_reentrant(stage: int) -> Any:
    engine, reward = start(stage, remat="reentrant")
    x = batch(0).requires_grad_()
    engine.backward(-reward(sample(engine, x)).mean())
    engine.step()
    return "accepted"


def run_case(name: str) -> Any:
    """`plain:2` runs case_plain(2); an error is a result too."""
    case, _, stage = name.partition(":")
    try:
        return globals()[f"case_{case}"](int(stage))
    except (RuntimeError, KeyError, AssertionError, UserError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    results = {name: run_case(name) for name in sys.argv[2:]}
    if is_main():
        Path(sys.argv[1]).write_text(json.dumps(results))
