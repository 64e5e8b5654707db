"""Embeddings of prompts on disk, keyed by what encoded them and by their text: encoded once, read by every run that needs them.

A file is written aside under a name of its own and then renamed, so any number of processes may share a folder.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from reelhf.errors import UserError
from reelhf.hashing import content_hash, weight_hashes

if TYPE_CHECKING:
    from torch import Tensor

    from generator.base import Condition


def encoder_key(folder: Path) -> str:
    """Of a saved text encoder: its weights, and all of its config that changes embeddings."""
    from generator.text import CONFIG_NAME

    file = folder / CONFIG_NAME
    card = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept = {key: card.get(key) for key in ("hidden_layer", "max_tokens", "template")}
    return content_hash(weight_hashes(folder), kept)


def write_tensors(file: Path, **tensors: Tensor) -> None:
    """A .safetensors file, whole or not at all. Raises: UserError where nothing can be written."""
    from safetensors.torch import save_file

    aside = file.with_name(f".{file.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, aside)
        os.replace(aside, file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None


def read_tensors(file: Path, what: str) -> dict[str, Tensor]:
    """What `write_tensors` wrote. Raises: UserError naming the file, and `what` it holds."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} ({what}) cannot be read ({error})") from None


class PromptCache:
    """One file per prompt, `ab/<key>.safetensors`, of one encoder in a folder that several may share.

    Args:
        encoder: `encoder_key`.
    """

    def __init__(self, folder: Path, encoder: str) -> None:
        self.folder, self.encoder = Path(folder), encoder

    def file(self, prompt: str) -> Path:
        key = content_hash(self.encoder, prompt)
        return self.folder / key[:2] / f"{key}.safetensors"

    def write(self, prompts: list[str], condition: Condition) -> None:
        """Rows of a condition, each without its padding."""
        for row, prompt in enumerate(prompts):
            write_tensors(
                self.file(prompt), embeds=condition.embeds[row][condition.mask[row]].cpu()
            )

    def read(self, prompt: str) -> Condition:
        """One row. Raises: UserError if it is not there, or damaged."""
        import torch

        from generator.base import Condition

        embeds = read_tensors(self.file(prompt), f"the prompt '{prompt[:40]}'")["embeds"]
        return Condition(embeds[None], torch.ones(1, len(embeds), dtype=torch.bool))
