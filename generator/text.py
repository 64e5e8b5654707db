"""The text encoder: a decoder-only language model (Qwen architecture) whose hidden states condition the denoiser.

Seedance 1.0 (arXiv 2506.09113, 2.1) encodes prompts with a fine-tuned decoder-only LLM. Here it is either a tiny Qwen built from
the config, with a byte-level BPE tokenizer trained on the captions (English and Chinese alike), or a local folder / hub id of a
pre-trained one. Padding is on the right and attention is causal, so a prompt's embeddings do not depend on its batch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, field_validator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from generator.base import Condition
from generator.prompt_cache import PromptCache, encoder_key
from reelhf.config import Config
from reelhf.errors import UserError
from reelhf.progress import silence_transformers

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
CONFIG_NAME = "text.json"
IGNORED_LABEL = -100  # what cross_entropy skips


class TextEncoderConfig(Config):
    """A tiny Qwen from these numbers, or a pre-trained one from `path`."""

    path: str | None = None
    """Local folder or hub id of a causal language model with its tokenizer; the sizes below are then ignored."""
    architecture: Literal["qwen2", "qwen3"] = "qwen3"
    vocab_size: PositiveInt = 1024
    """Upper bound of the byte-level BPE vocabulary (256 bytes and three marks are always in it)."""
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt = 2
    mlp_size: PositiveInt = 384
    max_tokens: PositiveInt = Field(256, ge=8)
    """Longer prompts are cut at the end."""
    hidden_layer: int = 1
    """Which of the `num_layers + 1` hidden states conditions the denoiser. The last ones are specialised in the next token; in a
    tiny model trained on few captions the first ones still tell words apart, in a pre-trained LLM take one near the end (-3)."""
    template: str | None = None
    """What stands around every prompt, with {} in its place, such as an instruction and the marks of a chat. A token before the prompt
    has read nothing of it, so its embedding is dropped (as HunyuanVideo and Qwen-Image do); `max_tokens` does not count those."""

    @field_validator("template")
    @classmethod
    def _has_one_place(cls, template: str | None) -> str | None:
        if template is not None and template.count("{}") != 1:
            raise ValueError(
                f"a template with {template.count('{}')} places; expected {{}} once, where the prompt goes"
            )
        return template


def train_tokenizer(captions: Sequence[str], config: TextEncoderConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the captions: any text round-trips, whatever was seen in training."""
    tokenizer = Tokenizer(models.BPE())
    # Chinese has no spaces: without the split whole clauses of the training captions would become single tokens
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in (BEGIN, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_language_model(
    config: TextEncoderConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """A randomly initialised Qwen2 or Qwen3 of the configured size."""
    model_class = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}[config.architecture]
    marks = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return model_class(language_model_config(config, vocab_size=len(tokenizer), **marks))


def language_model_config(
    config: TextEncoderConfig, *, vocab_size: int | None = None, **marks: int | None
) -> PretrainedConfig:
    """Of the language model at `config.path`, or of a tiny one of the configured size.

    Raises: UserError if the path holds none.
    """
    if config.path is not None:
        try:
            return AutoConfig.from_pretrained(config.path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"text encoder path '{config.path}': not a readable language model ({' '.join(str(error).split())})"
            ) from error
    sizes = {
        "vocab_size": config.vocab_size if vocab_size is None else vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_tokens,
        "tie_word_embeddings": True,
        **marks,
    }
    if config.architecture == "qwen3":
        return Qwen3Config(**sizes, head_dim=config.hidden_size // config.num_heads)
    return Qwen2Config(**sizes)


class Tokens(NamedTuple):
    """A batch of texts, padded on the right."""

    ids: Tensor
    """[B, L] int64."""
    mask: Tensor
    """True where a token exists, [B, L] bool."""
    own: Tensor
    """Those of them that do not stand before the prompt in the template, [B, L] bool."""


class TextEncoder(nn.Module):
    """Prompts -> hidden states of one layer of the language model."""

    cache: PromptCache | None = None
    """Where embeddings are looked up and kept; see `use_cache`."""

    def __init__(
        self,
        config: TextEncoderConfig,
        language_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        num_states = language_model.config.num_hidden_layers + 1
        if not -num_states <= config.hidden_layer < num_states:
            raise UserError(
                f"hidden_layer {config.hidden_layer}: the language model has {num_states} hidden states, "
                f"expected {-num_states} to {num_states - 1}"
            )
        self.config = config
        self.language_model = language_model
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "right"
        self._before, _, self._after = (config.template or "{}").partition("{}")
        if config.template is not None and not self.tokenizer.is_fast:
            raise UserError(
                "template: this tokenizer does not say where its tokens come from, so the template cannot be dropped; use a fast one"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def build(cls, config: TextEncoderConfig, captions: Sequence[str]) -> TextEncoder:
        """From `config.path`, or a fresh model with a tokenizer trained on the captions."""
        silence_transformers()
        if config.path is not None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(config.path)
                return cls(config, AutoModelForCausalLM.from_pretrained(config.path), tokenizer)
            except OSError as error:
                raise UserError(
                    f"text encoder path '{config.path}': not a readable language model ({' '.join(str(error).split())})"
                ) from error
        if not captions:
            raise UserError(
                "a text encoder built from a config needs captions to train its tokenizer; got none"
            )
        tokenizer = train_tokenizer(captions, config)
        return cls(config, build_language_model(config, tokenizer), tokenizer)

    @property
    def embed_size(self) -> int:
        """E, the width of the embeddings."""
        return self.language_model.config.hidden_size

    def use_cache(self, folder: Path, encoder: Path) -> TextEncoder:
        """From now on `encode` reads from, and adds to, embeddings on disk; returns itself.

        They were computed in other batches, so they may differ in their last bits. For weights that stay as they are.

        Args:
            encoder: the folder that this encoder was loaded from.
        """
        self.cache = PromptCache(folder, encoder_key(encoder))
        return self

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts in the template, cut at their ends where they are too long."""
        templated = self.config.template is not None
        before = len(self.tokenizer(self._before)["input_ids"]) if templated else 0
        batch = self.tokenizer(
            [f"{self._before}{text}{self._after}" for text in texts],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.config.max_tokens + before,
            return_offsets_mapping=templated,
        )
        device = self.language_model.device
        mask = batch["attention_mask"].to(device).bool()
        own = mask
        if templated:  # a token that reaches over the border belongs to the prompt
            starts = batch["offset_mapping"][..., 1].to(device) > len(self._before)
            own = mask & (starts.cumsum(dim=1) > 0)
        return Tokens(batch["input_ids"].to(device), mask, own)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """`embed` without gradient, from disk where a cache has them."""
        if self.cache is None:
            return self.embed(prompts)
        found: dict[str, Condition] = {}
        for prompt in set(prompts):
            if self.cache.file(prompt).is_file():
                with contextlib.suppress(UserError):  # a damaged file is made anew
                    found[prompt] = self.cache.read(prompt)
        missing = sorted(set(prompts) - set(found))
        if missing:
            new = self.embed(missing).to("cpu")
            self.cache.write(missing, new)
            found |= {prompt: new[row] for row, prompt in enumerate(missing)}
        return Condition.cat([found[prompt] for prompt in prompts]).to(self.language_model.device)

    def embed(self, prompts: Sequence[str]) -> Condition:
        """Embeddings [B, L, E] fp32, scaled to unit RMS per token, and mask [B, L]; differentiable in the weights.

        An empty (or blank) prompt is the unconditional one: its mask is all False and its embeddings are zero.
        """
        tokens = self.tokenize([prompt if prompt.strip() else "" for prompt in prompts])
        empty = torch.tensor([not prompt.strip() for prompt in prompts], device=tokens.mask.device)
        output = self.language_model(
            input_ids=tokens.ids,
            attention_mask=tokens.mask.long(),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        )
        hidden = output.hidden_states[self.config.hidden_layer].float()
        # layers differ in scale by an order of magnitude; a denoiser should not have to know which one it was given
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        mask = tokens.mask & ~empty[:, None]
        if self.config.template is not None:
            hidden, mask = _to_front(hidden, tokens.own & mask)
        return Condition(hidden * mask[..., None], mask)

    def caption_loss(self, captions: Sequence[str]) -> Tensor:
        """Cross entropy of each next caption token in nats, averaged over the tokens of the batch; a scalar."""
        tokens = self.tokenize(captions)
        logits = self.language_model(
            input_ids=tokens.ids, attention_mask=tokens.mask.long(), use_cache=False
        ).logits
        labels = tokens.ids.masked_fill(~tokens.own, IGNORED_LABEL)
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
        )

    def forward(self, captions: Sequence[str]) -> Tensor:
        """The training loss; prompts are encoded with `encode`."""
        return self.caption_loss(captions)

    def save(self, directory: str | Path) -> Path:
        """Write `text.json`, the language model and the tokenizer."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.language_model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        (directory / CONFIG_NAME).write_text(
            json.dumps(self.config.model_dump(mode="json"), indent=2) + "\n"
        )
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> TextEncoder:
        """Read a folder written by `save`, in eval mode and frozen."""
        directory = Path(directory)
        if not (directory / CONFIG_NAME).is_file():
            raise UserError(f"{directory} is not a text encoder folder: {CONFIG_NAME} is missing")
        config = TextEncoderConfig.model_validate_json((directory / CONFIG_NAME).read_text())
        local = TextEncoder.build(config.model_copy(update={"path": str(directory)}), [])
        local.config = config
        return local.eval().requires_grad_(False)


def _to_front(hidden: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's own tokens first, cut to the longest: hidden [B, L, E], own [B, L] -> [B, L', E], [B, L']."""
    order = (~own).long().argsort(dim=1, stable=True)
    longest = max(1, int(own.sum(1).max()))
    order = order[:, :longest]
    return hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1])), own.gather(1, order)
