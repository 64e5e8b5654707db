"""`reelhf generator train | vae-report | eval | sample | refine | merge`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from generator.data.commands import app as data_app
from reelhf.cli_config import read_config_words, report_result
from reelhf.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from generator.adapters.base import DiffusersBackbone
    from generator.checkpoint import DiTGenerator
    from generator.tiling import Tiling
    from generator.vae import VideoVAE
    from reelhf.config import Config

app = typer.Typer(help="Train, sample, refine and merge video generators.", no_args_is_help=True)
app.add_typer(data_app, name="data")

DecodeChunk = Annotated[
    int | None, typer.Option(min=1, help="latent frames decoded at a time; fewer take less memory")
]
TileSize = Annotated[
    int | None, typer.Option(min=1, help="decode in square tiles of this side in pixels")
]
TileOverlap = Annotated[
    int | None,
    typer.Option(
        min=0, help="pixels two tiles share; by default what makes tiling exact, if it fits"
    ),
]

# stage -> (config, function, the folders it needs besides --clips and --out, what to run next)
STAGES: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "text": (
        "generator.training.text:TextTrainConfig",
        "generator.training.text:train_text_encoder",
        (),
        "reelhf generator train configs/generator/base_toy.yaml --clips DIR --vae DIR --text {out} --out DIR",
    ),
    "vae": (
        "generator.training.vae:VAETrainConfig",
        "generator.training.vae:train_vae",
        (),
        "reelhf generator train configs/generator/base_toy.yaml --clips DIR --vae {out} --text DIR --out DIR",
    ),
    "base": (
        "generator.training.denoiser:DenoiserTrainConfig",
        "generator.training.denoiser:train_base",
        ("vae", "text"),
        "reelhf generator sample {out} --prompts prompts.txt --out DIR",
    ),
    "base in stages": (
        "generator.training.denoiser:DenoiserTrainConfig",
        "generator.training.progressive:train_stages",
        ("vae", "text"),
        "reelhf generator sample {out} --prompts prompts.txt --out DIR",
    ),
    "refiner": (
        "generator.training.denoiser:DenoiserTrainConfig",
        "generator.training.denoiser:train_refiner",
        ("base",),
        "reelhf distill train configs/distill/consistency_toy.yaml --teacher {out} --base DIR --clips DIR --out DIR",
    ),
    "refiner in stages": (
        "generator.training.denoiser:DenoiserTrainConfig",
        "generator.training.progressive:train_stages",
        ("base",),
        "reelhf generator sample BASE --refiner {out} --prompts prompts.txt --out DIR",
    ),
}


@app.command()
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG.yaml [KEY=VALUE]...", show_default=False),
    ] = None,
    clips: Annotated[Path | None, typer.Option(help="folder of captioned clips")] = None,
    vae: Annotated[Path | None, typer.Option(help="trained VAE (stage: base)")] = None,
    text: Annotated[Path | None, typer.Option(help="trained text encoder (stage: base)")] = None,
    base: Annotated[Path | None, typer.Option(help="base generator (stage: refiner)")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="in place of --clips: what `generator data encode` made (`stages:`)"),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="in place of --vae and --text: generator to go on from (`stages:`)"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where the result goes")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved config and stop")
    ] = False,
) -> None:
    """Train the stage that the YAML's `stage:` names: text, vae, base or refiner. Run it again to resume.

    What lists `stages:` in its YAML is trained through them from encoded clips: --data instead of --clips; a base either from --vae and
    --text or from --init, a refiner from --base, and from --init if it goes on. It resumes on another number of processes too.
    """
    from reelhf.cli import load
    from reelhf.config import to_yaml

    stage = _stage_of(words or [])
    config_class, function, needed, next_step = STAGES[stage]
    config: Config = read_config_words(load(config_class), words or [])
    if dry_run:
        typer.echo(to_yaml(config), nl=False)
        return
    source, given = "clips", {"clips": clips, "vae": vae, "text": text, "base": base}
    if getattr(config, "stages", ()):
        _, function, needed, next_step = STAGES[f"{stage} in stages"]
        source, given = "data", {**given, "data": data, "init": init}
        if init is not None:
            needed = ("init",) if stage == "base" else ("base", "init")
    folders: dict[str, Path | None] = {name: given[name] for name in (source, *needed)}
    missing = [f"--{name}" for name, path in {**folders, "out": out}.items() if path is None]
    if missing:
        raise UserError(f"stage '{stage}' needs {', '.join(missing)}; `--help` says what each is.")
    for name, path in folders.items():
        if path is not None and not path.is_dir():
            raise UserError(f"--{name} {path}: there is no such folder")
    result = load(function)(config, **folders, out=out)
    if stage == "vae":
        from generator.reconstruction import REPORT_NAME, read_report

        for row in read_report(out / REPORT_NAME):
            typer.echo(f"held out: {row}")
    report_result(result, next_step)


@app.command("vae-report")
def vae_report(
    vae: Annotated[Path, typer.Argument(help="folder of a VAE, or of a generator that has one")],
    clips: Annotated[Path, typer.Option(help="folder of clips it has not seen")],
    out: Annotated[Path, typer.Option(help="JSON file to write")] = Path("vae_report.json"),
    num_frames: Annotated[int, typer.Option(min=1, help="per window")] = 17,
    height: Annotated[int, typer.Option(min=1, help="in pixels")] = 128,
    width: Annotated[int, typer.Option(min=1, help="in pixels")] = 128,
    fps: Annotated[float, typer.Option(help="frames per second of the windows")] = 8.0,
    max_clips: Annotated[int, typer.Option(min=1, help="windows at most")] = 32,
    seed: Annotated[int, typer.Option(help="of the windows' places")] = 0,
    tile: TileSize = None,
    tile_overlap: TileOverlap = None,
) -> None:
    """How well a VAE rebuilds clips: PSNR, SSIM and temporal flicker, printed and kept as JSON."""
    from generator.reconstruction import measure_reconstruction, write_report
    from generator.vae import VideoVAE
    from reelhf.clips import load_folder_windows
    from reelhf.engine import device

    if not clips.is_dir():
        raise UserError(f"--clips {clips}: there is no such folder")
    if fps <= 0:
        raise UserError(f"--fps {fps}; expected a rate above 0")
    folder = vae / "vae" if (vae / "vae").is_dir() else vae
    model = VideoVAE.load(folder).to(device())
    model.spec.check(num_frames, height, width)
    tiling = _tiling(model, tile, tile_overlap)
    windows = load_folder_windows(
        clips, frame_shape=(num_frames, height, width), fps=fps, max_windows=max_clips, seed=seed
    )
    row = measure_reconstruction(
        partial(model.reconstruct, tiling=tiling), windows.frames, batch=1 if tile else 8
    )
    typer.echo(str(row))
    write_report(out, [row], vae=str(vae), clips=str(clips), fps=fps, seed=seed)
    report_result(out)


@app.command("eval")
def evaluate(
    generator: Annotated[Path, typer.Argument(help="folder of a base generator or a refiner")],
    clips: Annotated[Path, typer.Option(help="folder of captioned clips it has not seen")],
    out: Annotated[Path, typer.Option(help="JSON file to write")] = Path("generator_eval.json"),
    max_clips: Annotated[int, typer.Option(min=1, help="windows at most")] = 32,
    factor: Annotated[
        float, typer.Option(help="refiner: how many times smaller its input is in each side")
    ] = 2.0,
    seed: Annotated[int, typer.Option(help="of the windows' places")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """Figures of a generator on clips it has not seen, printed and kept as JSON.

    A base: velocity error, and PSNR of a given first frame. A refiner: low-resolution consistency (its clips brought back to the size of
    what they were made from), PSNR and SSIM against the real clips, beside bicubic enlargement.
    """
    from generator.checkpoint import DiTGenerator, load_generator
    from generator.evaluate import evaluate_base, evaluate_refiner, write_figures
    from reelhf.clips import load_folder_windows
    from reelhf.engine import device

    if not clips.is_dir():
        raise UserError(f"--clips {clips}: there is no such folder")
    if factor <= 1:
        raise UserError(f"--factor {factor:g}; expected more than 1")
    backbone = load_generator(generator)
    if not isinstance(backbone, DiTGenerator):
        raise UserError(f"{generator} is a diffusers model; eval is of generators of ours")
    backbone = backbone.to(device())
    windows = load_folder_windows(
        clips,
        frame_shape=backbone.frame_shape,
        fps=backbone.fps,
        max_windows=max_clips,
        seed=seed,
    )
    if backbone.role == "refiner":
        figures = evaluate_refiner(backbone, windows, factor=factor, batch_size=batch_size)
    else:
        figures = evaluate_base(backbone, windows, batch_size=batch_size)
    typer.echo(f"{len(windows.frames)} clips of {clips}")
    for figure in figures:
        typer.echo(str(figure))
    write_figures(out, figures, generator=str(generator), clips=str(clips), seed=seed)
    report_result(out)


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="folder for the clips and their captions.jsonl")],
    generator: Annotated[
        Path | None, typer.Argument(help="folder of a base generator", show_default=False)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="in its place: a diffusers folder or hub id (Wan, LTX, CogVideoX)"),
    ] = None,
    refiner: Annotated[
        Path | None, typer.Option(help="folder of a refiner that enlarges the clips")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="folder of adapters, as `stages:` with `lora:` leaves it")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file, one prompt per line")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="a prompt; may be given several times. '[SHOT 1] ... [CUT] [SHOT 2] ...' makes a clip of two shots"
        ),
    ] = None,
    first_frame: Annotated[
        Path | None,
        typer.Option(
            "--first-frame",
            "--image",
            help="where every clip starts: an image, or a video's first frame",
        ),
    ] = None,
    last_frame: Annotated[
        Path | None, typer.Option(help="where every clip ends; alone or beside --first-frame")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="clips per prompt")] = 1,
    first_seed: Annotated[int, typer.Option(help="seed of the first of them")] = 0,
    negative: Annotated[
        str | None, typer.Option(help="a prompt that guidance moves away from")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="per clip (diffusers)")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="in pixels (diffusers)")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="in pixels (diffusers)")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="denoiser steps")] = None,
    solver: Annotated[
        str | None, typer.Option(help="euler, or adams: second order at the same cost")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; 1 is none")] = None,
    guidance_rescale: Annotated[
        float | None, typer.Option(help="0 to 1: guidance without overexposure")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="sdpa, or packed: no padding of prompts, shots and windows"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    decode_chunk: DecodeChunk = None,
    tile: TileSize = None,
    tile_overlap: TileOverlap = None,
) -> None:
    """Make clips with a base generator; the result is a folder of captioned clips like any other.

    With --refiner they are enlarged in the same call: base, then refiner, same prompt and seed. A generator folder carries its clip size and its sampler; steps, solver and guidance may be others. A diffusers model starts from
    its family's, and takes other sizes too. A clip depends on its prompt and seed, not on the batch it is made in.
    Clips are decoded straight into their files, a few frames at a time: a long one never lies in memory whole.
    """
    from generator.sampling import check_cascade, refine_batches, sample_batches

    texts = _prompts(prompts, prompt)
    if (generator is None) == (model is None):
        raise UserError("name one generator: its folder, or --model with a diffusers folder or id")
    loaded = _load(generator or model, "base")
    if lora is not None:
        from generator.checkpoint import DiTGenerator
        from generator.training.lora import apply_lora

        if not isinstance(loaded, DiTGenerator):
            raise UserError("--lora adapts generators of ours, not a diffusers model")
        loaded = apply_lora(loaded, lora)
    backbone = _configured(loaded, (frames, height, width), steps, guidance)
    _check_shots(texts, backbone)
    enlarged_by = None if refiner is None else _load(refiner, "refiner")
    for each in (backbone, enlarged_by):
        if attention is not None and each is not None:
            _attend(each, attention)
    if enlarged_by is not None:
        check_cascade(backbone, enlarged_by)
    asked = {"kind": solver, "guidance_rescale": guidance_rescale}
    sampler = replace(backbone.sampler, **{k: v for k, v in asked.items() if v is not None})
    last = enlarged_by or backbone
    decode = _decoder(last, decode_chunk, tile, tile_overlap)
    jobs = [(text, first_seed + k) for text in texts for k in range(seeds)]
    given = {
        index: _picture(path, backbone.frame_shape)
        for index, path in ((0, first_frame), (-1, last_frame))
        if path is not None
    }

    def latents_of(part: list[tuple[str, int]]) -> Tensor:
        task = None
        if given:
            pictures = {at: one.expand(len(part), -1, -1, -1) for at, one in given.items()}
            task = backbone.frames_task(pictures, *backbone.frame_shape)
        (latents,) = sample_batches(
            backbone,
            *_columns(part),
            task=task,
            batch_size=batch_size,
            sampler=sampler,
            negative_prompt=negative,
        )
        if enlarged_by is None:
            return latents
        small = backbone.decode(latents)[0].clamp(0, 1)
        (latents,) = refine_batches(enlarged_by, small, *_columns(part), batch_size=batch_size)
        return latents

    _write_clips(last.fps, jobs, latents_of, decode, out, batch_size)
    enlarge = "reelhf generator refine REFINER --clips {out} --out DIR"
    judge = "reelhf annotate quickstart {out} --out DIR"
    report_result(out, enlarge if refiner is None else judge)


@app.command()
def refine(
    generator: Annotated[Path, typer.Argument(help="folder of a refiner")],
    clips: Annotated[Path, typer.Option(help="folder of captioned low-resolution clips")],
    out: Annotated[Path, typer.Option(help="folder for the refined clips")],
    seed: Annotated[int, typer.Option(help="seed of the first clip; the next ones count up")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    decode_chunk: DecodeChunk = None,
    tile: TileSize = None,
    tile_overlap: TileOverlap = None,
) -> None:
    """Enlarge a folder of captioned clips, such as `reelhf generator sample` writes."""
    import torch

    from generator.sampling import refine_batches
    from reelhf.clips import load_clip_folder, resize_frames
    from reelhf.video import read_video

    backbone = _load(generator, "refiner")
    decode = _decoder(backbone, decode_chunk, tile, tile_overlap)
    entries = load_clip_folder(clips)
    num_frames, height, width = backbone.frame_shape
    jobs = [(entry.caption, seed + index) for index, entry in enumerate(entries)]
    done = 0

    def latents_of(part: list[tuple[str, int]]) -> Tensor:
        nonlocal done
        low_res = []
        for entry in entries[done : done + len(part)]:
            frames, _ = read_video(entry.path, start=entry.start_frame, num_frames=num_frames)
            if frames.shape[1] < num_frames:
                raise UserError(
                    f"{entry.path} has {frames.shape[1]} frames; this refiner needs {num_frames}"
                )
            size = (min(height, frames.shape[2]), min(width, frames.shape[3]))
            low_res.append(resize_frames(frames, size))
        done += len(part)
        if len({clip.shape for clip in low_res}) > 1:
            low_res = [resize_frames(clip, (height, width)) for clip in low_res]
        (latents,) = refine_batches(
            backbone, torch.stack(low_res), *_columns(part), batch_size=batch_size
        )
        return latents

    _write_clips(backbone.fps, jobs, latents_of, decode, out, batch_size)
    report_result(out, "reelhf annotate quickstart {out} --out DIR")


@app.command()
def merge(
    generators: Annotated[list[Path], typer.Argument(help="folders fine-tuned from one parent")],
    out: Annotated[Path, typer.Option(help="a new folder for the merged generator")],
    weights: Annotated[
        str | None, typer.Option(help="one per generator, such as 0.5,0.3,0.2; alike by default")
    ] = None,
    sweep: Annotated[
        int | None,
        typer.Option(help="try every mixture in steps of 1/SWEEP instead, keep the best", min=1),
    ] = None,
    clips: Annotated[
        Path | None, typer.Option(help="captioned clips to score on, unseen by all parents")
    ] = None,
    max_clips: Annotated[int, typer.Option(min=1, help="of them at most")] = 256,
) -> None:
    """Average the weights of generators fine-tuned on different subsets; a sweep scores the mixtures on held-out clips."""
    from generator.merge import merge_generators

    if clips is not None and not clips.is_dir():
        raise UserError(f"--clips {clips}: there is no such folder")
    try:
        numbers = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise UserError(
            f"--weights {weights}; expected numbers with commas between, such as 0.5,0.5"
        ) from None
    scored = merge_generators(
        generators, out, weights=numbers, sweep=sweep, clips=clips, max_clips=max_clips
    )
    for one in scored:
        mixture = ", ".join(f"{weight:.3g}" for weight in one.weights)
        typer.echo(f"loss {one.loss:.5f}  weights {mixture}")
    report_result(out, "reelhf generator sample {out} --prompts prompts.txt --out DIR")


def _stage_of(words: list[str]) -> str:
    """`stage` of the YAML, or of an override."""
    import yaml

    from reelhf.config import find_config

    stage = None
    if words and "=" not in words[0]:
        data = yaml.safe_load(find_config(words[0]).read_text(encoding="utf-8"))
        stage = data.get("stage") if isinstance(data, dict) else None
    for word in words:
        if word.startswith("stage="):
            stage = word.removeprefix("stage=")
    known = [name for name in STAGES if " " not in name]
    if stage is None:
        raise UserError(
            f"the config names no stage; expected `stage:` with one of {', '.join(known)}"
        )
    if stage not in known:
        raise UserError(
            f"stage '{stage}'; expected one of {', '.join(known)}.{did_you_mean(str(stage), known)}"
        )
    return str(stage)


def _prompts(file: Path | None, given: list[str] | None) -> list[str]:
    texts = list(given or [])
    if not all(text.strip() for text in texts):
        raise UserError("--prompt is empty; describe the clip, or leave the option out")
    if file is not None:
        if not file.is_file():
            raise UserError(f"--prompts {file}: there is no such file")
        texts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError("no prompts; give --prompt TEXT, or --prompts FILE with one per line")
    return texts


def _check_shots(texts: list[str], backbone: DiTGenerator | DiffusersBackbone) -> None:
    """Refuse a prompt whose shots do not fit before any clip is made; to a diffusers model a prompt is plain text."""
    from generator.checkpoint import DiTGenerator
    from generator.shots import prompt_shots

    if isinstance(backbone, DiTGenerator):
        prompt_shots(texts, backbone.frame_shape[0], temporal_ratio=backbone.spec.temporal_ratio)


def _load(folder: Path, role: str) -> DiTGenerator | DiffusersBackbone:
    from generator.checkpoint import load_generator
    from reelhf.engine import device

    backbone = load_generator(folder)
    if backbone.role != role:
        raise UserError(f"{folder} is a {backbone.role} generator; this command needs a {role}")
    return backbone.to(device())


def _attend(backbone: DiTGenerator | DiffusersBackbone, attention: str) -> None:
    from generator.checkpoint import DiTGenerator
    from generator.dit import DiTConfig
    from reelhf.config import load_config

    if not isinstance(backbone, DiTGenerator):
        raise UserError("--attention is for generators of ours, not a diffusers model")
    backbone.denoiser.run_as(load_config(DiTConfig, None, [f"attention={attention}"]))


def _configured(
    backbone: DiTGenerator | DiffusersBackbone,
    size: tuple[int | None, int | None, int | None],
    steps: int | None,
    guidance: float | None,
) -> DiTGenerator | DiffusersBackbone:
    """The model at the size and with the sampler that the options name."""
    own = backbone.frame_shape
    num_frames, height, width = (
        value if given is None else given for given, value in zip(size, own, strict=True)
    )
    return backbone.configured(
        frame_shape=(num_frames, height, width), num_steps=steps, guidance_scale=guidance
    )


def _picture(image: Path, frame_shape: tuple[int, int, int]) -> Tensor:
    """[3, H, W] in [0, 1] at the generator's size."""
    from reelhf.clips import resize_frames
    from reelhf.video import read_video

    frames, _ = read_video(image, num_frames=1)
    return resize_frames(frames[:, :1], frame_shape[1:])[:, 0]


def _columns(jobs: list[tuple[str, int]]) -> tuple[list[str], list[int]]:
    return [text for text, _ in jobs], [seed for _, seed in jobs]


def _decoder(
    backbone: DiTGenerator | DiffusersBackbone,
    chunk: int | None,
    tile: int | None,
    overlap: int | None,
) -> Callable[[Tensor], Iterator[Tensor]]:
    """Latents [1, C, T, h, w] -> the chunks of one clip, uint8 [3, f, H, W]."""
    from generator.checkpoint import DiTGenerator
    from generator.streaming import DECODE_CHUNK, decode_stream

    decode: Callable[..., Any] = backbone.decode
    if isinstance(backbone, DiTGenerator):
        decode = partial(backbone.vae.decode, tiling=_tiling(backbone.vae, tile, overlap))
    elif tile is not None:
        raise UserError("--tile is for generators of ours; a diffusers VAE has its own tiling")

    def pictures(latents: Tensor) -> Iterator[Tensor]:
        whole = latents.shape[2]
        size = (chunk or DECODE_CHUNK) if backbone.decodes_in_chunks else whole
        return (frames[0] for frames in decode_stream(decode, latents, chunk=size))

    return pictures


def _tiling(vae: VideoVAE, tile: int | None, overlap: int | None) -> Tiling | None:
    """The tiles that `--tile` and `--tile-overlap` ask for; by default they overlap by what makes them exact, if it fits."""
    from generator.tiling import Tiling, in_latents

    if tile is None:
        if overlap is not None:
            raise UserError("--tile-overlap without --tile; name the tile's side too")
        return None
    ratio = vae.spec.spatial_ratio
    if overlap is None:
        reach = max(vae.encoder.radius, vae.decoder.radius)
        overlap = min(2 * reach, tile // (2 * ratio)) * ratio
    tiling = Tiling(size=tile, overlap=overlap)
    in_latents(tiling, ratio)  # sizes that do not fit are named before the work, not after
    return tiling


def _write_clips(
    fps: float,
    jobs: list[tuple[str, int]],
    latents_of: Callable[[list[tuple[str, int]]], Tensor],
    decode: Callable[[Tensor], Iterator[Tensor]],
    out: Path,
    batch_size: int,
) -> None:
    """Batch by batch, `<index>_seed<seed>.mp4` and a captions.jsonl beside them."""
    from reelhf.progress import track
    from reelhf.video import write_video

    try:
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        for start in track(range(0, len(jobs), batch_size), label="clips"):
            part = jobs[start : start + batch_size]
            latents = latents_of(part).split(1)
            for offset, (clip, (text, seed)) in enumerate(zip(latents, part, strict=True)):
                name = f"{start + offset:04d}_seed{seed}.mp4"
                write_video(out / name, decode(clip), fps)
                rows.append({"path": name, "caption": text, "seed": seed})
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
