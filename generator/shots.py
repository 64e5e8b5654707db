"""Several shots in one clip: how a prompt names them, where their cuts may fall, and how their captions become one condition.

A prompt of two shots reads `[SHOT 1] a red circle [CUT] [SHOT 2] a blue square`; a shot may say how long it is,
`[SHOT 1: 5 frames]`, and shots that do not share what is left evenly. The causal VAE codes the first frame alone and then groups of
four, so the first shot has 1 + 4a frames and each later one 4b: a cut never falls inside a latent frame.
Shots and their captions follow Seedance 1.0 (2506.09113, 2.2); their positions are `generator.rope.shot_positions`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from generator.base import NO_SHOT, Condition
from reelhf.errors import UserError

_CUT = re.compile(r"\[\s*cut\s*\]", re.IGNORECASE)
_SHOT = re.compile(
    r"\s*\[\s*shot\s*(?P<number>\d+)\s*(?:[:,]\s*(?P<frames>\d+)\s*frames?\s*)?\]", re.IGNORECASE
)
_MARK = re.compile(r"\[\s*shot\s*(?=[\d:,\]])[^\[\]]*\]?|\[\s*cut\s*\]", re.IGNORECASE)
"""Whatever looks as if it meant to be one of the two."""
EXAMPLE = "[SHOT 1] a red circle [CUT] [SHOT 2] a blue square"


@dataclass(frozen=True)
class ShotPrompt:
    """A prompt taken apart: a caption per shot, and how many frames each asks for."""

    captions: tuple[str, ...]
    num_frames: tuple[int | None, ...]
    """None: what is left over, shared evenly."""

    def __len__(self) -> int:
        return len(self.captions)


def parse_shots(prompt: str) -> ShotPrompt:
    """The shots of a prompt; a prompt without marks is one shot, word for word. Blanks and case of the marks do not matter.

    Raises: UserError when there are marks that do not make numbered shots with a cut between each two.
    """
    if _MARK.search(prompt) is None:
        return ShotPrompt((prompt,), (None,))
    captions, num_frames = [], []
    for number, part in enumerate(_CUT.split(prompt), start=1):
        mark = _SHOT.match(part)
        if mark is None:
            raise _malformed(prompt, f"shot {number} does not begin with [SHOT {number}]")
        if int(mark["number"]) != number:
            raise _malformed(prompt, f"shot {number} is called [SHOT {mark['number']}]")
        caption = part[mark.end() :].strip()
        if not caption:
            raise _malformed(prompt, f"shot {number} has no caption")
        stray = _MARK.search(caption)
        if stray is not None:
            raise _malformed(prompt, f"there is no [CUT] before '{stray[0]}'")
        captions.append(caption)
        num_frames.append(int(mark["frames"]) if mark["frames"] else None)
    return ShotPrompt(tuple(captions), tuple(num_frames))


def _malformed(prompt: str, reason: str) -> UserError:
    return UserError(f"prompt '{prompt[:80]}': {reason}; write shots as '{EXAMPLE}'")


def shot_prompt(captions: Sequence[str], num_frames: Sequence[int | None] | None = None) -> str:
    """The prompt of these shots; `parse_shots` takes it apart again."""
    lengths = num_frames or [None] * len(captions)
    parts = [
        f"[SHOT {number}{'' if frames is None else f': {frames} frames'}] {caption}"
        for number, (caption, frames) in enumerate(zip(captions, lengths, strict=True), start=1)
    ]
    return " [CUT] ".join(parts)


def shot_latents(
    num_frames: Sequence[int | None], clip_frames: int, *, temporal_ratio: int = 4
) -> tuple[int, ...]:
    """Latent frames of each shot of a clip, at least one; shots of unstated length share evenly, the earlier ones get the remainder.

    Args:
        num_frames: what each shot asks for, in frames.
        clip_frames: 1 + temporal_ratio * n.
    Raises: UserError when the shots do not fit, or a stated length would cut inside a latent frame.
    """
    total = 1 + (clip_frames - 1) // temporal_ratio
    if len(num_frames) > total:
        raise UserError(
            f"a prompt of {len(num_frames)} shots for a clip of {clip_frames} frames, which has room for {total}: "
            f"the first of 1 + {temporal_ratio}a frames, each later one of {temporal_ratio}b"
        )
    stated = [
        None if frames is None else _stated(number, frames, temporal_ratio)
        for number, frames in enumerate(num_frames, start=1)
    ]
    left = total - sum(latents or 0 for latents in stated)
    open_shots = stated.count(None)
    if left < open_shots or (left > 0 and not open_shots):
        lengths = ", ".join("open" if frames is None else str(frames) for frames in num_frames)
        raise UserError(
            f"shots of {lengths} frames do not make a clip of {clip_frames}; leave out a length or change one"
        )
    even, more = divmod(left, open_shots) if open_shots else (0, 0)
    shares = itertools.chain([even + 1] * more, itertools.repeat(even))
    return tuple(next(shares) if latents is None else latents for latents in stated)


def _stated(number: int, frames: int, ratio: int) -> int:
    """Latent frames of a shot whose length is given."""
    first = int(number == 1)
    if frames < 1 or (frames - first) % ratio:
        lower = max((frames - first) // ratio, 1 - first) * ratio + first
        form = f"1 + {ratio}a" if first else f"{ratio}b"
        raise UserError(
            f"shot {number} of {frames} frames: cuts fall between latent frames, so it has {form}; use {lower} or {lower + ratio}"
        )
    return first + (frames - first) // ratio


def cut_frames(latents: Sequence[int], *, temporal_ratio: int = 4) -> list[int]:
    """The first frame of every shot but the first, from latent frames per shot: always 1 + 4a."""
    starts = itertools.accumulate(latents[:-1])
    return [1 + (start - 1) * temporal_ratio for start in starts]


def prompt_shots(
    prompts: Sequence[str], clip_frames: int | Sequence[int], *, temporal_ratio: int = 4
) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Captions and latent frames of every prompt's shots in a clip of this length. Raises: UserError if they do not fit."""
    parsed = [parse_shots(prompt) for prompt in prompts]
    lengths = [clip_frames] * len(prompts) if isinstance(clip_frames, int) else clip_frames
    return [
        (shots.captions, shot_latents(shots.num_frames, length, temporal_ratio=temporal_ratio))
        for shots, length in zip(parsed, lengths, strict=True)
    ]


def encode_shots(
    encode: Callable[[list[str]], Condition],
    prompts: Sequence[str],
    clip_frames: int | Sequence[int],
    *,
    temporal_ratio: int = 4,
) -> Condition:
    """Encode every shot's caption on its own and lay those of a prompt one after another; plain prompts pass as they are.

    Args:
        encode: captions to a condition of one shot per row, padded on the right.
        clip_frames: of the clip that the prompts are for, or of each one's; decides where the cuts fall.
    """
    shots = prompt_shots(prompts, clip_frames, temporal_ratio=temporal_ratio)
    each = encode([caption for captions, _ in shots for caption in captions])
    counts = [len(captions) for captions, _ in shots]
    if max(counts, default=1) == 1:
        return each
    embeds, token_shots = [], []
    row = 0
    for count in counts:
        tokens = [each.embeds[row + shot][each.mask[row + shot]] for shot in range(count)]
        embeds.append(torch.cat(tokens))
        token_shots.append(
            torch.cat([torch.full((len(part),), shot) for shot, part in enumerate(tokens)])
        )
        row += count
    starts = torch.full((len(counts), max(counts)), NO_SHOT)
    for index, (_, of_clip) in enumerate(shots):
        starts[index, : len(of_clip)] = torch.tensor([0, *itertools.accumulate(of_clip[:-1])])

    def padded(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return Condition(
        padded(embeds),
        padded([torch.ones(len(part), dtype=torch.bool) for part in embeds]).to(each.mask.device),
        padded(token_shots).to(each.mask.device),
        starts.to(each.mask.device),
    )
