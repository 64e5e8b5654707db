"""Training the text encoder: the captions, one next token after another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import nn

from generator.text import TextEncoder, TextEncoderConfig
from reelhf.clips import load_clip_folder
from reelhf.config import Config
from reelhf.engine import (
    EngineConfig,
    OptimizerConfig,
    all_reduce_sum,
    init_distributed,
    seed_everything,
    world_size,
)
from reelhf.errors import UserError
from reelhf.run import RunFolder, seal
from reelhf.training import (
    BatchSplit,
    ShuffledEpochs,
    TrainLoop,
    mean_over_processes,
    run_identity,
)


class TextTrainConfig(Config):
    """The text encoder and its training."""

    stage: Literal["text"] = "text"
    """What `reelhf generator train` trains with this config."""

    text: TextEncoderConfig = TextEncoderConfig()
    """A tiny Qwen, or the path of a pre-trained one."""
    num_steps: int = Field(150, ge=0)
    """Optimizer steps; 0 keeps a pre-trained model as it is."""
    batch_size: PositiveInt = 32
    """Captions per optimizer step over all processes."""
    num_held_out: PositiveInt = 64
    """Captions kept out of training and measured at its end; at most a quarter of them."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, warmup_steps=10)
    """AdamW on the whole language model."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    save_every: PositiveInt = 100
    """Steps between two checkpoints; the last step is always saved."""
    seed: int = 0
    """Of weights and order."""


def train_text_encoder(config: TextTrainConfig, clips: Path, out: Path) -> Path:
    """Train tokenizer and language model on the captions of a clip folder; resumes from the last checkpoint.

    Logs the cross entropy in nats per token, in training and, after the last step, of held-out captions.

    Returns: the text encoder folder, `out/text`.
    """
    init_distributed()
    seed_everything(config.seed)
    split = BatchSplit(config.batch_size)
    held_out, training = split_captions(config, clips)
    shuffled = ShuffledEpochs(len(training), config.seed)
    run = RunFolder.open(out, config)
    loop = TrainLoop(
        run,
        config,
        TextEncoder.build(config.text, training),
        EngineConfig(zero_stage=config.zero_stage, micro_batch_size=split.micro_batch_size),
        identity=run_identity(config, training),
    )
    if config.num_steps == 0:
        run.log(0, {"held_out/loss": held_out_loss(loop.averaged, held_out)})

    for step in loop.steps("training the text encoder"):
        # 1. Predict each next token of the batch's captions.
        captions = [training[shuffled[p]] for p in split.positions(step)]
        loss = loop.engine(captions) * share_of_tokens(loop.engine.module, captions)
        update = loop.update(loss)

        # 2. Report, after the last step also on held-out captions; save when due.
        metrics = {"loss": mean_over_processes(loss), **update}
        if loop.is_last(step):
            metrics["held_out/loss"] = held_out_loss(loop.averaged, held_out)
        loop.end_step(step, metrics)

    return loop.save_model("text", lambda folder: seal(loop.averaged.save(folder)))


def share_of_tokens(encoder: nn.Module, captions: list[str]) -> float:
    """This process's tokens over the processes' mean: what its mean loss counts in the mean over all tokens; 1 on one process."""
    assert isinstance(encoder, TextEncoder)
    count = encoder.tokenize(captions).own[:, 1:].sum().double()
    return count.item() * world_size() / all_reduce_sum(count).item()


def split_captions(config: TextTrainConfig, clips: Path) -> tuple[list[str], list[str]]:
    """(held-out, training) captions of a clip folder in a seeded order."""
    # each wording once: a caption that many clips share is neither over-weighted nor on both sides of the split
    captions = sorted({entry.caption for entry in load_clip_folder(clips) if entry.caption.strip()})
    if len(captions) < 2:
        raise UserError(f"{clips} holds {len(captions)} different captions; expected at least 2")
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(config.seed))
    captions = [captions[i] for i in order]
    num_held_out = max(1, min(config.num_held_out, len(captions) // 4))
    return captions[:num_held_out], captions[num_held_out:]


@torch.no_grad()
def held_out_loss(encoder: TextEncoder, captions: list[str]) -> float:
    """Cross entropy in nats per token."""
    return encoder.eval().caption_loss(captions).item()
