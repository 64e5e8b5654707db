"""Published video generators from diffusers folders or the Hugging Face Hub, as `VideoBackbone`.

diffusers is an extra, `pip install 'reelhf[diffusers]'`; nothing of it is imported before a model is loaded.
"""

from __future__ import annotations

import json
import re
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelhf.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from generator.adapters.base import DiffusersBackbone

ADAPTERS = {
    "WanPipeline": "generator.adapters.wan:WanBackbone",
    "LTXPipeline": "generator.adapters.ltx:LTXBackbone",
    "LTXImageToVideoPipeline": "generator.adapters.ltx:LTXBackbone",  # the same modules
    "LTXConditionPipeline": "generator.adapters.ltx:LTXBackbone",
    "CogVideoXPipeline": "generator.adapters.cogvideox:CogVideoXBackbone",
}
"""`_class_name` in a folder's model_index.json -> the class that wraps it."""

INDEX = "model_index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_diffusers(path: str | Path) -> bool:
    """A folder with a model_index.json, or what can only be a hub id: `owner/name` where no folder `owner` is."""
    path = Path(path)
    if path.exists():
        return (path / INDEX).is_file()
    return bool(_HUB_ID.fullmatch(path.as_posix())) and not path.parent.exists()


def load_diffusers(path: str | Path, *, dtype: torch.dtype | None = None) -> DiffusersBackbone:
    """Read a diffusers folder or hub id; a folder that we saved brings its sampler, clip size and fps along.

    Args:
        dtype: of transformer and text encoder; the VAE stays in float32. By default bfloat16 where CUDA is, else float32.
    Raises: UserError when diffusers is missing, the model cannot be read, or no adapter knows its class.
    """
    name = Path(path).as_posix()
    if find_spec("diffusers") is None:
        raise UserError(
            f"{name} is a diffusers model, and diffusers is not installed; pip install 'reelhf[diffusers]'"
        )
    import torch

    from generator.adapters.base import CARD
    from generator.base import SamplerSpec
    from reelhf.progress import silence_transformers
    from reelhf.run import MANIFEST, verify

    silence_transformers()
    _silence_diffusers()
    if (Path(path) / MANIFEST).is_file():
        verify(path)
    adapter = _adapter_of(name)
    if dtype is None:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    import diffusers

    pipeline_class = getattr(diffusers, adapter.pipeline_class)
    try:
        pipe = pipeline_class.from_pretrained(name, dtype={"default": dtype, "vae": torch.float32})
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: diffusers cannot load it: {_first_line(error)}") from error
    card_file = Path(path) / CARD
    if not card_file.is_file():
        return adapter(pipe)
    card: dict[str, Any] = json.loads(card_file.read_text())
    card["sampler"] = SamplerSpec(**card["sampler"])
    card["frame_shape"] = tuple(card["frame_shape"])
    return adapter(pipe, **card)


def _adapter_of(name: str) -> type[DiffusersBackbone]:
    from diffusers import DiffusionPipeline

    try:
        with (
            warnings.catch_warnings()
        ):  # huggingface_hub deprecates an argument that diffusers passes
            warnings.simplefilter("ignore")
            class_name = DiffusionPipeline.load_config(name).get("_class_name")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: there is no such folder, and no diffusers model of that name can be read from the "
            f"Hugging Face Hub: {_first_line(error)}"
        ) from error
    if class_name not in ADAPTERS:
        raise UserError(
            f"{name} is a {class_name}; expected one of {', '.join(ADAPTERS)}."
            f"{did_you_mean(str(class_name), ADAPTERS)}"
        )
    module, _, attribute = ADAPTERS[class_name].partition(":")
    return getattr(import_module(module), attribute)


def _silence_diffusers() -> None:
    """No bars of its own, and no advice to install torchvision while its pipelines are imported."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        import_module("diffusers.pipelines.wan.pipeline_wan")
    finally:
        transformers_logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
