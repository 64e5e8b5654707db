"""Low-rank adapters for the denoiser (LoRA, 2106.09685), by peft: trained, saved, loaded and merged.

A folder of adapters is peft's own: `adapter_config.json` and `adapter_model.safetensors` with keys `base_model.model.<layer>.lora_A.weight`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from reelhf.config import Config
from reelhf.errors import UserError

if TYPE_CHECKING:
    from generator.checkpoint import DiTGenerator

ADAPTER = "default"
PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_KEYS_SHOWN = 5


class LoraSettings(Config):
    """Adapters in place of all weights."""

    rank: PositiveInt = 16
    """Width of the bottleneck."""
    alpha: PositiveFloat = 16.0
    """The adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = Field(())
    """Names of linear layers, or the ends of names, such as `.q`; all of the attention and MLP layers by default."""


def adaptable(denoiser: nn.Module) -> list[str]:
    """Names of the layers of our denoiser that may have adapters: those of attention and MLPs."""
    return [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and name.endswith((".q", ".kv", ".out", ".up", ".down"))
    ]


def add_lora(denoiser: nn.Module, settings: LoraSettings, layers: list[str]) -> None:
    """Freeze the weights and put adapters beside the linear layers, in place; the network's output is the same at first.

    Args:
        layers: names of all layers that may have one (`VideoBackbone.lora_targets`).
    Raises: UserError if a target fits none of them.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chosen = [name for name in layers if not settings.targets or name.endswith(settings.targets)]
    idle = [end for end in settings.targets if not any(name.endswith(end) for name in layers)]
    if idle:
        raise UserError(
            f"lora.targets: no layer's name ends in {', '.join(map(repr, idle))}; the layers are such as {', '.join(layers[:3])}"
        )
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=chosen)
    inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_("lora_" in name)


def adapter_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights under peft's names."""
    return {
        PREFIX + name.replace(f".{ADAPTER}.", "."): value.detach().cpu().contiguous()
        for name, value in denoiser.state_dict().items()
        if "lora_" in name
    }


def save_lora(denoiser: nn.Module, settings: LoraSettings, folder: Path) -> None:
    """Write peft's two files, sealed."""
    from safetensors.torch import save_file

    from reelhf.run import seal

    folder.mkdir(parents=True, exist_ok=True)
    state = adapter_state(denoiser)
    layers = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in state})
    card = {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": layers,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    save_file(state, folder / WEIGHTS_FILE)
    seal(folder)


def merged(denoiser: nn.Module) -> Any:
    """A copy with the adapters added into its weights, and no trace of them."""
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(denoiser)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(plain.get_submodule(parent), own, module.get_base_layer())
    return plain.requires_grad_(True)


def apply_lora(backbone: DiTGenerator, folder: Path) -> DiTGenerator:
    """The generator with the adapters of a folder merged into it.

    Raises: UserError if a file is missing or cut short, or naming the adapter's keys that fit no layer of this generator, and
        the layers whose adapters are incomplete.
    """
    from dataclasses import replace

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not a folder of LoRA adapters: it has no {file}")
    try:
        card = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        scale = float(card["lora_alpha"]) / int(card["r"])
        state = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the LoRA adapters in {folder} are damaged: {error}") from None
    denoiser = copy.deepcopy(backbone.denoiser)
    linears = {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    used: set[str] = set()
    with torch.no_grad():
        for name, linear in linears.items():
            keys = [f"{PREFIX}{name}.lora_{part}.weight" for part in "AB"]
            if not all(key in state for key in keys):
                continue
            down, up = (state[key].to(linear.weight) for key in keys)
            if (len(up), down.shape[1], up.shape[1]) == (*linear.weight.shape, len(down)):
                linear.weight += scale * (up @ down)
                used.update(keys)
    unmatched = sorted(state.keys() - used)
    if unmatched or not used:
        shown = ", ".join(unmatched[:MAX_KEYS_SHOWN])
        more = len(unmatched) - MAX_KEYS_SHOWN
        raise UserError(
            f"{len(unmatched)} of the {len(state)} keys in {folder / WEIGHTS_FILE} fit no layer of this generator: "
            f"{shown}{f' and {more} more' if more > 0 else ''}; it was trained for another architecture, or by another tool"
        )
    return replace(backbone, denoiser=denoiser)
