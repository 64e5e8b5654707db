"""Export of many judgments: its rate, and that its memory does not grow with their number.

    OMP_NUM_THREADS=1 python benchmarks/annotation_export.py --judgments 100000
    OMP_NUM_THREADS=1 python benchmarks/annotation_export.py --judgments 1000000 --format jsonl

Fills a SQLite store by plain inserts (four clips a task, three judgments a task, four dimensions, one answer in ten vetoed; no media),
exports it in a process of its own and prints seconds, judgments per second (of the clock, and of one core's work, where others use the machine too) and that process's peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from annotation import schema as t
from annotation.export import ExportQuery, export_preferences
from annotation.records import DIMENSIONS
from annotation.store import Store

LIMIT_MB = 500
CLIPS, JUDGES, ANNOTATORS = 4, 3, 200
BATCH_TASKS = 2000
FILLED = (
    t.prompt,
    t.clip,
    t.project_clip,
    t.task,
    t.task_clip,
    t.presentation,
    t.judgment,
    t.choice,
)
"""In the order in which their rows refer to each other."""


def fill(folder: Path, num_judgments: int) -> None:
    """A store with so many judgments, in the order in which a team would have made them."""
    rng = random.Random(0)
    with Store.open(folder) as store:
        with store.write() as connection:
            connection.execute(
                t.account.insert(),
                [
                    {
                        "id": i + 1,
                        "name": f"user{i}",
                        "password_hash": "x",
                        "role": "annotator",
                        "pseudonym": f"annotator-{i:04d}",
                        "simulated": False,
                        "created_ms": 0,
                    }
                    for i in range(ANNOTATORS)
                ],
            )
        number = (num_judgments + JUDGES - 1) // JUDGES
        left = num_judgments
        for start in range(0, number, BATCH_TASKS):
            tasks = range(start, min(start + BATCH_TASKS, number))
            left -= _fill_tasks(store, tasks, left, rng)


Row = dict[str, Any]


def _fill_tasks(store: Store, tasks: range, left: int, rng: random.Random) -> int:
    """Stores these tasks and at most `left` judgments of them; how many it were."""
    rows: dict[sa.Table, list[Row]] = {table: [] for table in FILLED}
    for task in tasks:
        if task % 4 == 0:
            rows[t.prompt].append(_prompt(task))
        clips = [_clip(task, slot) for slot in range(CLIPS)]
        rows[t.clip] += clips
        rows[t.project_clip] += [_member(clip) for clip in clips]
        rows[t.task].append(_task(task))
        rows[t.task_clip] += [_shown(task, slot, clip) for slot, clip in enumerate(clips)]
    # A task's judgments lie apart, as they do when people work side by side.
    work = [(judge, task) for judge in range(JUDGES) for task in tasks][:left]
    for number, (judge, task) in enumerate(work, tasks.start * JUDGES + 1):
        account = (task + judge * 7) % ANNOTATORS + 1
        rows[t.presentation].append(_showing(number, task, account, rng))
        rows[t.judgment].append(_judgment(number, task, account))
        rows[t.choice] += [
            _choice(number, position, dimension, rng)
            for position, dimension in enumerate(DIMENSIONS[:4])
        ]
    with store.write() as connection:
        for table, values in rows.items():
            if values:
                connection.execute(table.insert(), values)
    return len(work)


def _prompt_id(task: int) -> str:
    return f"p{task // 4:015d}"


def _prompt(task: int) -> Row:
    return {
        "prompt_id": _prompt_id(task),
        "text": f"Prompt number {task // 4} of a benchmark, a few words long like most.",
        "language": "en",
        "cluster": _prompt_id(task),
        "created_ms": 0,
    }


def _clip(task: int, slot: int) -> Row:
    clip_id = task * CLIPS + slot + 1
    return {
        "id": clip_id,
        "sha256": f"{clip_id:064x}",
        "prompt_id": _prompt_id(task),
        "task_kind": "t2v",
        "model": f"model{slot % 3}",
        "stage": f"stage{slot % 2}",
        "seed": slot,
        "fps": 24.0,
        "num_frames": 121,
        "width": 1280,
        "height": 720,
        "storage_key": f"clips/{clip_id:064x}.mp4",
        "created_ms": 0,
    }


def _member(clip: Row) -> Row:
    return {"project_id": t.DEFAULT_PROJECT_ID, "clip_id": clip["id"], "created_ms": 0}


def _task(task: int) -> Row:
    return {
        "id": task + 1,
        "project_id": t.DEFAULT_PROJECT_ID,
        "prompt_id": _prompt_id(task),
        "task_kind": "t2v",
        "round": 0,
        "need_n": JUDGES,
        "priority": 0,
        "state": "done",
        "num_judgments": JUDGES,
        "shown_fps": 24.0,
        "shown_frames": 121,
        "created_ms": 0,
    }


def _shown(task: int, slot: int, clip: Row) -> Row:
    return {
        "task_id": task + 1,
        "slot": slot,
        "clip_id": clip["id"],
        "shown_key": f"shown/{clip['id']}",
    }


def _showing(number: int, task: int, account: int, rng: random.Random) -> Row:
    return {
        "id": number,
        "token": f"token{number}",
        "task_id": task + 1,
        "account_id": account,
        "clip_order": [task * CLIPS + slot + 1 for slot in rng.sample(range(CLIPS), CLIPS)],
        "dimension_order": list(DIMENSIONS[:4]),
        "guideline_version": "bench",
        "shown_ms": number,
    }


def _judgment(number: int, task: int, account: int) -> Row:
    return {
        "id": number,
        "task_id": task + 1,
        "account_id": account,
        "presentation_id": number,
        "idempotency_key": f"bench-key-{number}",
        "payload_hash": "x",
        "kind": "best_worst",
        "surplus": False,
        "simulated": False,
        "guideline_version": "bench",
        "seconds": 20.0,
        "note": "",
        "submitted_ms": number,
    }


def _choice(number: int, position: int, dimension: str, rng: random.Random) -> Row:
    best, worst = rng.sample(range(CLIPS), 2)
    vetoed = rng.random() < 0.1
    return {
        "judgment_id": number,
        "dimension": dimension,
        "position": position,
        "status": "no_valid_pair" if vetoed else "ok",
        "best": None if vetoed else best,
        "worst": None if vetoed else worst,
        "first_best": best,
        "first_worst": worst,
        "constrained": False,
        "admissible": not vetoed,
    }


def export(folder: Path, out: Path, fmt: str, implied: bool) -> dict[str, object]:
    """Exports in this process; says how long it took and how much memory the process had at its peak."""
    with Store.open(folder, create=False) as store:
        before = _peak_mb()
        start, work = time.perf_counter(), time.process_time()
        export_preferences(store, out, ExportQuery(include_implied=implied), fmt=fmt)
        seconds, work = time.perf_counter() - start, time.process_time() - work
    files = json.loads((out / "manifest.json").read_text())["files"]
    return {
        "seconds": seconds,
        "cpu_seconds": work,
        "peak_mb": _peak_mb(),
        "before_mb": before,
        "rows": {name.partition(".")[0]: entry["rows"] for name, entry in files.items()},
        "megabytes": sum(entry["bytes"] for entry in files.values()) / 2**20,
    }


def expected_rows(folder: Path, implied: bool) -> dict[str, int]:
    """Counted by the database: a row per answer and one more per veto; of each free or vetoed pick one pair, or 2K - 3."""
    with sqlite3.connect(folder / "annotation.db") as connection:
        counts = "SELECT count(*), sum(status = 'no_valid_pair') FROM choice"
        answers, vetoed = connection.execute(counts).fetchone()
        (clips,) = connection.execute(
            "SELECT count(*) FROM task_clip WHERE task_id IN (SELECT task_id FROM judgment)"
        ).fetchone()
    pairs = 2 * CLIPS - 3 if implied else 1
    return {"clips": clips, "judgments": answers + vetoed, "preferences": answers * pairs}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judgments", type=int, default=100_000)
    parser.add_argument("--format", default="parquet")
    parser.add_argument("--implied", action="store_true")
    parser.add_argument(
        "--store", type=Path, help="keep the filled store here, and use it if there"
    )
    parser.add_argument("--export-only", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.export_only is not None:
        found = export(asked.store, asked.export_only, asked.format, asked.implied)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.store or Path(scratch) / "store"
        if not (folder / "annotation.db").exists():
            start = time.perf_counter()
            fill(folder, asked.judgments)
            print(f"filled with {asked.judgments} judgments in {time.perf_counter() - start:.0f} s")
        words = [sys.executable, __file__, "--format", asked.format, "--store", str(folder)]
        words += ["--export-only", str(Path(scratch) / "out")]
        words += ["--implied"] if asked.implied else []
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        expected = expected_rows(folder, asked.implied)
        if found["rows"] != expected:
            sys.exit(f"rows {found['rows']}, expected {expected}")
    rate = asked.judgments / found["seconds"]
    print(
        f"{asked.judgments} judgments, {asked.format}: {found['seconds']:.1f} s, {rate:.0f} judgments/s "
        f"({found['cpu_seconds']:.1f} s of one core, {asked.judgments / found['cpu_seconds']:.0f} judgments/s), {found['megabytes']:.0f} MB written, rows {found['rows']}"
    )
    print(
        f"peak resident memory {found['peak_mb']:.0f} MB, of which {found['before_mb']:.0f} MB before the export began"
    )
    if found["peak_mb"] > LIMIT_MB:
        sys.exit(f"more than {LIMIT_MB} MB")


if __name__ == "__main__":
    main()
