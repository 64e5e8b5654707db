"""The generative reward: a vision-language model that answers yes or no, as RewardDance does.

    Clip 1: <video> Clip 2: <video> Text: the prompt. <the question> Is clip 2 better than clip 1? -> yes | no

The score is the logit of yes minus that of no, at the place of the answer: never P(yes), whose gradient dies as it saturates. Against a reference clip
both orders are asked and averaged, so that which one stands second says nothing. With `asks: single` there is no reference: is this clip good?
Source: RewardDance, 2509.08826, sec. 3.2 (the comparison, its instruction, answer before rationale).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from reelhf.config import Config
from reelhf.errors import UserError
from rewards.module import HeadsSaid
from rewards.tokens import answer_ids, encode_texts, pad_right
from rewards.vision_language import VisionLanguageConfig, VisionLanguageReward

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

QUESTIONS = {
    "prompt_following": "Judge how well each clip shows what the text says: its subjects, their looks and what they do.",
    "structural_stability": "Judge how intact bodies and objects stay. Ignore how they move.",
    "motion_quality": "Judge how naturally things move and whether they move as the text says. More motion is not better.",
    "aesthetic_quality": "Judge how good each clip looks: light, colour, detail, composition.",
}
"""Dimension -> the task instruction."""
COMPARE = "Is clip 2 better than clip 1? Answer yes or no."
ASSESS = "Is this clip good? Answer yes or no."
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
"""What a chat model expects around a question; left out where the tokenizer does not know the marks."""

REFERENCES = "references.safetensors"
"""In a checkpoint: the clip that each prompt's clips are held against, by the prompt's token ids."""


class GenerativeConfig(VisionLanguageConfig):
    """The vision-language model that answers yes or no."""

    dimensions: tuple[
        Literal["prompt_following", "structural_stability", "motion_quality", "aesthetic_quality"],
        ...,
    ] = ("prompt_following", "structural_stability")
    """What it is asked about, each by a question of its own."""
    asks: Literal["against_reference", "single"] = "against_reference"
    """Whether a clip beats a reference clip of the same prompt (`rewards.references`), or whether it is good."""
    questions: dict[str, str] = Field(default_factory=dict)
    """Task instructions that take the place of the built-in ones, by dimension."""


@dataclass(frozen=True)
class Answer:
    """One question whose answer is known, to learn from."""

    clips: tuple[int, ...]
    """Indices of the clips in the order shown: two to compare, one to assess."""
    prompt: list[int]
    """Its token ids."""
    dimension: str
    yes: float
    """1, 0, or 0.5 for a tie."""
    rationale: str = ""
    """Why, in words (chain of thought); learned after the answer."""


@dataclass(frozen=True)
class Seen:
    """What the vision tower made of several clips of any size."""

    features: Any
    grids: list[tuple[int, int, int]]
    num_frames: list[int]
    fps: list[float]


class GenerativeReward(VisionLanguageReward):
    """Qwen2.5-VL, Qwen3-VL or InternVL that answers yes or no."""

    kind: ClassVar[str] = "qwen_vl_generative"
    readouts: ClassVar[tuple[str, ...]] = ("vocabulary",)
    config_class: ClassVar[type[Config]] = GenerativeConfig
    settings: GenerativeConfig

    def __init__(
        self,
        config: GenerativeConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        backbone_config: PretrainedConfig | None = None,
    ) -> None:
        if config.uncertainty:
            raise UserError(
                "uncertainty: true is for scores of a regression head; a generative reward has none"
            )
        self.yes, self.no = answer_ids(tokenizer)  # may add tokens, so before the embeddings
        super().__init__(config, tokenizer, backbone_config=backbone_config)
        size = self.backbone.config
        if not size.tie_word_embeddings:
            self.vocabulary = nn.Linear(
                size.text_config.hidden_size, size.text_config.vocab_size, bias=False
            )
            if backbone_config is None and config.backbone is not None:
                self.vocabulary.weight.data.copy_(
                    self.family.output_embeddings(config.backbone, len(tokenizer))
                )
        chat = "<|im_start|>" in tokenizer.get_vocab()
        self.opening, self.closing = (USER, ASSISTANT) if chat else ("", "")
        self.references: dict[tuple[int, ...], Tensor] = {}

    @property
    def compares(self) -> bool:
        """Whether `score` needs a `reference`."""
        return self.settings.asks == "against_reference"

    # What a clip is held against

    def keep_reference(self, prompt: str, frames: Tensor) -> None:
        """Hold the clips of a prompt against this one (uint8 [3, F, H, W]) from now on; it travels with the checkpoint."""
        for other in self.references.values():
            if other.shape != frames.shape:
                raise UserError(
                    f"a reference clip is {tuple(frames.shape)}, another {tuple(other.shape)}; expected one length and size, "
                    "that of the model whose clips they are"
                )
        self.references[tuple(self.encode_prompts([prompt])[0])] = frames.cpu()

    def hear(
        self,
        frames: Tensor,
        *,
        prompts: Sequence[Any],
        reference: Tensor | None = None,
        **options: Any,
    ) -> HeadsSaid:
        """As of any reward; without `reference`, against the clips that were kept."""
        if self.compares and reference is None and self.references:
            if isinstance(prompts[0], str):
                prompts = self.encode_prompts(prompts)
            for prompt in prompts:
                if tuple(prompt) not in self.references:
                    raise UserError(
                        f"no reference clip for {self.tokenizer.decode(prompt)!r}; there are {len(self.references)}, chosen by "
                        "`reelhf rewards references`: choose one for this prompt too"
                    )
            kept = torch.stack([self.references[tuple(prompt)] for prompt in prompts])
            reference = kept.to(frames.device, frames.dtype) / 255
        return super().hear(frames, prompts=prompts, reference=reference, **options)

    def save_extras(self, folder: Path) -> None:
        """The kept reference clips, as they are."""
        from safetensors.torch import save_file

        if self.references:
            named = {" ".join(map(str, key)): clip for key, clip in self.references.items()}
            save_file(named, folder / REFERENCES)

    def load_extras(self, folder: Path) -> None:
        from safetensors.torch import load_file

        if (folder / REFERENCES).is_file():
            named = load_file(folder / REFERENCES)
            self.references = {tuple(map(int, key.split())): clip for key, clip in named.items()}

    # What is asked

    def question(self, dimension: str) -> str:
        """The task instruction and the question for one dimension."""
        task = self.settings.questions.get(dimension, QUESTIONS[dimension])
        return f" {task} {COMPARE if self.compares else ASSESS}{self.closing}"

    def text(self, text: str) -> list[int]:
        """Token ids of our own words."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def sequence(
        self, seen: Seen, clips: Sequence[int], prompt: list[int], dimension: str
    ) -> list[int]:
        """Token ids up to the place of the answer."""
        ids = self.text(self.opening)
        for number, clip in enumerate(clips, 1):
            ids += self.text(f"Clip {number}:" if len(clips) > 1 else "Clip:")
            ids += self.video_tokens(seen.grids[clip], seen.num_frames[clip], seen.fps[clip])
        return [*ids, *self.text(" Text:"), *prompt, *self.text(self.question(dimension))]

    # What the model says

    def see(self, clips: Sequence[Tensor], fps: Sequence[float]) -> Seen:
        """The vision tower on clips [1, 3, F, H, W] of any size, all at once."""
        made = [self.patches(clip) for clip in clips]
        grids = [grid for _, grid in made]
        features = self.family.look(self.backbone, [patches for patches, _ in made], grids)
        return Seen(features, grids, [clip.shape[2] for clip in clips], list(fps))

    def states(
        self, seen: Seen, rows: Sequence[Sequence[int]], clips: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, L, H], token ids and their mask [N, L] of rows of tokens that show `clips`, in order."""
        order = [clip for shown in clips for clip in shown]
        device = seen.features.pooler_output[0].device
        ids, mask = pad_right(rows, self.tokenizer.pad_token_id, device=device)
        self.check_context(ids.shape[1])
        fps = torch.tensor([seen.fps[clip] for clip in order], device=device)
        shown = self.family.in_order(seen.features, order)
        grids = [seen.grids[clip] for clip in order]
        states = self.family.read(self.backbone, ids, mask, shown, grids, fps, self.tokenizer)
        return states, ids, mask

    def output_weight(self) -> Tensor:
        """Of the vocabulary's logits [V, H]: the embeddings' where the two are tied."""
        if hasattr(self, "vocabulary"):
            return self.vocabulary.weight
        return self.backbone.get_input_embeddings().weight

    def yes_minus_no(
        self, seen: Seen, asked: Sequence[tuple[Sequence[int], list[int], str]]
    ) -> Tensor:
        """Logit of yes minus logit of no [N] for (clips, prompt, dimension) asked."""
        rows = [self.sequence(seen, *question) for question in asked]
        states, _, mask = self.states(seen, rows, [clips for clips, _, _ in asked])
        last = states[torch.arange(len(rows), device=states.device), mask.sum(1) - 1]
        weight = self.output_weight()
        return last @ (weight[self.yes] - weight[self.no])

    def values(
        self,
        frames: Tensor,
        fps: Tensor,
        prompts: list[list[int]],
        reference: Tensor | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        count = len(frames)
        if self.compares and reference is None:
            raise UserError(
                "this reward asks whether a clip beats a reference clip; give `reference`, or train one with asks: single"
            )
        clips, rates = list(frames.split(1)), fps.tolist()
        if self.compares:
            clips, rates = clips + list(reference.split(1)), rates * 2  # type: ignore[union-attr]
        seen = self.see(clips, rates)
        orders: list[Callable[[int], tuple[int, ...]]] = [lambda i: (i,)]
        if self.compares:
            orders = [lambda i: (count + i, i), lambda i: (i, count + i)]
        asked = [
            (order(i), prompts[i], dimension)
            for order in orders
            for i in range(count)
            for dimension in self.dimensions
        ]
        logits = self.yes_minus_no(seen, asked).view(len(orders), count, len(self.dimensions))
        if not self.compares:
            return [logits[0]], {}
        second, first = logits  # as the second clip of the two, and as the first
        flips = ((second > 0) == (first > 0)).float().mean(1)
        return [(second - first) / 2], {"position_flip": flips.detach()}

    def answer_losses(
        self, clips: Sequence[Tensor], fps: Sequence[float], answers: Sequence[Answer]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy over the whole vocabulary, in nats.

        Args:
            clips: [1, 3, F, H, W] in [0, 1], of any size; the answers name them by index.
        Returns: of each answer [N], of its rationale, mean over its tokens [N] (0 without one), and yes minus no [N].
        """
        seen = self.see(clips, fps)
        asked = [self.sequence(seen, a.clips, a.prompt, a.dimension) for a in answers]
        told = [self.text(f" {a.rationale}") if a.rationale else [] for a in answers]
        said = [self.yes if a.yes > 0.5 else self.no for a in answers]
        rows = [
            [*question, answer, *why]
            for question, answer, why in zip(asked, said, told, strict=True)
        ]
        states, ids, mask = self.states(seen, rows, [a.clips for a in answers])
        at = torch.tensor([len(question) - 1 for question in asked], device=ids.device)
        first = int(at.min())  # logits from the first answer on: a vocabulary is large
        log_probs = F.log_softmax(states[:, first:-1] @ self.output_weight().T, dim=-1)
        rows_index = torch.arange(len(rows), device=ids.device)
        answered = log_probs[rows_index, at - first]
        yes = torch.tensor([a.yes for a in answers], device=ids.device)
        loss = -(yes * answered[:, self.yes] + (1 - yes) * answered[:, self.no])
        tokens = log_probs.gather(-1, ids[:, first + 1 :, None]).squeeze(-1)
        place = torch.arange(first + 1, ids.shape[1], device=ids.device)
        why = (place > at[:, None] + 1) & mask[:, first + 1 :]
        of_rationale = -(tokens * why).sum(1) / why.sum(1).clamp_min(1)
        return loss, of_rationale, answered[:, self.yes] - answered[:, self.no]

    def forward(
        self, *arguments: Any, answers: Sequence[Answer] | None = None, **options: Any
    ) -> Any:
        """Values and std, or the losses of given answers: the engine that trains it knows only this name."""
        if answers is None:
            return super().forward(*arguments, **options)
        return self.answer_losses(*arguments, answers=answers, **options)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of one prompt, cut as when scoring."""
        return encode_texts(self.tokenizer, [text], max_tokens=self.settings.max_text_tokens)[0]
