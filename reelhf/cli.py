"""The front door: one table from verb to the folder that owns it, imported only when used."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reelhf import __version__
from reelhf.errors import UserError, did_you_mean


class Verb(NamedTuple):
    """Where a verb lives and what `reelhf --help` says of it."""

    app: str
    help: str


VERBS: dict[str, Verb] = {
    "doctor": Verb(
        "reelhf.doctor:app", "what works on this machine, what is missing, the line that mends it"
    ),
    "demo": Verb(
        "rlhf.demo.commands:app", "the whole loop, from rendered clips to a better generator"
    ),
    "annotate": Verb(
        "annotation.commands:app", "prompts, clips, tasks, judgments, export; the annotation page"
    ),
    "generator": Verb(
        "generator.commands:app", "train, sample, refine and evaluate the video generator"
    ),
    "plan": Verb(
        "generator.plan.commands:app",
        "what a generator's training costs, and whether it fits, before it is launched",
    ),
    "rewards": Verb("rewards.commands:app", "train, evaluate and apply the reward models"),
    "distill": Verb(
        "distill.commands:app", "fewer denoising steps: consistency distillation of the refiner"
    ),
    "rlhf": Verb("rlhf.commands:app", "maximise the rewards; compare before and after; run rounds"),
    "review": Verb(
        "rlhf.review:app", "reward curves and clips side by side, as a page or one file"
    ),
}
PACKAGES = ("annotation", "generator", "rewards", "rlhf", "distill")
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. Bad input ends in one line, `error: ...`, and exit code 2; `--debug` shows the traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        _run(words)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # `reelhf ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        if debug:
            raise
        if int(os.environ.get("RANK", "0")) == 0:  # every rank fails alike; one says so
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if debug or not missing or missing in (*PACKAGES, "reelhf"):
            raise
        print(
            f"error: the package '{missing}' is not installed; `reelhf doctor` says how.",
            file=sys.stderr,
        )
        sys.exit(EXIT_BAD_INPUT)


def load(target: str) -> Any:
    """The object behind `package.module:name`."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def check_packages(root: Path | None = None) -> None:
    """Refuse to run on somebody else's `generator` or `rewards`: our package names are common words.

    Raises: UserError naming the path that would be imported and the one that was expected.
    """
    root = root or Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        loaded = sys.modules.get(name)
        spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec(name)
        expected = root / name / "__init__.py"
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found != expected:
            raise UserError(
                f"the package '{name}' would come from {found or 'nowhere'}, ours is {expected}; start from "
                "another folder, clear PYTHONPATH, or install reelhf into an environment of its own."
            )


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return
    if words[0] in ("-V", "--version"):
        print(f"reelhf {__version__}")
        return
    name, rest = words[0], words[1:]
    if name not in VERBS:
        raise UserError(
            f"no verb '{name}'.{did_you_mean(name, VERBS)} `reelhf --help` lists them all."
        )
    check_packages()
    os.environ.setdefault("TYPER_STANDARD_TRACEBACK", "1")  # plain tracebacks, no boxes
    app = load(VERBS[name].app)
    try:
        status = app(rest, prog_name=f"reelhf {name}", standalone_mode=False)
    except Exception as error:
        # typer carries click inside itself or beside itself, by version: know its errors by their shape
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(EXIT_BAD_INPUT)
        if type(error).__name__ == "Abort":
            sys.exit(EXIT_INTERRUPTED)
        if hasattr(error, "format_message"):
            raise UserError(
                f"{error.format_message()} (`{_usage(error, name)} --help` says more)"
            ) from error
        raise
    if isinstance(status, int) and status:
        sys.exit(status)


def _usage(error: Any, name: str) -> str:
    """The command an argument error is about, such as `reelhf rlhf train`."""
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else f"reelhf {name}"


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: reelhf VERB [...] [--debug]",
            "",
            "Human verdicts on generated video become reward models, and reward models a better generator.",
            "",
            *lines,
            "",
            "`reelhf VERB --help` says more. Training verbs take a YAML and overrides: optimizer.lr=1e-4 --dry-run",
        ]
    )
