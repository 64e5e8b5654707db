"""Who tells a reconstruction from the real thing: patches of single frames by their look, patches of clips by their motion too.

Both are stacks of strided convolutions whose output is one logit per patch (PatchGAN, 1611.07004), in two dimensions for frames and in
three for clips, as Seaweed-7B (2504.08685) and Seedance 1.0 (2506.09113, 2.1) train their VAEs. Every convolution is spectrally
normalised and there is no batch norm: the choice of Seaweed-7B, over R1 and LeCam.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from reelhf.config import Config

SLOPE = 0.2
"""Of the leaky ReLUs."""


class DiscriminatorConfig(Config):
    """Both networks."""

    image_width: PositiveInt = 64
    """Channels of the frame network's first layer; each layer doubles them, up to eight times."""
    image_layers: PositiveInt = 3
    """Its strided layers: a logit sees about 16, 34 or 70 pixels with 2, 3 or 4 of them."""
    video_width: PositiveInt = 32
    """Channels of the clip network's first layer."""
    video_layers: PositiveInt = 3
    """Its strided layers."""


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: real logits above 1, fake ones below -1 (1705.02894). Any two shapes -> a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_hinge_loss(fake: Tensor) -> Tensor:
    """What the generator minimises against `hinge_loss`: the mean logit with its sign turned."""
    return -fake.mean()


def smallest_side(num_layers: int) -> int:
    """Pixels that a frame needs for one logit of a network of so many strided layers."""
    return 2 ** (num_layers + 1)


class PatchDiscriminator(nn.Module):
    """Frames [B, 3, H, W] or clips [B, 3, F, H, W] in [0, 1] -> one logit per patch, and what each layer saw.

    In three dimensions the first layer keeps the frames and the others halve them, so that the motion from frame to frame is seen.
    """

    def __init__(self, dims: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.dims = dims
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]

        def layer(inputs: int, outputs: int, time_stride: int, stride: int) -> nn.Module:
            kernel, strides, pad = (4, 4), (stride, stride), (1, 1)
            if dims == 3:
                kernel, strides, pad = (3, *kernel), (time_stride, *strides), (1, *pad)
            return spectral_norm(conv(inputs, outputs, kernel, strides, pad))

        widths = [3, *(width * min(2**index, 8) for index in range(num_layers))]
        self.layers = nn.ModuleList(
            layer(inputs, outputs, 1 if index == 0 else 2, 2)
            for index, (inputs, outputs) in enumerate(pairwise(widths))
        )
        self.head = layer(widths[-1], 1, 1, 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden, features = 2 * frames - 1, []
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), SLOPE)
            features.append(hidden)
        return self.head(hidden), features


class Verdict(NamedTuple):
    """What each network said of the same clips and what its layers saw; only the frame network where the clips are images."""

    logits: list[Tensor]
    features: list[list[Tensor]]


class HybridDiscriminator(nn.Module):
    """The frame network on one frame of each clip, and the clip network on whole clips; images have no motion to judge."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.image = PatchDiscriminator(2, config.image_width, config.image_layers)
        self.video = PatchDiscriminator(3, config.video_width, config.video_layers)

    def verdict(self, frames: Tensor, picks: Tensor) -> Verdict:
        """Of frames [B, 3, F, H, W]; `picks` [B] long: the frame of each clip that the frame network sees."""
        chosen = frames[torch.arange(len(frames), device=frames.device), :, picks]
        said = [self.image(chosen)]
        if frames.shape[2] > 1:
            said.append(self.video(frames))
        return Verdict(*map(list, zip(*said, strict=True)))

    def forward(
        self, real: Tensor, fake: Tensor, picks: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's own loss on clips and their reconstructions, and what it is made of; `fake` should be detached."""
        of_real, of_fake = self.verdict(real, picks).logits, self.verdict(fake, picks).logits
        losses = [hinge_loss(*logits) for logits in zip(of_real, of_fake, strict=True)]
        with torch.no_grad():
            parts = {
                "real_logit": torch.stack([logits.mean() for logits in of_real]).mean(),
                "fake_logit": torch.stack([logits.mean() for logits in of_fake]).mean(),
            }
        loss = torch.stack(losses).mean()
        if (
            real.shape[2] == 1
        ):  # a gradient of zero for the network that sees no images: see `FrameLinear.without_later`
            loss = loss + 0.0 * sum(parameter.sum() for parameter in self.video.parameters())
        return loss, parts


def adversarial_loss(logits: Sequence[Tensor]) -> Tensor:
    """What the reconstruction pays for being told apart: `generator_hinge_loss`, the mean over networks, a scalar."""
    return torch.stack([generator_hinge_loss(said) for said in logits]).mean()
