"""Training the text encoder: the captions, one next token after another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt

from generator.text import TextEncoder, TextEncoderConfig
from reelhf.clips import load_clip_folder
from reelhf.config import Config
from reelhf.engine import (
    Engine,
    EngineConfig,
    OptimizerConfig,
    all_reduce_sum,
    device,
    init_distributed,
    is_main,
    rank,
    seed_everything,
    world_size,
)
from reelhf.errors import UserError
from reelhf.hashing import content_hash
from reelhf.progress import track
from reelhf.run import RunFolder, seal

_STREAM = 2_000_003  # separates the positions of neighbouring seeds


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

    Logs the cross entropy in nats per token, in training and, at the end, of held-out captions.

    Returns: the text encoder folder, `out/text`.
    """
    init_distributed()
    seed_everything(config.seed)
    if config.batch_size % world_size():
        raise UserError(
            f"batch_size {config.batch_size} cannot be split over {world_size()} processes"
        )
    micro_batch_size = config.batch_size // world_size()
    # each wording once: a caption that many clips share is neither over-weighted nor on both sides of the split
    captions = sorted({entry.caption for entry in load_clip_folder(clips) if entry.caption.strip()})
    if len(captions) < 2:
        raise UserError(f"{clips} holds {len(captions)} different captions; expected at least 2")
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(config.seed))
    captions = [captions[i] for i in order]
    num_held_out = max(1, min(config.num_held_out, len(captions) // 4))
    held_out, training = captions[:num_held_out], captions[num_held_out:]

    run = RunFolder.open(out, config)
    engine = Engine(
        TextEncoder.build(config.text, training),
        config.optimizer,
        EngineConfig(zero_stage=config.zero_stage, micro_batch_size=micro_batch_size),
    )
    identity = content_hash(
        config.model_dump(mode="json", exclude={"num_steps", "save_every"}), training
    )
    start = _resume(run, engine, identity)
    for step in track(range(start, config.num_steps), label="training the text encoder"):
        # 1. Predict each next token of the batch's captions.
        first = step * config.batch_size + rank() * micro_batch_size
        positions = range(first, first + micro_batch_size)
        loss = engine([training[_index(config.seed, p, len(training))] for p in positions])
        engine.backward(loss)
        update = engine.step()

        # 2. Report and save when due.
        done = step + 1
        run.log(done, {"loss": all_reduce_sum(loss).item() / world_size(), **update})
        if done % config.save_every == 0 or done == config.num_steps:
            run.save_checkpoint(
                done,
                lambda folder: engine.save(folder / "engine", {"identity": identity}),
                keep=2,
            )

    encoder = engine.module.eval()
    assert isinstance(encoder, TextEncoder)
    with torch.no_grad():
        run.log(config.num_steps, {"held_out/loss": encoder.caption_loss(held_out).item()})
    folder = run.path / "text"
    if is_main():
        encoder.to("cpu").save(folder)
        encoder.to(device())
        seal(folder)
    return folder


def _index(seed: int, position: int, count: int) -> int:
    """Which caption stands at a position of the stream: shuffled epochs, as a function of the position alone."""
    epoch, offset = divmod(position, count)
    generator = torch.Generator().manual_seed(seed * _STREAM + epoch)
    return int(torch.randperm(count, generator=generator)[offset])


def _resume(run: RunFolder, engine: Engine, identity: str) -> int:
    latest = run.latest_checkpoint()
    if latest is None:
        return 0
    step, folder = latest
    if engine.load(folder / "engine")["identity"] != identity:
        raise UserError(
            f"{run.path} holds a run of another configuration or other captions; choose another --out"
        )
    return step
