"""The verbs that say whether judgments can be trusted, on an export and on the project itself."""

from __future__ import annotations

import json

import pytest

from annotation import claims
from annotation.export import export_preferences
from annotation.quality import report
from annotation.records import Choice, Verdict
from annotation.snapshots import take
from reelhf.cli import main
from tests.annotation.annotation_cases import plain_verdict


@pytest.fixture
def judged(new_project):
    """Three tasks, three people: two of one mind, one who always takes the first place."""
    from sqlalchemy import select

    from annotation import schema

    store = new_project(tasks=3, need=3, annotators=3)

    def by_clip(task):
        with store.read() as connection:
            shown = connection.execute(
                select(schema.presentation.c.clip_order).where(
                    schema.presentation.c.token == task.presentation
                )
            ).scalar_one()
        best, worst = shown.index(min(shown)), shown.index(max(shown))
        return Verdict(tuple(Choice(d, best, worst) for d in task.dimensions), seconds=9.0)

    for name, verdict_of in (("ann0", by_clip), ("ann1", by_clip), ("ann2", plain_verdict)):
        account = store.find_user(name)
        while task := claims.claim(store, account, lease_seconds=60):
            key = f"key-{task.presentation}"
            claims.submit(store, account, task.presentation, key, verdict_of(task))
    return store


def test_agreement_prints_a_line_per_dimension_and_writes_the_same_figures(
    judged, tmp_path, capsys
):
    folder = export_preferences(judged, tmp_path / "out")
    figures = tmp_path / "agreement.json"
    main(["annotate", "agreement", str(folder), "--json", str(figures), "--bootstrap", "50"])
    said = capsys.readouterr().out
    found = json.loads(figures.read_text())
    motion = found["orders"]["motion_quality"]
    assert f"{motion['alpha']:.2f}" in said
    assert found["best_pick"]["motion_quality"]["of"] == 9
    assert found["best_pick"]["motion_quality"]["chance"] == 0.25
    assert motion["num_prompts"] == 3


def test_quality_reads_the_project_itself_and_names_people_by_pseudonym_only(
    judged, tmp_path, capsys
):
    figures = tmp_path / "quality.json"
    main(["annotate", "quality", str(judged.media.parent), "--json", str(figures)])
    said = capsys.readouterr().out
    assert "annotator-" in said
    assert "ann0" not in said
    found = json.loads(figures.read_text())
    by_name = {one["annotator"]: one for one in found["annotators"]}
    one_mind = [by_name[judged.find_user(name).pseudonym] for name in ("ann0", "ann1")]
    first_place = by_name[judged.find_user("ann2").pseudonym]
    assert min(one["ability"] for one in one_mind) > first_place["ability"]
    assert min(one["skill"] for one in one_mind) > first_place["skill"]
    assert first_place["median_seconds"] == 4.0
    assert found["position_bias"]["4"]["best"][0] >= 12, "the third person's, at least"
    assert len(found["vetoes"]) == 6


def test_gold_answers_are_read_from_a_file_and_a_bad_line_is_named(judged, tmp_path, capsys):
    rows = report.load_judged(judged.media.parent).judgments
    first = next(row for row in rows if row["annotator"] == judged.find_user("ann0").pseudonym)
    best, worst = (first["candidates"][first[name]] for name in ("best", "worst"))
    gold = tmp_path / "gold.jsonl"
    known = {"task_id": first["task_id"], "dimension": first["dimension"]}
    gold.write_text(json.dumps({**known, "best": best, "worst": worst}) + "\n")
    figures = tmp_path / "quality.json"
    folder = str(judged.media.parent)
    main(["annotate", "quality", folder, "--gold", str(gold), "--json", str(figures)])
    people = json.loads(figures.read_text())["annotators"]
    assert [one["gold"]["of"] for one in people] == [1, 1, 1]
    assert sum(one["gold"]["share"] for one in people) >= 2
    gold.write_text(json.dumps(known) + "\n")
    with pytest.raises(SystemExit):
        main(["annotate", "quality", folder, "--gold", str(gold)])
    assert "line 1 has no best, worst or tie" in capsys.readouterr().err


def test_the_answers_of_gold_tasks_are_known_without_a_file(new_project):
    store = new_project(tasks=1, annotators=1)
    store.create_tasks(
        [[5, 6, 7, 8]], purpose="gold", answers=[{"motion_quality": {"best": 0, "worst": 3}}]
    )
    ((question, answer),) = report.gold_answers(store).items()
    assert question == ("t2", "motion_quality")
    with store.read() as connection:
        from sqlalchemy import select

        from annotation.schema import clip

        sha256 = dict(connection.execute(select(clip.c.id, clip.c.sha256)).all())
    assert (answer.best, answer.worst) == (sha256[5], sha256[8])


def test_the_leaderboard_ranks_models_and_an_unknown_dimension_is_named(judged, tmp_path, capsys):
    figures = tmp_path / "board.json"
    folder = str(judged.media.parent)
    main(["annotate", "leaderboard", folder, "--json", str(figures), "--bootstrap", "50"])
    found = json.loads(figures.read_text())
    names = [rank["name"] for rank in found["ratings"]]
    assert names[0] == "secretmodel0"
    assert names[-1] == "secretmodel3", "clips come in in the order of their models"
    assert found["ratings"][0]["low"] <= found["ratings"][0]["rating"]
    assert "secretmodel0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["annotate", "leaderboard", folder, "--dimension", "beauty"])
    assert "no judgment is of dimension 'beauty'" in capsys.readouterr().err


def test_a_snapshot_is_read_only_listed_and_its_change_is_found(judged, capsys):
    folder = str(judged.media.parent)
    main(["annotate", "export", folder, "--snapshot", "first"])
    path = judged.media.parent / "snapshots" / "first" / "preferences.parquet"
    assert path.stat().st_mode & 0o222 == 0
    main(["annotate", "snapshots", folder, "--verify"])
    assert "unchanged" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["annotate", "export", folder, "--snapshot", "first"])
    assert "already a snapshot 'first'" in capsys.readouterr().err
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit):
        main(["annotate", "snapshots", folder, "--verify"])
    assert "preferences.parquet was changed" in capsys.readouterr().err


def test_two_snapshots_of_the_same_judgments_have_the_same_tables(judged):
    hashes = []
    for name in ("a", "b"):
        manifest = json.loads((take(judged, name).folder / "manifest.json").read_text())
        hashes.append({file: entry["sha256"] for file, entry in manifest["files"].items()})
    assert hashes[0]["preferences.parquet"] == hashes[1]["preferences.parquet"]
    assert hashes[0]["judgments.parquet"] == hashes[1]["judgments.parquet"]
