"""The figures of a project put together: plain data for the command line, JSON files and the dashboard."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annotation.place import is_project
from annotation.quality import agreement, annotators, leaderboard, raters
from annotation.quality.agreement import Share
from annotation.quality.votes import Row, free_picks, votes_of
from reelhf.errors import UserError

if TYPE_CHECKING:
    from annotation.store import Store

OVERALL_KIND = "gsb"
"""Judgments of this kind compare two clips whole; the others say how a clip fares in one dimension."""
GROUPS = ("model", "stage", "checkpoint")


@dataclass(frozen=True)
class Judged:
    """What there is to look at: rows of the two tables of the preference data."""

    judgments: Sequence[Row]
    clips: Sequence[Row]
    gold: annotators.GoldAnswers


def load_judged(path: Path | str, *, gold: Path | None = None) -> Judged:
    """Reads a project folder (with the answers of its gold tasks) or an export.

    Args:
        gold: JSONL of known answers, for an export or beside the project's: task_id, dimension, best and/or worst (sha256) or tie.
    Raises: UserError if it is neither, or holds no judgments.
    """
    path = Path(path)
    stated = _read_gold(gold) if gold is not None else {}
    if (path / "manifest.json").exists() or not path.exists():
        from annotation.records import read_preferences

        data = read_preferences(path, tables=["clips", "judgments"])
        judged = Judged(data.judgments, data.clips, stated)
    elif is_project(path):
        from annotation.export import judgment_table
        from annotation.store import Store

        with Store.open(path, create=False) as store:
            judgments, clips = judgment_table(store)
            judged = Judged(judgments, clips, {**gold_answers(store), **stated})
    else:
        raise UserError(
            f"{path} is neither preference data (no manifest.json) nor a project (no annotation.db)"
        )
    if not judged.judgments:
        raise UserError(f"{path} holds no judgments")
    return judged


def gold_answers(store: Store) -> dict[tuple[str, str], annotators.GoldAnswer]:
    """The known answers of the store's gold tasks; known scores are no picks and stay out."""
    from sqlalchemy import select

    from annotation import schema as t

    with store.read() as connection:
        tasks = connection.execute(
            select(t.task.c.id, t.task.c.answers).where(t.task.c.purpose == "gold")
        ).all()
        clips = connection.execute(
            select(t.clip.c.id, t.clip.c.sha256)
            .join(t.task_clip, t.task_clip.c.clip_id == t.clip.c.id)
            .join(t.task, t.task.c.id == t.task_clip.c.task_id)
            .where(t.task.c.purpose == "gold")
        )
        name = {row.id: row.sha256 for row in clips}
    return {
        (f"t{task.id}", dimension): annotators.GoldAnswer(
            name.get(answer.get("best")), name.get(answer.get("worst")), bool(answer.get("tie"))
        )
        for task in tasks
        for dimension, answer in (task.answers or {}).items()
        if {"best", "worst", "tie"} & answer.keys()
    }


def _read_gold(path: Path) -> dict[tuple[str, str], annotators.GoldAnswer]:
    from annotation.quickstart import jsonl_rows

    found = {}
    for number, row in jsonl_rows(path):
        absent = [name for name in ("task_id", "dimension") if not row.get(name)]
        if absent:
            raise UserError(f"{path} line {number} has no {', '.join(absent)}")
        answer = annotators.GoldAnswer(row.get("best"), row.get("worst"), bool(row.get("tie")))
        if answer == annotators.GoldAnswer():
            raise UserError(f"{path} line {number} has no best, worst or tie")
        found[row["task_id"], row["dimension"]] = answer
    return found


def agreement_report(judged: Judged, *, num_bootstrap: int = agreement.NUM_BOOTSTRAP) -> Any:
    """Per dimension: alpha of the order labels and of the scores, and how often two people name the same best clip."""
    orders = agreement.agreement_by_dimension(judged.judgments, num_bootstrap=num_bootstrap)
    ratings = agreement.rating_agreement(judged.judgments, num_bootstrap=num_bootstrap)
    bests = agreement.best_pick_agreement(judged.judgments)
    return {
        "orders": {name: asdict(found) for name, found in orders.items()},
        "ratings": {name: asdict(found) for name, found in ratings.items() if found.num_units},
        "best_pick": {
            name: {**_share(found), "chance": chance} for name, (found, chance) in bests.items()
        },
    }


def quality_report(judged: Judged) -> Any:
    """Per annotator: how many, how fast, how consistent, how skilled; and position bias and vetoes of the page."""
    votes = votes_of(judged.judgments)
    seconds_of = annotators.play_seconds(judged.clips)
    fast = annotators.too_fast(judged.judgments, seconds_of)
    gold = annotators.gold_accuracy(judged.judgments, judged.gold)
    retest = agreement.retest_agreement(judged.judgments)
    others = agreement.agreement_with_others(votes)
    models = {score.annotator: score for score in raters.rate_annotators(votes)}
    people = []
    for name, rows in sorted(_by_annotator(judged.judgments).items()):
        seconds = list({row["task_id"]: row["seconds"] for row in rows if row["seconds"]}.values())
        model = models.get(name)
        people.append(
            {
                "annotator": name,
                "simulated": rows[0]["simulated"],
                "tasks": len({row["task_id"] for row in rows}),
                "median_seconds": statistics.median(seconds) if seconds else None,
                "too_fast": _share(fast.get(name)),
                "gold": _share(gold.get(name)),
                "retest": _share(retest.get(name)),
                "agrees_with_others": _share(others.get(name)),
                "skill": model and model.skill,
                "ability": model and model.ability,
                "ties": sum(row["tie"] for row in free_picks(rows)),
                "cannot_judge": sum(row["status"] == "cannot_judge" for row in rows),
            }
        )
    return {
        "annotators": people,
        "position_bias": {
            num_clips: asdict(bias)
            for num_clips, bias in annotators.position_bias(judged.judgments).items()
        },
        "vetoes": [
            {"dimension": d, "other": e, **_share(share)}
            for (d, e), share in annotators.veto_rates(judged.judgments).items()
        ],
        "statuses": dict(Counter(row["status"] for row in judged.judgments)),
    }


def leaderboard_report(
    judged: Judged,
    *,
    by: str = "model",
    dimension: str | None = None,
    num_bootstrap: int = leaderboard.NUM_BOOTSTRAP,
) -> Any:
    """Ratings, GSB and opinion scores of the models (or stages, or checkpoints) and what each dimension weighs.

    Args:
        by: the column of the clips that names a competitor.
        dimension: votes of this one; all by default.
    """
    if by not in GROUPS:
        raise UserError(f"a leaderboard is by {', '.join(GROUPS)}; got {by!r}")
    known = sorted({row["dimension"] for row in judged.judgments})
    if dimension is not None and dimension not in known:
        raise UserError(f"no judgment is of dimension {dimension!r}; there are {', '.join(known)}")
    rows = [row for row in judged.judgments if dimension in (None, row["dimension"])]
    model_of = {clip["sha256"]: str(clip[by] or "unknown") for clip in judged.clips}
    votes = votes_of(rows)
    ranks = leaderboard.leaderboard(votes, model_of, num_bootstrap=num_bootstrap)
    return {
        "by": by,
        "dimension": dimension,
        "ratings": [asdict(rank) for rank in ranks],
        "gsb": [
            {**asdict(found), "score": found.score}
            for found in leaderboard.gsb(votes, model_of, num_bootstrap=num_bootstrap)
        ],
        "opinion_scores": [
            asdict(score)
            for score in leaderboard.opinion_scores(rows, model_of, num_bootstrap=num_bootstrap)
        ],
        "dimension_weights": [asdict(weight) for weight in _dimension_weights(judged)],
    }


def _dimension_weights(judged: Judged) -> list[leaderboard.DimensionWeight]:
    """What a win of one clip over another owes to its score in each dimension; empty without pairs (GSB) of clips that were scored.

    Someone who finds a clip better in more dimensions than worse has it win. Scores are means of 1 to 5 ratings, or, where there are
    none, best-worst counts.
    """
    verdicts: dict[Any, int] = defaultdict(int)
    for vote in votes_of([row for row in judged.judgments if row["kind"] == OVERALL_KIND]):
        verdicts[vote.annotator, vote.prompt_id, vote.clip_a, vote.clip_b] += vote.label
    detail = [row for row in judged.judgments if row["kind"] != OVERALL_KIND]
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in detail:
        for clip, score in zip(row["candidates"], row["scores"] or (), strict=False):
            sums[clip, row["dimension"]].append(score)
    scores = {key: statistics.fmean(values) for key, values in sums.items()}
    scores = scores or leaderboard.best_worst_scores(detail)
    dimensions = sorted({name for _, name in scores})
    usable = [
        (prompt, a, b, net)
        for (_, prompt, a, b), net in verdicts.items()
        if net and dimensions and _scored(a, b, dimensions, scores)
    ]
    if not usable:
        return []
    deltas = [[scores[a, name] - scores[b, name] for name in dimensions] for _, a, b, _ in usable]
    won = [net > 0 for *_, net in usable]
    return leaderboard.dimension_weights(dimensions, deltas, won, [prompt for prompt, *_ in usable])


def _scored(
    a: str, b: str, dimensions: Sequence[str], scores: Mapping[tuple[str, str], float]
) -> bool:
    return all((clip, name) in scores for clip in (a, b) for name in dimensions)


def _by_annotator(judgments: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in judgments:
        found[row["annotator"]].append(row)
    return found


def _share(share: Share | None) -> dict[str, Any]:
    share = share or agreement.wilson(0, 0)
    return {"share": share.share, "low": share.low, "high": share.high, "of": share.number}


def write_json(report: Any, path: Path) -> None:
    """Raises UserError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
