"""Training in stages from encoded buckets: pictures, then small clips, then larger and longer ones; or from a generator on; or a refiner.

Each stage of `DenoiserTrainConfig.stages` becomes a `generator.training.denoiser.Stage`; the loop is the same as for one size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from generator.base import Condition
from generator.checkpoint import DiTGenerator, load_generator
from generator.data.buckets import Bucket
from generator.data.low_res import LowResMaker, check_low_res, low_res_key
from generator.data.manifest import CAPTION_KINDS, read_clips
from generator.data.packing import RuntimeTable, load_table, samples_per_micro_batch, save_table
from generator.data.store import LatentStore, Window
from generator.dit import HOW_LAYERS_RUN
from generator.plan.flops import LatentGrid, model_flops
from generator.prompt_cache import encoder_key
from generator.refiner import check_sizes, low_res_size, refiner_from_base
from generator.text import TextEncoder
from generator.training.bucket_stream import BucketStream, image_groups
from generator.training.denoiser import DenoiserTrainConfig, Stage, new_base, train_denoiser
from generator.training.latents import Draws, LatentSet
from generator.training.stages import StageConfig, learning_rate
from generator.vae import VideoVAE
from reelhf.engine import barrier, device, init_distributed, is_main, seed_everything
from reelhf.errors import UserError, did_you_mean
from reelhf.hashing import content_hash, weight_hashes

RUNTIME_FILE = "runtime.json"
MEASURED_TEXT_TOKENS = 64
FITTED_PROMPTS = 2048
"""Captions that a fresh denoiser's input is fitted to."""


def encode_stages(
    config: DenoiserTrainConfig,
    clips: Path,
    out: Path,
    *,
    vae: Path | None = None,
    text: Path | None = None,
    base: Path | None = None,
) -> Path:
    """Encode a manifest or folder of clips for every stage of a config; what is there already is not made again.

    Args:
        vae, text: encoders of a base; or base: the generator that a refiner enlarges clips of, and that makes its inputs.
    Returns: the store. Prints what each bucket holds, and every clip that fits none with the reason.
    """
    from generator.data.encode import encode_set, format_set

    if not config.stages:
        raise UserError("the config has no stages; expected `stages:` with the buckets of each")
    init_distributed()
    listed = read_clips(clips)
    vae, text = encoders(vae, text, base)
    small = None if base is None else load_base(base).to(device())
    video_vae, text_encoder = VideoVAE.load(vae).to(device()), TextEncoder.load(text).to(device())
    if is_main():
        open_store(out, vae, text, create=True)
    barrier()
    store = open_store(out, vae, text)
    done: set[str] = set()
    for stage in config.stages:
        low_res = None
        if config.stage == "refiner":
            assert small is not None and base is not None
            how = stage.low_res or config.low_res
            low_res = LowResMaker(small, how, low_res_key(base, how, config.seed))
        key = content_hash(stage.buckets, "" if low_res is None else low_res.key)
        if key not in done:
            windows, skipped = encode_set(
                store, listed, stage.buckets, video_vae, text_encoder, low_res
            )
            if is_main():
                print(f"{stage.name}:\n{format_set(stage.buckets, windows, skipped)}\n")
            done.add(key)
    return out


def encoders(vae: Path | None, text: Path | None, generator: Path | None) -> tuple[Path, Path]:
    """Folders of the VAE and the text encoder: as named, or those of a generator."""
    if generator is not None:
        return generator / "vae", generator / "text"
    assert vae is not None and text is not None
    return vae, text


def load_base(folder: Path) -> DiTGenerator:
    """Raises: UserError if it is no base generator of ours."""
    base = load_generator(folder)
    if not isinstance(base, DiTGenerator) or base.role != "base":
        raise UserError(f"--base {folder} is not a base generator of ours")
    return base


def open_store(folder: Path, vae: Path, text: Path, *, create: bool = False) -> LatentStore:
    """The store of these encoders. Raises: UserError if it is another's, or none."""
    of_vae = content_hash(weight_hashes(vae))
    return LatentStore(folder, vae=of_vae, text=encoder_key(text), create=create)


def train_stages(
    config: DenoiserTrainConfig,
    data: Path,
    out: Path,
    *,
    vae: Path | None = None,
    text: Path | None = None,
    base: Path | None = None,
    init: Path | None = None,
) -> Path:
    """Train a base or a refiner through its stages; resumes from the run folder's last checkpoint, on any number of processes that
    divides `micro_batches`.

    Args:
        data: what `encode_stages` made.
        vae, text: encoders of a new base; base: of a new refiner; init: a generator to go on from (a refiner beside its base).
    Returns: the generator folder, `out/generator`; with `lora` the adapters lie beside it in `out/lora`.
    """
    init_distributed()
    seed_everything(config.seed)
    if config.lora is not None and init is None:
        raise UserError("lora adapts a generator: name it with --init")
    vae, text = encoders(vae, text, init or base)
    store = open_store(data, vae, text)
    windows = [stage_windows(stage, store) for stage in config.stages]
    inputs = [
        low_res_of(config, stage, base, store, own)
        for stage, own in zip(config.stages, windows, strict=True)
    ]
    if init is not None:
        backbone = going_on(config, init).to(device())
    elif base is not None:
        parent = replace(load_base(base), fps=config.fps)
        check_sizes(parent.spec, parent.frame_shape, config.frame_shape)
        backbone = refiner_from_base(parent, config.frame_shape, config.sampler).to(device())
        backbone.denoiser.run_as(config.architecture)
    else:
        backbone = new_base(config, VideoVAE.load(vae), TextEncoder.load(text)).to(device())
        fitted = sorted({(w.captions["caption"], w.num_frames) for w in windows[0]})
        texts = [caption for caption, _ in fitted[:FITTED_PROMPTS]]
        lengths = [num_frames for _, num_frames in fitted[:FITTED_PROMPTS]]
        prompts = store.condition(texts, lengths, backbone.spec.temporal_ratio)
        prompts = prompts.to(device())
        backbone.denoiser.fit_pooled_text(prompts.embeds, prompts.mask, prompts.token_shots)
    table = runtime_table(config, backbone, windows, out)
    stages: list[Stage] = []
    position = 0
    for number, (stage, own) in enumerate(zip(config.stages, windows, strict=True)):
        made = make_stage(
            config, stage, backbone, store, own, table, number, position, inputs[number]
        )
        assert isinstance(made.stream, BucketStream)
        position += stage.num_steps * config.micro_batches * made.stream.stride
        stages.append(made)
    if init is not None:  # another parent is another run
        parent = content_hash(weight_hashes(init))
        stages[0] = replace(stages[0], identity=(*stages[0].identity, parent))
    return train_denoiser(config, backbone, stages, out)


def low_res_of(
    config: DenoiserTrainConfig,
    stage: StageConfig,
    base: Path | None,
    store: LatentStore,
    windows: Sequence[Window],
) -> str | None:
    """The key of a refiner's inputs, all of them there; None for a base."""
    if config.stage == "base":
        return None
    assert base is not None
    key = low_res_key(base, stage.low_res or config.low_res, config.seed)
    check_low_res(store, windows, key, what=f"stage {stage.name}")
    return key


def stage_windows(stage: StageConfig, store: LatentStore) -> list[Window]:
    """The stage's windows. Raises: UserError when there are none, or none with its tag."""
    what = f"stage {stage.name}"
    windows = store.read_set(stage.buckets, what=what)
    if stage.subset is None:
        return windows
    chosen = [window for window in windows if stage.subset in window.tags]
    if not chosen:
        tags = sorted({tag for window in windows for tag in window.tags})
        raise UserError(
            f"{what}: no clip has the tag '{stage.subset}'.{did_you_mean(stage.subset, tags)} "
            f"There are: {', '.join(tags) or 'no tags at all'}"
        )
    return chosen


def split_windows(
    windows: Sequence[Window], num_validation: int, what: str
) -> tuple[list[Window], list[Window]]:
    """(validation, training): whole source files are kept out, in the order of their hashes, at most a quarter of the windows.

    One file is kept out at least, and a file never gives windows to both sides.

    Raises: UserError when all windows are of one file.
    """
    by_source: dict[str, list[Window]] = {}
    for window in windows:
        by_source.setdefault(window.source, []).append(window)
    if len(by_source) < 2:
        raise UserError(
            f"{what}: its {len(windows)} windows are all of one file; expected at least 2 files, so that one can validate"
        )
    budget = max(1, min(num_validation, len(windows) // 4))
    order = sorted(by_source, key=lambda source: content_hash("held out", source))
    held: list[str] = []
    for source in order:
        if len(by_source[source]) <= budget:
            held.append(source)
            budget -= len(by_source[source])
    if (
        not held
    ):  # every file alone is more than that: the smallest, so that most is left to train on
        held = [min(order, key=lambda source: len(by_source[source]))]
    validation = [window for source in held for window in by_source[source]]
    training = [window for window in windows if window.source not in held]
    return validation, training


def make_stage(
    config: DenoiserTrainConfig,
    stage: StageConfig,
    backbone: DiTGenerator,
    store: LatentStore,
    windows: list[Window],
    table: RuntimeTable,
    number: int,
    first_position: int,
    low_res: str | None = None,
) -> Stage:
    """A stage as the loop sees it. What the stage leaves open is as the run has it. `low_res`: see `low_res_of`."""
    what = f"stage {stage.name}"
    validation, training = split_windows(windows, config.num_validation, what)
    tell_missing_captions(stage, training)
    sigma = stage.sigma or config.sigma
    dropout = config.prompt_dropout if stage.prompt_dropout is None else stage.prompt_dropout
    own = {bucket: table[bucket] for bucket in costed_buckets(windows)}
    sizes = samples_per_micro_batch(own, backbone.spec, stage.micro_batch_tokens)
    stream = BucketStream(
        store,
        training,
        Draws(config.seed, sigma, stage.tasks or config.tasks, dropout),
        stage.captions,
        sizes=sizes,
        table=own,
        micro_batches=config.micro_batches,
        number=number,
        first_position=first_position,
        name=stage.name,
        ratio=backbone.spec.temporal_ratio,
        low_res=low_res,
        sharing=config.sequence_parallel,
    )
    ratio = backbone.spec.temporal_ratio
    sets = validation_sets(store, validation[: config.num_validation], sizes, ratio, low_res)
    frames, height, width = sets[0].latents.shape[2:]
    spec = backbone.spec
    shape = (
        1 + (frames - 1) * spec.temporal_ratio,
        height * spec.spatial_ratio,
        width * spec.spatial_ratio,
    )
    low_size = None
    if low_res is not None:
        factor = (stage.low_res or config.low_res).factor
        low_size = low_res_size(*shape[1:], factor, spec.spatial_ratio)
    return Stage(
        name=stage.name,
        num_steps=stage.num_steps,
        stream=stream,
        validation=sets,
        sampled=replace(
            backbone,
            frame_shape=shape,
            fps=stage.buckets.fps,
            sampler=config.sampler_for(shape, sigma),
        ),
        identity=([[w.key, w.captions] for w in training], *([low_res] if low_res else [])),
        micro_batch_size=max(sizes.values()),
        accumulation_steps=config.micro_batches // stream.num_groups,
        learning_rate=partial(
            learning_rate,
            num_steps=stage.num_steps,
            lr=stage.lr or config.optimizer.lr,
            final_lr=stage.final_lr,
            warmup_steps=stage.warmup_steps,
        ),
        early_stop=stage.early_stop,
        low_size=low_size,
    )


def costed_buckets(windows: Sequence[Window]) -> set[Bucket]:
    """Every size that a forward pass may have: the buckets, and single frames of them."""
    return {window.bucket for window in windows} | set(image_groups(windows))


def validation_sets(
    store: LatentStore,
    windows: Sequence[Window],
    sizes: dict[Bucket, int],
    ratio: int,
    low_res: str | None = None,
) -> list[LatentSet]:
    """In memory, one set per bucket, cut to what a forward pass takes; `low_res` as in `make_stage`."""
    sets = []
    for bucket in sorted({window.bucket for window in windows}, reverse=True):
        own = [window for window in windows if window.bucket == bucket]
        for first in range(0, len(own), sizes[bucket]):
            part = own[first : first + sizes[bucket]]
            captions = [window.captions["caption"] for window in part]
            sets.append(
                LatentSet(
                    torch.stack([store.latents(window) for window in part]),
                    store.condition(captions, [bucket.num_frames] * len(captions), ratio),
                    captions,
                    None
                    if low_res is None
                    else torch.stack([store.low_res(w, low_res) for w in part]),
                )
            )
    return sets


def tell_missing_captions(stage: StageConfig, windows: Sequence[Window]) -> None:
    """On stderr: for how many clips a kind of caption that the stage asks for has to be replaced by the plain one."""
    for kind in CAPTION_KINDS:
        missing = sum(kind not in window.captions for window in windows)
        if getattr(stage.captions, kind) and missing and is_main():
            print(
                f"stage {stage.name}: {missing} of {len(windows)} windows have no {kind}; they show their caption instead",
                file=sys.stderr,
            )


def going_on(config: DenoiserTrainConfig, init: Path) -> DiTGenerator:
    """A generator to train further, at the config's size and with its sampler.

    Raises: UserError if it is none of ours in this role, or of another architecture than the config names.
    """
    parent = load_generator(init)
    if not isinstance(parent, DiTGenerator) or parent.role != config.stage:
        raise UserError(f"--init {init} is not a {config.stage} generator of ours")
    own = parent.denoiser.config
    different = [
        f"{key} is {getattr(config.architecture, key)} in the config, {getattr(own, key)} there"
        for key in sorted(config.architecture.model_fields_set - HOW_LAYERS_RUN)
        if getattr(config.architecture, key) != getattr(own, key)
    ]
    if different:
        raise UserError(
            f"--init {init} has another architecture: {'; '.join(different)}; leave architecture out, or train without --init"
        )
    parent.denoiser.run_as(config.architecture)
    return replace(parent, sampler=config.sampler, frame_shape=config.frame_shape, fps=config.fps)


def runtime_table(
    config: DenoiserTrainConfig,
    backbone: DiTGenerator,
    windows: Sequence[Sequence[Window]],
    out: Path,
) -> dict[Bucket, float]:
    """What a sample of each bucket costs: measured once by rank 0 and kept in the run folder, or counted in FLOPs."""
    buckets = sorted({bucket for own in windows for bucket in costed_buckets(own)})

    def grid(bucket: Bucket) -> LatentGrid:
        shape = backbone.spec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
        return LatentGrid(*shape[1:])

    if config.balance == "flops":
        architecture = backbone.denoiser.config
        return {
            bucket: model_flops(architecture, grid(bucket), MEASURED_TEXT_TOKENS)
            for bucket in buckets
        }
    file = Path(out) / RUNTIME_FILE
    if is_main() and not file.is_file():
        measured = {b: measure_seconds(config, backbone, grid(b)) for b in buckets}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_table(measured, file)
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror or error}") from None
    barrier()
    table = load_table(file)
    unknown = [str(bucket) for bucket in buckets if bucket not in table]
    if unknown:
        raise UserError(
            f"{file} has no run time of bucket {', '.join(unknown)}: the run was begun with other clips; choose another --out"
        )
    return table


def measure_seconds(
    config: DenoiserTrainConfig, backbone: DiTGenerator, grid: LatentGrid, repeats: int = 2
) -> float:
    """Forward and backward of one sample of this size: the fastest of a few, after one to warm up."""
    shape = (1, backbone.spec.channels, *grid)
    clean = torch.zeros(shape, device=device())
    width = backbone.denoiser.config.text_width
    embeds = torch.zeros(1, MEASURED_TEXT_TOKENS, width, device=device())
    condition = Condition(embeds, embeds[..., 0] == 0)
    task = backbone.text_to_video_task(
        1,
        1 + (grid.frames - 1) * backbone.spec.temporal_ratio,
        grid.height * backbone.spec.spatial_ratio,
        grid.width * backbone.spec.spatial_ratio,
    )
    if backbone.role == "refiner":
        task = replace(task, low_res_latents=clean)
    fastest = float("inf")
    for attempt in range(repeats + 1):
        started = time.perf_counter()
        with torch.autocast(device().type, torch.bfloat16, enabled=config.bf16):
            velocity = backbone.velocity(
                backbone.denoiser, clean, clean.new_full((1,), 0.5), condition, task
            )
        velocity.square().mean().backward()
        if device().type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if attempt:
            fastest = min(fastest, seconds)
    backbone.denoiser.zero_grad(set_to_none=True)
    return fastest
