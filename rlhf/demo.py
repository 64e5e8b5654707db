"""`reelhf demo`: the whole loop on one bare machine, then the pages.

Light at import; everything heavy starts after the checks that can fail cheaply (folder, port, disk, captions).
"""

from __future__ import annotations

import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelhf.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from annotation.store import Store
    from rlhf.rounds import GeneratorStages, LoopConfig, RoundStages
    from rlhf.stages import Stage, StageRunner
    from rlhf.world import World

app = typer.Typer(add_completion=False)

PRESETS = {"standard": "configs/loop/demo_standard.yaml", "smoke": "configs/loop/demo_smoke.yaml"}
ANNOTATORS = ("simulated", "human")
NEEDED_DISK_BYTES = 3_000_000_000
"""The cache of a standard run with its checkpoints; measured at 1 GB."""
DEFAULT_PORT = 7860


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asked for."""

    preset: str | None = "standard"
    """None when `config` names a file instead."""
    config: str | None = None
    annotator: str = "simulated"
    clips: Path | None = None
    serve: bool = True
    port: int = DEFAULT_PORT
    out: Path = Path("runs/demo")
    top_up: bool = False
    overrides: tuple[str, ...] = ()


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Config overrides, such as rlhf_base.num_steps=20")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="standard (20 minutes on 2 cores) or smoke (3 minutes)")
    ] = "standard",
    annotator: Annotated[
        str,
        typer.Option(
            help="simulated, or human: you judge 12 tasks in the browser, then it goes on"
        ),
    ] = "simulated",
    clips: Annotated[
        Path | None, typer.Option(help="A folder of captioned videos instead of the toy world")
    ] = None,
    serve: Annotated[
        bool, typer.Option(help="Open the annotation and review pages at the end")
    ] = True,
    port: Annotated[
        int, typer.Option(help="Annotation page; the review page takes the next one")
    ] = DEFAULT_PORT,
    out: Annotated[Path, typer.Option(help="Where the results go")] = Path("runs/demo"),
    top_up: Annotated[
        bool,
        typer.Option(
            "--top-up", help="With human: simulated annotators judge the rest, marked as such"
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and stop")
    ] = False,
) -> None:
    """Go round the whole loop: generate, judge, learn rewards, maximise them, compare; then serve the pages."""
    options = DemoOptions(
        preset, None, annotator, clips, serve, port, out, top_up, tuple(overrides or ())
    )
    if dry_run:
        from reelhf.config import to_yaml

        typer.echo(to_yaml(load_preset(options)), nl=False)
        return
    run_demo(options)


def loop(
    config: Annotated[
        str, typer.Argument(help="A loop config, such as configs/loop/demo_standard.yaml")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Config overrides, such as num_rounds=2")
    ] = None,
    clips: Annotated[
        Path | None, typer.Option(help="A folder of captioned videos instead of the toy world")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the results go")] = Path("runs/loop"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and stop")
    ] = False,
) -> None:
    """Round after round by one YAML, with simulated annotators: each starts from the generator the last one improved."""
    options = DemoOptions(
        None, config, "simulated", clips, False, DEFAULT_PORT, out, False, tuple(overrides or ())
    )
    if dry_run:
        from reelhf.config import to_yaml

        typer.echo(to_yaml(load_preset(options)), nl=False)
        return
    load_preset(options)
    run_demo(options)


def run_demo(options: DemoOptions) -> Path:
    """Check, run every stage, write the report, and serve the pages if asked. Returns the report's path."""
    from rlhf.stages import StageFailed

    check_first(options)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log file should show a stage when it begins
        sys.stdout.reconfigure(line_buffering=True)
    try:
        return _run(options)
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print(
            "\nstopped. Run the same command again: finished stages are skipped, an interrupted one continues where it can.",
            file=sys.stderr,
        )
        raise


def check_first(options: DemoOptions) -> None:
    """Everything that can be wrong before any work: each as one UserError."""
    if options.preset is not None and options.preset not in PRESETS:
        raise UserError(
            f"preset '{options.preset}'; expected {' or '.join(PRESETS)}.{did_you_mean(options.preset, PRESETS)}"
        )
    if options.annotator not in ANNOTATORS:
        raise UserError(
            f"annotator '{options.annotator}'; expected {' or '.join(ANNOTATORS)}."
            f"{did_you_mean(options.annotator, ANNOTATORS)}"
        )
    if options.top_up and options.annotator != "human":
        raise UserError("--top-up adds simulated votes to yours; it needs --annotator human")
    if options.top_up and options.clips is not None:
        raise UserError("--top-up simulates votes from the toy world's gold; real clips have none")
    if options.annotator == "human" and not options.serve:
        raise UserError("--annotator human needs the annotation page; leave out --no-serve")
    check_writable(options.out)
    check_disk(options.out)
    if options.serve:
        check_port(options.port)
        check_port(options.port + 1)
    if options.clips is not None:
        from reelhf.clips import load_clip_folder
        from reelhf.video import probe_video

        for path in sorted({entry.path for entry in load_clip_folder(options.clips)}):
            probe_video(path)


def check_writable(folder: Path) -> None:
    """Raises UserError unless files can be made in `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another folder with --out"
        ) from error


def check_disk(folder: Path) -> None:
    """Raises UserError if too little space is left where the results or the cache go."""
    for place in (folder, _existing_parent(cache_folder())):
        free = shutil.disk_usage(place).free
        if free < NEEDED_DISK_BYTES:
            raise UserError(
                f"{free / 1e9:.1f} GB free at {place}; the demo needs {NEEDED_DISK_BYTES / 1e9:.0f} GB. "
                "Free some, or set REELHF_CACHE and --out to a larger disk"
            )


def check_port(port: int) -> None:
    """Raises UserError if nobody can listen on the port of this machine."""
    from annotation.api import bind

    bind("127.0.0.1", port).close()


def cache_folder() -> Path:
    """Where finished stages are kept: REELHF_CACHE, or ~/.cache/reelhf."""
    from reelhf.clips import cache_folder

    return cache_folder()


def _existing_parent(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def load_preset(options: DemoOptions) -> LoopConfig:
    """The preset's config with the overrides of the command line."""
    from reelhf.config import load_config
    from rlhf.rounds import LoopConfig

    path = PRESETS[options.preset] if options.preset is not None else options.config
    return load_config(LoopConfig, path, options.overrides)


def _run(options: DemoOptions) -> Path:
    from rlhf.report import RECORD, write_report
    from rlhf.rounds import run_loop, simulated_judge
    from rlhf.stages import StageRunner
    from rlhf.world import real_world, toy_world

    started = time.monotonic()
    config = load_preset(options)
    world = (
        toy_world(config.prompts, config.clips.variety)
        if options.clips is None
        else real_world(
            config.prompts, options.clips, corrupted_candidates=options.annotator == "simulated"
        )
    )
    write_prompts(world, options.out / "prompts")
    runner = StageRunner(cache_folder(), config.budget_seconds, links=options.out)
    print_plan(options, config)
    with ExitStack() as pages:
        judge = (
            simulated_judge(config, world)
            if options.annotator == "simulated"
            else human_judge(options, config, world, pages)
        )
        made, rounds = run_loop(config, world, runner, judge)
        record = describe(options, config, world, runner, made, rounds)
        (options.out / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False))
        report = write_report(options.out)
        print_end(config, runner, record, report, time.monotonic() - started)
        if options.serve:
            serve_pages(options, rounds[-1], pages)
    return report


def write_prompts(world: World, folder: Path) -> None:
    """The prompts of each use as text files, for the commands that take one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in vars(world.prompts).items():
        (folder / f"{name}.txt").write_text(
            "\n".join(dict.fromkeys(prompts)) + "\n", encoding="utf-8"
        )


# --- a person as the annotator ---------------------------------------------------------------------------------------


def human_judge(options: DemoOptions, config: LoopConfig, world: World, pages: ExitStack) -> Any:
    """A judge that serves the annotation page, waits for the asked number of tasks, and goes on. The page stays open."""
    from annotation.api import running_server
    from rlhf.judging import (
        PROJECT,
        HumanSession,
        create_human_tasks,
        finish_human,
        human_app,
        human_share,
        judgments_digest,
        open_project,
        wait_for_human,
    )

    def judge(runner: StageRunner, suffix: str, candidates: Stage) -> Stage:
        started = time.monotonic()
        out = options.out / f"project{suffix}"
        keep_other_project(out, candidates.key)
        prompts = (world.prompts.feedback, world.prompts.held_out)
        gold = world.annotator_view(candidates.path) if options.top_up else None
        store, groups = open_project(out / PROJECT, candidates.path)
        pages.callback(store.close)
        share = human_share(
            config.judging, (len(prompts[0]), len(prompts[1])), top_up=options.top_up
        )
        wanted = sum(share)
        create_human_tasks(store, groups, share, len(prompts[0]))
        site, account = human_app(store, wanted=wanted)
        url = pages.enter_context(running_server(store, port=options.port, app=site))
        link = url + site.state.sign_in_link(account)
        session = HumanSession(store, account, groups, url, link)
        print(
            f"\n      Your turn: judge {wanted} tasks (about {wanted} minutes) at\n\n        {link}\n"
        )
        print_tunnel([options.port])
        wait_for_human(store, wanted, print)
        finish_human(
            config.judging,
            session,
            prompts=prompts,
            share=share,
            gold=gold,
            top_up=options.top_up,
            out=out,
        )
        return runner.adopt(
            f"annotation{suffix}",
            out,
            key=judgments_digest(store)[:16],
            seconds=time.monotonic() - started,
        )

    return judge


def keep_other_project(folder: Path, key: str) -> None:
    """A project made from other candidates is moved aside, never overwritten."""
    stamp = folder / "candidates.key"
    if folder.exists() and (not stamp.exists() or stamp.read_text() != key):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
        print(f"      the project of other clips is kept in {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key)


# --- what the loop leaves --------------------------------------------------------------------------------------------


def describe(
    options: DemoOptions,
    config: LoopConfig,
    world: World,
    runner: StageRunner,
    made: GeneratorStages,
    rounds: list[RoundStages],
) -> dict[str, Any]:
    """The record that the report and the review page read (`loop.json`)."""
    from reelhf.config import to_yaml
    from rlhf.report import RECORD_VERSION
    from rlhf.rounds import run_folder

    last = rounds[-1]
    artefacts = {
        "base": made.base.path,
        "refiner": made.refiner.path,
        "student": made.student.path,
        "vae": made.vae.path,
        "rlhf_base": run_folder(last.rlhf_base),
        "rlhf_refiner": run_folder(last.rlhf_refiner),
        "compare_base": last.compare_base.path,
        "compare_refiner": last.compare_refiner.path,
        "rewards": last.rewards.path,
        "rewards_evaluation": last.rewards_evaluation.path,
        "held_out_rewards": last.held_out_rewards.path,
        "held_out_evaluation": last.held_out_evaluation.path,
        "annotation": last.judging.path,
    }
    if last.gold_base is not None and last.gold_refiner is not None:
        artefacts |= {"gold_base": last.gold_base.path, "gold_refiner": last.gold_refiner.path}
    stages = [
        {
            "name": stage.name,
            "seconds": stage.seconds,
            "budget": config.budget_seconds.get(stage.name),
            "cached": stage.cached,
            "attempts": stage.attempts,
            "peak_bytes": stage.peak_bytes,
        }
        for stage in runner.stages.values()
    ]
    where = "toy world" if world.clips is None else f"real clips ({world.clips.name})"
    return {
        "schema_version": RECORD_VERSION,
        "title": f"{config.title}: {where}",
        "preset": options.preset,
        "command": command_line(options),
        "created": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "commit": commit(),
        "config": to_yaml(config),
        "notes": [*world.notes, *judging_notes(options, last)],
        "annotation": annotation_facts(options, last),
        "generator_facts": generator_facts(made),
        "stages": stages,
        "total_budget_seconds": config.total_budget_seconds,
        "memory_budget_bytes": config.memory_budget_bytes,
        "artefacts": {name: os.path.relpath(path, options.out) for name, path in artefacts.items()},
    }


def judging_notes(options: DemoOptions, last: RoundStages) -> list[str]:
    """What the verdicts' origin means for the results."""
    if options.annotator == "simulated":
        return []
    if options.top_up:
        return [
            "You judged part of the feedback tasks; simulated annotators judged the rest. Their votes are marked in every table."
        ]
    return [
        "All verdicts are yours. That is few for six reward models; and one person judged for the rewards and for the held-out "
        "rewards (other prompts), so the two are less independent than in a run with several annotators."
    ]


def annotation_facts(options: DemoOptions, last: RoundStages) -> dict[str, Any]:
    """Counts of the verdicts, for the report."""
    from annotation.records import read_preferences
    from rlhf.judging import PREFERENCES, SUMMARY

    summary = json.loads((last.judging.path / SUMMARY).read_text())
    data = read_preferences(last.judging.path / PREFERENCES)
    final = [row for row in data.judgments if row["pick"] == "final"]
    vetoed = sum(row["pick"] == "first" for row in data.judgments)
    explicit = [row for row in data.preferences if row["kind"] == "explicit"]
    counts = summary["counts"]
    facts = [
        ["tasks of four clips", counts["tasks"]],
        ["judgments (task and annotator)", counts["judgments"]],
        ["of them simulated", counts["simulated_judgments"]],
        ["answers (one per dimension)", len(final)],
        ["answered as a tie", _share(sum(row["tie"] for row in final), len(final))],
        ["first picks vetoed by the admissibility rule (kept, marked)", _share(vetoed, len(final))],
        [
            "preference pairs, explicit and implied",
            f"{len(explicit)} and {len(data.preferences) - len(explicit)}",
        ],
    ]
    who = {
        "simulated": "Simulated annotators with stated noise, bias and carelessness judged every task over the same HTTP interface "
        "as the page. One half judged the prompts of the rewards, the other half those of the held-out rewards.",
        "human": "You judged in the browser.",
    }[options.annotator]
    return {
        "judgments": counts["judgments"],
        "annotators": len({row["annotator"] for row in data.judgments}),
        "summary": who,
        "facts": facts,
    }


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else "0"


def generator_facts(made: GeneratorStages) -> list[list[str]]:
    """Figures of the generator's own training: label, value, meaning."""
    from reelhf.run import read_metrics
    from rlhf.rounds import run_folder

    measured = read_metrics(run_folder(made.vae))[-1]
    facts = [
        [
            "VAE, rebuilt held-out clips",
            f"{measured['held_out/psnr']:.1f} dB",
            "peak signal-to-noise ratio at the refined size, whole frames; "
            f"the moving shape alone {measured.get('held_out/foreground_psnr', float('nan')):.1f} dB; "
            f"at half the size {measured['held_out/half_size_psnr']:.1f} dB",
        ]
    ]
    distilled = json.loads((run_folder(made.student) / "distill.json").read_text())
    low, high = distilled["interval"]
    distance = distilled["distance_to_teacher"]
    facts += [
        [
            "Accelerated refiner, distance to the teacher's full output",
            f"{distance['student']:.3f}",
            f"at {distilled['nfe']['student']:.0f} evaluations; the teacher itself at as few: {distance['teacher_few_steps']:.3f}",
        ],
        [
            "How much closer the student is",
            f"{distilled['difference']:+.3f}",
            f"paired interval {low:+.3f} to {high:+.3f} over {distilled['num_prompts']} held-out prompts, equal noise; "
            + ("closer" if distilled["student_is_closer"] else "NOT shown to be closer"),
        ],
    ]
    return facts


def command_line(options: DemoOptions) -> str:
    if options.preset is None:
        words = ["reelhf", "rlhf", "loop", str(options.config), *options.overrides]
    else:
        words = ["reelhf", "demo", *options.overrides, "--preset", options.preset]
    words += ["--annotator", options.annotator] if options.annotator != "simulated" else []
    words += ["--clips", str(options.clips)] if options.clips else []
    words += ["--top-up"] if options.top_up else []
    return shlex.join([*words, "--out", str(options.out)])


def machine() -> str:
    import torch

    model = platform.processor() or platform.machine()
    return f"{os.cpu_count()} CPU cores ({model}), torch {torch.__version__}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """Short commit of the source, with a plus sign when files differ from it; None outside a clone."""
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    try:
        head = _git(source, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(source, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(source: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(source), *words], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


# --- what is printed -------------------------------------------------------------------------------------------------


def print_plan(options: DemoOptions, config: LoopConfig) -> None:
    print(
        f"ReelHF, {options.preset or options.config}: about {config.total_budget_seconds / 60:.0f} minutes on 2 CPU cores the first time. "
        f"Finished stages are kept in {cache_folder()}."
    )


def print_end(
    config: LoopConfig,
    runner: StageRunner,
    record: dict[str, Any],
    report: Path,
    wall_seconds: float,
) -> None:
    """Seconds per stage against the budget, the checks, and where the report lies."""
    print(f"\n{'stage':<24}{'seconds':>9}{'budget':>9}{'peak GB':>9}")
    for stage in runner.stages.values():
        budget = config.budget_seconds.get(stage.name)
        remark = " over" if budget and stage.seconds > budget else ""
        remark += " (cached)" if stage.cached else ""
        print(
            f"{stage.name:<24}{stage.seconds:>9.1f}{f'{budget:.0f}' if budget else '':>9}"
            f"{stage.peak_bytes / 1e9:>9.2f}{remark}"
        )
    total = sum(stage.seconds for stage in runner.stages.values())
    peak = max(stage.peak_bytes for stage in runner.stages.values())
    print(f"{'all stages':<24}{total:>9.1f}{config.total_budget_seconds:>9.0f}{peak / 1e9:>9.2f}")
    print(f"this run: {wall_seconds:.0f} s\n")
    for run in ("base", "refiner"):
        comparison = json.loads(
            (
                (report.parent / record["artefacts"][f"compare_{run}"]) / "comparison.json"
            ).read_text()
        )
        statuses = [check["status"] for check in comparison["checks"]]
        failed = [check["measure"] for check in comparison["checks"] if check["status"] == "fail"]
        line = f"{run}: {statuses.count('pass')} of {len(statuses) - statuses.count('not_measured')} checks passed"
        print(line + (f"; not shown: {', '.join(failed)}" if failed else ""))
    print(f"\nreport: {report}")


def print_tunnel(ports: list[int]) -> None:
    """Over SSH: the line that brings the pages to the other end."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) == 4:
        forwards = " ".join(f"-L {port}:127.0.0.1:{port}" for port in ports)
        user = os.environ.get("USER", "user")
        print(
            f"You are connected over SSH. On your own machine run:\n\n  ssh {forwards} {user}@{connection[2]}\n"
        )


# --- the pages -------------------------------------------------------------------------------------------------------


def serve_pages(options: DemoOptions, last: RoundStages, pages: ExitStack) -> None:
    """Serve the annotation page and the review page until interrupted."""
    from annotation.api import running_server
    from rlhf.judging import human_app
    from rlhf.review import create_review_app

    if options.annotator == "simulated":
        store = pages.enter_context(own_project(options.out, last))
        site, account = human_app(store, wanted=None)
        link = pages.enter_context(running_server(store, port=options.port, app=site))
        link += site.state.sign_in_link(account)
    else:  # it has been open since the judging began
        link = f"http://127.0.0.1:{options.port}"
    review = create_review_app(options.out.parent)
    review_url = pages.enter_context(running_server(None, port=options.port + 1, app=review))  # type: ignore[arg-type]
    print(f"\nannotation: {link}\nreview:     {review_url}\n")
    print_tunnel([options.port, options.port + 1])
    print("Both pages stay open until Ctrl-C.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("\nclosed. What you judged is kept; the next run opens the same project.")


def own_project(out: Path, last: RoundStages) -> Store:
    """The project to judge in: a copy of the one in the cache, with blind before/after tasks that nobody has judged yet."""
    from annotation.store import Store
    from rlhf.judging import PROJECT, add_before_after_tasks

    folder = out / "project"
    keep_other_project(folder, last.judging.key + last.compare_base.key + last.compare_refiner.key)
    if not (folder / PROJECT).exists():
        aside = folder / f".{PROJECT}"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(last.judging.path / PROJECT, aside)
        with Store.open(aside) as store:
            add_before_after_tasks(store, [last.compare_base.path, last.compare_refiner.path])
        aside.rename(folder / PROJECT)
    return Store.open(folder / PROJECT)
