"""What a reward is given, checked: a frame rate that is one, prompts that say something and fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reelhf.errors import UserError
from rewards.tokens import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def checked_fps(fps: Tensor | float | None) -> Tensor:
    """Frames per second as a float tensor; UserError where they are missing or no rate."""
    if fps is None:
        raise UserError(
            "fps is missing; expected the clip's frames per second: the same frames at another rate are another motion"
        )
    rate = torch.as_tensor(fps, dtype=torch.float32)
    if not (rate.isfinite() & (rate > 0)).all():
        raise UserError(f"fps is {rate.tolist()}; expected finite numbers above 0")
    return rate


def checked_prompts(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    refuse_long: bool,
) -> list[list[int]]:
    """Token ids of each prompt, at most `max_tokens`.

    Raises: UserError naming a prompt that is empty, or longer if `refuse_long`; otherwise a longer one is cut with a warning.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(
                f"prompt {number} of {len(prompts)} is empty; expected what the clip was to show"
            )
    encoded = encode_texts(tokenizer, prompts, max_tokens=None)
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]), default=None)
    if longest is not None and len(encoded[longest]) > max_tokens:
        what = (
            f"prompt {longest + 1} of {len(prompts)} has {len(encoded[longest])} tokens, "
            f"max_text_tokens is {max_tokens}"
        )
        if refuse_long:
            raise UserError(f"{what}; shorten it, or set long_prompts: cut to score its beginning")
        warnings.warn(f"{what}: its beginning is scored", stacklevel=3)
    return [row[:max_tokens] for row in encoded]
