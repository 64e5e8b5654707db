"""What is erased is gone from every table and folder; what stays says so; the trail cannot be changed unseen."""

from __future__ import annotations

import json
import sqlite3

import pytest
import sqlalchemy as sa

from annotation import audit, claims, erasure, projects, schema
from annotation.disk import disk_use, human_bytes
from annotation.export import ExportQuery, export_preferences
from annotation.records import Choice, Verdict, read_preferences
from annotation.snapshots import take
from reelhf.cli import main
from reelhf.errors import UserError
from tests.annotation.annotation_cases import PASSWORD, SMALL


def judge(store, name, note=""):
    account = store.find_user(name)
    while task := claims.claim(store, account, lease_seconds=60):
        choices = tuple(Choice(d, 0, 1) for d in task.dimensions)
        verdict = Verdict(choices, note=note, seconds=4.0)
        claims.submit(store, account, task.presentation, f"key-{task.presentation}", verdict)


def every_value(store) -> str:
    """All tables as one text."""
    with store.read() as connection:
        return "\n".join(
            str(tuple(row))
            for table in schema.metadata.sorted_tables
            for row in connection.execute(sa.select(table))
        )


def came_from_label_studio(store, judgment: int):
    """As if this judgment had been pulled: its note is kept there too."""
    task = {"uid": "u1", "server": "http://ls", "project": 1, "task_id": 1, "pushed_ms": 0}
    order = {"clip_order": [], "dimension_order": [], "guideline_version": "v"}
    body = [{"from_name": "note", "value": {"text": ["phone of Jo"]}}]
    row = {"uid": "u1", "their_id": 1, "updated_at": "now", "state": "stored", "reason": ""}
    with store.write() as connection:
        connection.execute(sa.insert(schema.label_studio_task).values(**task, **order))
        connection.execute(
            sa.insert(schema.label_studio_annotation).values(
                **row, judgment_id=judgment, body=body, seen_ms=0
            )
        )


@pytest.fixture
def judged(new_project):
    store = new_project(tasks=3, need=2, annotators=1)
    store.add_user("Jo Doe <jo@example.com>", PASSWORD)
    judge(store, "ann0")
    judge(store, "Jo Doe <jo@example.com>", note="call me, Jo")
    return store


JO = "Jo Doe <jo@example.com>"


def test_a_purged_person_is_named_nowhere_and_their_judgments_stay(judged):
    pseudonym = judged.find_user(JO).pseudonym
    came_from_label_studio(judged, judgment=4)
    assert "jo@example.com" in every_value(judged)
    dry = erasure.purge_user(judged, JO, reason="asked", dry_run=True)
    assert "jo@example.com" in every_value(judged), "a dry run erases nothing"
    found = erasure.purge_user(judged, JO, reason="asked")
    assert found == dry
    left = every_value(judged)
    assert "jo@example.com" not in left
    assert "call me" not in left
    assert "phone of Jo" not in left
    assert (found.subject, found.judgments) == (pseudonym, 3)
    assert judged.counts()["judgments"] == 6
    assert judged.find_user(JO) is None
    assert judged.check_password(f"purged {pseudonym}", PASSWORD) is None
    assert judged.add_user(JO, PASSWORD).pseudonym != pseudonym, "the name is free again"


def test_withdrawn_judgments_leave_the_next_export_but_not_the_store(judged, tmp_path):
    pseudonym = judged.find_user(JO).pseudonym
    erasure.purge_user(judged, JO, reason="asked", withdraw=True)
    data = read_preferences(export_preferences(judged, tmp_path / "out"))
    assert pseudonym not in {row["annotator"] for row in data.judgments}
    assert data.manifest["left_out"] == {"withdrawn answers": 12}
    assert judged.counts()["judgments"] == 6


def test_a_purged_clip_is_gone_from_disk_and_from_pairs_and_what_holds_it_is_named(
    judged, tmp_path
):
    judged.create_tasks([[1, 5]], presentation=SMALL)  # an open task that shows it
    snapshot = take(judged, "before", ExportQuery(include_implied=True))
    take(judged, "another-round", ExportQuery(min_round=3))
    run = tmp_path / "runs" / "rewards"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"preferences: {snapshot.folder}\n")
    (tmp_path / "runs" / "config.yaml").write_text("preferences: elsewhere\n")
    with judged.read() as connection:
        sha256 = connection.execute(
            sa.select(schema.clip.c.sha256).where(schema.clip.c.id == 1)
        ).scalar_one()
    found = erasure.purge_clip(judged, sha256[:12], reason="shows a face", runs=tmp_path / "runs")
    assert found.num_bytes > 0
    assert len(found.keys) == 2, "the original, and the copy that both tasks show"
    assert not any((judged.media / key).exists() for key in found.keys)
    assert [s.name for s in found.snapshots] == ["before"]
    assert found.runs == [run]
    assert found.tasks == [4]
    assert judged.counts()["open_tasks"] == 0
    data = read_preferences(
        export_preferences(judged, tmp_path / "out", ExportQuery(include_implied=True))
    )
    assert sha256 not in {clip["sha256"] for clip in data.clips}
    assert all(sha256 not in (row["clip_a"], row["clip_b"]) for row in data.preferences)
    assert data.manifest["left_out"]["pairs with a purged clip"] > 0
    assert any(sha256 in row["candidates"] for row in data.judgments), "what was said stays"
    with pytest.raises(UserError, match="was purged before"):
        erasure.purge_clip(judged, sha256, reason="again")
    for bad, words in (("12", "no sha256"), ("f" * 64, "0 clips begin with")):
        with pytest.raises(UserError, match=words):
            erasure.purge_clip(judged, bad, reason="x")


def test_a_note_can_be_emptied_and_never_rewritten(judged):
    judgment = 4
    came_from_label_studio(judged, judgment)
    erasure.redact_note(judged, judgment, reason="a phone number")
    with judged.read() as connection:
        notes = dict(
            connection.execute(sa.select(schema.judgment.c.id, schema.judgment.c.note)).all()
        )
    assert notes[judgment] == ""
    assert notes[5] == "call me, Jo"
    assert "phone of Jo" not in every_value(judged)
    for values in ({"note": "other"}, {"note": "", "seconds": 1.0}, {"seconds": 1.0}):
        change = sa.update(schema.judgment).where(schema.judgment.c.id == 5).values(values)
        with (
            pytest.raises(sa.exc.IntegrityError, match="append-only"),
            judged.write() as connection,
        ):
            connection.execute(change)
    with pytest.raises(UserError, match="no judgment 99"):
        erasure.redact_note(judged, 99, reason="x")


def test_the_trail_names_nobody_and_a_changed_or_missing_entry_is_found(judged):
    erasure.purge_user(judged, JO, reason="asked")
    projects.set_member(judged, "default", "ann0", "reviewer", actor="admin-1")
    take(judged, "one")
    with judged.read() as connection:
        entries = audit.entries(connection)
        assert audit.first_broken(connection) is None
    actions = [entry.action for entry in entries]
    assert actions[-4:] == ["purge user", "project member", "export", "snapshot"]
    assert {"user add", "clips import", "tasks create"} <= set(actions)
    text = "\n".join(entry.detail + entry.subject + entry.actor for entry in entries)
    assert "ann0" not in text
    assert "jo@example.com" not in text
    assert judged.find_user("ann0").pseudonym in text
    with judged.write() as connection:  # as someone with the database file in hand could
        off = "DROP TRIGGER event_no_update"
        connection.exec_driver_sql(off if judged.database.is_sqlite else off + " ON event")
        connection.execute(
            sa.update(schema.event).where(schema.event.c.id == 2).values(actor="nobody")
        )
    with judged.read() as connection:
        assert audit.first_broken(connection) == 2


# --- projects ------------------------------------------------------------------------------------


def test_a_clip_is_shared_by_projects_and_its_bytes_are_kept_once(
    new_project, clip_files, tmp_path
):
    from tests.annotation.annotation_cases import records

    store = new_project(tasks=1, annotators=1)
    files = len(list((store.media / "clips").iterdir()))
    ids = store.add_clips(records(clip_files)[:4], project="second")
    assert ids == [1, 2, 3, 4]
    store.create_tasks([ids], project="second", presentation=SMALL)
    assert len(list((store.media / "clips").iterdir())) == files
    lines = {line.name: line for line in projects.list_projects(store)}
    assert (lines["default"].clips, lines["second"].clips) == (12, 4)
    assert (lines["default"].tasks, lines["second"].tasks) == (1, 1)
    judge(store, "ann0")
    one = read_preferences(export_preferences(store, tmp_path / "a", ExportQuery("second")))
    assert {row["project"] for row in one.judgments} == {"second"}
    assert {row["project"] for row in one.clips} == {"second"}
    assert len(one.judgments) == 4
    both = read_preferences(export_preferences(store, tmp_path / "b"))
    assert {row["project"] for row in both.judgments} == {"default", "second"}
    with pytest.raises(UserError, match=r"no project 'secon'.*second"):
        export_preferences(store, tmp_path / "c", ExportQuery("secon"))


def test_a_project_with_members_is_closed_to_others_and_one_without_is_not(new_project):
    store = new_project(tasks=1, need=3)
    store.add_user("boss", PASSWORD, role="admin")

    def given(name):
        return claims.claim(store, store.find_user(name), lease_seconds=60) is not None

    projects.set_member(store, "default", "ann1", "annotator", actor="x")
    assert not given("ann0")
    assert given("ann1")
    assert given("boss")
    projects.set_member(store, "default", "ann1", None, actor="x")
    assert given("ann0")
    with pytest.raises(UserError, match="role is 'king'"):
        projects.set_member(store, "default", "ann1", "king", actor="x")


def test_clips_past_the_retention_of_all_their_projects_are_found(new_project, clip_files, clock):
    from tests.annotation.annotation_cases import records

    store = new_project(tasks=1)
    store.add_clips(records(clip_files)[:2], project="kept for ever")
    projects.configure(
        store, "default", retention_days=30, guideline_version=store.guideline.version, actor="x"
    )
    assert erasure.expired_clips(store) == []
    clock.seconds += 31 * 86_400
    expired = erasure.expired_clips(store)
    assert len(expired) == 10, "two of twelve belong to a project that keeps them"
    use = disk_use(store)
    assert sum(clip.expired for clip in use.clips) == 10
    assert use.originals == sum(path.stat().st_size for path in (store.media / "clips").iterdir())
    assert use.copies == sum(path.stat().st_size for path in (store.media / "shown").iterdir())
    with pytest.raises(UserError, match="retention is 0 days"):
        projects.configure(store, "default", retention_days=0, guideline_version=None, actor="x")


def test_sizes_are_written_for_people():
    assert [human_bytes(n) for n in (0, 1536, 5 * 2**20)] == ["0 B", "1.5 kB", "5.0 MB"]


# --- verbs ---------------------------------------------------------------------------------------


class TestVerbs:
    @pytest.fixture
    def database(self) -> str:
        return "sqlite"

    def test_purge_says_what_goes_and_what_holds_copies(self, judged, capsys):
        take(judged, "before")
        folder = str(judged.media.parent)
        main(["annotate", "purge", "user", JO, "--reason", "asked", "--project", folder])
        said = capsys.readouterr().out
        assert "gone: the name, password" in said
        assert "snapshot before holds it" in said
        main(["annotate", "disk", folder])
        sha256 = next(
            line.split()[0]
            for line in capsys.readouterr().out.splitlines()
            if " in 1 copies" in line
        )
        words = ["annotate", "purge", "clip", sha256, "--reason", "face", "--project", folder]
        main([*words, "--dry-run"])
        assert "would go: clip" in capsys.readouterr().out
        main(words)
        main(["annotate", "audit", folder])
        said = capsys.readouterr().out
        assert "purge clip" in said
        assert "the chain is whole" in said

    def test_projects_are_made_listed_and_given_members(self, judged, capsys):
        folder = str(judged.media.parent)
        main(["annotate", "project", "set", "new", "--retention-days", "90", "--project", folder])
        main(["annotate", "project", "member", "new", "ann0", "reviewer", "--project", folder])
        capsys.readouterr()
        main(["annotate", "project", "list", folder])
        assert "new: 0 prompts, 0 clips, 0 tasks, 1 members, clips kept 90 days" in (
            capsys.readouterr().out
        )

    def test_a_backup_becomes_a_project_again_and_missing_media_are_counted(
        self, judged, tmp_path, capsys
    ):
        judged.backup(tmp_path / "copy.db")
        media = str(judged.media)
        main(
            [
                "annotate",
                "restore",
                str(tmp_path / "copy.db"),
                str(tmp_path / "new"),
                "--media",
                media,
            ]
        )
        said = capsys.readouterr().out
        assert "3 tasks, 6 judgments" in said
        assert "all 24 media files are there" in said
        with pytest.raises(SystemExit):
            main(["annotate", "restore", str(tmp_path / "copy.db"), str(tmp_path / "bare")])
        assert "24 of 24 media files are missing" in capsys.readouterr().err
        damaged = tmp_path / "damaged.db"
        data = bytearray((tmp_path / "copy.db").read_bytes())
        data[4096:12288] = bytes(8192)
        damaged.write_bytes(data)
        (tmp_path / "text.db").write_text("not a database")
        for source, target, words in (
            (tmp_path / "copy.db", tmp_path / "new", "already holds a project"),
            (damaged, tmp_path / "x", "is damaged"),
            (tmp_path / "text.db", tmp_path / "y", "is no backup"),
            (tmp_path / "none.db", tmp_path / "z", "cannot read"),
        ):
            with pytest.raises(SystemExit):
                main(["annotate", "restore", str(source), str(target)])
            assert words in capsys.readouterr().err
            assert target.name == "new" or not target.exists(), "nothing half-written"

    def test_a_backup_of_the_first_revision_is_upgraded_as_it_is_restored(self, tmp_path, capsys):
        from alembic import command

        from tests.annotation.test_upgrade import OLD_ROWS, config_for

        engine = sa.create_engine(f"sqlite:///{tmp_path / 'old.db'}")
        with engine.begin() as connection:
            command.upgrade(config_for(connection), "0001")
        engine.dispose()
        with sqlite3.connect(tmp_path / "old.db") as connection:
            connection.executescript(OLD_ROWS)
        with pytest.raises(SystemExit):
            main(["annotate", "restore", str(tmp_path / "old.db"), str(tmp_path / "new")])
        said = capsys.readouterr()
        assert "1 tasks, 1 judgments" in said.out
        assert "media files are missing" in said.err


def test_snapshots_name_the_query_they_answer(judged):
    snapshot = take(judged, "one", ExportQuery(max_round=0))
    manifest = json.loads((snapshot.folder / "manifest.json").read_text())
    assert manifest["source_query"] == snapshot.query.words()
    assert snapshot.last_judgment == manifest["last_judgment"] == 6
