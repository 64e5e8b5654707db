"""The VAE's opponents in training: what they and a perceptual distance add to its loss, and how the opponents learn.

    added = AddedTerms(config, micro_batch_size, decoder.head)
    with head_inputs(decoder) as seen:
        reconstruction, posterior = engine(frames, noise)
    pull = added.pull(...)            # on a leaf: their graphs are gone before the VAE's backward pass
    loop.update(pulled(reconstruction, pull.cotangent) + ...)
    added.learn(...)                  # one step of the discriminators

One engine and one backward per optimizer; in the VAE's turn the discriminators are asked through `.module`, in eval mode, and only the
gradient with respect to the reconstruction is taken, so they gather none themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from generator.training.crops import frames_at
from generator.training.discriminators import (
    DiscriminatorConfig,
    HybridDiscriminator,
    adversarial_loss,
)
from generator.training.perceptual import Lpips, feature_matching_loss
from generator.training.vae_losses import (
    HeadInput,
    adaptive_weight,
    last_layer_norms,
    pixel_loss,
)
from reelhf.config import Config
from reelhf.engine import Engine, EngineConfig, OptimizerConfig, device, gathered_parameters
from reelhf.training import mean_over_processes

if TYPE_CHECKING:
    from generator.training.vae import VAETrainConfig


class AdversarialConfig(Config):
    """Discriminators of frames and of clips beside the VAE."""

    weight: float = Field(0.0, ge=0)
    """Of the adversarial term, times its adaptive weight; 0 builds no discriminator."""
    start_step: int = Field(0, ge=0)
    """Step at which they begin: both to learn and to be listened to."""
    max_adaptive_weight: PositiveFloat = 100.0
    """Bound of the ratio of gradient norms at the decoder's last layer."""
    discriminators: DiscriminatorConfig = DiscriminatorConfig()
    """Their widths and depths."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, betas=(0.5, 0.9), weight_decay=0.0)
    """Theirs."""


@dataclass(frozen=True)
class Example:
    """What a reconstruction is held against."""

    frames: Tensor
    """[B, 3, F, H, W] in [0, 1]."""
    foreground: Tensor
    """`foreground_distance` of the whole clips at these crops, [B, 1, F, H, W]."""
    picks: Tensor
    """Frames of each clip to look at, [B, n] long; the frame discriminator takes the first."""


@dataclass(frozen=True)
class Pull:
    """What a reconstruction is pulled by, beside the divergence of its posterior."""

    cotangent: Tensor
    """Gradient of all terms with respect to the reconstruction, [B, 3, F, H, W]."""
    value: Tensor
    """Of all terms, a scalar without gradient."""
    metrics: dict[str, float]


class AddedTerms:
    """The perceptual and the adversarial term of a run, with whatever networks they need."""

    def __init__(self, config: VAETrainConfig, micro_batch_size: int, head: nn.Module) -> None:
        """`head`: the decoder's last layer, before an engine takes it."""
        self.config = config
        # run again on what the layer saw: under ZeRO-3 the layer itself passes for a part of the VAE's next forward pass
        self._plain_head = copy.deepcopy(head).to(device())
        self.lpips: Lpips | None = None
        perceptual, adversarial = config.perceptual, config.adversarial
        if perceptual.weight and perceptual.kind == "lpips":
            assert perceptual.features and perceptual.linear
            lpips = Lpips.load(perceptual.network, perceptual.features, perceptual.linear)
            self.lpips = lpips.to(device())
        self.engine: Engine | None = None
        if adversarial.weight:
            self.engine = Engine(
                HybridDiscriminator(adversarial.discriminators),
                adversarial.optimizer,
                # asked in the VAE's turn through `.module`, layer by layer: their weights stay whole
                EngineConfig(
                    zero_stage=min(config.zero_stage, 2), micro_batch_size=micro_batch_size
                ),
            )

    @property
    def engines(self) -> dict[str, Engine]:
        """What a checkpoint keeps beside the VAE's."""
        return {} if self.engine is None else {"discriminators": self.engine}

    def opponent(self, step: int) -> Engine | None:
        """The discriminators from their first step on."""
        return self.engine if step >= self.config.adversarial.start_step else None

    def present(self, step: int) -> bool:
        """Whether any of the terms counts at this step."""
        return self.lpips is not None or self.opponent(step) is not None

    def pull(
        self,
        step: int,
        reconstruction: Tensor,
        example: Example,
        head: nn.Module,
        seen: Sequence[HeadInput],
    ) -> Pull:
        """Values and gradients at a reconstruction of all terms, those of the pixels included.

        `head` is the decoder's last layer and `seen` what reached it: see `head_inputs`.
        """
        leaf = reconstruction.detach().requires_grad_(True)
        fidelity = pixel_loss(leaf, example.frames, example.foreground, self.config.loss)
        metrics: dict[str, float] = {}
        perceptual, picks = self.config.perceptual, example.picks
        if self.lpips is not None:
            shown = (frames_at(clips, picks) for clips in (leaf, example.frames))
            distance = self.lpips(*(x.transpose(1, 2).flatten(0, 1) for x in shown)).mean()
            metrics["perceptual/lpips"] = mean_over_processes(distance)
            fidelity = fidelity + perceptual.weight * distance
        opponent = self.opponent(step)
        if opponent is None:
            (cotangent,) = torch.autograd.grad(fidelity, leaf)
            return Pull(cotangent, fidelity.detach(), metrics)

        # 1. What the discriminators say of the reconstruction, and how far it is from the clip in what they see.
        discriminators = cast(HybridDiscriminator, opponent.module.eval())
        verdict = discriminators.verdict(leaf, picks[:, 0])
        if perceptual.weight and perceptual.kind == "discriminator_features":
            with torch.no_grad():
                real = discriminators.verdict(example.frames, picks[:, 0])
            matching = feature_matching_loss(real.features, verdict.features)
            metrics["perceptual/discriminator_features"] = mean_over_processes(matching)
            fidelity = fidelity + perceptual.weight * matching
        adversarial = adversarial_loss(verdict.logits)

        # 2. The adversarial pull, brought to the size of the others at the decoder's last layer.
        (towards_clip,) = torch.autograd.grad(fidelity, leaf, retain_graph=True)
        (towards_real,) = torch.autograd.grad(adversarial, leaf)
        with gathered_parameters(head):
            self._plain_head.load_state_dict(head.state_dict())
        norms = last_layer_norms(self._plain_head, seen, [towards_clip, towards_real])
        ratio = adaptive_weight(*norms, limit=self.config.adversarial.max_adaptive_weight)
        weight = self.config.adversarial.weight * ratio.item()
        metrics["adversarial/loss"] = mean_over_processes(adversarial)
        metrics["adversarial/weight"] = weight
        value = (fidelity + weight * adversarial).detach()
        return Pull(towards_clip + weight * towards_real, value, metrics)

    def learn(self, step: int, reconstruction: Tensor, example: Example) -> dict[str, float]:
        """One step of the discriminators on clips and their reconstructions; nothing before their first step."""
        opponent = self.opponent(step)
        if opponent is None:
            return {}
        opponent.module.train()
        loss, parts = opponent(example.frames, reconstruction.detach(), example.picks[:, 0])
        opponent.backward(loss)
        update = opponent.step()
        means = {name: mean_over_processes(part) for name, part in {"loss": loss, **parts}.items()}
        means |= {name: update[name] for name in ("grad_norm", "skipped")}
        return {f"discriminator/{name}": value for name, value in means.items()}
