from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from generator.training.denoiser import DenoiserTrainConfig
from reelhf.cli import main
from reelhf.clips import load_clip_folder
from reelhf.config import load_config
from reelhf.video import probe_video, read_video, write_video

CONFIGS = Path(__file__).parents[2] / "configs"


def fails(capsys, *words: object) -> str:
    """Run a command that must end with exit code 2 and one line; that line."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


@pytest.mark.parametrize("name", ["base_toy", "base_smoke", "refiner_toy", "refiner_smoke"])
def test_every_denoiser_yaml_loads(name, capsys):
    config = load_config(DenoiserTrainConfig, CONFIGS / "generator" / f"{name}.yaml")
    assert config.stage == name.split("_")[0]
    main(["generator", "train", f"configs/generator/{name}.yaml", "num_steps=3", "--dry-run"])
    assert "num_steps: 3" in capsys.readouterr().out


def test_sampled_clips_are_a_captioned_folder_that_a_refiner_reads(
    tiny_generator, tmp_path, capsys
):
    tiny_generator("base", 32).save(tmp_path / "base")
    tiny_generator("refiner", 64).save(tmp_path / "refiner")
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star\n")
    main(
        ["generator", "sample", str(tmp_path / "base"), "--prompts", str(tmp_path / "prompts.txt")]
        + ["--seeds", "2", "--first-seed", "5", "--out", str(tmp_path / "clips")]
    )
    assert "next: reelhf generator refine" in capsys.readouterr().out
    entries = load_clip_folder(tmp_path / "clips")
    assert [entry.caption for entry in entries] == ["a red circle"] * 2 + ["a blue star"] * 2
    rows = [
        json.loads(line) for line in (tmp_path / "clips/captions.jsonl").read_text().splitlines()
    ]
    assert [row["seed"] for row in rows] == [5, 6, 5, 6]
    main(
        ["generator", "refine", str(tmp_path / "refiner"), "--clips", str(tmp_path / "clips")]
        + ["--out", str(tmp_path / "refined"), "--batch-size", "3"]
    )
    refined = load_clip_folder(tmp_path / "refined")
    assert [entry.caption for entry in refined] == [entry.caption for entry in entries]
    info = probe_video(refined[0].path)
    assert (info.frames, info.fps, info.height, info.width) == (5, 8.0, 64, 64)


def test_a_first_frame_may_come_from_an_image_or_a_video(tiny_generator, tmp_path):
    tiny_generator("base", 32).save(tmp_path / "base")
    write_video(tmp_path / "first.mp4", torch.rand(3, 2, 48, 32), 8.0)
    main(
        ["generator", "sample", str(tmp_path / "base"), "--prompt", "a red circle"]
        + ["--image", str(tmp_path / "first.mp4"), "--out", str(tmp_path / "clips")]
    )
    assert len(load_clip_folder(tmp_path / "clips")) == 1


def test_where_clips_start_and_end_may_both_be_given(tiny_generator, tmp_path, capsys):
    tiny_generator("base", 32).save(tmp_path / "base")
    write_video(tmp_path / "picture.mp4", torch.rand(3, 2, 48, 32), 8.0)
    sample = ["generator", "sample", tmp_path / "base", "--prompt", "a red circle"]
    made = []
    for index, options in enumerate(
        ([], ["--first-frame"], ["--last-frame"], ["--first-frame", "--last-frame"])
    ):
        given = [word for option in options for word in (option, tmp_path / "picture.mp4")]
        main([str(word) for word in [*sample, *given, "--out", tmp_path / str(index)]])
        made.append(read_video(load_clip_folder(tmp_path / str(index))[0].path)[0])
    for one, other in itertools.combinations(made, 2):
        assert not torch.equal(one, other)
    capsys.readouterr()
    missing = ["--last-frame", tmp_path / "none.png", "--out", tmp_path / "out"]
    assert "none.png" in fails(capsys, *sample, *missing)


def test_prompts_of_one_and_two_shots_are_sampled_together(tiny_generator, tmp_path, capsys):
    tiny_generator("base", 32).save(tmp_path / "base")
    two = "[SHOT 1] a red circle [CUT] [SHOT 2] a blue square"
    (tmp_path / "prompts.txt").write_text(f"a red circle\n{two}\n")
    sample = ["generator", "sample", str(tmp_path / "base")]
    main([*sample, "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "clips")])
    assert [entry.caption for entry in load_clip_folder(tmp_path / "clips")] == [
        "a red circle",
        two,
    ]
    capsys.readouterr()
    out = ["--out", tmp_path / "out"]
    three = f"{two} [CUT] [SHOT 3] a star"
    said = fails(capsys, *sample, "--prompt", "fine", "--prompt", three, *out)
    assert "3 shots for a clip of 5 frames, which has room for 2" in said
    assert "has 4b; use 4 or 8" in fails(
        capsys, *sample, "--prompt", two.replace("SHOT 2", "SHOT 2: 5 frames"), *out
    )
    assert "there is no [CUT] before" in fails(
        capsys, *sample, "--prompt", two.replace("[CUT]", ""), *out
    )
    assert "--prompt is empty" in fails(capsys, *sample, "--prompt", " ", "--prompt", "a", *out)
    assert not (tmp_path / "out").exists()


def test_steps_solver_and_guidance_may_be_others_than_the_checkpoints(
    tiny_generator, tmp_path, capsys
):
    tiny_generator("base", 32).save(tmp_path / "base")
    sample = ["generator", "sample", tmp_path / "base", "--prompt", "a red circle"]
    made = {}
    for name, options in {
        "own": [],
        "again": [],
        "adams": ["--steps", "6", "--solver", "adams"],
        "guided": ["--guidance", "4", "--guidance-rescale", "0.7", "--negative", "blue"],
    }.items():
        main([str(word) for word in [*sample, *options, "--out", tmp_path / name]])
        made[name] = read_video(load_clip_folder(tmp_path / name)[0].path)[0]
    assert torch.equal(made["own"], made["again"])
    assert not torch.equal(made["own"], made["adams"])
    assert not torch.equal(made["own"], made["guided"])
    capsys.readouterr()
    out = ["--out", tmp_path / "out"]
    said = fails(capsys, *sample, "--solver", "heun", *out)
    assert "sampler kind 'heun'; expected 'euler' or 'adams' or 'renoise'" in said
    assert "only diffusers models take other sizes" in fails(capsys, *sample, "--frames", "9", *out)
    said = fails(capsys, *sample, "--guidance", "1", "--negative", "x", *out)
    assert "works through guidance" in said
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_bad_input_is_one_line_and_exit_code_two(tiny_generator, tmp_path, capsys):
    tiny_generator("base", 32).save(tmp_path / "base")
    capsys.readouterr()  # transformers draws a bar while it saves
    out = ["--out", tmp_path / "out"]
    toy = "configs/generator/base_toy.yaml"
    assert "did you mean 'base'" in fails(capsys, "generator", "train", "stage=bas").lower()
    assert "names no stage" in fails(capsys, "generator", "train", "num_steps=3")
    assert "num_stepz" in fails(capsys, "generator", "train", toy, "num_stepz=3", "--dry-run")
    assert "'base' needs --clips, --vae, --text, --out" in fails(capsys, "generator", "train", toy)
    absent = [f"--{name}={tmp_path / 'nowhere'}" for name in ("clips", "vae", "text")]
    assert "there is no such folder" in fails(capsys, "generator", "train", toy, *absent, *out)
    assert "no prompts" in fails(capsys, "generator", "sample", tmp_path / "base", *out)
    assert "this command needs a refiner" in fails(
        capsys, "generator", "refine", tmp_path / "base", "--clips", tmp_path, *out
    )
    assert "not a generator folder" in fails(
        capsys, "generator", "sample", tmp_path, "--prompt", "x", *out
    )
