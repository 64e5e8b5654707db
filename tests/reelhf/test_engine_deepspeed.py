"""What DeepSpeed does, measured once and kept true: ZeRO-0 to 3, two processes, the traps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reelhf.engine import Engine, EngineConfig, OptimizerConfig
from reelhf.errors import UserError
from tests.reelhf.engine_cases import make, reference, run_case, start, train

CASES = Path(__file__).with_name("engine_cases.py")
ROOT = CASES.parent.parent.parent
STAGES = (0, 1, 2, 3)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder, *cases):
    """Results of the cases on two processes, by name."""
    out = folder / "results.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    ]
    done = subprocess.run(
        [*command, str(CASES), str(out), *cases],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert out.is_file(), done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    names = [f"plain:{stage}" for stage in STAGES]
    names += ["bf16:1", "bf16:2", "last_step_only:2", "checkpointed:2", "checkpointed:3"]
    names += ["unequal_valid:0", "unequal_valid:2", "nan_on_one_rank:0", "nan_on_one_rank:2"]
    names += ["resume:0", "resume:2", *(f"start:{stage}" for stage in STAGES)]
    folder = tmp_path_factory.mktemp("two")
    return {"folder": folder, **launch(folder, *names)}


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_equals_training_by_hand(stage):
    assert run_case(f"plain:{stage}") == pytest.approx(reference(20), abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(two_processes, stage):
    assert two_processes[f"plain:{stage}"] == pytest.approx(reference(20), abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_stays_close_to_float32(two_processes, stage):
    assert two_processes[f"bf16:{stage}"] == pytest.approx(reference(5), abs=2e-2)
    assert run_case(f"bf16:{stage}") == pytest.approx(reference(5), abs=2e-2)


def test_bfloat16_without_zero_keeps_float32_master_weights():
    assert run_case("bf16:0") == run_case("bf16:1")


def test_calls_without_gradient_before_the_last(two_processes):
    assert two_processes["last_step_only:2"] == pytest.approx(reference(5, graded=1), abs=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_non_reentrant_checkpointing_changes_nothing(two_processes, stage):
    assert two_processes[f"checkpointed:{stage}"] == pytest.approx(reference(5), abs=1e-5)


@pytest.mark.parametrize("stage", [0, 2])
def test_unequal_valid_counts_give_the_gradient_of_the_global_mean(two_processes, stage):
    assert two_processes[f"unequal_valid:{stage}"] == pytest.approx(
        run_case("unequal_valid:0"), rel=1e-5
    )


@pytest.mark.parametrize("stage", [0, 2])
def test_a_bad_gradient_on_one_rank_refuses_the_step_on_all(two_processes, stage):
    result = two_processes[f"nan_on_one_rank:{stage}"]
    assert result["skipped"] == 1
    assert result["unchanged"]
    assert result["losses"] == pytest.approx(run_case("nan_on_one_rank:0")["losses"], abs=1e-5)


@pytest.mark.parametrize("stage", [0, 2])
def test_two_processes_resume_bit_equal(two_processes, stage):
    result = two_processes[f"resume:{stage}"]
    assert result["resumed"] == result["straight"]
    assert result["weights_equal"]
    assert result["client_is_mine"]
    assert result["steps"] == 6


def test_a_checkpoint_of_two_processes_is_refused_on_one(two_processes):
    engine = Engine(make()[0], OptimizerConfig(lr=1e-3), EngineConfig(micro_batch_size=8))
    folder = two_processes["folder"] / "run_0" / "checkpoints" / "step_000003"
    with pytest.raises(UserError, match=r"saved with 2 process\(es\).* this run has 1"):
        engine.load(folder)


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_where_two_stopped(two_processes, stage):
    """Weights and moments are the same bits: the next losses differ by the order of sums alone."""
    folder = two_processes["folder"] / f"moved_{stage}"
    engine, reward = start(stage)
    assert engine.load(folder, any_world_size=True) == {"rank": 0}
    saved = {}
    for file in folder.glob("pieces_rank_*.safetensors"):
        for key, value in load_file(file).items():
            kind, offset, name = key.split("|")
            saved.setdefault(f"{kind}|{name}", []).append((int(offset), value))
    whole = {key: torch.cat([v for _, v in sorted(parts)]) for key, parts in saved.items()}
    for name, value in engine.full_state_dict().items():
        assert torch.equal(value.flatten(), whole[f"weight|{name}"])
    engine.save(folder / "again", {})
    again = load_file(folder / "again" / "pieces_rank_000.safetensors")
    assert len(again) == len(whole)
    for key, value in again.items():
        kind, _, name = key.split("|")
        assert torch.equal(value, whole[f"{kind}|{name}"])
    assert train(engine, reward, range(3, 6)) == pytest.approx(
        two_processes[f"start:{stage}"], rel=1e-5
    )


def test_a_checkpoint_of_another_architecture_is_one_line(two_processes):
    from torch import nn

    small = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    engine = Engine(small, OptimizerConfig(lr=1e-3), EngineConfig(micro_batch_size=8))
    with pytest.raises(
        UserError, match=r"another architecture: it lacks 0.weight, 0.bias, 1.weight"
    ) as e:
        engine.load(two_processes["folder"] / "moved_0", any_world_size=True)
    assert "\n" not in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_processes_resume_bit_equal_at_the_other_stages(tmp_path, stage):
    result = launch(tmp_path, f"resume:{stage}")[f"resume:{stage}"]
    assert result["resumed"] == result["straight"]
    assert result["weights_equal"]


@pytest.mark.slow
def test_the_traps_are_still_there(tmp_path):
    """If one of these stops failing, DeepSpeed has changed: the rules in `reelhf.engine` can be relaxed."""
    results = launch(tmp_path, "loss_backward:2")
    assert "KeyError" in results["loss_backward:2"]["error"]
    results = launch(tmp_path, "two_backwards:2", "two_backwards:3")
    assert results["two_backwards:2"] == "accepted"
    assert "error" in results["two_backwards:3"]
    assert "error" in launch(tmp_path, "reentrant:2")["reentrant:2"]


LAUNCHERS = {
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=PORT",
        "-m",
    ],
    "deepspeed": [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus=2",
        "--master_port=PORT",
        "--no_local_rank",
        "--module",
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launch_lines_of_the_readme_start_every_process(launcher):
    command = [word.replace("PORT", str(free_port())) for word in LAUNCHERS[launcher]]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "reelhf", "doctor"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("took a step") == 2
