from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from annotation import claims, erasure, flags, schema, snapshots
from annotation.database import postgres_program
from annotation.records import Choice, ClipRecord, Verdict
from annotation.store import Store
from reelhf.errors import UserError
from tests.annotation.annotation_cases import PASSWORD, SMALL, plain_verdict, records

LEASE = 60.0


def user(store: Store, name: str):
    account = store.find_user(name)
    assert account is not None
    return account


def claim(store: Store, name: str):
    return claims.claim(store, user(store, name), lease_seconds=LEASE)


def submit(store: Store, name: str, task, key: str = "key-0123", verdict: Verdict | None = None):
    verdict = verdict or plain_verdict(task)
    return claims.submit(store, user(store, name), task.presentation, key, verdict)


# --- idempotency ---


def test_the_same_submission_twice_is_one_judgment(new_project):
    store = new_project()
    task = claim(store, "ann0")
    first = submit(store, "ann0", task)
    assert submit(store, "ann0", task) == first
    assert store.counts()["judgments"] == 1


def test_the_same_key_with_other_answers_is_a_conflict(new_project):
    store = new_project()
    task = claim(store, "ann0")
    submit(store, "ann0", task)
    with pytest.raises(claims.Conflict, match="other answers"):
        submit(store, "ann0", task, verdict=plain_verdict(task, best=2))
    with pytest.raises(claims.Conflict, match="already judged"):
        submit(store, "ann0", task, key="another-key")
    assert store.counts()["judgments"] == 1


def test_an_inadmissible_verdict_is_refused_with_its_reason_and_leaves_no_trace(new_project):
    store = new_project()
    task = claim(store, "ann0")
    choices = list(plain_verdict(task).choices)
    choices[1] = replace(choices[1], best=1, worst=2)
    with pytest.raises(claims.Refused) as refused:
        submit(store, "ann0", task, verdict=Verdict(tuple(choices)))
    assert any("B is your best for" in problem for problem in refused.value.problems)
    assert store.counts()["judgments"] == 0
    assert claim(store, "ann0").presentation == task.presentation, "the task is still theirs"


# --- leases and overlap ---


def test_a_claimed_task_is_given_to_nobody_else_until_its_lease_expires(new_project, clock):
    store = new_project(tasks=1)
    mine = claim(store, "ann0")
    assert claim(store, "ann1") is None
    assert claim(store, "ann0") == mine, "asking again shows the same task in the same order"
    clock.seconds += LEASE + 1
    theirs = claim(store, "ann1")
    assert theirs is not None
    assert theirs.presentation != mine.presentation


def test_a_heartbeat_keeps_a_lease_alive(new_project, clock):
    store = new_project(tasks=1)
    mine = claim(store, "ann0")
    for _ in range(3):
        clock.seconds += LEASE * 0.7
        assert claims.heartbeat(store, user(store, "ann0"), mine.presentation, lease_seconds=LEASE)
        assert claim(store, "ann1") is None
    clock.seconds += LEASE * 2
    assert not claims.heartbeat(store, user(store, "ann0"), mine.presentation, lease_seconds=LEASE)


def test_a_late_submission_counts_while_a_place_is_free_and_is_kept_as_surplus_after(
    new_project, clock
):
    store = new_project(tasks=1)
    late = claim(store, "ann0")
    clock.seconds += LEASE + 1
    second = claim(store, "ann1")
    assert not submit(store, "ann0", late, key="late-key").surplus
    assert submit(store, "ann1", second, key="second-key").surplus
    counts = store.counts()
    assert (counts["judgments"], counts["open_tasks"]) == (2, 0)


def test_nobody_gets_a_task_twice(new_project):
    store = new_project(tasks=2, need=2, annotators=1)
    for key in ("key-one-1", "key-two-2"):
        task = claim(store, "ann0")
        submit(store, "ann0", task, key=key)
    assert claim(store, "ann0") is None
    assert store.counts()["open_tasks"] == 2, "the second judgment must come from someone else"


@pytest.mark.parametrize("need", [1, 2])
def test_eight_threads_share_the_tasks_without_a_double_lease_or_too_many_judgments(
    new_project, need
):
    store = new_project(tasks=100 // need, need=need, annotators=0)
    workers = [store.add_user(f"w{i}", PASSWORD, simulated=True) for i in range(8)]
    tasks_of: dict[int, list[str]] = {w.id: [] for w in workers}
    errors = []

    def work(account):
        try:
            while task := claims.claim(store, account, lease_seconds=LEASE):
                claims.submit(
                    store,
                    account,
                    task.presentation,
                    f"key-{task.presentation}",
                    plain_verdict(task),
                )
                tasks_of[account.id].append(task.presentation)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(w,)) for w in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with store.read() as connection:
        judged = Counter(connection.execute(sa.select(schema.judgment.c.task_id)).scalars())
        shown = Counter(connection.execute(sa.select(schema.presentation.c.task_id)).scalars())
        surplus = connection.execute(
            sa.select(sa.func.count()).where(schema.judgment.c.surplus)
        ).scalar_one()
    assert judged == dict.fromkeys(judged, need)
    assert len(judged) == 100 // need
    assert shown == judged, "each task was leased exactly as often as it was judged"
    assert surplus == 0
    assert store.counts()["open_tasks"] == 0


def test_a_task_that_three_people_skip_is_flagged(new_project):
    store = new_project(tasks=1, annotators=4)
    for index in range(3):
        task = claim(store, f"ann{index}")
        claims.skip(store, user(store, f"ann{index}"), task.presentation, "unclear_prompt")
        assert claim(store, f"ann{index}") is None, "a skipped task does not come back"
    assert store.counts()["flagged_tasks"] == 1
    assert claim(store, "ann3") is None


def test_a_skip_needs_a_known_reason(new_project):
    store = new_project(tasks=1)
    task = claim(store, "ann0")
    with pytest.raises(claims.Refused, match="reason 'bored' is not one of broken_clip"):
        claims.skip(store, user(store, "ann0"), task.presentation, "bored")


def test_orders_are_drawn_anew_for_every_showing(new_project):
    store = new_project(tasks=12, need=4, annotators=4)
    clip_orders, dimension_orders = set(), set()
    for index in range(4):
        for number in range(12):
            task = claim(store, f"ann{index}")
            submit(store, f"ann{index}", task, key=f"key-{index}-of-{number}")
            dimension_orders.add(task.dimensions)
    with store.read() as connection:
        for order in connection.execute(sa.select(schema.presentation.c.clip_order)).scalars():
            clip_orders.add(tuple((clip - 1) % 4 for clip in order))
    assert len(clip_orders) > 8
    assert len(dimension_orders) > 8


# --- durability ---


def test_what_people_said_cannot_be_changed_or_deleted(new_project):
    store = new_project(tasks=2)
    submit(store, "ann0", claim(store, "ann0"))
    passed = claim(store, "ann0")
    claims.skip(store, user(store, "ann0"), passed.presentation, "other")
    claims.flag(store, user(store, "ann0"), passed.presentation, "broken")
    store.add_user("boss", PASSWORD, role="admin")
    flags.decide(store, user(store, "boss"), 2, "remove")
    with store.write() as c:
        c.execute(
            sa.insert(schema.exam).values(
                account_id=1,
                attempt=0,
                correct=1,
                asked=1,
                passed=True,
                guideline_version="v",
                created_ms=1,
            )
        )
    snapshots.take(store, "first")  # an event too
    erasure.redact_note(store, 1, reason="a name in it")  # a tombstone
    for table in schema.APPEND_ONLY:
        first = next(iter(schema.metadata.tables[table].columns)).name
        verbs = [f"UPDATE {table} SET {first} = {first}", f"DELETE FROM {table}"]
        if not store.database.is_sqlite:
            verbs.append(f"TRUNCATE {table} CASCADE")
        for verb in verbs:
            with (
                pytest.raises(sa.exc.IntegrityError, match=f"{table} is append-only"),
                store.write() as c,
            ):
                c.exec_driver_sql(verb)
    assert (store.counts()["judgments"], store.counts()["skips"]) == (1, 1)


def test_replacing_a_judgment_is_refused_too(new_project):
    store = new_project(tasks=1)
    submit(store, "ann0", claim(store, "ann0"))
    replace_it = (
        "INSERT OR REPLACE INTO judgment SELECT * FROM judgment"
        if store.database.is_sqlite
        else "INSERT INTO judgment SELECT * FROM judgment ON CONFLICT (id) DO UPDATE SET note = ''"
    )
    with pytest.raises(sa.exc.IntegrityError, match="append-only"), store.write() as connection:
        connection.exec_driver_sql(replace_it)


CRASH = """
import os, sys, signal
from annotation import claims
from annotation.store import Store
from tests.annotation.annotation_cases import plain_verdict
store = Store.open(sys.argv[1])
account = store.find_user("ann0")
task = claims.claim(store, account, lease_seconds=60)
print(task.presentation, flush=True)
receipt = claims.submit(store, account, task.presentation, "crash-key", plain_verdict(task))
print(receipt.judgment_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_confirmed_judgment_survives_kill_9_and_the_retry_finds_it(new_project, tmp_path):
    store = new_project(tasks=1)
    folder = store.media.parent
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    presentation, judgment_id = done.stdout.split()
    with Store.open(folder) as again:
        account = user(again, "ann0")
        with again.read() as connection:
            order = connection.execute(
                sa.select(schema.presentation.c.dimension_order).where(
                    schema.presentation.c.token == presentation
                )
            ).scalar_one()
        verdict = Verdict(tuple(Choice(d, 0, 1) for d in order), seconds=4.0)
        receipt = claims.submit(again, account, presentation, "crash-key", verdict)
        assert receipt.judgment_id == int(judgment_id)
        assert again.counts()["judgments"] == 1


def test_a_database_of_a_newer_version_is_refused(new_project):
    store = new_project(tasks=1)
    folder = store.media.parent
    with store.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    store.close()
    with pytest.raises(UserError, match="made by a newer version \\(revision 9999"):
        Store.open(folder)


def test_places_that_are_no_project_are_refused(tmp_path):
    with pytest.raises(UserError, match="no annotation project at"):
        Store.open(tmp_path / "nowhere", create=False)
    (tmp_path / "annotation.db").write_text(
        "this is not a database, only a text file of some length"
    )
    with pytest.raises(UserError, match="is not an annotation database"):
        Store.open(tmp_path)


def test_a_backup_holds_every_judgment_and_overwrites_nothing(new_project, tmp_path):
    store = new_project(tasks=1)
    submit(store, "ann0", claim(store, "ann0"))
    path = store.backup(tmp_path / "copy" / "annotation.db")
    if store.database.is_sqlite:
        with Store.open(path) as copy:
            assert copy.counts()["judgments"] == 1
    else:
        listed = subprocess.run(
            [
                str(postgres_program("pg_restore")),
                "--data-only",
                "--table=judgment",
                "-f",
                "-",
                path,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert listed.stdout.count("key-0123") == 1
    with pytest.raises(UserError, match="already there"):
        store.backup(path)


# --- accounts, prompts, clips ---


def test_accounts_are_checked(new_project):
    store = new_project(tasks=1)
    assert store.check_password("ann0", PASSWORD).name == "ann0"
    assert store.check_password("ann0", "wrong password") is None
    assert store.check_password("nobody", PASSWORD) is None
    with pytest.raises(UserError, match="already a user named 'ann0'"):
        store.add_user("ann0", PASSWORD)
    with pytest.raises(UserError, match="at least 8 characters"):
        store.add_user("short", "1234567")
    with pytest.raises(UserError, match="role is 'root'"):
        store.add_user("boss", PASSWORD, role="root")
    store.set_password("ann0", "a new password")
    assert store.check_password("ann0", PASSWORD) is None
    with store.read() as connection:
        stored = connection.execute(sa.select(schema.account.c.password_hash)).scalars().all()
    assert all(value.startswith("$argon2id$") for value in stored)


def test_near_duplicate_prompts_share_a_cluster_and_different_ones_do_not(tmp_path, clip_files):
    long = "A small red ball with a matte surface rolls slowly from left to right over a pale blue floor"
    with Store.open(tmp_path / "p") as store:
        prompts = [
            long,
            long + " today",
            long.replace("red", "green"),
            "一只猫在草地上慢慢地走着，镜头跟着它移动",
        ]
        store.add_clips(
            ClipRecord(path, prompt, "a", "base")
            for path, prompt in zip(clip_files[:4], prompts, strict=True)
        )
        with store.read() as connection:
            clusters = dict(
                connection.execute(sa.select(schema.prompt.c.text, schema.prompt.c.cluster))
                .tuples()
                .all()
            )
    assert clusters[long] == clusters[long + " today"]
    assert len(set(clusters.values())) == 3


def test_clips_are_copied_once_and_known_by_their_bytes(new_project, clip_files):
    store = new_project(tasks=1)
    again = store.add_clips(records(clip_files)[:2])
    assert again == [1, 2]
    assert len(list((store.media / "clips").iterdir())) == len(clip_files)


def test_groups_that_cannot_be_a_task_are_named(new_project, clip_files, tmp_path):
    store = new_project(tasks=1)
    for groups, words in (
        ([[1]], "task 0 has 1 clips; best and worst need 2 to 8"),
        ([[1, 2], [3, 3]], "task 1 shows the same clip twice"),
        ([[1, 99]], "no clip with id 99"),
    ):
        with pytest.raises(UserError, match=words):
            store.create_tasks(groups, presentation=SMALL)
    with pytest.raises(UserError, match="need is 0"):
        store.create_tasks([[1, 2]], need=0)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    with pytest.raises(UserError, match=r"broken\.mp4"):
        store.add_clips([ClipRecord(broken, "prompt", "m", "s")])
    assert store.counts()["tasks"] == 1


def test_progress_counts_towards_the_number_asked_for_and_estimates_the_rest(new_project):
    store = new_project(tasks=3)
    account = user(store, "ann0")
    assert claims.progress(store, account, wanted=None) == claims.Progress(0, 3, None, None)
    submit(store, "ann0", claim(store, "ann0"))
    assert claims.progress(store, account, wanted=12) == claims.Progress(1, 12, 4.0, 44.0)
    assert claims.progress(store, account, wanted=None) == claims.Progress(1, 3, 4.0, 8.0)
