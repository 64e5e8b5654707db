"""The foundational reward: a vision-language model that reads each dimension's score at a reward token.

    <vision_start> video <vision_end> <reward:structural_stability> the prompt <reward:prompt_following>

Attention is causal, so what is read before the prompt cannot depend on it: structure is judged prompt-blind. Prompt
following also sees how well the clip predicts the prompt: log P(prompt | clip), the captioner's own opinion, and the
words that the vision tower alone calls for (`rewards.words`).
Source: VideoAlign 2501.13918 sec. 3.3 (reward tokens and their order); the likelihood features are ours, after the
generative score of RewardDance 2509.08826.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn

from reelhf.config import Config
from rewards.backbones import LANGUAGE, build
from rewards.backbones.language import video_token_types
from rewards.base import FrameSelection
from rewards.module import RewardModule
from rewards.preprocess import fixed_rate_frames, pad_frames, patchify_qwen, stratified_frames
from rewards.recipes import PixelRecipe
from rewards.tokens import pad_right, reward_token
from rewards.words import WordHead

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

BEFORE_PROMPT = ("structural_stability",)
AFTER_PROMPT = ("prompt_following",)


class FoundationalConfig(Config):
    """Size of the tiny vision-language model, or the folder of a real one."""

    dimensions: tuple[Literal["prompt_following", "structural_stability"], ...] = (
        "prompt_following",
        "structural_stability",
    )
    """What it scores; structural_stability is read before the prompt, prompt_following after it."""
    backbone: str | None = None
    """A local folder or hub id of a Qwen2.5-VL or Qwen3-VL; None builds the tiny one below, to be pre-trained on captioned clips."""
    family: Literal["qwen2_5_vl", "qwen3_vl"] = "qwen2_5_vl"
    """Of the tiny one; a folder says its own."""
    hidden_size: PositiveInt = 96
    """Width of the language model and of the vision tower."""
    num_layers: PositiveInt = 3
    """Layers of the language model."""
    vision_layers: PositiveInt = 2
    """Layers of the vision tower."""
    num_heads: PositiveInt = 4
    """Attention heads of both."""
    patch_size: PositiveInt = 8
    """Side of a vision patch in pixels; 2x2 of them and 2 frames make one token."""
    area: PositiveInt = 64 * 64
    """Pixels per frame after the resize; the aspect ratio is kept."""
    preprocessing: Literal["area", "processor"] | PixelRecipe = "area"
    """How frames are made to fit: about `area` pixels; as the backbone's own processor does, whose numbers are then kept with the checkpoint; or these."""
    num_frames: PositiveInt = 6
    """Frames looked at per clip, one per equal stretch of it; at most so many with `sample_fps`."""
    sample_fps: PositiveFloat | None = None
    """Frames looked at per second, at fixed seconds whatever the clip's rate; None takes `num_frames` of any clip."""
    vocab_size: PositiveInt = 640
    """Tokens of the tokenizer trained on the captions."""
    uncertainty: bool = False
    """Also say how sure each score is, for a `loss.kind: gaussian` training."""
    max_text_tokens: PositiveInt = 128
    """Longer prompts are cut."""

    @field_validator("dimensions")
    @classmethod
    def _in_reading_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))


class FoundationalReward(RewardModule):
    """Qwen2.5-VL or Qwen3-VL with reward tokens: prompt_following and structural_stability."""

    kind: ClassVar[str] = "qwen_vl_foundational"
    readouts: ClassVar[tuple[str, ...]] = (
        "heads.",
        "sight.",
        "agree.",
        "words.weight",
        "spread.",
        "log_tie_width",
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
        super().__init__(config, tokenizer)
        self.family, self.backbone = build(
            LANGUAGE,
            config.backbone,
            backbone_config,
            tiny=config.family,
            settings=config,
            tokenizer=tokenizer,
        )
        if backbone_config is None and config.backbone is not None:
            self.backbone.resize_token_embeddings(len(tokenizer))
        self.backbone.config.use_cache = False
        vision = self.backbone.config.vision_config
        self.patch, self.merge, self.temporal = (
            vision.patch_size,
            vision.spatial_merge_size,
            vision.temporal_patch_size,
        )
        self.recipe = self.make_recipe(
            self.family.recipe, multiple=self.patch * self.merge, area_kernel="bicubic"
        )
        hidden = self.backbone.config.text_config.hidden_size
        self.summary = nn.Sequential(
            nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )
        self.words = WordHead(hidden, len(tokenizer))
        # each score: what the language model says at the reward token, what the vision tower says by itself, and, after
        # the prompt, how well clip and prompt agree
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, 1) for name in self.dimensions})
        self.sight = nn.ModuleDict({name: nn.Linear(2 * hidden, 1) for name in self.dimensions})
        self.agree = nn.ModuleDict(
            {name: nn.Linear(4, 1) for name in self.dimensions if name in AFTER_PROMPT}
        )
        for head in (*self.heads.values(), *self.sight.values()):
            nn.init.normal_(head.weight, std=0.02)
        for head in self.agree.values():  # begins as the agreement of the words alone
            head.weight.data.copy_(torch.tensor([[0.0, 0.0, 0.5, 0.5]]))
        if config.uncertainty:
            self.spread = self.spread_head(2 * hidden)
        token = tokenizer.convert_tokens_to_ids
        self.reward_ids = {name: token(reward_token(name)) for name in self.dimensions}
        self.before = [self.reward_ids[n] for n in BEFORE_PROMPT if n in self.reward_ids]
        self.after = [self.reward_ids[n] for n in AFTER_PROMPT if n in self.reward_ids]

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        count, rate = self.settings.num_frames, self.settings.sample_fps
        if rate is None:
            return FrameSelection(stratified_frames(num_frames, count, generator))
        return FrameSelection(
            fixed_rate_frames(num_frames, fps, rate=rate, at_most=count, generator=generator)
        )

    def see(self, frames: Tensor) -> tuple[Any, tuple[int, int, int], Tensor]:
        """The vision tower on frames [B, 3, F, H, W].

        Returns: its output, the grid (t, h, w) of one clip, and what its tokens say: the level over time and the unrest
        from time to time, [B, 2 H].
        """
        patches, grid = patchify_qwen(
            pad_frames(self.recipe(frames), self.temporal),
            patch=self.patch,
            merge=self.merge,
            temporal=self.temporal,
        )
        grids = torch.tensor([grid] * len(frames), device=frames.device)
        seen = self.backbone.get_video_features(patches, grids, return_dict=True)
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
            [
                *self.family.video_tokens(
                    grid,
                    merge=self.merge,
                    temporal=self.temporal,
                    num_frames=num_frames,
                    fps=rate,
                    tokenizer=self.tokenizer,
                ),
                *self.before,
            ]
            for rate in fps.tolist()
        ]
        ids, mask = pad_right(
            [[*head, *prompt, *self.after] for head, prompt in zip(heads, prompts, strict=True)],
            self.tokenizer.pad_token_id,
            device=fps.device,
        )
        states = self.backbone(
            input_ids=ids,
            attention_mask=mask.long(),
            mm_encoder_outputs={"video": seen},
            video_grid_thw=torch.tensor([grid] * len(ids), device=ids.device),
            mm_token_type_ids=video_token_types(ids, self.tokenizer),
            **self.family.timing(fps, self.temporal),
        ).last_hidden_state
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

    def values_and_log_probs(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw logits [B, D], log-probabilities of the prompt's tokens [B, L], which tokens those are [B, L], and
        log-probabilities of words [B, V]."""
        seen, grid, summary = self.see(frames)
        states, ids, is_prompt = self.read(seen, grid, frames.shape[2], fps, prompts)
        words = self.words_of(summary)
        log_probs = self.prompt_log_probs(states, ids, is_prompt)
        # the whole prompt, and its least expected word (soft-min); tens of nats, so scaled towards one
        surprise = torch.stack([log_probs.sum(1), -torch.logsumexp(-log_probs, dim=1)], dim=1) / 10
        agreement = torch.cat([surprise, self.words.match(words, prompts)], dim=1)
        values = []
        for name in self.dimensions:
            at = torch.eq(ids, self.reward_ids[name]).float().argmax(1)
            state = states[torch.arange(len(ids), device=ids.device), at]
            value = self.heads[name](state) + self.sight[name](summary)
            if name in AFTER_PROMPT:
                value = value + self.agree[name](agreement)
            values.append(value)
        spread = [self.spread(summary)] if self.settings.uncertainty else []
        return torch.cat([*values, *spread], dim=1), log_probs, is_prompt, words

    def values(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values, log_probs, _, _ = self.values_and_log_probs(frames, fps, prompts)
        return values, {"prompt_log_prob": log_probs.sum(1).detach()}
