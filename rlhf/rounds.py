"""The loop, read top to bottom: make a generator, then annotate -> learn rewards -> maximise them -> compare, round after round.

`run_loop` is what `reelhf demo` and `reelhf rlhf loop CONFIG` run. Each step is one call into the room that owns it, kept under
a hash of everything it came from (`rlhf.stages`), so that a second run skips it and an interrupted one resumes in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from annotation.records import read_preferences
from distill.consistency import ConsistencyConfig, distill_refiner
from generator.toyworld import ToyDatasetConfig, render_dataset
from generator.training.denoiser import DenoiserTrainConfig, train_base, train_refiner
from generator.training.text import TextTrainConfig, train_text_encoder
from generator.training.vae import VAETrainConfig, train_vae
from reelhf.config import Config
from rewards.evaluate import evaluate_rewards
from rewards.pretrain import PretrainConfig, pretrain_backbones
from rewards.train import RewardTrainConfig, train_rewards
from rlhf.candidates import BASE, REFINER, CandidatesConfig
from rlhf.compare import CompareConfig, Gold, compare, gold_curve
from rlhf.direct import DirectConfig, train_direct
from rlhf.judging import PREFERENCES, JudgingConfig, judge_simulated, read_groups
from rlhf.simulated import annotator_ceiling
from rlhf.stages import Stage, StageRunner
from rlhf.world import PromptsConfig, World


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
    reward_backbones: PretrainConfig = PretrainConfig()
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
    prompts = world.prompts

    # 1. Clips of both stages of the model, judged per dimension.
    candidates = runner.run(
        f"candidates{suffix}",
        lambda out: world.make_candidates(
            config.candidates, stages={BASE: base.path, REFINER: student.path}, out=out
        ),
        config=config.candidates,
        inputs={"base": base, "student": student, "prompts": [prompts.feedback, prompts.held_out]},
        source=("rlhf.candidates", "rlhf.world"),
    )
    judging = judge(runner, suffix, candidates)
    preferences, groups = judging.path / PREFERENCES, read_groups(judging.path)

    # 2. Three reward models learn those verdicts; three more, of other annotators and prompts, only watch.
    backbones = runner.run(
        "reward_backbones",
        lambda out: pretrain_backbones(config.reward_backbones, clips, out),
        config=config.reward_backbones,
        inputs={"clips": base},  # the base's key covers the clips
        source="rewards.pretrain",
    )
    rewards = runner.run(
        f"rewards{suffix}",
        lambda out: train_rewards(
            config.rewards,
            preferences,
            backbones.path,
            out,
            annotators=groups.feedback_annotators,
            prompt_ids=groups.feedback_prompt_ids,
            splits=None,
        ),
        config=config.rewards,
        inputs={"judging": judging, "backbones": backbones},
        source="rewards.train",
    )
    held_out = runner.run(
        f"held_out_rewards{suffix}",
        lambda out: train_rewards(
            config.held_out_rewards,
            preferences,
            backbones.path,
            out,
            annotators=groups.held_out_annotators,
            prompt_ids=groups.held_out_prompt_ids,
            splits=None,
        ),
        config=config.held_out_rewards,
        inputs={"judging": judging, "backbones": backbones},
        source="rewards.train",
    )
    # each is measured on the other's prompts and annotators: nothing that taught it
    evaluations = [
        _evaluate_rewards(world, runner, f"{name}_evaluation{suffix}", trained, judging, who, ids)
        for name, trained, who, ids in (
            ("rewards", rewards, groups.held_out_annotators, groups.held_out_prompt_ids),
            ("held_out", held_out, groups.feedback_annotators, groups.feedback_prompt_ids),
        )
    ]

    # 3. Maximise the rewards: first the base, then the accelerated refiner on clips of the improved base.
    direct = [
        run.model_copy(update={"seed": run.seed + config.seed})
        for run in (config.rlhf_base, config.rlhf_refiner)
    ]
    rlhf_base = runner.run(
        f"rlhf_base{suffix}",
        lambda out: train_direct(
            direct[0],
            generator=base.path,
            rewards=rewards.path,
            held_out=held_out.path,
            prompts=list(prompts.training),
            validation_prompts=list(prompts.validation),
            out=out,
        ),
        config=direct[0],
        inputs={
            "base": base,
            "rewards": rewards,
            "held_out": held_out,
            "prompts": [prompts.training, prompts.validation],
        },
        source="rlhf.direct",
    )
    rlhf_refiner = runner.run(
        f"rlhf_refiner{suffix}",
        lambda out: train_direct(
            direct[1],
            generator=student.path,
            rewards=rewards.path,
            held_out=held_out.path,
            prompts=list(prompts.training),
            validation_prompts=list(prompts.validation),
            low_res_generator=rlhf_base.path,
            out=out,
        ),
        config=direct[1],
        inputs={
            "student": student,
            "low_res": rlhf_base,
            "rewards": rewards,
            "held_out": held_out,
            "prompts": [prompts.training, prompts.validation],
        },
        source="rlhf.direct",
    )

    # 4. Compare on prompts that nothing has seen; gold of the curves only now, from the saved samples.
    compared = [
        runner.run(
            f"compare_{name}{suffix}",
            lambda out, settings=settings, run=run, before=before, after=after, low=low: compare(
                settings,
                before=before.path,
                after=after.path,
                prompts=list(prompts.test),
                rewards=rewards.path,
                held_out=held_out.path,
                weights=run.reward_weights,
                low_res_generator=None if low is None else low.path,
                gold=world.gold,
                out=out,
            ),
            config=settings,
            inputs={
                "before": before,
                "after": after,
                "low_res": low,
                "rewards": rewards,
                "held_out": held_out,
                "prompts": prompts.test,
            },
            source=("rlhf.compare", *world.gold_source),
        )
        for name, settings, run, before, after, low in (
            ("base", config.compare_base, direct[0], base, rlhf_base, None),
            ("refiner", config.compare_refiner, direct[1], student, rlhf_refiner, rlhf_base),
        )
    ]
    return RoundStages(
        candidates=candidates,
        judging=judging,
        backbones=backbones,
        rewards=rewards,
        held_out_rewards=held_out,
        rewards_evaluation=evaluations[0],
        held_out_evaluation=evaluations[1],
        rlhf_base=rlhf_base,
        rlhf_refiner=rlhf_refiner,
        compare_base=compared[0],
        compare_refiner=compared[1],
        gold_base=_gold_curve(config, world, runner, "base", rlhf_base, suffix),
        gold_refiner=_gold_curve(config, world, runner, "refiner", rlhf_refiner, suffix),
    )


def _evaluate_rewards(
    world: World,
    runner: StageRunner,
    name: str,
    trained: Stage,
    judging: Stage,
    annotators: Collection[str] | None,
    prompt_ids: Collection[str],
) -> Stage:
    """Accuracy on prompts and annotators these rewards never met, beside the ceiling that the annotators' noise sets."""
    preferences = judging.path / PREFERENCES
    chosen = {"annotators": annotators, "prompt_ids": prompt_ids}

    def evaluate(out: Path) -> None:
        ceiling = None
        if world.gold is not None:
            ceiling = reward_ceiling(preferences, world.gold, **chosen)
        evaluate_rewards(trained.path, preferences, out, ceiling=ceiling, split=None, **chosen)

    return runner.run(
        name,
        evaluate,
        inputs={"rewards": trained, "judging": judging},
        source=("rewards.evaluate", "rlhf.simulated", *world.gold_source),
    )


def reward_ceiling(
    preferences: Path,
    gold: Gold,
    *,
    annotators: Collection[str] | None,
    prompt_ids: Collection[str],
) -> dict[str, float]:
    """Dimension -> how often gold itself agrees with the annotators on the same-stage pairs that are no ties."""
    data = read_preferences(preferences)
    measured: dict[tuple[str, bytes], Mapping[str, float]] = {}

    def once(frames: Tensor, prompt: str, fps: float) -> Mapping[str, float]:
        key = prompt, hashlib.sha256(frames.numpy().tobytes()).digest()
        if key not in measured:
            measured[key] = gold(frames, prompt, fps)
        return measured[key]

    parts = [
        annotator_ceiling(data, once, annotators=annotators, prompt_ids=prompt_ids, kind=kind)
        for kind in ("explicit", "implied")
    ]
    ceiling = {}
    for dimension in {name for part in parts for name in part}:
        counted = [part[dimension] for part in parts if dimension in part]
        total = sum(one["n"] for one in counted)
        ceiling[dimension] = sum(one["accuracy"] * one["n"] for one in counted) / total
    return ceiling


def _gold_curve(
    config: LoopConfig, world: World, runner: StageRunner, name: str, run: Stage, suffix: str
) -> Stage | None:
    gold = world.gold
    if gold is None:
        return None
    prompts = list(world.prompts.validation)

    def measure(out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        rows = gold_curve(run_folder(run), gold, prompts=prompts, fps=config.base.fps)
        (out / "gold_curve.json").write_text(json.dumps(rows, indent=1))

    return runner.run(
        f"gold_{name}{suffix}",
        measure,
        inputs={"run": run},
        source=("rlhf.compare", *world.gold_source),
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
