"""What the rewards on one backbone share: validity, heads, the checkpoint folder."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from reelhf.config import Config
from reelhf.errors import UserError
from reelhf.progress import silence_transformers
from rewards.base import FrameSelection, RewardScores
from rewards.calibrated import CalibratedReward, bound
from rewards.card import model_card
from rewards.checkpoint import REWARD_SCHEMA_VERSION, read_reward_json
from rewards.heads import OTHER_HEADS, mean_and_disagreement, set_heads
from rewards.inputs import checked_fps, checked_prompts
from rewards.lora import LoraSettings, add_lora, base_state, is_base_weight
from rewards.preprocess import clamp_straight_through
from rewards.recipes import PixelRecipe
from rewards.tokens import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from typing_extensions import Self

LOG_STD_RANGE = (-5.0, 5.0)
"""Of a learned spread; beyond it the quadrature of the loss is not exact."""


@dataclass(frozen=True)
class HeadsSaid:
    """What each head makes of a batch of clips."""

    values: Tensor
    """Raw logits [B, H, D]; NaN (without gradient) where the clip is invalid."""
    std: Tensor | None
    """Of each, [B, H, D], from a model with `uncertainty`."""
    valid: Tensor
    parts: dict[str, Tensor]


class RewardModule(CalibratedReward):
    """Base of the reward models on one backbone: subclasses implement `values` on clean, selected, clamped frames.

    With `uncertainty` in its settings a model also says the spread of each value. `tie_width` [D] is the gap, in logits, at which the
    better clip wins half its verdicts. With several heads (`rewards.heads`) its score is the mean of their z-scores by `head_mean` and `head_std` [H, D].
    """

    config_class: ClassVar[type[Config]]
    readouts: ClassVar[tuple[str, ...]]
    """Names of the parts that turn features into scores; the rest is the backbone to an optimizer."""
    reads_prompt: ClassVar[bool] = True
    """Whether a score depends on the prompt, which may then not be empty."""
    recipe: PixelRecipe
    head_mean: Tensor
    head_std: Tensor

    def __init__(self, config: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(config.dimensions)
        silence_transformers()
        self.settings, self.tokenizer = config, tokenizer
        self.tie_width: list[float] | None = None
        self.lora: LoraSettings | None = None
        self.base: dict[str, str] | None = None
        self.card: dict[str, Any] = {}

    @property
    def num_heads(self) -> int:
        return 1 + len(getattr(self, OTHER_HEADS, ()))

    def new_readouts(self) -> dict[str, nn.Module]:
        """Modules among the `readouts`, drawn anew; none where a model has no head of its own."""
        return {}

    def is_readout(self, parameter: str) -> bool:
        """Whether a parameter, by its name, is part of a head or of the loss, not of the backbone."""
        parts = (*self.readouts, OTHER_HEADS, "log_tie_width")
        return any(parameter == part or parameter.startswith(f"{part}.") for part in parts)

    def make_recipe(
        self, processor: PixelRecipe, *, multiple: int, area_kernel: Literal["bicubic", "bilinear"]
    ) -> PixelRecipe:
        """How frames are made to fit, from the settings; `processor` is what the family's own processor does."""
        chosen = self.settings.preprocessing
        if isinstance(chosen, PixelRecipe):
            return chosen
        processor = processor.model_copy(update={"multiple": multiple})
        if chosen == "processor":
            source = self.settings.backbone
            return processor if source is None else processor.from_folder(source)
        return PixelRecipe(
            sizing="area",
            kernel=area_kernel,
            mean=processor.mean,
            std=processor.std,
            multiple=multiple,
            area=self.settings.area,
        )

    @abstractmethod
    def values(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Raw logits [B, D] of each head, and detached parts, of finite frames [B, 3, F', H, W] in [0, 1]; prompts as token ids.

        With `uncertainty` the logarithm of each one's spread stands behind them, [B, 2 D].
        """

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        return FrameSelection(None)

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        if not self.reads_prompt:
            limit = self.settings.max_text_tokens
            return encode_texts(self.tokenizer, prompts, max_tokens=limit)
        return checked_prompts(
            self.tokenizer,
            prompts,
            max_tokens=self.settings.max_text_tokens,
            refuse_long=self.settings.long_prompts == "refuse",
        )

    def score(
        self,
        frames: Tensor,
        *,
        selection: FrameSelection,
        fps: Tensor | float,
        prompts: Sequence[Any],
        first_frame: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> RewardScores:
        """See `rewards.base.RewardModel.score`."""
        said = self.hear(frames, selection=selection, fps=fps, prompts=prompts, reference=reference)
        if self.num_heads == 1:
            std = None if said.std is None else said.std[:, 0]
            return RewardScores(said.values[:, 0], said.valid, std, said.parts)
        z = ((said.values - self.head_mean) / self.head_std).transpose(0, 1)
        own = None if said.std is None else (said.std / self.head_std).transpose(0, 1)
        mean, std = mean_and_disagreement(z, own)
        return RewardScores(mean, said.valid, std, said.parts)

    def hear(
        self,
        frames: Tensor,
        *,
        selection: FrameSelection,
        fps: Tensor | float,
        prompts: Sequence[Any],
        reference: Tensor | None = None,
    ) -> HeadsSaid:
        """What each head says of the clips, before they are made one score."""
        if (
            frames.dim() != 5
            or frames.shape[1] != 3
            or not frames.shape[2]
            or len(prompts) != len(frames)
        ):
            raise ValueError(
                f"expected frames [B, 3, F, H, W] and B prompts, got {tuple(frames.shape)} and {len(prompts)} prompts"
            )
        if isinstance(prompts[0], str):
            prompts = self.encode_prompts(prompts)
        frames = selection.apply(frames)
        valid = frames.detach().flatten(1).isfinite().all(dim=1)  # [B]
        clean = torch.where(
            valid.view(-1, 1, 1, 1, 1), frames, 0.0
        )  # NaN must not reach the other clips' gradient
        fps = checked_fps(fps).to(frames.device).expand(len(frames))
        fps = selection.rate(fps)
        more = {}
        if reference is not None and self.compares:
            other = self.select(reference.shape[2], float(fps[0])).apply(reference)
            whole = other.detach().flatten(1).isfinite().all(dim=1)
            valid = valid & whole
            other = torch.where(whole.view(-1, 1, 1, 1, 1), other, 0.0)
            more["reference"] = clamp_straight_through(other)
        each, parts = self.values(clamp_straight_through(clean), fps, list(prompts), **more)
        values = torch.stack(each, dim=1)  # [B, H, D], or 2 D with their spread
        values = values.to(
            torch.promote_types(values.dtype, torch.float32)
        )  # never a bfloat16 score
        valid = valid & values.detach().isfinite().flatten(1).all(dim=1)
        values = values.masked_fill(~valid[:, None, None], float("nan"))
        if not self.settings.uncertainty:
            return HeadsSaid(values, None, valid, parts)
        values, log_std = values.chunk(2, dim=2)
        return HeadsSaid(values, log_std.clamp(*LOG_STD_RANGE).exp(), valid, parts)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Raw values of every head [B, H * D] and their std or None: for the engine that trains it, whose hooks find tensors in tuples alone."""
        said = self.hear(*arguments, **options)
        return said.values.flatten(1), None if said.std is None else said.std.flatten(1)

    def spread_head(self, features: int) -> nn.Linear:
        """A head for the logarithm of each value's spread, beginning at a spread of one."""
        head = nn.Linear(features, len(self.dimensions))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    @contextmanager
    def learning_ties(self, width: Tensor, how: object) -> Iterator[None]:
        """While training: the tie width is `width` [D], or begins there and is learned with the weights if `how` is "learned"."""
        if how == "learned":
            self.log_tie_width = nn.Parameter(width.log())
        yield
        self.tie_width = self.tie_width_now(width).tolist()
        if how == "learned":
            del self.log_tie_width

    def tie_width_now(self, given: Tensor) -> Tensor:
        """Tie width per dimension [D]: the learned one while one is learned, otherwise the given one."""
        learned = getattr(self, "log_tie_width", None)
        return given if learned is None else learned.exp()

    def recompute_layers(self) -> None:
        """Keep no activations inside the backbone's layers; the backward pass computes them again. Needs train() mode."""
        self.backbone.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[union-attr, operator]

    # Checkpoints

    def save(self, folder: Path) -> Path:
        """Write reward.json, config.json (the backbone's), model.safetensors and the tokenizer; sealed.

        A model with low-rank deltas on a `base` writes the deltas and everything beside the backbone, and names the base.
        """
        from safetensors.torch import save_file

        from reelhf.run import seal

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: t.detach().cpu().contiguous().clone()
            for name, t in self.state_dict().items()
            if self.base is None or not is_base_weight(name)
        }
        save_file(state, folder / "model.safetensors")
        self.backbone.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        self.tokenizer.save_pretrained(folder / "tokenizer")
        described = {
            "schema_version": REWARD_SCHEMA_VERSION,
            "type": self.kind,
            "dimensions": list(self.dimensions),
            "config": self.settings.model_dump(mode="json"),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "validation_range": [
                [bound(a), bound(b)] for a, b in zip(self.low, self.high, strict=True)
            ],
            "temperature": self.temperature.tolist(),
            "data_hash": self.data_hash,
            "tie_width": self.tie_width,
            "training": self.card,
            "heads": self.num_heads,
            "lora": None if self.lora is None else self.lora.model_dump(mode="json"),
            "base": self.base,
            "preprocessing": self.recipe.model_dump(mode="json", exclude_none=True),
        }
        (folder / "reward.json").write_text(json.dumps(described, indent=2) + "\n")
        (folder / "README.md").write_text(model_card(described), encoding="utf-8")
        self.save_extras(folder)
        seal(folder)
        return folder

    def save_extras(self, folder: Path) -> None:
        """Write what else belongs to a model of this kind; nothing by default."""

    def load_extras(self, folder: Path) -> None:
        """Read what `save_extras` wrote."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The model of a folder written by `save`, trainable."""
        from safetensors.torch import load_file
        from transformers import AutoConfig, PreTrainedTokenizerFast

        described = read_reward_json(folder)
        settings = dict(described["config"])
        if (
            "preprocessing" in described
        ):  # the numbers it was trained with, whatever the backbone's folder says now
            settings["preprocessing"] = described["preprocessing"]
        config = cls.config_class.model_validate(settings)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        model = cls(config, tokenizer, backbone_config=AutoConfig.from_pretrained(folder))  # type: ignore[call-arg]
        set_heads(model, described.get("heads", 1))
        state, base = load_file(folder / "model.safetensors"), described.get("base")
        if base is not None:
            untouched = base_state(base, Path(folder))
            model.load_state_dict(
                {k: v for k, v in untouched.items() if is_base_weight(k)}, strict=False
            )
        if described.get("lora"):
            add_lora(model, LoraSettings.model_validate(described["lora"]))
        try:
            missing, unexpected = model.load_state_dict(state, strict=base is None)
        except RuntimeError as error:
            raise UserError(
                f"the weights in {folder} do not fit a {cls.kind} reward of this version ({str(error).splitlines()[1].strip()[:120]}); "
                "pre-train and train it anew, or use the version that wrote it"
            ) from None
        assert not unexpected and all(map(is_base_weight, missing)), (missing, unexpected)
        model.base = base
        model.data_hash = described["data_hash"]
        model.tie_width = described.get("tie_width")
        model.card = described.get("training", {})
        model.load_extras(Path(folder))
        return model
