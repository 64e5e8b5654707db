"""One run of direct reward maximisation from one YAML: what `reelhf rlhf train` calls."""

from __future__ import annotations

from pathlib import Path

from reelhf.errors import UserError
from rlhf.direct import DirectConfig, train_direct


class DirectRun(DirectConfig):
    """The same with the paths of what it reads: one YAML, one run."""

    generator: Path
    """Folder of the generator to improve: a base, or an accelerated refiner."""
    rewards: Path
    """Folder of the rewards that are maximised."""
    held_out: Path
    """Folder of rewards trained with another seed on other annotators and prompts: watched, never differentiated."""
    prompts: Path
    """Text file, one training prompt per line."""
    validation_prompts: Path
    """Text file, one validation prompt per line; none of them may be a training prompt."""
    low_res_generator: Path | None = None
    """Refiner: the base generator that makes its low-resolution clips."""
    clips: Path | None = None
    """Folder of captioned clips for `flow_matching_weight`."""


def run_direct(run: DirectRun, *, out: Path) -> Path:
    """`train_direct` from one config with paths; what `reelhf rlhf train` calls."""
    settings = run.model_dump(include=set(DirectConfig.model_fields))
    return train_direct(
        DirectConfig.model_validate(settings),
        generator=run.generator,
        rewards=run.rewards,
        held_out=run.held_out,
        prompts=read_prompts(run.prompts),
        validation_prompts=read_prompts(run.validation_prompts),
        low_res_generator=run.low_res_generator,
        clips=run.clips,
        out=out,
    )


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a text file."""
    if not path.is_file():
        raise UserError(f"no prompt file at {path}; expected a text file with one prompt per line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{path} holds no prompt; expected one per line")
    return prompts
