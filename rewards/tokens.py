"""The reward models' tokenizer: byte-level BPE trained on captions, so that every language has tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD = "<|pad|>"
INTERNVL_MARKS = ("<img>", "<IMG_CONTEXT>", "</img>")
"""Start, place and end of a picture in InternVL's tokenizers."""
VISION_START, VISION_END, VIDEO_PAD, IMAGE_PAD = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|image_pad|>",
)


def reward_token(dimension: str) -> str:
    """The token at whose position a dimension's score is read."""
    return f"<|reward:{dimension}|>"


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int, dimensions: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the vision tokens and one reward token per dimension."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, VISION_START, VISION_END, VIDEO_PAD, IMAGE_PAD, *map(reward_token, dimensions)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, additional_special_tokens=special[1:]
    )


def load_tokenizer(folder: str, *, dimensions: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder or hub id, with the reward tokens and any missing vision token added."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    known = tokenizer.get_vocab()
    special = list(map(reward_token, dimensions))
    if not all(mark in known for mark in INTERNVL_MARKS):
        special = [VISION_START, VISION_END, VIDEO_PAD, IMAGE_PAD, *special]
    tokenizer.add_tokens([token for token in special if token not in known], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def answer_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The tokens of "yes" and of "no"; a tokenizer that has no such words gets a token of its own for each."""
    ids = []
    for word in ("yes", "no"):
        own = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(own) != 1:
            tokenizer.add_tokens([f"<|{word}|>"], special_tokens=True)
            own = [tokenizer.convert_tokens_to_ids(f"<|{word}|>")]
        ids += own
    return ids[0], ids[1]


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, max_tokens: int | None
) -> list[list[int]]:
    """Token ids of each text, cut to `max_tokens`; never empty."""
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [row[:max_tokens] or [tokenizer.pad_token_id] for row in ids]


def pad_right(
    rows: Sequence[Sequence[int]], pad: int, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Ids [B, L] padded on the right and the mask of real tokens, bool [B, L]."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    for row, out in zip(rows, ids, strict=True):
        out[: len(row)] = torch.as_tensor(row, dtype=torch.long)
    mask = torch.arange(length)[None] < torch.tensor([len(row) for row in rows])[:, None]
    return ids.to(device), mask.to(device)
