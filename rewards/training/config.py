"""Settings of reward training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from reelhf.config import Config
from rewards.composite import MODEL_FOLDERS
from rewards.lora import LoraSettings
from rewards.training.groups import Group


class LossConfig(Config):
    """What a verdict teaches (`rewards.losses`)."""

    kind: Literal["pairs", "best_worst", "gaussian", "answers"] = "pairs"
    """pairs: Bradley-Terry with ties on every pair. best_worst: the likelihood of best, then worst, of all K clips at once; verdicts that are no
    free best and worst (ties, constrained picks, scores) stay pairs. gaussian: pairs of a model with `uncertainty`, trained on -log E[P(vote)]. answers: a generative reward's
    yes or no to "is clip 2 better than clip 1?", by cross-entropy."""
    ties: Literal["rate", "learned"] | PositiveFloat = "rate"
    """Width of a tie in logits, per dimension: from the share of ties among explicit verdicts, learned with the weights, or this number for all."""
    margin: float = Field(0.0, ge=0)
    """By how many logits more than the tie width a winner has to lead; 0 is the likelihood."""
    annotator_weights: bool = False
    """Weigh each annotator's verdicts by how far beyond chance the others agree with them."""
    agreement_power: float = Field(0.0, ge=0)
    """Weigh each verdict by the share of other annotators who said the same, to this power; 0 is off, verdicts nobody repeated count fully."""
    rationales: str | None = None
    """JSONL of {clip_a, clip_b, dimension, text}: why the {winner} beat the {loser}, learned after the answer (kind answers)."""
    rationale_weight: float = Field(0.5, ge=0)
    """Weight of the rationale's mean cross-entropy beside the answer's."""


class EnsembleConfig(Config):
    """How many opinions a reward is made of."""

    kind: Literal["seeds", "heads"] = "seeds"
    """seeds: models of their own, trained in turn with `seed`, `seed + 1`, …. heads: one backbone with several heads (`rewards.heads`), trained, saved and
    scored at about the price of one model; the heads share what the backbone cannot see, so they disagree less."""
    size: PositiveInt = 1
    """How many; 1 is none."""

    @property
    def models(self) -> int:
        """Models to train."""
        return self.size if self.kind == "seeds" else 1

    @property
    def heads(self) -> int:
        """Heads of each."""
        return self.size if self.kind == "heads" else 1


class RewardTrainConfig(Config):
    """How the reward models learn from preference data."""

    models: tuple[str, ...] = MODEL_FOLDERS
    """Which of foundational, motion and aesthetic to train."""
    epochs: PositiveFloat = 3.0
    """Passes over the training tasks."""
    tasks_per_batch: PositiveInt = 4
    """Tasks per step; each brings its K clips and all its verdicts."""
    head_lr: PositiveFloat = 1e-3
    """Learning rate of the heads; warms up over a tenth of the steps, then falls as a cosine."""
    backbone_lr: float = Field(1e-4, ge=0)
    """Learning rate of everything before the heads; 0 freezes it."""
    weight_decay: float = Field(0.05, ge=0)
    """Of AdamW."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    shift: float = Field(0.06, ge=0, lt=0.5)
    """Augmentation: each clip is moved by up to this fraction of its side, its border repeated."""
    side_by_side: PositiveInt = 1
    """Models that are trained at once, each in a process of its own with its share of the threads."""
    loss: LossConfig = LossConfig()
    """What a verdict teaches."""
    lora: LoraSettings | None = None
    """Learn low-rank deltas of the backbone instead of its weights (at `backbone_lr`); the checkpoint holds them and the readouts."""
    synthetic: float = Field(0.0, ge=0)
    """Weight of lessons that need no vote: in each step clips beat themselves spoiled (motion: as in pre-training and flickering, warped, stuttering,
    reversed; the others as in pre-training). 0 is off."""
    frozen: tuple[Group, ...] = ()
    """Groups of weights that stay as they are; vision, language and embeddings are parts of a vision-language model's backbone."""
    gradient_checkpointing: bool = False
    """Recompute the backbone's layers in the backward pass instead of keeping what they computed."""
    bf16: bool = False
    """Compute in bfloat16; weights stay float32 (under DeepSpeed its master weights do)."""
    accumulation_steps: PositiveInt = 1
    """Batches per optimizer step."""
    zero_stage: Literal[1, 2, 3] | None = None
    """Train through DeepSpeed: 1 splits optimizer states over processes, 2 also gradients, 3 also weights."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between looks at the held-out prompts (split `validation`); the weights of the best look are kept. 0 is never."""
    patience: PositiveInt = 3
    """Looks without a better held-out loss after which training stops."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints from which an interrupted run goes on, bit for bit; 0 keeps none. With `evaluate_every` there is one at every look."""
    ensemble: EnsembleConfig = EnsembleConfig()
    """Several opinions in place of one, whose disagreement becomes the score's std; a number N stands for {kind: seeds, size: N}."""
    seed: int = 0
    """Of batches and augmentation."""
    own: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of one model that differ from the above: {aesthetic: {tasks_per_batch: 2}}."""

    @field_validator("ensemble", mode="before")
    @classmethod
    def _number_of_seeds(cls, value: Any) -> Any:
        return {"size": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _own_settings(self) -> RewardTrainConfig:
        for option, names in (("models", self.models), ("own", self.own)):
            for name in names:
                if name not in MODEL_FOLDERS:
                    raise ValueError(
                        f"{option} names '{name}'; expected one of {', '.join(MODEL_FOLDERS)}"
                    )
        for name in self.own:
            self.of(name)
        if self.loss.margin and self.loss.kind == "gaussian":
            raise ValueError("loss.margin needs kind pairs or best_worst; expected 0 with gaussian")
        return self

    def of(self, name: str) -> RewardTrainConfig:
        """The settings that one model is trained with."""
        shared = self.model_dump(exclude={"own"})
        return RewardTrainConfig(**(shared | self.own.get(name, {})))
