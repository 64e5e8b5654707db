"""The text encoder in training beside the denoiser; and every trainer of two networks or split weights on two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from generator.checkpoint import load_generator
from generator.text import TextEncoder
from generator.training.denoiser import DenoiserTrainConfig, train_base
from generator.training.perceptual import PerceptualConfig
from generator.training.text_tuning import PromptEmbedder, keep_what_is_read
from reelhf.run import read_metrics
from tests.generator.joint_worker import train
from tests.generator.test_training_vae_text import TEXT_CONFIG
from tests.generator.test_vae_adversarial import ADVERSARIAL

WORKER = Path(__file__).with_name("joint_worker.py")
TUNED = DenoiserTrainConfig.model_validate(
    {
        "architecture": {"width": 24, "num_heads": 2, "num_pairs": 1},
        "num_frames": 5,
        "height": 32,
        "width": 32,
        "num_steps": 4,
        "batch_size": 4,
        "num_validation": 4,
        "optimizer": {"lr": 2e-3, "warmup_steps": 0},
        "text_tuning": {"lr": 1e-3, "weight_decay": 0.0},
        "ema_decay": 0.5,
        "sampler_steps": 2,
        "save_every": 2,
        "validate_every": 2,
        "num_samples": 0,
        "prompt_dropout": 0.3,
    }
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}/{name}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.fixture(scope="module")
def tuned(tiny_clips, tiny_folders, tmp_path_factory) -> Path:
    return train_base(TUNED, tiny_clips, *tiny_folders, tmp_path_factory.mktemp("tuned") / "run")


def test_a_tuned_text_encoder_is_saved_inside_its_generator(tuned, tiny_folders):
    before = TextEncoder.load(tiny_folders[1])
    after = load_generator(tuned).text
    moved = {
        name: (value - before.state_dict()[name]).abs().max().item()
        for name, value in after.state_dict().items()
    }
    read = [name for name in moved if "layers.0" in name or "embed_tokens" in name]
    assert all(0 < moved[name] < 0.01 for name in read)
    # the second layer lies above the hidden state that is read
    above = [name for name in moved if "layers.1" in name or "model.norm" in name]
    assert above and all(moved[name] == 0 for name in above)
    rows = read_metrics(tuned.parent)
    assert all(row["text/lr"] == 1e-3 for row in rows)
    # a denoiser that predicts nothing yet reads nothing either
    assert [row["text/grad_norm"] > 0 for row in rows] == [False, True, True, True]
    assert [row["step"] for row in rows if "validation/loss" in row] == [2, 4]


def test_a_run_with_a_tuned_text_encoder_continues_bit_for_bit(
    tuned, tiny_clips, tiny_folders, tmp_path
):
    short = TUNED.model_copy(update={"num_steps": 2})
    shutil.rmtree(train_base(short, tiny_clips, *tiny_folders, tmp_path / "run"))
    resumed = train_base(TUNED, tiny_clips, *tiny_folders, tmp_path / "run")
    expected = weights(tuned)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_accumulation_passes_the_same_gradient_to_the_text_encoder(
    tuned, tiny_clips, tiny_folders, tmp_path
):
    split = TUNED.model_copy(update={"gradient_accumulation_steps": 2})
    halves = train_base(split, tiny_clips, *tiny_folders, tmp_path / "run")
    expected, found = (
        [row["text/grad_norm"] for row in read_metrics(run.parent)] for run in (tuned, halves)
    )
    assert found == pytest.approx(expected, rel=1e-4)
    for name, value in weights(tuned).items():
        torch.testing.assert_close(weights(halves)[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_only_what_embeddings_depend_on_is_trained(tiny_parts):
    module = PromptEmbedder(tiny_parts[1])
    keep_what_is_read(module)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert any("layers.0" in name for name in trained)
    assert not any("layers.1" in name or "lm_head" in name for name in trained)
    module.requires_grad_(False)


@pytest.mark.parametrize(
    "update", [{"stage": "refiner"}, {"cache_prompts": True}], ids=["refiner", "cache"]
)
def test_a_frozen_text_encoder_is_not_tuned(update):
    with pytest.raises(ValueError, match="text_tuning is for a base"):
        DenoiserTrainConfig.model_validate({**TUNED.model_dump(), **update})


def test_cached_prompts_serve_a_second_run(tiny_clips, tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("REELHF_CACHE", str(tmp_path / "cache"))
    config = TUNED.model_copy(update={"text_tuning": None, "cache_prompts": True, "num_steps": 1})
    one = train_base(config, tiny_clips, *tiny_folders, tmp_path / "one")
    assert list((tmp_path / "cache" / "prompts").rglob("*.safetensors"))
    monkeypatch.setattr(TextEncoder, "embed", None)  # nothing is encoded again
    two = train_base(config, tiny_clips, *tiny_folders, tmp_path / "two")
    assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())


SCENARIOS = {
    "text": TEXT_CONFIG.model_copy(update={"num_steps": 4}),
    "vae": ADVERSARIAL.model_copy(
        update={
            "num_steps": 4,
            # a distance of features is relative to those of a process's own clips
            "perceptual": PerceptualConfig(),
            "adversarial": ADVERSARIAL.adversarial.model_copy(update={"start_step": 1}),
        }
    ),
    "base": TUNED,
}


@pytest.fixture(scope="module")
def pairs(tiny_clips, tiny_folders, tmp_path_factory) -> Path:
    """Every scenario as `one_<kind>` on one process without ZeRO, and as `two_<kind>` on two under ZeRO-3."""
    root = tmp_path_factory.mktemp("joint")
    scenarios = []
    for kind, config in SCENARIOS.items():
        parts = tiny_folders if kind == "base" else ()
        folders = [str(path) for path in (tiny_clips, *parts)]
        train(kind, config.model_dump(mode="json"), [*folders, str(root / f"one_{kind}")])
        split = {**config.model_dump(mode="json"), "zero_stage": 3}
        scenarios.append(
            {"kind": kind, "config": split, "folders": [*folders, str(root / f"two_{kind}")]}
        )
    (root / "scenarios.json").write_text(json.dumps(scenarios))
    repository = WORKER.parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(str(WORKER), str(root / "scenarios.json")),
        ],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), "DS_ACCELERATOR": "cpu"},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCENARIOS)
def test_split_weights_on_two_processes_train_as_whole_ones_on_one(pairs, kind):
    """A text encoder, a VAE with its discriminators, a denoiser with its text encoder: ZeRO-3 against none."""
    one, two = (read_metrics(pairs / f"{count}_{kind}") for count in ("one", "two"))
    for row, other in zip(one, two, strict=True):
        for key in row.keys() & {"loss", "grad_norm", "text/grad_norm", "discriminator/loss"}:
            assert other[key] == pytest.approx(row[key], rel=1e-3), (row["step"], key)
    folder = "generator" if kind == "base" else kind
    expected, found = (weights(pairs / f"{count}_{kind}" / folder) for count in ("one", "two"))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=5e-5, msg=name)
