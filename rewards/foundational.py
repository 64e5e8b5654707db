"""The foundational reward: a vision-language model that reads each dimension's score at a reward token.

    <vision_start> video <vision_end> <reward:structural_stability> the prompt <reward:prompt_following>

Attention is causal, so what is read before the prompt cannot depend on it: structure is judged prompt-blind. Prompt
following also sees how well the clip predicts the prompt: log P(prompt | clip), the captioner's own opinion, and the
words that the vision tower alone calls for (`rewards.words`).
Source: VideoAlign 2501.13918 sec. 3.3 (reward tokens and their order); the likelihood features are ours, after the
generative score of RewardDance 2509.08826.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from reelhf.config import Config
from rewards.heads import every_head, own_readouts
from rewards.tokens import pad_right, reward_token
from rewards.vision_language import VisionLanguageConfig, VisionLanguageReward
from rewards.words import MatchingWords

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

BEFORE_PROMPT = ("structural_stability",)
AFTER_PROMPT = ("prompt_following",)


class FoundationalConfig(VisionLanguageConfig):
    """The vision-language model that reads scores at reward tokens."""

    dimensions: tuple[Literal["prompt_following", "structural_stability"], ...] = (
        "prompt_following",
        "structural_stability",
    )
    """What it scores; structural_stability is read before the prompt, prompt_following after it."""

    reads: Literal["all", "reward_tokens"] = "all"
    """all: the language model at the reward token, the vision tower by itself and how well the prompt's words fit the clip, which is what a tiny
    pre-trained model needs. reward_tokens: a linear head at each reward token and nothing else, for a real backbone."""

    @model_validator(mode="after")
    def _pre_trained_reads_all(self) -> FoundationalConfig:
        if self.reads == "reward_tokens" and self.backbone is None:
            raise ValueError(
                "reads is reward_tokens without a backbone; expected the folder or hub id of one, or reads: all"
            )
        return self

    @field_validator("dimensions")
    @classmethod
    def _in_reading_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))


@dataclass(frozen=True)
class Observed:
    """What backbone and prompt give to every head."""

    at_tokens: dict[str, Tensor]
    """Hidden state [B, H] at each dimension's reward token."""
    summary: Tensor
    """What the vision tower says by itself, [B, 2 H]."""
    words: Tensor
    """Log-probabilities of words [B, V]."""
    log_probs: Tensor
    """Of the prompt's tokens, [B, L]."""
    is_prompt: Tensor
    surprise: Tensor
    """Of the whole prompt and of its least expected word, [B, 2]."""


class FoundationalReward(VisionLanguageReward):
    """Qwen2.5-VL, Qwen3-VL or InternVL with reward tokens: prompt_following and structural_stability."""

    kind: ClassVar[str] = "qwen_vl_foundational"
    readouts: ClassVar[tuple[str, ...]] = (
        "heads",
        "sight",
        "agree",
        "words.weight",
        "spread",
    )
    config_class: ClassVar[type[Config]] = FoundationalConfig
    settings: FoundationalConfig

    def __init__(
        self,
        config: FoundationalConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        backbone_config: PretrainedConfig | None = None,
    ) -> None:
        super().__init__(config, tokenizer, backbone_config=backbone_config)
        hidden = self.backbone.config.text_config.hidden_size
        if config.reads == "all":
            self.summary = nn.Sequential(
                nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
            )
            self.words = MatchingWords(hidden, len(tokenizer))
        for name, part in self.new_readouts().items():
            self.add_module(name, part)
        token = tokenizer.convert_tokens_to_ids
        self.reward_ids = {name: token(reward_token(name)) for name in self.dimensions}
        self.before = [self.reward_ids[n] for n in BEFORE_PROMPT if n in self.reward_ids]
        self.after = [self.reward_ids[n] for n in AFTER_PROMPT if n in self.reward_ids]

    def new_readouts(self) -> dict[str, nn.Module]:
        """Of each score: what the language model says at the reward token, what the vision tower says by itself, and, after
        the prompt, how well clip and prompt agree."""
        hidden = self.backbone.config.text_config.hidden_size
        everything = self.settings.reads == "all"
        heads = nn.ModuleDict({name: nn.Linear(hidden, 1) for name in self.dimensions})
        out: dict[str, nn.Module] = {"heads": heads}
        drawn: list[nn.Module] = list(heads.values())
        if everything:
            sight = nn.ModuleDict({name: nn.Linear(2 * hidden, 1) for name in self.dimensions})
            agree = nn.ModuleDict(
                {name: nn.Linear(4, 1) for name in self.dimensions if name in AFTER_PROMPT}
            )
            for head in agree.values():  # begins as the agreement of the words alone
                head.weight.data.copy_(torch.tensor([[0.0, 0.0, 0.5, 0.5]]))  # type: ignore[operator, union-attr]
            out |= {"sight": sight, "agree": agree}
            drawn += sight.values()
        for head in drawn:
            nn.init.normal_(head.weight, std=0.02)  # type: ignore[arg-type]
        if self.settings.uncertainty:
            out["spread"] = self.spread_head(2 * hidden if everything else hidden)
        return out

    def look(self, frames: Tensor) -> tuple[Any, tuple[int, int, int]]:
        """The vision tower's output on frames [B, 3, F, H, W] and the grid (t, h, w) of one clip."""
        patches, grid = self.patches(frames)
        return self.family.look(self.backbone, [patches], [grid] * len(frames)), grid

    def see(self, frames: Tensor) -> tuple[Any, tuple[int, int, int], Tensor]:
        """The vision tower on frames [B, 3, F, H, W].

        Returns: its output, the grid (t, h, w) of one clip, and what its tokens say: the level over time and the unrest
        from time to time, [B, 2 H].
        """
        seen, grid = self.look(frames)
        said = self.summary(torch.stack(list(seen.pooler_output)))  # [B, t * h * w / 4, H]
        said = said.unflatten(1, (grid[0], -1)).mean(2)  # [B, t, H]
        unrest = torch.zeros_like(said[:, 0])
        if grid[0] > 1:
            unrest = (said.diff(dim=1).square() + 1e-6).sqrt().mean(1)
        return seen, grid, torch.cat([said.mean(1), unrest], dim=1)

    def words_of(self, summary: Tensor) -> Tensor:
        """Log-probabilities of words [B, V] for a summary [B, 2 H]."""
        return self.words(summary.chunk(2, dim=1)[0])

    def read(
        self,
        seen: Any,
        grid: tuple[int, int, int],
        num_frames: int,
        fps: Tensor,
        prompts: list[list[int]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The language model on what was seen and the prompts.

        Returns: hidden states [B, L, H], the token ids [B, L] and the mask of prompt tokens [B, L].
        """
        heads = [
            [*self.video_tokens(grid, num_frames, rate), *self.before] for rate in fps.tolist()
        ]
        ids, mask = pad_right(
            [[*head, *prompt, *self.after] for head, prompt in zip(heads, prompts, strict=True)],
            self.tokenizer.pad_token_id,
            device=fps.device,
        )
        self.check_context(ids.shape[1])
        grids = [grid] * len(ids)
        states = self.family.read(self.backbone, ids, mask, seen, grids, fps, self.tokenizer)
        is_prompt = mask.clone()
        for row, head in zip(is_prompt, heads, strict=True):
            row[: len(head)] = False
        for token in self.after:
            is_prompt &= ids != token
        return states, ids, is_prompt

    def prompt_log_probs(self, states: Tensor, ids: Tensor, is_prompt: Tensor) -> Tensor:
        """log P(token | clip, tokens before it) at each prompt token, 0 elsewhere, [B, L]."""
        embedding = self.backbone.get_input_embeddings().weight
        first = int(is_prompt.any(0).float().argmax())  # logits only where there are prompt tokens
        logits = states[:, first - 1 : -1] @ embedding.T
        log_probs = F.log_softmax(logits, dim=-1).gather(-1, ids[:, first:, None]).squeeze(-1)
        return F.pad(log_probs, (first, 0)) * is_prompt

    def observe(self, frames: Tensor, fps: Tensor, prompts: list[list[int]]) -> Observed:
        """All that a head is told."""
        seen, grid, summary = self.see(frames)
        states, ids, is_prompt = self.read(seen, grid, frames.shape[2], fps, prompts)
        words = self.words_of(summary)
        log_probs = self.prompt_log_probs(states, ids, is_prompt)
        # the whole prompt, and its least expected word (soft-min); tens of nats, so scaled towards one
        surprise = torch.stack([log_probs.sum(1), -torch.logsumexp(-log_probs, dim=1)], dim=1) / 10
        at_tokens = {name: self.state_at(states, ids, name) for name in self.dimensions}
        return Observed(at_tokens, summary, words, log_probs, is_prompt, surprise)

    def judge(self, seen: Observed, prompts: list[list[int]], head: Mapping[str, Any]) -> Tensor:
        """Raw logits [B, D] of one head."""
        match = self.words.match(seen.words, prompts, head["words.weight"])
        agreement = torch.cat([seen.surprise, match], dim=1)
        values = []
        for name in self.dimensions:
            value = head["heads"][name](seen.at_tokens[name]) + head["sight"][name](seen.summary)
            if name in AFTER_PROMPT:
                value = value + head["agree"][name](agreement)
            values.append(value)
        spread = [head["spread"](seen.summary)] if self.settings.uncertainty else []
        return torch.cat([*values, *spread], dim=1)

    def values_and_log_probs(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw logits [B, D] of the first head, log-probabilities of the prompt's tokens [B, L], which tokens those are
        [B, L], and log-probabilities of words [B, V]."""
        seen = self.observe(frames, fps, prompts)
        values = self.judge(seen, prompts, own_readouts(self))
        return values, seen.log_probs, seen.is_prompt, seen.words

    def state_at(self, states: Tensor, ids: Tensor, dimension: str) -> Tensor:
        """The hidden state [B, H] at a dimension's reward token."""
        at = torch.eq(ids, self.reward_ids[dimension]).float().argmax(1)
        return states[torch.arange(len(ids), device=ids.device), at]

    def values(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        if self.settings.reads == "all":
            told = self.observe(frames, fps, prompts)
            each = [self.judge(told, prompts, head) for head in every_head(self)]
            return each, {"prompt_log_prob": told.log_probs.sum(1).detach()}
        seen, grid = self.look(frames)
        states, ids, _ = self.read(seen, grid, frames.shape[2], fps, prompts)
        found = {name: self.state_at(states, ids, name) for name in self.dimensions}
        return [self.judge_tokens(found, head) for head in every_head(self)], {}

    def judge_tokens(self, at_tokens: Mapping[str, Tensor], head: Mapping[str, Any]) -> Tensor:
        """Raw logits [B, D] of one head from the states at the reward tokens alone."""
        out = [head["heads"][name](state) for name, state in at_tokens.items()]
        if self.settings.uncertainty:
            out.append(head["spread"](torch.stack(list(at_tokens.values())).mean(0)))
        return torch.cat(out, dim=1)
