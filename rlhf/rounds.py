"""The loop, read top to bottom: make a generator, then annotate -> learn rewards -> maximise them -> compare, round after round.

`run_loop` is what `reelhf demo` and `reelhf rlhf loop CONFIG` run. Each step is one call into the room that owns it, kept under
a hash of everything it came from (`rlhf.stages`), so that a second run skips it and an interrupted one resumes in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from distill.consistency import ConsistencyConfig, distill_refiner
from generator.toyworld import ToyDatasetConfig, render_dataset
from generator.training.denoiser import DenoiserTrainConfig, train_base, train_refiner
from generator.training.text import TextTrainConfig, train_text_encoder
from generator.training.vae import VAETrainConfig, train_vae
from reelhf.config import Config
from reelhf.side_by_side import in_background
from rewards.evaluation.held_out import evaluate_rewards
from rewards.pretrain import PretrainConfig, pretrain_backbones
from rewards.train import RewardTrainConfig, train_rewards
from rlhf.candidates import BASE, REFINER, CandidatesConfig
from rlhf.compare import CompareConfig, compare, gold_curve
from rlhf.direct import DirectConfig, train_direct
from rlhf.judging import PREFERENCES, JudgingConfig, judge_simulated, read_groups
from rlhf.regenerated import RegenerateConfig, regenerate
from rlhf.simulated import annotator_ceiling
from rlhf.stages import Stage, StageRunner, source_digest
from rlhf.world import PromptsConfig, World

PRETRAIN_SOURCE = "rewards.pretrain"


class LoopConfig(Config):
    """Every stage of the loop, each with its owner's own config."""

    title: str = "One round of the loop"
    num_rounds: PositiveInt = 1
    """Rounds of annotate -> rewards -> RLHF -> compare; each starts from the generator the last one improved."""
    seed: int = 0
    """Added to the seed of every RLHF run: what a repetition with another training seed changes."""

    clips: ToyDatasetConfig = ToyDatasetConfig()
    """The toy world's clips; unused with real ones."""
    text_encoder: TextTrainConfig = TextTrainConfig()
    vae: VAETrainConfig = VAETrainConfig()
    base: DenoiserTrainConfig = DenoiserTrainConfig()
    refiner: DenoiserTrainConfig = DenoiserTrainConfig()
    student: ConsistencyConfig = ConsistencyConfig()
    """The accelerated refiner: what RLHF touches."""

    prompts: PromptsConfig = PromptsConfig()
    candidates: CandidatesConfig = CandidatesConfig()
    judging: JudgingConfig = JudgingConfig()
    regenerated: RegenerateConfig | None = None
    """Real clips that the generator partly makes anew, whose order the reward backbones learn; None leaves them out."""
    reward_backbones: PretrainConfig = PretrainConfig()
    """With `side_by_side` of 2 or more they are pre-trained while the verdicts are given."""
    held_out_backbones: PretrainConfig | None = None
    """What the held-out rewards start from. None: the same backbones, in less time; but then both are fooled by the same pixels."""
    rewards: RewardTrainConfig = RewardTrainConfig()
    held_out_rewards: RewardTrainConfig = RewardTrainConfig()
    """Another seed; annotators and prompts are disjoint from those of `rewards`."""
    rlhf_base: DirectConfig = DirectConfig()
    rlhf_refiner: DirectConfig = DirectConfig()
    compare_base: CompareConfig = CompareConfig()
    compare_refiner: CompareConfig = CompareConfig()

    budget_seconds: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Stage -> seconds it should take on two CPU cores; printed and reported, never enforced."""
    total_budget_seconds: PositiveFloat = 1200.0
    """For everything up to the pages."""
    memory_budget_bytes: PositiveFloat = 6e9
    """Peak resident memory; reported."""


@dataclass(frozen=True)
class GeneratorStages:
    """The generator as trained: what the first round starts from."""

    clips: Path
    vae: Stage
    text_encoder: Stage
    base: Stage
    refiner: Stage
    student: Stage


@dataclass(frozen=True)
class RoundStages:
    """One round, by stage."""

    candidates: Stage
    judging: Stage
    backbones: Stage
    rewards: Stage
    held_out_rewards: Stage
    rewards_evaluation: Stage
    held_out_evaluation: Stage
    rlhf_base: Stage
    rlhf_refiner: Stage
    compare_base: Stage
    compare_refiner: Stage
    gold_base: Stage | None
    gold_refiner: Stage | None


Judge = Callable[[StageRunner, str, Stage], Stage]
"""(runner, name suffix, candidates) -> a stage whose path holds `preferences/` and `judging.json`."""


def make_generator(config: LoopConfig, world: World, runner: StageRunner) -> GeneratorStages:
    """Clips -> text encoder -> VAE -> base -> refiner -> accelerated refiner."""
    if world.clips is None:
        rendered = runner.run(
            "clips",
            lambda out: render_dataset(config.clips, out),
            config=config.clips,
            source="generator.toyworld",
        )
        clips: Path = rendered.path
        clips_key: Stage | Path = rendered
    else:
        clips = clips_key = world.clips
    text = runner.run(
        "text_encoder",
        lambda out: train_text_encoder(config.text_encoder, clips, out),
        config=config.text_encoder,
        inputs={"clips": clips_key},
        source="generator.training.text",
    )
    vae = runner.run(
        "vae",
        lambda out: train_vae(config.vae, clips, out),
        config=config.vae,
        inputs={"clips": clips_key},
        source="generator.training.vae",
    )
    base = runner.run(
        "base",
        lambda out: train_base(config.base, clips, vae.path, text.path, out),
        config=config.base,
        inputs={"clips": clips_key, "vae": vae, "text": text},
        source="generator.training.denoiser",
    )
    refiner = runner.run(
        "refiner",
        lambda out: train_refiner(config.refiner, clips, base.path, out),
        config=config.refiner,
        inputs={"clips": clips_key, "base": base},
        source="generator.training.denoiser",
    )
    student = runner.run(
        "student",
        lambda out: distill_refiner(config.student, refiner.path, base.path, clips, out),
        config=config.student,
        inputs={"clips": clips_key, "base": base, "refiner": refiner},
        source="distill.consistency",
    )
    return GeneratorStages(clips, vae, text, base, refiner, student)


def simulated_judge(config: LoopConfig, world: World) -> Judge:
    """The judge that a loop without a person uses."""

    def judge(runner: StageRunner, suffix: str, candidates: Stage) -> Stage:
        gold = world.annotator_view(candidates.path)
        prompts = (world.prompts.feedback, world.prompts.held_out)
        return runner.run(
            f"annotation{suffix}",
            lambda out: judge_simulated(
                config.judging, candidates.path, prompts=prompts, gold=gold, out=out
            ),
            config=config.judging,
            inputs={"candidates": candidates, "prompts": prompts},
            source=("rlhf.judging", "rlhf.simulated", "rlhf.world"),
        )

    return judge


def run_round(
    config: LoopConfig,
    world: World,
    runner: StageRunner,
    *,
    clips: Path,
    base: Stage,
    student: Stage,
    judge: Judge,
    suffix: str = "",
) -> RoundStages:
    """Candidates -> verdicts -> rewards and held-out rewards -> RLHF of base and refiner -> compare both."""
    one = Round(config, world, runner, suffix)

    # 1. Clips of both stages of the model, judged per dimension. The reward backbones need no verdict: they learn meanwhile.
    candidates = one.make_candidates(base, student)
    anew = one.regenerate(clips, base, student)

    def pretrain() -> Stage:
        return one.pretrain("reward_backbones", config.reward_backbones, clips, base, anew)

    if config.reward_backbones.side_by_side > 1:
        # read here what the stage's key is made of: two threads must not parse at once (CPython 3.11 raises a SystemError)
        source_digest(PRETRAIN_SOURCE)
        with in_background(pretrain) as pretrained:
            judging = judge(runner, suffix, candidates)
            backbones = pretrained()
    else:
        judging = judge(runner, suffix, candidates)
        backbones = pretrain()
    groups = read_groups(judging.path)
    feedback = {"annotators": groups.feedback_annotators, "prompt_ids": groups.feedback_prompt_ids}
    held_out = {"annotators": groups.held_out_annotators, "prompt_ids": groups.held_out_prompt_ids}
    as_many = groups.feedback_prompt_ids[: len(groups.held_out_prompt_ids)]

    # 2. Three reward models learn those verdicts; three more, of other annotators and prompts, only watch. Each is measured
    #    on what the other was taught, on as many prompts.
    other_backbones = backbones
    if config.held_out_backbones is not None:
        other_backbones = one.pretrain(
            "held_out_backbones", config.held_out_backbones, clips, base, anew
        )
    rewards = one.learn("rewards", config.rewards, judging, backbones, feedback)
    watching = one.learn(
        "held_out_rewards", config.held_out_rewards, judging, other_backbones, held_out
    )
    rewards_evaluation = one.evaluate("rewards_evaluation", rewards, judging, held_out)
    held_out_evaluation = one.evaluate(
        "held_out_evaluation", watching, judging, feedback | {"prompt_ids": as_many}
    )

    # 3. Maximise the rewards: first the base, then the accelerated refiner on clips of the improved base.
    scored_by = {"rewards": rewards, "held_out": watching}
    rlhf_base = one.maximise("rlhf_base", config.rlhf_base, base, **scored_by)
    rlhf_refiner = one.maximise(
        "rlhf_refiner", config.rlhf_refiner, student, low_res=rlhf_base, **scored_by
    )

    # 4. Compare on prompts that nothing has seen; gold of the curves only now, from the saved samples.
    weights = config.rlhf_base.reward_weights, config.rlhf_refiner.reward_weights
    compare_base = one.compare(
        "compare_base", config.compare_base, (base, rlhf_base), weights[0], **scored_by
    )
    compare_refiner = one.compare(
        "compare_refiner",
        config.compare_refiner,
        (student, rlhf_refiner),
        weights[1],
        low_res=rlhf_base,
        **scored_by,
    )
    return RoundStages(
        candidates=candidates,
        judging=judging,
        backbones=backbones,
        rewards=rewards,
        held_out_rewards=watching,
        rewards_evaluation=rewards_evaluation,
        held_out_evaluation=held_out_evaluation,
        rlhf_base=rlhf_base,
        rlhf_refiner=rlhf_refiner,
        compare_base=compare_base,
        compare_refiner=compare_refiner,
        gold_base=one.gold_curve("gold_base", rlhf_base),
        gold_refiner=one.gold_curve("gold_refiner", rlhf_refiner),
    )


@dataclass(frozen=True)
class Round:
    """The stages of one round: what each calls, and what its result depends on."""

    config: LoopConfig
    world: World
    runner: StageRunner
    suffix: str

    def make_candidates(self, base: Stage, student: Stage) -> Stage:
        prompts = self.world.prompts
        return self.runner.run(
            f"candidates{self.suffix}",
            lambda out: self.world.make_candidates(
                self.config.candidates, stages={BASE: base.path, REFINER: student.path}, out=out
            ),
            config=self.config.candidates,
            inputs={
                "base": base,
                "student": student,
                "prompts": [prompts.feedback, prompts.held_out],
            },
            source=("rlhf.candidates", "rlhf.world"),
        )

    def regenerate(self, clips: Path, base: Stage, student: Stage) -> Stage | None:
        config = self.config.regenerated
        if config is None:
            return None
        return self.runner.run(
            f"regenerated{self.suffix}",
            lambda out: regenerate(
                config, clips=clips, base=base.path, refiner=student.path, out=out
            ),
            config=config,
            inputs={"base": base, "student": student},  # the base's key covers the clips
            source="rlhf.regenerated",
        )

    def pretrain(
        self, name: str, config: PretrainConfig, clips: Path, base: Stage, anew: Stage | None
    ) -> Stage:
        graded = [] if anew is None else [anew.path / part for part in (BASE, REFINER)]
        return self.runner.run(
            f"{name}{self.suffix}",
            lambda out: pretrain_backbones(config, clips, out, graded=graded),
            config=config,
            inputs={"clips": base, "graded": anew},
            source=PRETRAIN_SOURCE,
        )

    def learn(
        self,
        name: str,
        config: RewardTrainConfig,
        judging: Stage,
        backbones: Stage,
        taught_by: Mapping[str, Any],
    ) -> Stage:
        return self.runner.run(
            f"{name}{self.suffix}",
            lambda out: train_rewards(
                config,
                judging.path / PREFERENCES,
                backbones.path,
                out,
                splits=None,
                **taught_by,
            ),
            config=config,
            inputs={"judging": judging, "backbones": backbones},
            source="rewards.train",
        )

    def evaluate(
        self, name: str, trained: Stage, judging: Stage, judged_by: Mapping[str, Any]
    ) -> Stage:
        """Accuracy on prompts and annotators these rewards never met, beside the ceiling that the annotators' noise sets."""
        preferences, gold = judging.path / PREFERENCES, self.world.gold

        def evaluate(out: Path) -> None:
            ceiling = None
            if gold is not None:
                kinds = ("explicit", "implied")
                found = annotator_ceiling(preferences, gold, kinds=kinds, **judged_by)
                ceiling = {dimension: row["accuracy"] for dimension, row in found.items()}
            evaluate_rewards(
                trained.path, preferences, out, ceiling=ceiling, split=None, **judged_by
            )

        return self.runner.run(
            f"{name}{self.suffix}",
            evaluate,
            inputs={
                "rewards": trained,
                "judging": judging,
                "prompts": list(judged_by["prompt_ids"]),
            },
            source=("rewards.evaluation.held_out", "rlhf.simulated", *self.world.gold_source),
        )

    def maximise(
        self,
        name: str,
        config: DirectConfig,
        generator: Stage,
        *,
        rewards: Stage,
        held_out: Stage,
        low_res: Stage | None = None,
    ) -> Stage:
        prompts = self.world.prompts
        settings = config.model_copy(update={"seed": config.seed + self.config.seed})
        return self.runner.run(
            f"{name}{self.suffix}",
            lambda out: train_direct(
                settings,
                generator=generator.path,
                rewards=rewards.path,
                held_out=held_out.path,
                prompts=list(prompts.training),
                validation_prompts=list(prompts.validation),
                low_res_generator=None if low_res is None else low_res.path,
                out=out,
            ),
            config=settings,
            inputs={
                "generator": generator,
                "low_res": low_res,
                "rewards": rewards,
                "held_out": held_out,
                "prompts": [prompts.training, prompts.validation],
            },
            source="rlhf.direct",
        )

    def compare(
        self,
        name: str,
        config: CompareConfig,
        before_after: tuple[Stage, Stage],
        weights: Mapping[str, float],
        *,
        rewards: Stage,
        held_out: Stage,
        low_res: Stage | None = None,
    ) -> Stage:
        prompts, (before, after) = list(self.world.prompts.test), before_after
        return self.runner.run(
            f"{name}{self.suffix}",
            lambda out: compare(
                config,
                before=before.path,
                after=after.path,
                prompts=prompts,
                rewards=rewards.path,
                held_out=held_out.path,
                weights=weights,
                low_res_generator=None if low_res is None else low_res.path,
                gold=self.world.gold,
                out=out,
            ),
            config=config,
            inputs={
                "before": before,
                "after": after,
                "low_res": low_res,
                "rewards": rewards,
                "held_out": held_out,
                "prompts": prompts,
            },
            source=("rlhf.compare", *self.world.gold_source),
        )

    def gold_curve(self, name: str, run: Stage) -> Stage | None:
        gold, config = self.world.gold, self.config
        if gold is None:
            return None
        prompts = list(self.world.prompts.validation)

        def measure(out: Path) -> None:
            out.mkdir(parents=True, exist_ok=True)
            rows = gold_curve(run_folder(run), gold, prompts=prompts, fps=config.base.fps)
            (out / "gold_curve.json").write_text(json.dumps(rows, indent=1))

        return self.runner.run(
            f"{name}{self.suffix}",
            measure,
            inputs={"run": run},
            source=("rlhf.compare", *self.world.gold_source),
        )


def run_folder(stage: Stage) -> Path:
    """The run folder of a training stage, whose path is the best checkpoint in it."""
    return stage.folder / "result"


def run_loop(
    config: LoopConfig, world: World, runner: StageRunner, judge: Judge | None = None
) -> tuple[GeneratorStages, list[RoundStages]]:
    """The whole loop: the generator once, then `num_rounds` rounds, each from the generator of the last."""
    judge = judge or simulated_judge(config, world)
    made = make_generator(config, world, runner)
    base, student = made.base, made.student
    rounds = []
    for number in range(1, config.num_rounds + 1):
        suffix = "" if number == 1 else f"_round{number}"
        one = run_round(
            config,
            world,
            runner,
            clips=made.clips,
            base=base,
            student=student,
            judge=judge,
            suffix=suffix,
        )
        rounds.append(one)
        base, student = one.rlhf_base, one.rlhf_refiner
    return made, rounds
