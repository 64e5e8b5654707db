"""Distances between frames that count structure and texture more than pixels.

`lpips` is the real one (1801.03924): features of VGG16 or AlexNet trained on ImageNet, and linear weights fitted to human judgments. Its
weights are files that the user brings; the networks are written here, so torchvision is not needed. Without them there is
`discriminator_features`: the distance of what our own discriminators saw (feature matching, 1606.03498), which is not LPIPS and is not
called so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from reelhf.config import Config
from reelhf.errors import UserError

# position in torchvision's `features`, (inputs, outputs, kernel, stride, padding); a pool precedes what follows "pool"
VGG16: tuple[tuple[int, tuple[int, int, int, int, int]] | str, ...] = (
    *((0, (3, 64, 3, 1, 1)), (2, (64, 64, 3, 1, 1)), "tap", "pool"),
    *((5, (64, 128, 3, 1, 1)), (7, (128, 128, 3, 1, 1)), "tap", "pool"),
    *((10, (128, 256, 3, 1, 1)), (12, (256, 256, 3, 1, 1)), (14, (256, 256, 3, 1, 1))),
    *("tap", "pool"),
    *((17, (256, 512, 3, 1, 1)), (19, (512, 512, 3, 1, 1)), (21, (512, 512, 3, 1, 1))),
    *("tap", "pool"),
    *((24, (512, 512, 3, 1, 1)), (26, (512, 512, 3, 1, 1)), (28, (512, 512, 3, 1, 1)), "tap"),
)
ALEXNET: tuple[tuple[int, tuple[int, int, int, int, int]] | str, ...] = (
    *((0, (3, 64, 11, 4, 2)), "tap", "pool"),
    *((3, (64, 192, 5, 1, 2)), "tap", "pool"),
    *((6, (192, 384, 3, 1, 1)), "tap", (8, (384, 256, 3, 1, 1)), "tap"),
    *((10, (256, 256, 3, 1, 1)), "tap"),
)
LAYERS = {"vgg16": (VGG16, 2), "alexnet": (ALEXNET, 3)}  # layers, and the side of their max pools
# of RGB in [-1, 1]; ImageNet's mean and std brought to that range, as published with LPIPS
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10
MAX_NAMES_SHOWN = 3


class PerceptualConfig(Config):
    """A perceptual distance beside the pixels' own."""

    weight: float = Field(0.0, ge=0)
    """0 leaves it out."""
    kind: Literal["lpips", "discriminator_features"] = "discriminator_features"
    """`lpips` needs the two files below; `discriminator_features` needs an adversarial weight above 0."""
    network: Literal["vgg16", "alexnet"] = "vgg16"
    """Of `lpips`."""
    features: Path | None = None
    """Weights of the network as torchvision names them (`features.0.weight`, ...): .pth or .safetensors."""
    linear: Path | None = None
    """LPIPS's own linear weights (`lin0.model.1.weight`, ...) for the same network: .pth or .safetensors."""
    frames_per_clip: int = Field(2, ge=1)
    """Frames of each clip that `lpips` looks at, drawn anew at each step."""

    @model_validator(mode="after")
    def _lpips_has_its_files(self) -> PerceptualConfig:
        if self.weight and self.kind == "lpips" and not (self.features and self.linear):
            raise ValueError(
                "kind 'lpips' needs both files, features and linear; without them use kind 'discriminator_features'"
            )
        return self


class ConvFeatures(nn.Module):
    """The convolutions of VGG16 or AlexNet, read at the five layers that LPIPS reads."""

    def __init__(self, network: Literal["vgg16", "alexnet"]) -> None:
        super().__init__()
        self.plan, self.pool = LAYERS[network]
        self.features = nn.ModuleDict(
            {
                str(step[0]): nn.Conv2d(*step[1][:3], stride=step[1][3], padding=step[1][4])
                for step in self.plan
                if not isinstance(step, str)
            }
        )

    @property
    def widths(self) -> list[int]:
        """Channels of each layer that is read."""
        widths, last = [], 0
        for step in self.plan:
            if step == "tap":
                widths.append(last)
            elif not isinstance(step, str):
                last = step[1][1]
        return widths

    def forward(self, frames: Tensor) -> list[Tensor]:
        """[N, 3, H, W] -> five maps [N, c, h, w], each after its ReLU."""
        taps = []
        for step in self.plan:
            if step == "tap":
                taps.append(frames)
            elif step == "pool":
                frames = F.max_pool2d(frames, self.pool, stride=2)
            else:
                frames = F.relu(self.features[str(step[0])](frames))
        return taps


class Lpips(nn.Module):
    """Learned perceptual image patch similarity, version 0.1; frozen, in eval mode."""

    def __init__(self, network: Literal["vgg16", "alexnet"]) -> None:
        super().__init__()
        self.net = ConvFeatures(network)
        self.linear = nn.ParameterList(torch.zeros(width) for width in self.net.widths)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, frames: Tensor, others: Tensor) -> Tensor:
        """Distance of frames [N, 3, H, W] in [0, 1], [N]; 0 for equal ones, symmetric."""
        maps = (self.net((2 * x - 1 - self.shift) / self.scale) for x in (frames, others))
        distances = [
            feature_distance(one, other, weight)
            for one, other, weight in zip(*maps, self.linear, strict=True)
        ]
        return torch.stack(distances).sum(0)

    @classmethod
    def load(cls, network: Literal["vgg16", "alexnet"], features: Path, linear: Path) -> Lpips:
        """Read both files. Raises: UserError naming a file that is missing or holds other weights."""
        model = cls(network)
        convolutions = {
            f"features.{name}": value for name, value in model.net.features.state_dict().items()
        }
        _fill(convolutions, _read(features), features, f"torchvision's {network}")
        heads = {
            f"lin{index}.model.1.weight": weight.data.view(1, -1, 1, 1)
            for index, weight in enumerate(model.linear)
        }
        _fill(heads, _read(linear), linear, f"LPIPS for {network}")
        return model.eval()


def feature_distance(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared distance of unit feature vectors, averaged over positions (1801.03924, equation 1): [N, c, h, w] -> [N]."""
    one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + EPS) for x in (one, other))
    return ((one - other).square() * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))


def feature_matching_loss(
    real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Mean absolute difference of features, each layer relative to the mean size of the real ones; the mean over all layers, a scalar.

    Args:
        real: per network and layer what it saw in the clips, detached here.
        fake: the same of their reconstructions.
    """
    layers = [
        (seen.detach(), rebuilt)
        for one, other in zip(real, fake, strict=True)
        for seen, rebuilt in zip(one, other, strict=True)
    ]
    terms = [
        (rebuilt - seen).abs().mean() / seen.abs().mean().clamp_min(1e-6)
        for seen, rebuilt in layers
    ]
    return torch.stack(terms).mean()


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(f"perceptual weights {path}: there is no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import pickle

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"perceptual weights {path} cannot be read: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(
            f"perceptual weights {path}: expected a state dict, got {type(state).__name__}"
        )
    return state


def _fill(
    targets: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, what: str
) -> None:
    """Copy every target from a state dict that may hold more."""
    missing = [name for name in targets if name not in state]
    if missing:
        shown = ", ".join(missing[:MAX_NAMES_SHOWN])
        raise UserError(f"{path} does not hold the weights of {what}: {shown} missing")
    for name, target in targets.items():
        if state[name].shape != target.shape:
            raise UserError(
                f"{path}: {name} is {tuple(state[name].shape)}; {what} has {tuple(target.shape)}"
            )
        target.copy_(state[name])
