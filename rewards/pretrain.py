"""Pre-training of the three backbones on captioned clips, for machines where no weights can be downloaded.

    foundational  words, then captioning; its heads: right against swapped captions, less against more spoiled bodies
    motion        masked latent prediction and words; its probe: right against wrong motion for the caption
    aesthetic     contrastive image-text; its head: less against more spoiled pictures

Clips and captions only: no human vote, no measured quality. The spoilings are those of `rewards.degrade`.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from reelhf.errors import UserError
from reelhf.graded import GradedClips
from reelhf.run import MANIFEST
from rewards.aesthetic import AestheticReward
from rewards.ensemble import join_members, part
from rewards.foundational import FoundationalConfig, FoundationalReward
from rewards.generative import GenerativeReward
from rewards.module import RewardModule
from rewards.motion import MotionReward
from rewards.pretraining.aesthetic import pretrain_aesthetic
from rewards.pretraining.config import PretrainConfig
from rewards.pretraining.foundational import pretrain_foundational
from rewards.pretraining.motion import pretrain_motion
from rewards.tokens import load_tokenizer, train_tokenizer
from rewards.vision_language import VisionLanguageConfig

if TYPE_CHECKING:
    from reelhf.clips import ClipTensors

PRETRAIN: dict[str, Callable[..., None]] = {
    "motion": pretrain_motion,
    "foundational": pretrain_foundational,
    "aesthetic": pretrain_aesthetic,
}
"""Folder name -> how its backbone is pre-trained; the longest first."""


def pretrain_backbones(
    config: PretrainConfig, clips: Path, out: Path, *, graded: Sequence[Path] = ()
) -> Path:
    """Pre-train and save out/foundational, out/motion and out/aesthetic; what an identical run finished is kept.

    With `config.ensemble` of N each of them is an ensemble of N, pre-trained with `seed`, `seed + 1`, …

    Args:
        clips: folder of captioned videos (`reelhf.clips`).
        graded: folders of graded clips (`reelhf.graded`), whose order all three learn in every second step.
    """
    from reelhf.clips import load_clip_folder
    from reelhf.hashing import content_hash
    from reelhf.side_by_side import run_jobs

    entries = load_clip_folder(clips)
    key = content_hash(
        config, [[str(e.path), e.caption, e.start_frame] for e in entries], [*graded]
    )
    jobs = {}
    for name in PRETRAIN:
        members = backbone_folders(Path(out), name, config.ensemble)
        waiting = [i for i, member in enumerate(members) if not _is_finished(member, key)]
        if len(waiting) == len(members):
            _clear(Path(out) / name)  # what another run made there
        elif waiting:
            (Path(out) / name / MANIFEST).unlink(missing_ok=True)  # not whole until all are done
        for i in waiting:
            label = f"{name} {i + 1}/{config.ensemble}" if config.ensemble > 1 else name
            arguments = (name, i, config, Path(clips), members[i], tuple(graded), key)
            jobs[label] = partial(_pretrain_one, *arguments)
    if jobs:
        _windows(config, Path(clips))  # read once, for all: from then on they are in the cache
    run_jobs(jobs, at_once=config.side_by_side)
    for name in PRETRAIN:
        if config.ensemble > 1 and not (Path(out) / name / MANIFEST).is_file():
            join_members(Path(out) / name, config.ensemble)
    return Path(out)


def backbone_folders(out: Path, name: str, count: int) -> list[Path]:
    """Where the backbones of one model are saved: in out/name, or in one folder per member of it."""
    return [out / name] if count == 1 else [part(out / name, i) for i in range(count)]


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _stamp(folder).unlink(missing_ok=True)


def _stamp(folder: Path) -> Path:
    """The file that says from what the backbone beside it was made."""
    return folder.with_name(f"{folder.name}.sha256")


def _is_finished(folder: Path, key: str) -> bool:
    stamp = _stamp(folder)
    return stamp.is_file() and stamp.read_text() == key


def _pretrain_one(
    name: str,
    index: int,
    config: PretrainConfig,
    clips: Path,
    out: Path,
    graded: Sequence[Path],
    key: str,
) -> None:
    """One backbone, the same whether others are trained before it, beside it or not at all."""
    from reelhf.engine import seed_everything
    from reelhf.run import write_text_atomic

    started = time.monotonic()
    windows = _windows(config, clips)  # the same for every member
    config = config.model_copy(update={"seed": config.seed + index})
    seed_everything(config.seed)
    model = build_models(config, windows.captions)[name]
    if model.settings.backbone is None:
        frames, sets = windows.frames, [load_graded(folder, config) for folder in graded]
        if name != "aesthetic":  # which alone looks at every pixel
            area = model.settings.area
            frames = shrink_windows(frames, area)
            sets = [replace(s, frames=shrink_versions(s.frames, area)) for s in sets]
        if isinstance(model, GenerativeReward):
            pretrain_generative(model, config, frames, windows.captions, sets)
        else:
            PRETRAIN[name](model, config, frames, windows.captions, sets)
        print(f"  {name}: pre-trained in {time.monotonic() - started:.0f} s", flush=True)
    model.save(out)
    write_text_atomic(_stamp(out), key)


def _windows(config: PretrainConfig, clips: Path) -> ClipTensors:
    from reelhf.clips import load_folder_windows

    return load_folder_windows(
        clips,
        frame_shape=(config.num_frames, config.size, config.size),
        fps=config.fps,
        max_windows=config.max_windows,
        seed=config.seed,
    )


def load_graded(folder: Path, config: PretrainConfig) -> GradedClips:
    """Graded clips of the length and rate of the windows; UserError otherwise."""
    clips = GradedClips.load(folder)
    found = clips.frames.shape[3], clips.fps
    if found != (config.num_frames, config.fps):
        raise UserError(
            f"{folder} holds graded clips of {found[0]} frames at {found[1]:g} fps; expected num_frames {config.num_frames} "
            f"at fps {config.fps:g}, as the backbones are pre-trained on"
        )
    return clips


def build_models(config: PretrainConfig, captions: Sequence[str]) -> dict[str, RewardModule]:
    """The three models before any training: tiny, or around a `backbone` that was named, which is not pre-trained here."""
    dimensions = config.foundational.dimensions
    trained = train_tokenizer(
        captions, vocab_size=config.foundational.vocab_size, dimensions=dimensions
    )
    settings = config.generative or config.foundational
    named = settings.backbone
    own = load_tokenizer(named, dimensions=dimensions) if named is not None else trained
    foundational: RewardModule = (
        FoundationalReward(settings, own)
        if isinstance(settings, FoundationalConfig)
        else GenerativeReward(settings, copy.deepcopy(own))
    )
    motion = MotionReward(config.motion, trained)
    for model in (foundational, motion):
        if hasattr(model, "words"):
            model.words.count(model.encode_prompts(captions))
    return {
        "foundational": foundational,
        "motion": motion,
        "aesthetic": AestheticReward(config.aesthetic, trained),
    }


def pretrain_generative(
    model: GenerativeReward,
    config: PretrainConfig,
    frames: Tensor,
    captions: list[str],
    graded: Sequence[GradedClips],
) -> None:
    """Teach the tiny backbone to see and to read as that of a `FoundationalReward`, whose heads are then dropped."""
    shared = {
        name: getattr(model.settings, name)
        for name in VisionLanguageConfig.model_fields
        if name in FoundationalConfig.model_fields
    }
    teacher = FoundationalReward(FoundationalConfig(**shared), model.tokenizer)
    teacher.words.count(teacher.encode_prompts(captions))
    pretrain_foundational(teacher, config, frames, captions, graded)
    model.backbone.load_state_dict(teacher.backbone.state_dict())


def shrink_windows(frames: Tensor, area: int) -> Tensor:
    """uint8 windows [N, 3, F, H, W] at about `area` pixels, so that each step does not shrink them again."""
    factor = max(1, math.isqrt(frames.shape[-1] * frames.shape[-2] // area))
    if factor == 1:
        return frames
    return torch.stack([F.avg_pool2d(w.float(), factor).round().byte() for w in frames])


def shrink_versions(frames: Tensor, area: int) -> Tensor:
    """The same of graded clips [N, G, 3, F, H, W]."""
    return shrink_windows(frames.flatten(0, 1), area).unflatten(0, frames.shape[:2])
