"""`reelhf rlhf train` from a shell: alone, under torchrun and under the deepspeed launcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import PROMPTS, VALIDATION_PROMPTS, tiny_generator

from generator import load_generator
from reelhf.run import read_metrics
from rewards.aesthetic import AestheticConfig, AestheticReward
from rewards.foundational import FoundationalConfig, FoundationalReward
from rewards.motion import MotionConfig, MotionReward
from rewards.tokens import train_tokenizer

ARGUMENTS = ["reelhf", "rlhf", "train", "run.yaml", "num_steps=2", "--out", "run"]
LAUNCHERS = {
    "python": [sys.executable, "-m"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
    ],
    "deepspeed": [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        "2",
        "--module",
        "--no_local_rank",
    ],
}


def make_rewards(folder: Path) -> Path:
    """Untrained rewards of the real classes."""
    sizes = {"hidden_size": 48, "num_layers": 1, "area": 32 * 32}
    foundational = FoundationalConfig(**sizes, vision_layers=1, num_frames=2)
    tokenizer = train_tokenizer(PROMPTS, vocab_size=300, dimensions=foundational.dimensions)
    FoundationalReward(foundational, tokenizer).save(folder / "foundational")
    MotionReward(MotionConfig(**sizes), tokenizer).save(folder / "motion")
    AestheticReward(AestheticConfig(**sizes), tokenizer).save(folder / "aesthetic")
    return folder


@pytest.fixture
def workplace(tmp_path) -> Path:
    tiny_generator().save(tmp_path / "base")
    make_rewards(tmp_path / "rewards")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "validation.txt").write_text("\n".join(VALIDATION_PROMPTS))
    config = {
        "generator": "base",
        "rewards": "rewards",
        "held_out": "rewards",
        "prompts": "prompts.txt",
        "validation_prompts": "validation.txt",
        "prompts_per_step": 2,
        "rollout_steps": 2,
        "num_samples": 1,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def launch(launcher: str, folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": root,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.run(
        [*LAUNCHERS[launcher], *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "launcher", ["python", "deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_each_launch_line_trains_and_says_where_the_result_lies(launcher, workplace):
    done = launch(launcher, workplace, ARGUMENTS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "written to run/best" in done.stdout
    assert [row["step"] for row in read_metrics(workplace / "run")] == [0, 1, 2]
    assert load_generator(workplace / "run" / "best").role == "base"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reward_wieghts.motion_quality=2"], "Did you mean 'reward_weights'?"),
        (["reward_weights.motoin_quality=2"], "Did you mean 'motion_quality'?"),
        (["generator=nowhere"], "nowhere is not a generator folder"),
        (["prompts_per_step=0"], "prompts_per_step"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, workplace, capsys):
    from reelhf.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        with pytest.raises(SystemExit) as stopped:
            main(["rlhf", "train", "run.yaml", *arguments, "--out", "run"])
    assert stopped.value.code == 2
    *_, error = re.split(
        r"[\r\n]+", capsys.readouterr().err.strip()
    )  # loading shows its progress before it
    assert error.startswith("error: ")
    assert message in error


def test_dry_run_prints_the_resolved_config_and_writes_nothing(workplace, capsys, monkeypatch):
    from reelhf.cli import main

    monkeypatch.chdir(workplace)
    main(["rlhf", "train", "run.yaml", "optimizer.lr=1e-3", "--out", "run", "--dry-run"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optimizer"]["lr"] == 1e-3
    assert not (workplace / "run").exists()
