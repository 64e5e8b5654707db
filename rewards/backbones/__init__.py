"""The pretrained networks the rewards stand on, one class per family: how it is loaded, what pixels and tokens it takes.

A family is told by the `model_type` of its config.json, so `backbone: FOLDER` is all that has to be said. Adding one: a class, a line, a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from reelhf.errors import UserError

LANGUAGE = {
    "qwen2_5_vl": "rewards.backbones.language:Qwen25",
    "qwen3_vl": "rewards.backbones.language:Qwen3",
    "internvl": "rewards.backbones.internvl:InternVL",
}
VIDEO = {
    "vjepa2": "rewards.backbones.video:VJepa2",
    "videomae": "rewards.backbones.video:VideoMae",
}
IMAGE = {
    "siglip": "rewards.backbones.image:Siglip",
    "siglip_vision_model": "rewards.backbones.image:Siglip",
    "siglip2": "rewards.backbones.image:Siglip2",
    "siglip2_vision_model": "rewards.backbones.image:Siglip2",
    "clip": "rewards.backbones.image:Clip",
    "clip_vision_model": "rewards.backbones.image:Clip",
}


def family(table: Mapping[str, str], model_type: str, source: object = "this checkpoint") -> Any:
    """The family behind a `model_type`; UserError naming the known ones for another."""
    if model_type not in table:
        raise UserError(
            f"{source} is a {model_type!r}; this reward stands on {', '.join(table)}. Name another backbone"
        )
    module, name = table[model_type].split(":")
    return getattr(import_module(module), name)()


def family_of_folder(table: Mapping[str, str], source: str) -> Any:
    """The family of a local folder or hub id."""
    return family(table, read_config(source).model_type, source)


def read_config(source: str) -> Any:
    """config.json of a local folder or hub id; UserError when there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        kind = "folder" if Path(source).exists() else "folder or hub id"
        first = str(error).strip().splitlines()[0]
        raise UserError(f"no backbone in the {kind} {source}: {first}") from None


def build(
    table: Mapping[str, str],
    source: str | None,
    backbone_config: Any,
    tiny: str,
    **tiny_options: Any,
) -> tuple[Any, Any]:
    """The family and the network itself.

    Args:
        source: local folder or hub id whose weights are loaded, in float32.
        backbone_config: of a checkpoint of ours, whose weights follow; takes the place of `source`.
        tiny: the `model_type` that is built from `tiny_options` where there is neither.
    """
    import torch

    if source is not None and backbone_config is None:
        kind = family_of_folder(table, source)
        return kind, kind.model_class().from_pretrained(source, dtype=torch.float32)
    kind = family(table, tiny if backbone_config is None else backbone_config.model_type)
    config = kind.tiny_config(**tiny_options) if backbone_config is None else backbone_config
    return kind, kind.model_class()(config)
