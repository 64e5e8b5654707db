"""Groups of a reward's weights: what is frozen, what gets low-rank deltas."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

from torch import nn

Group = Literal["backbone", "vision", "language", "embeddings"]


def group_of(name: str) -> Group:
    """The group of a backbone's parameter or module, by its name within the backbone; an encoder is all vision."""
    if "embed_tokens" in name:
        return "embeddings"
    return "language" if "language_model" in name else "vision"


def freeze_groups(model: Any, groups: Collection[str]) -> None:
    """Stop the gradient of the named groups of a reward model; its readouts always learn."""
    for name, parameter in model.backbone.named_parameters():
        if "backbone" in groups or group_of(name) in groups:
            parameter.requires_grad_(False)


def linear_layers(backbone: nn.Module, groups: Collection[str]) -> Iterator[str]:
    """Names of the linear layers of the groups, a predictor's aside: no score passes through it."""
    for name, module in backbone.named_modules():
        if not isinstance(module, nn.Linear) or "predictor" in name:
            continue
        if "backbone" in groups or group_of(name) in groups:
            yield name
