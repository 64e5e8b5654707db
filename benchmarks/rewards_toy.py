"""Do the rewards learn what noisy, biased and careless annotators see? Measured where the truth is known: in the toy world.

    python benchmarks/rewards_toy.py --out runs/rewards_toy [training.rewards.ensemble=1 …]

The demo's generator (taken from the cache when it is there) makes four clips per task for every prompt it can be asked; simulated
annotators judge them over HTTP; ensembles of the three rewards learn from half of the annotators. Then, on prompts and annotators they
never met: accuracy on same-stage pairs beside the ceiling that gold itself reaches against those annotators, beside stage identity and
sharpness; whether every synthetic corruption lowers the right score; whether the members' disagreement rises where nothing was judged.
Stages are kept in the cache: started again, it goes on where it was stopped. About two hours on two idle cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from annotation.records import read_preferences
from generator.toygold import measure
from generator.toyworld import (
    Split,
    Variety,
    caption,
    prompt_split,
    render,
    scene_from_caption,
    split_scenes,
)
from reelhf.clips import cache_folder
from reelhf.config import Config, load_config
from rewards.checkpoint import load_reward
from rewards.composite import MODEL_FOLDERS
from rewards.data import Clip, load_clips, load_tasks
from rewards.degrade import DEGRADATIONS
from rewards.ensemble import EnsembleReward
from rewards.evaluation.held_out import EVALUATION
from rewards.evaluation.probes import is_changed, probe_corruptions, spoiled_ladder
from rewards.pretrain import PretrainConfig
from rewards.train import RewardTrainConfig
from rlhf.demo.provenance import commit, machine
from rlhf.judging import PREFERENCES, JudgingConfig, read_groups
from rlhf.rounds import LoopConfig, Round, make_generator, simulated_judge
from rlhf.simulated import annotator_ceiling
from rlhf.stages import Stage, StageRunner
from rlhf.world import Prompts, World

LOOP = "configs/loop/demo_standard.yaml"
SETTINGS = Path(__file__).with_suffix(".yaml")
KINDS = {"explicit": ("explicit",), "all": ("explicit", "implied")}
"""Best against worst, as annotators said it; and with what follows for the clips between."""


class JuryConfig(Config):
    """How much is judged and how the rewards learn it."""

    taught: dict[Split, PositiveInt] = Field(default={"feedback": 184, "train": 246})
    """Split of the toy world -> prompts of it that the first panel judges."""
    measured: PositiveInt = 80
    """Prompts of the split `test`, judged by the second panel; nothing was chosen by them."""
    tasks_per_prompt: PositiveInt = 2
    """Tasks per prompt, each of other clips."""
    probed_clips: PositiveInt = 64
    """Clips of every set on which corruptions and disagreement are measured."""
    judging: JudgingConfig = JudgingConfig(judgments_per_task=4)
    reward_backbones: PretrainConfig = PretrainConfig()
    rewards: RewardTrainConfig = RewardTrainConfig()


@dataclass(frozen=True)
class Judged:
    """What everything is measured on."""

    judging: Stage
    rewards: Stage
    evaluation: Stage
    unmet: Mapping[str, Any]
    """Annotators and prompt ids that the rewards never met."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/rewards_toy"))
    parser.add_argument("--config", default=SETTINGS, type=Path)
    parser.add_argument("--loop", default=LOOP, help="whose generator and candidates are taken")
    parser.add_argument("overrides", nargs="*", help="of --config, such as rewards.ensemble=1")
    options = parser.parse_args()
    config = load_config(JuryConfig, options.config, options.overrides)
    own = {name: getattr(config, name) for name in ("judging", "reward_backbones", "rewards")}
    loop = load_config(LoopConfig, options.loop).model_copy(update=own)
    judged = teach(
        config, loop, StageRunner(cache_folder(), loop.budget_seconds, links=options.out)
    )
    results = {"machine": machine(), "commit": commit(), "accuracy": accuracies(judged)}
    results |= probe(config, loop, judged)
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{results['machine']}, commit {results['commit']}\n\n{describe(results)}")


def teach(config: JuryConfig, loop: LoopConfig, runner: StageRunner) -> Judged:
    """Generator -> clips -> verdicts -> backbones -> rewards."""
    again, zh = config.tasks_per_prompt, loop.prompts.zh_fraction
    taught = [
        p for split, n in config.taught.items() for p in prompt_split(split, n, zh_fraction=zh)
    ]
    unseen = prompt_split("test", config.measured, zh_fraction=zh)
    world = World(None, Prompts(tuple(taught * again), tuple(unseen * again), (), (), ()), measure)
    made = make_generator(loop, world, runner)
    one = Round(loop, world, runner, "_jury")
    candidates = one.make_candidates(made.base, made.student)
    judging = simulated_judge(loop, world)(runner, "_jury", candidates)
    anew = one.regenerate(made.clips, made.base, made.student)
    backbones = one.pretrain("reward_backbones", loop.reward_backbones, made.clips, made.base, anew)
    groups = read_groups(judging.path)
    feedback = {"annotators": groups.feedback_annotators, "prompt_ids": groups.feedback_prompt_ids}
    unmet = {"annotators": groups.held_out_annotators, "prompt_ids": groups.held_out_prompt_ids}
    rewards = one.learn("rewards", loop.rewards, judging, backbones, feedback)
    return Judged(
        judging, rewards, one.evaluate("rewards_evaluation", rewards, judging, unmet), unmet
    )


def accuracies(judged: Judged) -> dict[str, dict[str, Any]]:
    """Dimension -> accuracy on same-stage pairs, explicit and all, and their share of the ceiling, beside what cheap tricks reach."""
    rows = json.loads((judged.evaluation.path / EVALUATION).read_text())["dimensions"]
    ceilings = {
        kind: annotator_ceiling(
            judged.judging.path / PREFERENCES, measure, kinds=kinds, **judged.unmet
        )
        for kind, kinds in KINDS.items()
    }
    found = {}
    for dimension, row in rows.items():
        ceiling = {kind: ceilings[kind][dimension]["accuracy"] for kind in KINDS}
        reached = {"explicit": row["explicit_accuracy"], "all": row["accuracy"]}
        found[dimension] = row | {
            "ceilings": ceiling,
            "share": {kind: reached[kind] / ceiling[kind] for kind in KINDS},
        }
    return found


@torch.no_grad()
def probe(config: JuryConfig, loop: LoopConfig, judged: Judged) -> dict[str, Any]:
    """What corruptions do to the scores, and how far the members of each ensemble disagree about sets of clips."""
    sets = clip_sets(config.probed_clips, loop, judged)
    corruptions: dict[str, Any] = {}
    doubt: dict[str, Any] = {}

    def moving(of: str) -> list[tuple[Clip, str]]:
        return [(clip, prompt) for clip, prompt in sets[of] if shall_move(prompt)]

    for name in MODEL_FOLDERS:
        model = load_reward(judged.rewards.path / name)
        for index, dimension in enumerate(model.dimensions):
            hurts = moving if dimension == "motion_quality" else sets.__getitem__
            corruptions[dimension] = {
                of: probe_corruptions(model, index, hurts(of)) for of in ("rendered", "judged")
            }
            for of, found in corruptions[dimension].items():
                for corruption, share in gold_lowered(dimension, hurts(of)).items():
                    found[corruption]["gold_lowered"] = share
        if isinstance(model, EnsembleReward):
            spreads = {of: disagreement(model, clips) for of, clips in sets.items()}
            for index, dimension in enumerate(model.dimensions):
                known = spreads["judged"][:, index]
                doubt[dimension] = {
                    of: {"mean": float(s[:, index].mean()), "above": above(s[:, index], known)}
                    for of, s in spreads.items()
                }
    return {"corruptions": corruptions, "doubt": doubt}


def clip_sets(count: int, loop: LoopConfig, judged: Judged) -> dict[str, list[tuple[Clip, str]]]:
    """(clip, prompt) of what was judged, of the same prompts rendered, and of what no annotator of these ever saw."""
    data = read_preferences(judged.judging.path / PREFERENCES)
    tasks = load_tasks(data, **judged.unmet)[:count]
    clips = load_clips(data, tasks)
    seen = [(clips[task.clips[0]], task.prompt) for task in tasks]
    draw = torch.Generator().manual_seed(0)
    size, num_frames, fps = loop.clips.size, loop.clips.num_frames, loop.clips.fps

    def rendered(variety: Variety) -> list[tuple[Clip, str]]:
        scenes = split_scenes("test", len(seen), variety=variety)
        frames = (
            render(scene, num_frames=num_frames, size=size, fps=fps, seed=seed)
            for seed, scene in enumerate(scenes)
        )
        return [
            (Clip((shown * 255).round().byte(), fps), caption(scene))
            for scene, shown in zip(scenes, frames, strict=True)
        ]

    def changed(change: Callable[[Tensor], Tensor]) -> list[tuple[Clip, str]]:
        return [(replace(clip, frames=change(clip.frames)), prompt) for clip, prompt in seen]

    return {
        "judged": seen,
        "rendered": rendered("plain"),
        "other shapes, stripes and cameras": rendered("rich"),
        "colours inverted": changed(lambda frames: 255 - frames),
        "patches shuffled": changed(lambda frames: shuffle_patches(frames, draw)),
        "white noise": changed(
            lambda frames: torch.randint(256, frames.shape, generator=draw).byte()
        ),
    }


def gold_lowered(dimension: str, clips: Sequence[tuple[Clip, str]]) -> dict[str, float | None]:
    """Share of the clips of which gold itself, too, thinks less once they are spoiled: blurring a clip that is torn does it good."""
    found = {}
    for corruption, spoil in DEGRADATIONS.get(dimension, {}).items():
        fell = []
        for clip, prompt in clips:
            ladder = spoiled_ladder(clip, spoil)
            if is_changed(ladder):
                clean, worst = (measure(frames, prompt, clip.fps) for frames in ladder[[0, -1]])
                fell.append(worst[dimension] < clean[dimension])
        found[corruption] = fmean(fell) if fell else None
    return found


def shall_move(prompt: str) -> bool:
    """Whether the prompt asks for motion: where it does not, a clip that is frozen is no worse."""
    scene = scene_from_caption(prompt)
    return scene is not None and scene.motion != "still"


def shuffle_patches(frames: Tensor, generator: torch.Generator, *, cells: int = 8) -> Tensor:
    """The cells of a grid in another order, the same in every frame: [3, F, H, W] -> the same."""
    side = frames.shape[-1] // cells
    grid = frames.unfold(-2, side, side).unfold(-2, side, side)  # [3, F, cells, cells, side, side]
    order = torch.randperm(cells * cells, generator=generator)
    mixed = grid.flatten(2, 3)[:, :, order].unflatten(2, (cells, cells))
    return mixed.transpose(3, 4).flatten(-2).flatten(-3, -2)


def disagreement(model: EnsembleReward, clips: Sequence[tuple[Clip, str]]) -> Tensor:
    """Standard deviation over the members of each clip's z-score, [N, D]."""
    spreads = []
    for clip, prompt in clips:
        frames = clip.frames[None].float() / 255
        selection = model.select(frames.shape[2], clip.fps)
        spreads.append(model.score(frames, selection=selection, fps=clip.fps, prompts=[prompt]).std)
    return torch.cat([spread for spread in spreads if spread is not None])


def above(spread: Tensor, known: Tensor) -> float:
    """How often a clip is doubted more than one of those that were judged: 1/2 where there is no difference (area under the ROC)."""
    return float((spread[:, None] > known[None]).double().mean())


def describe(results: Mapping[str, Any]) -> str:
    """The three tables in Markdown."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = markdown(
        (
            "dimension",
            "pairs",
            "accuracy",
            "n",
            "ceiling",
            "of the ceiling",
            "sharpness",
            "stage identity",
        ),
        [
            (
                dimension,
                kind,
                share(row[accuracy]),
                str(row[n]),
                share(row["ceilings"][kind]),
                share(row["share"][kind]),
                share(row["sharpness"]),
                share(row["stage_identity"]),
            )
            for dimension, row in results["accuracy"].items()
            for kind, accuracy, n in (
                ("explicit", "explicit_accuracy", "explicit_n"),
                ("all", "accuracy", "n"),
            )
        ],
    )
    lines += markdown(
        (
            "dimension",
            "corruption",
            "of clips",
            "lowered",
            "gold lowered",
            "rank correlation with severity",
        ),
        [
            (
                dimension,
                name,
                of,
                share(ladder["lowered"]),
                share(ladder["gold_lowered"]),
                share(ladder["rank"]),
            )
            for dimension, sets in results["corruptions"].items()
            for of, found in sets.items()
            for name, ladder in found.items()
        ],
    )
    return "\n".join(
        lines
        + markdown(
            ("dimension", "clips", "members' spread", "doubted more than a judged clip"),
            [
                (dimension, of, share(row["mean"]), share(row["above"]))
                for dimension, sets in results["doubt"].items()
                for of, row in sets.items()
            ],
        )
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]


if __name__ == "__main__":
    main()
