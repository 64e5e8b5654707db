"""`reelhf annotate agreement | quality | leaderboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

SourceArgument = Annotated[Path, typer.Argument(help="Preference data, or a project folder")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the figures here")]
BootstrapOption = Annotated[int, typer.Option(help="Resamples of the prompts for each interval")]


def register(app: typer.Typer) -> None:
    """Adds the three verbs."""
    app.command()(agreement)
    app.command()(quality)
    app.command("leaderboard")(show_leaderboard)


def agreement(
    source: SourceArgument, json: JsonOption = None, bootstrap: BootstrapOption = 1000
) -> None:
    """How far annotators agree: Krippendorff's alpha per dimension over the free picks, with 95 % intervals over prompts."""
    from annotation.quality.report import agreement_report, load_judged

    report = agreement_report(load_judged(source), num_bootstrap=bootstrap)
    bests = report["best_pick"]
    rows = [
        [
            name,
            _number(found["alpha"]),
            _interval(found),
            _percent(found["observed"]),
            _percent(found["chance"]),
            _percent(bests.get(name, {}).get("share")),
            _percent(bests.get(name, {}).get("chance")),
            found["num_units"],
        ]
        for name, found in report["orders"].items()
    ]
    head = ["dimension", "alpha", "95 % interval", "same order", "chance", "same best", "chance"]
    _table([*head, "pairs judged twice or more"], rows)
    if all(found["num_units"] == 0 for found in report["orders"].values()):
        typer.echo("no pair was judged by two people: create tasks with --need 2 or more")
    if report["ratings"]:
        typer.echo("")
        _table(
            ["scores of", "ordinal alpha", "95 % interval", "clips scored twice or more"],
            [
                [name, _number(found["alpha"]), _interval(found), found["num_units"]]
                for name, found in report["ratings"].items()
            ],
        )
    _finish(report, json)


def quality(
    source: SourceArgument,
    gold: Annotated[
        Path | None,
        typer.Option(help="JSONL of known answers: task_id, dimension, best, worst (sha256)"),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Each annotator's pace, haste, consistency and skill; where best clips stood; which dimensions veto each other."""
    from annotation.quality.report import load_judged, quality_report

    report = quality_report(load_judged(source, gold=gold))
    head = ["annotator", "tasks", "median s", "too fast", "gold", "retest", "as others"]
    rows = [
        [
            f"{one['annotator']}{' (simulated)' if one['simulated'] else ''}",
            one["tasks"],
            _number(one["median_seconds"], 1),
            *(_of(one[name]) for name in ("too_fast", "gold", "retest", "agrees_with_others")),
            _number(one["skill"]),
            _number(one["ability"]),
        ]
        for one in report["annotators"]
    ]
    _table([*head, "skill", "ability"], rows)
    typer.echo("")
    _table(
        ["clips", "best by place, from the left", "chi-square", "p"],
        [
            [num_clips, bias["best"], _number(bias["chi_square"]), _number(bias["p_value"], 3)]
            for num_clips, bias in report["position_bias"].items()
        ],
    )
    typer.echo("")
    rows = [[veto["dimension"], veto["other"], _of(veto)] for veto in report["vetoes"]]
    _table(["dimension", "clashes with", "free picks that clash"], rows)
    typer.echo("\nskill: how often they say what is probably true (Dawid-Skene).")
    typer.echo(
        "ability: factor on quality gaps (Bradley-Terry): 1 usual, 0 guesses, below 0 inverted."
    )
    _finish(report, json)


def show_leaderboard(
    source: SourceArgument,
    by: Annotated[str, typer.Option(help="What competes: model, stage or checkpoint")] = "model",
    dimension: Annotated[str | None, typer.Option(help="Votes of this dimension only")] = None,
    json: JsonOption = None,
    bootstrap: BootstrapOption = 1000,
) -> None:
    """Which model is better: Bradley-Terry ratings with ties, good / same / bad, mean opinion scores, dimension weights."""
    from annotation.quality.report import leaderboard_report, load_judged

    report = leaderboard_report(
        load_judged(source), by=by, dimension=dimension, num_bootstrap=bootstrap
    )
    if not report["ratings"]:
        typer.echo(f"no two clips of different {by}s were compared")
    names = ("name", "rating", "wins", "ties", "losses")
    rows = [
        [rank["name"], _number(rank["rating"], 0), _interval(rank, 0)]
        + [rank[name] for name in names[2:]]
        for rank in report["ratings"]
    ]
    _table([by, "rating", "95 % interval", *names[2:]], rows)
    typer.echo("")
    rows = [
        [g["name"], g["against"], g["good"], g["same"], g["bad"], _number(g["score"]), _interval(g)]
        for g in report["gsb"]
    ]
    _table([by, "against", "good", "same", "bad", "(G-B)/all", "95 % interval"], rows)
    if report["opinion_scores"]:
        typer.echo("")
        rows = [
            [one["name"], one["dimension"], _number(one["mean"]), _interval(one), one["number"]]
            for one in report["opinion_scores"]
        ]
        _table([by, "dimension", "mean score", "95 % interval", "scores"], rows)
    if report["dimension_weights"]:
        typer.echo("")
        rows = [
            [one["dimension"], _number(one["coefficient"]), _interval(one), _percent(one["share"])]
            for one in report["dimension_weights"]
        ]
        _table(["dimension", "logits per point", "95 % interval", "weight"], rows)
    _finish(report, json)


def _finish(report: Any, path: Path | None) -> None:
    from annotation.quality.report import write_json

    if path is not None:
        write_json(report, path)
        typer.echo(f"written: {path}")


def _table(head: list[str], rows: list[list[Any]]) -> None:
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _interval(found: Any, digits: int = 2) -> str:
    if found["low"] is None:
        return "-"
    return f"{found['low']:.{digits}f} to {found['high']:.{digits}f}"


def _of(share: Any) -> str:
    if not share["of"]:
        return "-"
    percent = _percent(share["share"])
    return f"{percent} ({100 * share['low']:.0f}-{100 * share['high']:.0f}) of {share['of']}"
