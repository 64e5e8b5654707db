"""Pre-training of the three backbones on captioned clips, for machines where no weights can be downloaded.

    foundational  words, then captioning; its heads: right against swapped captions, less against more spoiled bodies
    motion        masked latent prediction and words; its probe: right against wrong motion for the caption
    aesthetic     contrastive image-text; its head: less against more spoiled pictures

Clips and captions only: no human vote, no measured quality. The spoilings are those of `rewards.degrade`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Generator, Tensor, nn

from reelhf.config import Config
from reelhf.errors import UserError
from reelhf.graded import GradedClips
from rewards.aesthetic import AestheticConfig, AestheticReward
from rewards.degrade import degrade, drift
from rewards.foundational import FoundationalConfig, FoundationalReward
from rewards.losses import bradley_terry_loss
from rewards.module import RewardModule
from rewards.motion import MotionConfig, MotionReward
from rewards.tokens import encode_texts, load_tokenizer, pad_right, train_tokenizer


class StageConfig(Config):
    """How long one backbone is pre-trained."""

    num_steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Clips per step."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate of what is no matrix; matrices use Muon at ten times this. Warm-up, then a cosine."""


class PretrainConfig(Config):
    """The three backbones and how each is pre-trained."""

    foundational: FoundationalConfig = FoundationalConfig()
    """The vision-language model."""
    motion: MotionConfig = MotionConfig()
    """The video encoder."""
    aesthetic: AestheticConfig = AestheticConfig()
    """The image encoder."""
    foundational_stage: StageConfig = StageConfig(num_steps=200, batch_size=16)
    """Captioning and its heads."""
    motion_stage: StageConfig = StageConfig(num_steps=220, batch_size=16)
    """Masked prediction and its probe."""
    aesthetic_stage: StageConfig = StageConfig(num_steps=150, batch_size=16)
    """Contrastive learning and its head."""
    num_frames: PositiveInt = 9
    """Frames per window cut from the clips."""
    fps: PositiveFloat = 8.0
    """Frames per second of the windows."""
    size: PositiveInt = 128
    """Height and width of the windows in pixels."""
    max_windows: PositiveInt = 1024
    """Windows used at most."""
    spoil: float = Field(0.7, ge=0, le=1)
    """How far clips are spoiled at most while learning to caption them: generated clips are not clean either."""
    masked_share: float = Field(0.3, ge=0, le=1)
    """Share of the motion steps spent on masked prediction and words, before the probe learns to rank."""
    words_share: float = Field(0.75, ge=0, le=1)
    """Share of the foundational steps in which the vision tower alone learns words and spoiled bodies."""
    seed: int = 0
    """Of weights and batches."""


@dataclass(frozen=True)
class Batch:
    """Clips drawn for one step."""

    index: Tensor
    """Which windows, long [B]."""
    frames: Tensor
    """float [B, 3, F, H, W] in [0, 1]."""


def pretrain_backbones(
    config: PretrainConfig, clips: Path, out: Path, *, graded: Sequence[Path] = ()
) -> Path:
    """Pre-train and save out/foundational, out/motion and out/aesthetic; an identical finished run is kept.

    Args:
        clips: folder of captioned videos (`reelhf.clips`).
        graded: folders of graded clips (`reelhf.graded`), whose order all three learn in every second step.
    """
    from reelhf.clips import load_clip_folder, load_windows
    from reelhf.engine import seed_everything
    from reelhf.hashing import content_hash
    from reelhf.run import write_text_atomic

    entries = load_clip_folder(clips)
    key = content_hash(
        config, [[str(e.path), e.caption, e.start_frame] for e in entries], [*graded]
    )
    stamp = Path(out) / "pretrain.sha256"
    if stamp.is_file() and stamp.read_text() == key:
        return Path(out)
    windows = load_windows(
        entries,
        num_frames=config.num_frames,
        fps=config.fps,
        size=(config.size, config.size),
        max_windows=config.max_windows,
        seed=config.seed,
    )
    seed_everything(config.seed)
    models = build_models(config, windows.captions)
    small = shrink_windows(windows.frames, config.foundational.area)
    sets = [load_graded(folder, config) for folder in graded]
    for name, model in models.items():
        started = time.monotonic()
        pretrain = {
            "foundational": pretrain_foundational,
            "motion": pretrain_motion,
            "aesthetic": pretrain_aesthetic,
        }[name]
        frames = windows.frames if name == "aesthetic" else small
        if model.settings.backbone is None:
            pretrain(model, config, frames, windows.captions, sets)
            print(f"  {name}: pre-trained in {time.monotonic() - started:.0f} s", flush=True)
        model.save(Path(out) / name)
    write_text_atomic(stamp, key)
    return Path(out)


def load_graded(folder: Path, config: PretrainConfig) -> GradedClips:
    """Graded clips of the length and rate of the windows; UserError otherwise."""
    clips = GradedClips.load(folder)
    found = clips.frames.shape[3], clips.fps
    if found != (config.num_frames, config.fps):
        raise UserError(
            f"{folder} holds graded clips of {found[0]} frames at {found[1]:g} fps; expected num_frames {config.num_frames} "
            f"at fps {config.fps:g}, as the backbones are pre-trained on"
        )
    return clips


def build_models(config: PretrainConfig, captions: Sequence[str]) -> dict[str, RewardModule]:
    """The three models before any training: tiny, or around a `backbone` that was named, which is not pre-trained here."""
    dimensions = config.foundational.dimensions
    trained = train_tokenizer(
        captions, vocab_size=config.foundational.vocab_size, dimensions=dimensions
    )
    named = config.foundational.backbone
    foundational = FoundationalReward(
        config.foundational,
        load_tokenizer(named, dimensions=dimensions) if named is not None else trained,
    )
    motion = MotionReward(config.motion, trained)
    for model in (foundational, motion):
        model.words.count(model.encode_prompts(captions))
    return {
        "foundational": foundational,
        "motion": motion,
        "aesthetic": AestheticReward(config.aesthetic, trained),
    }


def shrink_windows(frames: Tensor, area: int) -> Tensor:
    """uint8 windows [N, 3, F, H, W] at about `area` pixels, so that each step does not shrink them again."""
    factor = max(1, math.isqrt(frames.shape[-1] * frames.shape[-2] // area))
    if factor == 1:
        return frames
    return torch.stack([F.avg_pool2d(w.float(), factor).round().byte() for w in frames])


def batches(
    frames: Tensor, stage: StageConfig, generator: Generator, label: str
) -> Iterator[Batch]:
    """Batches without replacement within an epoch, with a progress bar."""
    from reelhf.progress import track

    order = torch.empty(0, dtype=torch.long)
    size = min(stage.batch_size, len(frames))
    for _ in track(range(stage.num_steps), label=label, total=stage.num_steps):
        if len(order) < size:
            order = torch.randperm(len(frames), generator=generator)
        index, order = order[:size], order[size:]
        yield Batch(index, frames[index].float() / 255)


class CosineMuon:
    """Muon for the matrices, AdamW for the rest, warm-up, cosine decay, a gradient norm of at most 1.

    Source: Muon, Jordan et al. 2024. Measured on the words of rendered clips, 120 steps: colours named right 0.98 with
    Muon, 0.75 with AdamW.
    """

    MATRIX_LR = 10.0
    """Learning rate of Muon relative to AdamW's."""

    def __init__(self, modules: nn.Module, stage: StageConfig) -> None:
        named = [(n, p) for n, p in modules.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if p.dim() == 2 and not _is_table(n)]
        rest = [p for n, p in named if p.dim() != 2 or _is_table(n)]
        self.parameters = matrices + rest
        self.optimizers = [
            torch.optim.Muon(
                matrices, lr=self.MATRIX_LR * stage.lr, weight_decay=0.02, adjust_lr_fn="original"
            ),
            torch.optim.AdamW(rest, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.02),
        ]
        warm = max(1, stage.num_steps // 10)

        def share(step: int) -> float:
            fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / stage.num_steps)))
            return min((step + 1) / warm, fall + 0.02)

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, share) for o in self.optimizers]

    def step(self, loss: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()


def _is_table(name: str) -> bool:
    """Embeddings and word weights: two axes, but no linear map."""
    return any(part in name for part in ("embed", "words.", "queries"))


class TextTower(nn.Module):
    """A tiny SigLIP text encoder: token ids -> one embedding [B, H]."""

    def __init__(
        self, *, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_tokens: int
    ) -> None:
        from transformers import SiglipTextConfig, SiglipTextModel

        super().__init__()
        self.encoder = SiglipTextModel(
            SiglipTextConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                max_position_embeddings=max_tokens,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        nn.init.normal_(self.encoder.embeddings.position_embedding.weight, std=0.02)
        nn.init.normal_(self.encoder.embeddings.token_embedding.weight, std=0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(
            1, keepdim=True
        )  # mean over the real tokens


def spoil_lightly(frames: Tensor, most: float, generator: Generator) -> Tensor:
    """Nuisance: each clip loses some looks, by a random amount, none in a third of the cases."""
    severity = torch.rand(len(frames), generator=generator) * 1.5 - 0.5
    return degrade(frames, "aesthetic_quality", severity.clamp_min(0) * most, generator)


def spoiled_pair(
    frames: Tensor, dimension: str, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Two copies spoiled in one dimension, and how much more the second is: (less, more, difference [B])."""
    low, high = torch.rand(2, len(frames), generator=generator).sort(dim=0).values
    low = low * (torch.rand(len(frames), generator=generator) < 0.6)
    return (
        degrade(frames, dimension, low, generator),
        degrade(frames, dimension, high, generator),
        high - low,
    )


@dataclass(frozen=True)
class GradedPair:
    """A batch of clips in two versions whose order is known."""

    nearer: Tensor
    further: Tensor
    """float [B, 3, F, H, W] in [0, 1]."""
    margin: Tensor
    """How much further, [B]."""
    prompts: list[list[int]]
    """The captions' token ids, B."""


def graded_pairs(
    graded: Sequence[GradedClips], model: RewardModule, batch_size: int, generator: Generator
) -> Iterator[GradedPair]:
    """Batches of the sets in turn, without end; nothing when there are none."""
    prompts = [model.encode_prompts(clips.captions) for clips in graded]
    while graded:
        for clips, texts in zip(graded, prompts, strict=True):
            rows = torch.randperm(len(texts), generator=generator)[:batch_size]
            nearer, further, margin = clips.pairs(rows, generator)
            yield GradedPair(nearer, further, margin, [texts[row] for row in rows.tolist()])


def generated_clips(
    graded: Sequence[GradedClips], prompts: Sequence[list], batch_size: int, generator: Generator
) -> Iterator[tuple[Tensor, list]]:
    """Batches of the sets in turn, without end: (frames [B, 3, F, H, W] in [0, 1], what `prompts` holds of their captions).

    Any version but the furthest of each clip: what the generator makes, still more or less as the caption says. Spoiled like the
    real clips, they teach the same orders on the pictures that will be judged.
    """
    while graded:
        for clips, texts in zip(graded, prompts, strict=True):
            rows = torch.randperm(len(texts), generator=generator)[:batch_size]
            versions = torch.randint(clips.grades.shape[1] - 1, (len(rows),), generator=generator)
            yield clips.frames[rows, versions].float() / 255, [texts[row] for row in rows.tolist()]


def ranking_loss(better: Tensor, worse: Tensor, margin: Tensor) -> Tensor:
    """Bradley-Terry on pairs whose order is known, each counted by how far apart the two are. Scores [B]."""
    return (bradley_terry_loss(better, worse) * margin).sum() / margin.sum().clamp_min(1e-6)


def swapped_captions(
    index: Tensor, prompts: list[list[int]], generator: Generator, *, candidates: int = 24
) -> list[list[int]]:
    """A wrong caption per clip: of a few random other ones, the most alike in half of the cases.

    Captions are compared as sets of tokens; one equal to the right caption is never taken.
    """
    chosen = []
    for own in index.tolist():
        right = set(prompts[own])
        draws = torch.randint(len(prompts), (candidates,), generator=generator).tolist()
        others = [prompts[i] for i in draws if prompts[i] != prompts[own]] or [prompts[own][::-1]]
        alike = bool(torch.rand((), generator=generator) < 0.5)
        pick = max(others, key=lambda o: len(right & set(o)) / len(right | set(o)))
        chosen.append(pick if alike else others[0])
    return chosen


def pretrain_foundational(
    model: FoundationalReward,
    config: PretrainConfig,
    frames: Tensor,
    captions: list[str],
    graded: Sequence[GradedClips] = (),
) -> None:
    """Words and spoiled bodies first, by the vision tower alone; then captioning, and right against swapped captions."""
    generator = torch.Generator().manual_seed(config.seed)
    stage = config.foundational_stage
    optimizer = CosineMuon(model, stage)
    prompts = model.encode_prompts(captions)
    rows = {name: i for i, name in enumerate(model.dimensions)}
    model.train()
    judged = graded_pairs(graded, model, stage.batch_size, generator)
    for step, batch in enumerate(batches(frames, stage, generator, "pre-train foundational")):
        selection = model.select(frames.shape[2], config.fps, generator)
        pair = next(judged, None) if step % 2 else None
        if pair is None:
            right = [prompts[i] for i in batch.index.tolist()]
            clip = selection.apply(batch.frames)
            less, more, margin = spoiled_pair(clip, "structural_stability", generator)
            seen = spoil_lightly(torch.cat([less, more]), config.spoil, generator)
        else:
            right, margin = pair.prompts, pair.margin
            seen = selection.apply(torch.cat([pair.nearer, pair.further]))
        if step < stage.num_steps * config.words_share:
            _, _, summary = model.see(seen)
            loss = model.words.loss(model.words_of(summary), right + right)
            if "structural_stability" in rows:
                first, second = model.sight["structural_stability"](summary)[:, 0].chunk(2)
                loss = loss + ranking_loss(first, second, margin)
            optimizer.step(loss)
            continue
        # a copy keeps to the prompt less: by another caption, by other colours, or because the generator made it anew
        texts, worse_by = right + right, margin
        second_is_worse = torch.ones(len(right), dtype=torch.bool)
        matched = torch.ones(len(seen), 1, dtype=torch.bool)
        if pair is None:  # who keeps to it less has nothing to do with who is spoiled
            second_is_worse = torch.rand(len(right), generator=generator) < 0.5
            if step % 4:
                worse_by = torch.ones(len(right))
                wrong = swapped_captions(batch.index, prompts, generator)
                matched = torch.cat([second_is_worse, ~second_is_worse])[:, None]
                both = zip(texts, wrong + wrong, matched[:, 0].tolist(), strict=True)
                texts = [own if keep else other for own, other, keep in both]
            else:
                seen, worse_by = recoloured(less, more, second_is_worse, generator)
        fps = torch.full((len(seen),), config.fps * seen.shape[2] / frames.shape[2])
        values, log_probs, is_prompt, words = model.values_and_log_probs(seen, fps, texts)
        loss = -(log_probs * matched).sum() / (is_prompt * matched).sum()
        loss = loss + 0.3 * model.words.loss(words, right + right)
        first, second = values.chunk(2)
        if "prompt_following" in rows:
            row = rows["prompt_following"]
            better = torch.where(second_is_worse, first[:, row], second[:, row])
            worse = torch.where(second_is_worse, second[:, row], first[:, row])
            loss = loss + ranking_loss(better, worse, worse_by)
        if "structural_stability" in rows:
            row = rows["structural_stability"]
            loss = loss + ranking_loss(first[:, row], second[:, row], margin)
        optimizer.step(loss)


def recoloured(
    first: Tensor, second: Tensor, second_is_worse: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Both copies in other colours, one of them further: (the two, [2 B, 3, F, H, W]; how much further, [B])."""
    low, high = torch.rand(2, len(first), generator=generator).sort(dim=0).values
    of_first = torch.where(second_is_worse, low, high)
    frames, severity = torch.cat([first, second]), torch.cat([of_first, low + high - of_first])
    return degrade(frames, "prompt_following", severity, generator), high - low


WRONG_MOTION, WRONG_SPEED, DRIFT = 0.3, 0.2, 0.3
"""Shares of the pairs that teach the motion reward; in the rest both copies are spoiled in some way, the second more."""
MOST_OCTAVES = 1.3
"""How much too fast or too slow a clip is shown at most, as a power of two."""


def wrong_motion(frames: Tensor, generator: Generator) -> Tensor:
    """The same clips [B, 3, F, H, W] moving otherwise: backwards, turned or stopped; one way per clip."""
    num_frames, square = frames.shape[2], frames.shape[-1] == frames.shape[-2]
    ways = [
        lambda clip: clip.flip(1),
        lambda clip: clip.flip(2, 3),
        lambda clip: clip.transpose(2, 3) if square else clip.flip(2, 3),
        lambda clip: clip.transpose(2, 3).flip(2, 3) if square else clip.flip(2, 3),
        lambda clip: clip[:, num_frames // 2 :][:, :1].expand_as(clip),
    ]
    kinds = torch.randint(len(ways), (len(frames),), generator=generator).tolist()
    return torch.stack([ways[kind](clip) for kind, clip in zip(kinds, frames, strict=True)])


def worse_motion(
    frames: Tensor, fps: float, generator: Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two versions of each clip [B, 3, F, H, W] that differ in motion: (better, worse, by how much [B], fps of the worse [B]).

    The worse moves otherwise than the caption says, or the right way too fast or too slowly, or drifts or is spoiled further than
    the better. Too fast is as wrong as too slow: shown at another rate, a clip's own pictures say both.
    """
    better, worse, margin = spoiled_pair(frames, "motion_quality", generator)
    kind = torch.rand(len(frames), generator=generator)
    low, high = torch.rand(2, len(frames), generator=generator).sort(dim=0).values
    low = low * (torch.rand(len(frames), generator=generator) < 0.6)
    octaves = MOST_OCTAVES * (2 * torch.rand(len(frames), generator=generator) - 1)
    ends = torch.tensor([WRONG_MOTION, WRONG_SPEED, DRIFT]).cumsum(0)
    other, hurried, drifting = (
        (kind < end) & (kind >= end - share)
        for end, share in zip(ends, (WRONG_MOTION, WRONG_SPEED, DRIFT), strict=True)
    )
    for chosen, first, second, gap in (
        (other, frames, wrong_motion(frames, generator), torch.ones(len(frames))),
        (hurried, frames, frames, octaves.abs()),
        (drifting, drift(frames, low, generator), drift(frames, high, generator), high - low),
    ):
        where = chosen.view(-1, 1, 1, 1, 1)
        better, worse = torch.where(where, first, better), torch.where(where, second, worse)
        margin = torch.where(chosen, gap, margin)
    return better, worse, margin, fps * 2 ** (octaves * hurried)


def pretrain_motion(
    model: MotionReward,
    config: PretrainConfig,
    frames: Tensor,
    captions: list[str],
    graded: Sequence[GradedClips] = (),
) -> None:
    """Masked latent prediction (V-JEPA 2, 2506.09985 eq. 1) and the probe's ranking of motions for a caption."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    teacher = copy.deepcopy(model.backbone.encoder).requires_grad_(False)
    optimizer = CosineMuon(model, config.motion_stage)
    prompts = model.encode_prompts(captions)
    model.train()
    stage = config.motion_stage
    judged = graded_pairs(graded, model, stage.batch_size, generator)
    texts = [model.encode_prompts(clips.captions) for clips in graded]
    own = generated_clips(graded, texts, stage.batch_size, generator)
    for step, batch in enumerate(batches(frames, stage, generator, "pre-train motion")):
        right = [prompts[i] for i in batch.index.tolist()]
        fps = torch.full((len(right),), config.fps)
        if step < stage.num_steps * config.masked_share:
            seen = spoil_lightly(batch.frames, config.spoil, generator)
            masked = masked_prediction_loss(model, teacher, seen, generator)
            words = model.words(model.features(seen, fps))
            optimizer.step(masked + model.words.loss(words, right))
            follow(teacher, model.backbone.encoder)
            continue
        pair = next(judged, None) if step % 2 else None
        fps_of_worse = None
        if pair is None:
            source = next(own, None) if step % 4 == 0 else None
            clips, right = (batch.frames, right) if source is None else source
            better, worse, margin, fps_of_worse = worse_motion(clips, config.fps, generator)
            seen = spoil_lightly(torch.cat([better, worse]), config.spoil, generator)
        else:
            right, margin = pair.prompts, pair.margin
            seen = torch.cat([pair.nearer, pair.further])
        fps = torch.full((len(right),), config.fps)
        both = torch.cat([fps, fps if fps_of_worse is None else fps_of_worse])
        values, words = model.values_and_words(seen, both, right + right)
        first, second = values[:, 0].chunk(2)
        loss = model.words.loss(words.chunk(2)[0], right)
        optimizer.step(loss + ranking_loss(first, second, margin))


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, *, rate: float = 0.02) -> None:
    """Move the teacher a little towards the student: an exponential moving average of its weights."""
    for target, source in zip(teacher.parameters(), student.parameters(), strict=True):
        target.lerp_(source, rate)


def masked_prediction_loss(
    model: MotionReward, teacher: nn.Module, frames: Tensor, generator: Generator
) -> Tensor:
    """L1 between the predictor's guess and the teacher's layer-normed states at tubelets hidden from the student.

    The hidden part is one random half of the patches, through all time, painted over with the mean colour.
    """
    pixels = model.pixels(frames)  # [B, F, 3, h, w]
    patch = model.settings.patch_size
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    times = pixels.shape[1] // model.backbone.config.tubelet_size
    hidden = torch.randperm(rows * columns, generator=generator)[: rows * columns // 2]
    plane = torch.zeros(rows * columns)
    plane[hidden] = 1
    paint = plane.view(rows, columns).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    mask = plane.bool().repeat(times)
    context = (~mask).nonzero().T.expand(len(frames), -1)
    target = mask.nonzero().T.expand(len(frames), -1)
    with torch.no_grad():
        wanted = teacher(pixel_values_videos=pixels).last_hidden_state[:, mask]
        wanted = F.layer_norm(wanted, wanted.shape[-1:])
    out = model.backbone(pixels * (1 - paint), context_mask=[context], target_mask=[target])
    return F.l1_loss(out.predictor_output.last_hidden_state, wanted)


def pretrain_aesthetic(
    model: AestheticReward,
    config: PretrainConfig,
    frames: Tensor,
    captions: list[str],
    graded: Sequence[GradedClips] = (),
) -> None:
    """Sigmoid image-text contrast (SigLIP, 2303.15343) and the head's ranking of spoiled pictures."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    size = model.backbone.config.hidden_size
    text = TextTower(
        vocab_size=len(model.tokenizer),
        hidden_size=size,
        num_layers=1,
        num_heads=config.aesthetic.num_heads,
        max_tokens=config.aesthetic.max_text_tokens,
    )
    project = nn.Linear(2 * size, size)
    scale = nn.Parameter(torch.tensor([math.log(10.0), -5.0]))  # log temperature and bias
    modules = nn.ModuleDict({"model": model, "text": text, "project": project})
    modules.register_parameter("scale", scale)
    optimizer = CosineMuon(modules, config.aesthetic_stage)
    limit = config.aesthetic.max_text_tokens
    prompts = encode_texts(model.tokenizer, captions, max_tokens=limit)
    model.train()
    stage = config.aesthetic_stage
    judged = graded_pairs(graded, model, stage.batch_size, generator)
    texts = [encode_texts(model.tokenizer, clips.captions, max_tokens=limit) for clips in graded]
    own = generated_clips(graded, texts, stage.batch_size, generator)
    for step, batch in enumerate(batches(frames, stage, generator, "pre-train aesthetic")):
        which = int(torch.randint(frames.shape[2], (), generator=generator))
        pair = next(judged, None) if step % 2 else None
        if pair is None:
            source = next(own, None) if step % 4 == 0 else None
            right = [prompts[i] for i in batch.index.tolist()]
            clips, right = (batch.frames, right) if source is None else source
            picture = clips[:, :, which : which + 1]
            less, more, margin = spoiled_pair(picture, "aesthetic_quality", generator)
        else:
            right, margin = pair.prompts, pair.margin
            less, more = (clip[:, :, which : which + 1] for clip in (pair.nearer, pair.further))
        features = model.features(torch.cat([less, more]).squeeze(2))
        score = model.head(features)[:, 0]
        first, second = score.chunk(2)
        image = F.normalize(project(features.chunk(2)[0]), dim=1)
        ids, mask = pad_right(right, model.tokenizer.pad_token_id)
        words = F.normalize(text(ids, mask), dim=1)
        logits = image @ words.T * scale[0].exp() + scale[1]
        sign = 2 * torch.eye(len(logits)) - 1
        contrast = -F.logsigmoid(sign * logits).sum(1).mean()
        optimizer.step(0.3 * contrast + ranking_loss(first, second, margin))
