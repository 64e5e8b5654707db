"""`reelhf rlhf train | compare | loop`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from reelhf.cli_config import config_command
from rlhf.demo.commands import loop

if TYPE_CHECKING:
    from rlhf.compare import CompareConfig

app = typer.Typer(
    help="Maximise the rewards; compare before and after; run rounds.", no_args_is_help=True
)

config_command(
    app,
    "train",
    "rlhf.direct_run:DirectRun",
    "rlhf.direct_run:run_direct",
    help="Direct reward maximisation of a base generator or of an accelerated refiner.",
    next_step="reelhf rlhf compare --after {out} --before GENERATOR --prompts FILE --rewards DIR --held-out DIR --out DIR",
)
config_command(
    app,
    "compare",
    "rlhf.compare:CompareConfig",
    "rlhf.commands:compare_folders",
    help="Before against after on untouched prompts: paired bootstrap intervals and clip pairs.",
    paths={
        "before": "generator folder before RLHF",
        "after": "generator folder after RLHF",
        "prompts": "text file, one prompt per line, that nothing was trained or selected on",
        "rewards": "folder of the rewards that were maximised",
        "held_out": "folder of the held-out rewards",
        "low_res_generator?": "refiner: the base that makes its low-resolution clips",
    },
)

app.command("loop", context_settings={"help_option_names": ["-h", "--help"]})(loop)


def compare_folders(
    config: CompareConfig,
    *,
    before: Path,
    after: Path,
    prompts: Path,
    rewards: Path,
    held_out: Path,
    low_res_generator: Path | None,
    out: Path,
) -> Path:
    """`rlhf.compare.compare` on a prompt file, with equal weights; gold where every prompt is a toy caption."""
    from generator.toygold import measure
    from generator.toyworld import scene_from_caption
    from rlhf.compare import compare
    from rlhf.direct import DirectConfig
    from rlhf.direct_run import read_prompts

    texts = read_prompts(prompts)
    has_gold = all(scene_from_caption(text) is not None for text in texts)
    return compare(
        config,
        before=before,
        after=after,
        prompts=texts,
        rewards=rewards,
        held_out=held_out,
        weights=DirectConfig().reward_weights,
        low_res_generator=low_res_generator,
        gold=measure if has_gold else None,
        out=out,
    )
