"""Training the text encoder along with the denoiser (as Seedream 2.0 does, 2503.07703): its own engine, rate and average.

    shown = tuner.show(batch)         # the batch's prompts, encoded by the weights in training, as a leaf
    loop.update(loss of shown)        # the denoiser's backward pass leaves a gradient on that leaf
    tuner.learn()                     # which is pulled on through the encoder

One engine and one backward per optimizer, so a ZeRO stage treats each network as if it were alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from generator.base import Condition
from generator.shots import encode_shots
from generator.text import TextEncoder
from generator.training.latents import Batch, LatentSet
from generator.training.vae_losses import pulled
from reelhf.engine import Ema, Engine, EngineConfig, OptimizerConfig, device


class PromptEmbedder(nn.Module):
    """A text encoder whose forward pass embeds prompts, as an engine calls it."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        condition = self.encoder.embed(prompts)
        return condition.embeds, condition.mask


class TextTuner:
    """A copy of a text encoder in training.

    Args:
        config: of the engine, the denoiser's.
        ratio: frames per latent frame, for prompts of several shots.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        optimizer: OptimizerConfig,
        config: EngineConfig,
        *,
        ema_decay: float,
        ratio: int,
    ) -> None:
        module = PromptEmbedder(copy.deepcopy(encoder)).to(device())
        keep_what_is_read(module)
        self.ema = Ema(module, ema_decay)
        self.engine = Engine(module, optimizer, config)
        self.ratio = ratio
        self._shown: tuple[Tensor, Tensor] | None = None

    @property
    def averaged(self) -> TextEncoder:
        """What is measured and kept."""
        return cast(PromptEmbedder, self.ema.module).encoder

    def show(self, batch: Batch) -> Batch:
        """The batch with its prompts encoded anew; which of them are dropped stays."""

        def embed(captions: list[str]) -> Condition:
            return Condition(*self.engine(captions))

        condition = encode_shots(
            embed, batch.captions, batch.caption_frames, temporal_ratio=self.ratio
        )
        leaf = condition.embeds.detach().requires_grad_(True)
        self._shown = condition.embeds, leaf
        dropped = ~batch.condition.mask.any(dim=1)
        return replace(batch, condition=replace(condition, embeds=leaf).dropped(dropped))

    def learn(self) -> dict[str, float]:
        """After the denoiser's backward pass of a shown batch; with the last of a step the weights move."""
        assert self._shown is not None
        embeds, leaf = self._shown
        assert leaf.grad is not None
        # the denoiser's engine has divided by the accumulation steps, and this one does so again
        cotangent = leaf.grad * self.engine.config.gradient_accumulation_steps
        self.engine.backward(pulled(embeds, cotangent))
        update = self.engine.step()
        if update:
            self.ema.update(self.engine.module)
        return {f"text/{name}": value for name, value in update.items()}

    def encoded(self, data: LatentSet) -> LatentSet:
        """Clips kept out of training, with their prompts as the averaged weights encode them."""
        frames = 1 + (data.latents.shape[2] - 1) * self.ratio
        condition = encode_shots(
            self.averaged.encode, data.captions, frames, temporal_ratio=self.ratio
        )
        return replace(data, condition=condition.to("cpu"))


def keep_what_is_read(module: PromptEmbedder) -> None:
    """Leave only those weights to train that embeddings depend on: layers above the chosen hidden one, and the head, do not count."""
    module.requires_grad_(True)
    embeds, _ = module(["what is read"])
    embeds.sum().backward()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
