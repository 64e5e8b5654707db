"""Tiny random checkpoints of every family on disk, and the reward models that stand on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_rewards import AESTHETIC, CAPTIONS, FOUNDATIONAL, MOTION, tiny_models

from rewards.aesthetic import AestheticReward
from rewards.backbones import LANGUAGE, family
from rewards.foundational import FoundationalReward
from rewards.module import RewardModule
from rewards.motion import MotionReward
from rewards.tokens import load_tokenizer, train_tokenizer

ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
}


def _language(model_type: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tokenizer = train_tokenizer(
            [*CAPTIONS, "yes no"], vocab_size=320, dimensions=FOUNDATIONAL.dimensions
        )
        kind = family(LANGUAGE, model_type)
        config = kind.tiny_config(settings=FOUNDATIONAL, tokenizer=tokenizer)
        kind.model_class()(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write


def _encoder(name: str, **options: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import transformers

        config = getattr(transformers, f"{name}Config")(**(ENCODER | options))
        getattr(transformers, f"{name}Model")(config).save_pretrained(folder)

    return write


WRITERS: dict[str, Callable[[Path], None]] = {
    "qwen2_5_vl": _language("qwen2_5_vl"),
    "qwen3_vl": _language("qwen3_vl"),
    "internvl": _language("internvl"),
    "vjepa2": _encoder(
        "VJEPA2",
        crop_size=32,
        frames_per_clip=8,
        pred_hidden_size=16,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        initializer_range=0.1,  # at 0.02 so narrow an encoder says the same everywhere, and rounding is all that moves
    ),
    "videomae": _encoder("VideoMAE", image_size=32, num_frames=8),
    "siglip": _encoder("SiglipVision", image_size=32),
    "siglip2": _encoder("Siglip2Vision", num_patches=36),
    "clip": _encoder("CLIPVision", image_size=32),
}


def write_backbone(name: str, folder: Path, *, seed: int = 0) -> str:
    """Save a tiny random checkpoint of a family; returns the folder as a `backbone`."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[name](folder)
    return str(folder)


def reward_on(name: str, folder: Path, *, seed: int = 0, **settings: Any) -> RewardModule:
    """The reward model that stands on the checkpoint of a family, loaded from its folder as a user's would be, frozen."""
    if not (folder / "config.json").is_file():
        write_backbone(name, folder, seed=seed)
    settings = {"backbone": str(folder), **settings}
    alike = tiny_models()  # built before the seed, so that no draw depends on another model
    torch.manual_seed(1 + seed)
    model: RewardModule
    if name in LANGUAGE:
        tokenizer = load_tokenizer(str(folder), dimensions=FOUNDATIONAL.dimensions)
        model = FoundationalReward(FOUNDATIONAL.model_copy(update=settings), tokenizer)
        if model.settings.reads == "all":
            model.words.count(model.encode_prompts(CAPTIONS))
    else:
        tokenizer = alike["motion"].tokenizer
        if name in ("vjepa2", "videomae"):
            model = MotionReward(MOTION.model_copy(update=settings), tokenizer)
            model.words.count(model.encode_prompts(CAPTIONS))
        else:
            model = AestheticReward(AESTHETIC.model_copy(update=settings), tokenizer)
    return model.freeze()
