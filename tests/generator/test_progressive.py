"""Training in stages: what each stage sees, resume to the bit, other numbers of processes, early stops, adapters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from generator.checkpoint import load_generator
from generator.merge import merge_generators
from generator.training import progressive
from generator.training.lora import LoraSettings, add_lora, apply_lora, merged, save_lora
from generator.training.progressive import encode_stages, train_stages
from reelhf.cli import main
from reelhf.config import to_yaml
from reelhf.errors import UserError
from reelhf.run import RunFolder, read_metrics
from tests.generator.staged_parts import LONG, STAGED, staged, write_manifest

WORKER = Path(__file__).with_name("staged_worker.py")
SFT = {
    "architecture": {},
    "stages": [
        {
            "name": "tuning",
            "buckets": LONG,
            "num_steps": 12,
            "micro_batch_tokens": 48,
            "lr": 1e-3,
            "tasks": {"text_to_image": 0.0, "image_to_video": 0.3},
        }
    ],
}


@pytest.fixture(scope="module")
def data(tiny_folders, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("staged")
    vae, text = tiny_folders
    return encode_stages(staged(), write_manifest(root), root / "latents", vae=vae, text=text)


@pytest.fixture(scope="module")
def whole(data, tiny_folders, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    vae, text = tiny_folders
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train_stages(staged(num_samples=1), data, out, vae=vae, text=text)


def weights(generator: Path) -> dict[str, torch.Tensor]:
    return load_file(generator / "denoiser.safetensors")


def test_a_run_goes_through_its_stages(whole, data):
    rows = read_metrics(whole.parent)
    assert [row["stage"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [row["lr"] for row in rows[:4]] == pytest.approx([1e-3, 2e-3, 2e-3, 1e-3])
    assert rows[-1]["lr"] == pytest.approx(1e-4)
    assert [row["step"] for row in rows if "validation/loss" in row] == [3, 6, 8]
    assert all(row["speed/flops_per_second"] > 0 for row in rows)
    assert "speed/mfu" not in rows[0]  # a CPU has no peak on a data sheet
    generator = load_generator(whole)
    assert (generator.frame_shape, generator.sampler.num_steps) == (staged().frame_shape, 2)
    # a sample at the end of each stage, of that stage's size: a picture, then a clip
    assert sorted(p.name for p in (whole.parent / "samples").iterdir()) == [
        "step_000003",
        "step_000008",
    ]
    assert not torch.equal(generator.denoiser.output.weight, torch.zeros(8, 24))


def test_a_stage_that_saw_pictures_only_learned_from_single_frames(data, tiny_folders, tmp_path):
    """The first stage's batches, through the trainer's own stream."""
    seen = []
    stage = progressive.make_stage

    def watching(*args):
        made = stage(*args)
        batches = made.stream.micro_batches
        made.stream.micro_batches = lambda step: (
            seen.append((made.name, b)) or b for b in batches(step)
        )
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progressive, "make_stage", watching)
        vae, text = tiny_folders
        train_stages(staged(), data, tmp_path / "run", vae=vae, text=text)
    frames = {
        name: {batch.clean.shape[2] for own, batch in seen if own == name}
        for name in ("pictures", "clips")
    }
    assert frames["pictures"] == {1}
    assert frames["clips"] == {1, 2, 3}
    assert all(abs(b.weight) > 0 for _, b in seen)
    steps = [seen[i : i + 2] for i in range(0, len(seen), 2)]
    for step in steps:  # the mean over the samples of a step, whatever its micro-batches hold
        assert sum(len(b) for _, b in step) == step[0][1].samples_of_step
        assert sum(b.weight for _, b in step) == pytest.approx(2)


@pytest.mark.parametrize("killed_at", [2, 4, 6])
def test_a_killed_run_continues_bit_for_bit(killed_at, whole, data, tiny_folders, tmp_path):
    vae, text = tiny_folders
    with pytest.MonkeyPatch.context() as patch:
        save = RunFolder.save_checkpoint

        def saving(run, step, *args, **options):
            path = save(run, step, *args, **options)
            if step == killed_at:
                raise KeyboardInterrupt
            return path

        patch.setattr(RunFolder, "save_checkpoint", saving)
        with pytest.raises(KeyboardInterrupt):
            train_stages(staged(), data, tmp_path / "run", vae=vae, text=text)
    resumed = train_stages(staged(), data, tmp_path / "run", vae=vae, text=text)
    expected, actual = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in read_metrics(whole.parent)] == [
            r[key] for r in read_metrics(tmp_path / "run")
        ]


def test_a_run_with_other_clips_or_another_architecture_is_refused_in_one_line(
    whole, data, tiny_folders, tmp_path
):
    vae, text = tiny_folders
    out = shutil.copytree(whole.parent, tmp_path / "run")
    with pytest.raises(UserError, match="other settings or other clips") as error:
        train_stages(staged(seed=1), data, out, vae=vae, text=text)
    wider = staged(architecture={"width": 36, "num_heads": 2, "num_pairs": 1})
    with pytest.raises(
        UserError, match="checkpoint of another architecture: other shapes"
    ) as error:
        train_stages(wider, data, out, vae=vae, text=text)
    assert "\n" not in str(error.value)


def test_measured_run_times_are_kept_and_packed_with_again(data, tiny_folders, tmp_path):
    vae, text = tiny_folders
    config = staged(balance="measured", stages=STAGED["stages"][:1])
    first = train_stages(config, data, tmp_path / "run", vae=vae, text=text)
    table = json.loads((tmp_path / "run" / "runtime.json").read_text())
    assert set(table) == {"1x32x32", "5x32x32"}
    assert all(seconds > 0 for seconds in table.values())
    before = weights(first)
    again = train_stages(config, data, tmp_path / "run", vae=vae, text=text)
    assert json.loads((tmp_path / "run" / "runtime.json").read_text()) == table
    assert all(torch.equal(before[name], value) for name, value in weights(again).items())
    # a table that knows nothing of these buckets belongs to another run
    (tmp_path / "run" / "runtime.json").write_text('{"5x64x64": 1.0}')
    with pytest.raises(UserError, match="no run time of bucket 1x32x32, 5x32x32"):
        train_stages(config, data, tmp_path / "run", vae=vae, text=text)


def test_fine_tuning_on_a_subset_stops_early_and_keeps_its_best(whole, data, tmp_path, capsys):
    """A rate far too high makes the loss on clips kept out worse; what is kept is the best, not the last."""
    changes = {"subset": "odd", "early_stop": {"patience": 2}, "lr": 0.3, "num_steps": 40}
    tuning = {**SFT["stages"][0], **changes}
    config = staged(**{**SFT, "stages": [tuning], "validate_every": 1, "save_every": 3})
    folder = train_stages(config, data, tmp_path / "run", init=whole)
    rows = read_metrics(tmp_path / "run")
    losses = [row["validation/loss"] for row in rows]
    assert len(rows) < 40
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2
    assert (
        f"stopped early at step {len(rows)}: the validation loss was best at step {best + 1}"
        in (capsys.readouterr().err)
    )
    again = train_stages(config, data, tmp_path / "run", init=whole)  # nothing is left to do
    assert len(read_metrics(tmp_path / "run")) == len(rows)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(folder).values(), weights(again).values(), strict=True)
    )
    shorter = staged(
        **{
            **SFT,
            "stages": [{**tuning, "num_steps": best + 1}],
            "validate_every": 1,
            "save_every": 3,
        }
    )
    direct = train_stages(shorter, data, tmp_path / "direct", init=whole)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(folder).values(), weights(direct).values(), strict=True)
    )


def test_models_of_two_subsets_merge(whole, data, tmp_path):
    folders = []
    for tag in ("odd", "even"):
        stage = {**SFT["stages"][0], "subset": tag, "num_steps": 2}
        config = staged(**{**SFT, "stages": [stage]})
        folders.append(train_stages(config, data, tmp_path / tag, init=whole))
    merge_generators(folders, tmp_path / "merged")
    both, one, other = (weights(path) for path in (tmp_path / "merged", *folders))
    for name, value in both.items():
        torch.testing.assert_close(value, (one[name] + other[name]) / 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"subset": "evn"},
            r"no clip has the tag 'evn'. Did you mean 'even'\? There are: even, odd",
        ),
        ({"buckets": {**LONG, "fps": 12}}, "holds no clips encoded for its buckets"),
    ],
)
def test_a_stage_without_clips_is_one_line(change, said, whole, data, tmp_path):
    config = staged(**{**SFT, "stages": [{**SFT["stages"][0], **change}]})
    with pytest.raises(UserError, match=said):
        train_stages(config, data, tmp_path / "run", init=whole)


def test_going_on_from_another_architecture_is_one_line(whole, data, tmp_path):
    config = staged(**{**SFT, "architecture": {"width": 48, "num_heads": 2}})
    with pytest.raises(
        UserError, match="another architecture: width is 48 in the config, 24 there"
    ):
        train_stages(config, data, tmp_path / "run", init=whole)
    with pytest.raises(UserError, match="lora adapts a generator: name it with --init"):
        train_stages(staged(lora={"rank": 2}), data, tmp_path / "run")


def test_a_dead_data_folder_is_found_before_any_step(data, tiny_folders, tmp_path):
    vae, text = tiny_folders
    copy = shutil.copytree(data, tmp_path / "latents")
    first = next((copy / "latents").glob("*/*.safetensors"))
    first.unlink()
    with pytest.raises(UserError, match=r"the latents of 1 of \d+ windows are missing"):
        train_stages(staged(), copy, tmp_path / "run", vae=vae, text=text)
    assert not (tmp_path / "run").exists()


def test_a_window_that_is_not_finite_is_named_and_refused(data, tiny_folders, tmp_path, capsys):
    vae, text = tiny_folders
    copy = shutil.copytree(data, tmp_path / "latents")
    for file in (copy / "latents").glob("*/*.safetensors"):
        latents = load_file(file)["latents"]
        if latents.shape[1] == 1 and "done" not in str(file):
            save_file({"latents": latents * float("nan")}, file)
            break
    config = staged(stages=[{**STAGED["stages"][0], "num_steps": 4}], num_validation=1)
    folder = train_stages(config, copy, tmp_path / "run", vae=vae, text=text)
    said = capsys.readouterr().err
    rows = read_metrics(tmp_path / "run")
    assert sum(row["skipped"] for row in rows) >= 1
    assert "the loss of micro-batch" in said and "is nan, and the gradient is not finite in" in said
    assert ".png at 0.00 s (1x32x32) (loss nan)" in said
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


LORA = {"rank": 2, "alpha": 4.0, "targets": [".q", ".kv"]}


def test_adapters_are_trained_saved_merged_and_loaded(whole, data, tmp_path, capsys):
    config = staged(**{**SFT, "lora": LORA})
    folder = train_stages(config, data, tmp_path / "run", init=whole)
    parent, tuned = weights(whole), weights(folder)
    assert parent.keys() == tuned.keys()
    moved = {name for name in parent if not torch.equal(parent[name], tuned[name])}
    assert moved and all(name.endswith((".q.weight", ".kv.weight")) for name in moved)
    again = apply_lora(load_generator(whole), tmp_path / "run" / "lora").denoiser.state_dict()
    for name, value in tuned.items():
        torch.testing.assert_close(again[name], value)
    # peft reads it as its own
    state = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") and ".lora_" in key for key in state)
    from peft import LoraConfig

    assert LoraConfig.from_pretrained(tmp_path / "run" / "lora").r == 2
    main(
        [
            "generator",
            "sample",
            str(whole),
            "--lora",
            str(tmp_path / "run" / "lora"),
            "--prompt",
            "x",
        ]
        + ["--out", str(tmp_path / "clips")]
    )
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 1


def test_an_adapter_of_another_architecture_is_refused_naming_its_keys(tiny_generator, tmp_path):
    backbone = tiny_generator()
    settings = LoraSettings(rank=2)
    before = {name: value.clone() for name, value in backbone.denoiser.state_dict().items()}
    add_lora(backbone.denoiser, settings, backbone.lora_targets())
    plain = merged(backbone.denoiser).state_dict()
    assert plain.keys() == before.keys()
    assert all(torch.equal(plain[name], before[name]) for name in before)  # neutral at first
    save_lora(backbone.denoiser, settings, tmp_path / "lora")
    other = tiny_generator()
    apply_lora(other, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    state = load_file(file)
    wrong = {key.replace("spatial.0", "spatial.7"): value for key, value in state.items()}
    save_file(wrong, file)
    with pytest.raises(
        UserError, match=r"fit no layer of this generator: base_model\.model\.spatial\.7"
    ):
        apply_lora(other, tmp_path / "lora")
    key = next(iter(state))
    save_file({**state, key: torch.zeros(1, 1)}, file)
    with pytest.raises(UserError, match=r"2 of the .* keys"):  # one bad half spoils the pair
        apply_lora(other, tmp_path / "lora")
    file.write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        apply_lora(other, tmp_path / "lora")
    with pytest.raises(UserError, match=r"no layer's name ends in '\.qkv'"):
        add_lora(other.denoiser, LoraSettings(targets=(".qkv",)), other.lora_targets())


def test_the_command_trains_from_a_yaml(data, tiny_folders, tmp_path, capsys):
    vae, text = tiny_folders
    stage = {**STAGED["stages"][0], "num_steps": 1}
    (tmp_path / "stages.yaml").write_text(to_yaml(staged(stages=[stage])))
    command = ["generator", "train", str(tmp_path / "stages.yaml")]
    main([*command, "stages.0.num_steps=2", "--dry-run"])
    assert "num_steps: 2" in capsys.readouterr().out
    for options, said in (
        ([], "'base' needs --data, --vae, --text, --out"),
        (["--init", str(tmp_path / "no")], "'base' needs --data, --out"),
        (["--data", str(tmp_path / "no"), "--vae", str(vae), "--text", str(text), "--out", "x"],
         "there is no such folder"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as refused:
            main([*command, *options])
        assert refused.value.code == 2
        assert said in capsys.readouterr().err
    out = ["--vae", str(vae), "--text", str(text), "--out", str(tmp_path / "run")]
    main([*command, "--data", str(data), *out])
    assert "next: reelhf generator sample" in capsys.readouterr().out


@pytest.mark.slow
def test_the_readmes_launch_line_trains_in_stages(data, tiny_folders, tmp_path):
    vae, text = tiny_folders
    (tmp_path / "stages.yaml").write_text(to_yaml(staged()))
    root = Path(__file__).parents[2]
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "reelhf"]
    line += ["generator", "train", str(tmp_path / "stages.yaml"), "--data", str(data)]
    line += ["--vae", str(vae), "--text", str(text), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        line,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 9))
    assert load_generator(tmp_path / "run" / "generator").role == "base"


def launch(processes: int, scenarios: list[dict], folder: Path) -> None:
    """Run the scenarios one after another on this many processes."""
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, str(WORKER), str(folder / "scenarios.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def same_course(one: Path, two: Path, *, rel: float = 1e-4) -> None:
    """Losses of every step, and the weights kept, up to the order of sums."""
    first, second = read_metrics(one), read_metrics(two)
    assert len(first) == len(second)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in second] == pytest.approx([row[key] for row in first], rel=rel)
    for name, value in weights(one / "generator").items():
        torch.testing.assert_close(weights(two / "generator")[name], value, rtol=1e-3, atol=1e-5)


ZERO_STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def runs(data, tiny_folders, tmp_path_factory) -> Path:
    """Per ZeRO stage, `<stage>_<name>`: one process, two, one stopped and two going on, two stopped and one going on.

    And `shared`: two processes that share every clip.
    """
    root = tmp_path_factory.mktemp("processes")
    vae, text = tiny_folders
    common = {"data": str(data), "vae": str(vae), "text": str(text)}

    def scenario(name: str, zero_stage: int, **more: object) -> dict:
        sharing = 2 if name == "shared" else 1
        config = staged(zero_stage=zero_stage, micro_batches=4, sequence_parallel=sharing)
        out = str(root / f"{zero_stage}_{name}")
        return {**common, "config": config.model_dump(mode="json"), "out": out, **more}

    first = [scenario("one", 0, gradients=True), *(scenario("one", s) for s in ZERO_STAGES[1:])]
    launch(1, [*first, *(scenario("from_one", s, stop_after=4) for s in ZERO_STAGES)], root)
    second = [scenario("two", 0, gradients=True), *(scenario("two", s) for s in ZERO_STAGES[1:])]
    second += [scenario("from_two", s, stop_after=4) for s in ZERO_STAGES]
    second += [scenario("from_one", s) for s in ZERO_STAGES]
    launch(2, [*second, scenario("shared", 0), scenario("shared", 2)], root)
    for stage in ZERO_STAGES:
        assert len(read_metrics(root / f"{stage}_from_two")) == 4
    launch(1, [scenario("from_two", s) for s in ZERO_STAGES], root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "from_one", "from_two"])
@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_two_processes_equal_one_and_either_goes_on_for_the_other(zero_stage, name, runs):
    """Same global batches and seeds, fp32."""
    same_course(runs / f"{zero_stage}_one", runs / f"{zero_stage}_{name}")
    attempts = [row["attempt"] for row in read_metrics(runs / f"{zero_stage}_{name}")]
    assert attempts == ([1] * 8 if name == "two" else [1] * 4 + [2] * 4)


@pytest.mark.slow
def test_the_first_gradient_of_two_processes_is_that_of_one(runs):
    one, two = (torch.load(runs / f"0_{name}.gradients.pt") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5 * scale + 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_two_processes_that_share_every_clip_train_as_one(zero_stage, runs):
    one, shared = (runs / f"{zero_stage}_{name}" for name in ("one", "shared"))
    same_course(one, shared)
    # and its clips were shared, not dealt out, which would take the same course
    used = {out: int(out.with_suffix(".shared").read_text()) for out in (one, shared)}
    assert used[one] == 0
    assert used[shared] > 0
