from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from generator.dit import DiT
from generator.sampling import refine_frames
from generator.training.denoiser import DenoiserTrainConfig
from generator.training.lora import LoraSettings, adaptable, add_lora, save_lora
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


def test_clips_are_decoded_in_chunks_and_tiles_into_their_files(tiny_generator, tmp_path, capsys):
    backbone = tiny_generator("base", 160)
    backbone.save(tmp_path / "base")
    sample = ["generator", "sample", tmp_path / "base", "--prompt", "a red circle"]
    ways = {"whole": [], "chunks": ["--decode-chunk", "1"], "tiles": ["--tile", "128"]}
    ways["tiled chunks"] = ["--tile", "128", "--decode-chunk", "1"]
    clips = {}
    for name, options in ways.items():
        main([str(word) for word in [*sample, *options, "--out", tmp_path / name]])
        clips[name] = read_video(tmp_path / name / "0000_seed0.mp4")[0].float()
    write_video(tmp_path / "expected.mp4", backbone.sample("a red circle")[0], backbone.fps)
    expected = read_video(tmp_path / "expected.mp4")[0].float()
    for name, clip in clips.items():
        assert (clip - expected).abs().mean() < 0.1, name
    capsys.readouterr()
    out = ["--out", tmp_path / "none"]
    assert "tile size 40 is not a multiple of 16" in fails(capsys, *sample, "--tile", "40", *out)
    assert "cannot overlap by 48" in fails(
        capsys, *sample, "--tile", "64", "--tile-overlap", "48", *out
    )
    assert "--tile-overlap without --tile" in fails(capsys, *sample, "--tile-overlap", "16", *out)
    assert not (tmp_path / "none").exists()


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


def test_a_cascade_in_one_call_is_sampling_and_refining(tiny_generator, tmp_path, capsys):
    base, refiner = tiny_generator("base", 32), tiny_generator("refiner", 64)
    base.save(tmp_path / "base")
    refiner.save(tmp_path / "refiner")
    sample = ["generator", "sample", str(tmp_path / "base"), "--prompt", "a red circle"]
    sample += ["--seeds", "2", "--refiner", str(tmp_path / "refiner"), "--out"]
    main([*sample, str(tmp_path / "clips")])
    assert "next: reelhf annotate quickstart" in capsys.readouterr().out
    prompts = ["a red circle"] * 2
    whole = base.sample(prompts, refiner=refiner)
    in_turn = refine_frames(refiner, base.sample(prompts), prompts, [0, 1])
    torch.testing.assert_close(whole, in_turn)
    for entry, expected in zip(load_clip_folder(tmp_path / "clips"), whole, strict=True):
        write_video(tmp_path / "expected.mp4", expected, refiner.fps)  # the codec loses the same
        frames, wanted = (read_video(f)[0].float() for f in (entry.path, tmp_path / "expected.mp4"))
        assert frames.shape == (3, 5, 64, 64)
        assert (frames - wanted).abs().mean() < 0.1
    tiny_generator("refiner", 16).save(tmp_path / "smaller")
    sample[sample.index(str(tmp_path / "refiner"))] = str(tmp_path / "smaller")
    assert "no larger: 16 x 16" in fails(capsys, *sample, str(tmp_path / "none"))


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("num_frames=10",), "10 frames: the causal VAE needs 1 + 4 * n frames; use 9 or 13"),
        (("height=50",), "height 50 is not a positive multiple of 16; use 48 or 64"),
        (("fps=0",), "key 'fps' is 0"),
        (("--clips", "dead"), "--clips dead: there is no such folder"),
        (("--clips", "empty"), "empty"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(
    words, said, tiny_clips, tiny_folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    vae, text = tiny_folders
    size = ("num_frames=5", "height=32", "width=32")
    parts = ("--clips", tiny_clips, "--vae", vae, "--text", text, "--out", "run")
    toy = "configs/generator/base_toy.yaml"
    line = fails(capsys, "generator", "train", toy, *size, *parts, *words)
    assert said in line
    assert not (tmp_path / "run" / "generator").exists()
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt", " "), "--prompt is empty"),
        (
            ("--prompt", "[SHOT 1] a [CUT] [SHOT 2] b [CUT] [SHOT 3] c"),
            "a prompt of 3 shots for a clip of 5 frames, which has room for 2",
        ),
        (
            ("--prompt", "x", "--lora", "foreign"),
            "keys in foreign/adapter_model.safetensors fit no layer",
        ),
        (("--prompt", "x", "--attention", "flash"), "key 'attention' is 'flash'"),
    ],
)
def test_what_cannot_be_sampled_leaves_nothing(
    words, said, tiny_generator, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    base = tiny_generator()
    base.save(tmp_path / "base")
    wide = DiT(base.denoiser.config.model_copy(update={"num_pairs": 3}))
    settings = LoraSettings(rank=2, targets=(".q",))
    add_lora(wide, settings, adaptable(wide))
    save_lora(wide, settings, tmp_path / "foreign")
    line = fails(capsys, "generator", "sample", "base", "--out", "clips", *words)
    assert said in line
    if "--lora" in words:
        assert "spatial.2." in line  # the keys are named
    assert not (tmp_path / "clips").exists()


def test_attention_without_padding_samples_the_same_clips(tiny_generator, tmp_path):
    tiny_generator().save(tmp_path / "base")
    made = []
    for words in ([], ["--attention", "packed"]):
        out = tmp_path / f"clips{len(made)}"
        prompts = ["--prompt", "a red circle", "--prompt", "[SHOT 1] a [CUT] [SHOT 2] blue square"]
        main(["generator", "sample", str(tmp_path / "base"), *prompts, "--out", str(out), *words])
        made.append([read_video(file)[0].float() for file in sorted(out.glob("*.mp4"))])
    for one, other in zip(*made, strict=True):
        assert (one - other).abs().max() <= 2  # of 255, after the video's coding


def test_a_vae_report_prints_and_keeps_what_it_measured(
    tiny_generator, tiny_clips, tmp_path, capsys
):
    backbone = tiny_generator("base", 32)
    backbone.save(tmp_path / "base")
    words = ["generator", "vae-report", tmp_path / "base", "--clips", tiny_clips]
    size = ["--num-frames", "5", "--height", "48", "--width", "64", "--max-clips", "6"]
    out = tmp_path / "report.json"
    main([str(word) for word in [*words, *size, "--out", out]])
    said = capsys.readouterr().out
    report = json.loads(out.read_text())
    (row,) = report["reconstructions"]
    assert (row["clips"], row["num_frames"], row["height"], row["width"]) == (6, 5, 48, 64)
    assert f"6 clips of 5 frames at 48x64: PSNR {row['psnr']:.2f} dB" in said
    assert f"SSIM {row['ssim']:.4f}" in said and f"flicker {row['flicker']:.2f} of 255" in said
    assert report["clips"] == str(tiny_clips) and report["fps"] == 8.0

    backbone.vae.save(tmp_path / "vae")  # the VAE's own folder, and images
    words[2] = tmp_path / "vae"
    main([str(word) for word in [*words, *size[2:], "--num-frames", "1", "--out", out]])
    (image,) = json.loads(out.read_text())["reconstructions"]
    assert image["flicker"] is None and image["num_frames"] == 1

    capsys.readouterr()
    assert "height 50 is not" in fails(capsys, *words, "--height", "50", "--out", out)
    assert "there is no such folder" in fails(capsys, *words[:4], tmp_path / "none")
    assert "--fps 0.0; expected" in fails(capsys, *words, "--fps", "0")
    words[2] = tiny_clips
    assert "is not a VAE folder: vae.json is missing" in fails(capsys, *words, *size)


def test_training_a_vae_ends_with_its_report(tiny_clips, tmp_path, capsys):
    config = ["configs/generator/vae_smoke.yaml", "num_steps=1", "batch_size=2"]
    main(["generator", "train", *config, "--clips", str(tiny_clips), "--out", str(tmp_path / "v")])
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "v" / "vae_report.json").read_text())["reconstructions"]
    assert [row["height"] for row in rows] == [64, 32]
    for row in rows:
        assert f"at {row['height']}x{row['width']}: PSNR {row['psnr']:.2f} dB" in said


@pytest.mark.realdata
def test_real_footage_is_rebuilt_by_a_vae_that_saw_a_little_of_it(real_data, tmp_path, capsys):
    """Fitted and trained for a few steps on windows of some clips; those of another are held out."""
    config = ["configs/generator/vae_smoke.yaml", "num_steps=10", "max_clips=64"]
    main(
        [
            "generator",
            "train",
            *config,
            "--clips",
            str(real_data / "clips"),
            "--out",
            str(tmp_path / "v"),
        ]
    )
    rows = json.loads((tmp_path / "v" / "vae_report.json").read_text())["reconstructions"]
    print(capsys.readouterr().out)
    assert rows[0]["psnr"] > 17 and rows[0]["ssim"] > 0.3  # a scene of its own, after ten steps
