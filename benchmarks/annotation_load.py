"""How many people can label at once: the real server under simulated annotators, on SQLite or PostgreSQL.

    python -m benchmarks.annotation_load --database sqlite   --minutes 5 --repeats 3
    python -m benchmarks.annotation_load --database postgres --minutes 5 --repeats 3

Each repeat measures the quiet machine first (CPU, fsync, an idle request), then three stages against `reelhf annotate serve`, each on
the same project:

1. steady: 200 annotators, one judgment per 20 s each. A judgment is claim, progress, four clips by Range, two drafts, a heartbeat and a submit.
2. burst: requests at a fixed rate (150 per second on PostgreSQL, 60 on SQLite) for 30 s: a third claims, a third submits, and a third clips,
   drafts and heartbeats.
3. knee: the same mix, faster by a quarter every 10 s, until the p95 passes 100 ms or requests are left over.

The loop is open: every request has an intended moment, and its latency counts from there, so a slow server cannot hide by slowing its
clients. Client and server share the machine's cores. Afterwards the database is searched for judgments that were confirmed and are
not there, that are there twice, and for tasks that got more counted judgments than they wanted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch

from annotation import schema as t
from annotation.api.sessions import COOKIE
from annotation.place import Place, write_place
from annotation.presentation import PresentationConfig
from annotation.records import ClipRecord
from annotation.store import Store
from reelhf.video import write_video
from tests.postgres_cluster import Cluster

ANNOTATORS = 200
SECONDS_PER_JUDGMENT = 20.0
NEED = 2
PROMPTS, CLIPS = 6, 4
BURST_RATE = {"postgres": 150.0, "sqlite": 60.0}
REQUESTS_PER_TURN = 1.5
"""Of the burst: every other turn is a claim alone, the rest are two requests."""
KNEE_STEP_SECONDS, KNEE_FACTOR, KNEE_P95 = 10.0, 1.25, 0.100
MAX_KNEE_RATE = 1000.0
SETTLE_SECONDS = 3.0


# --- the project -----------------------------------------------------------------------------------


def make_project(folder: Path, url: str | None, tasks: int) -> list[tuple[str, str]]:
    """A project of `tasks` tasks of four moving clips. Returns the cookie and CSRF token of each signed-in annotator."""
    if url is not None:
        write_place(folder, Place(database=url))
    with Store.open(folder) as store:
        clips = []
        for prompt in range(PROMPTS):
            for clip in range(CLIPS):
                path = folder / f"source-{prompt}-{clip}.mp4"
                noise = torch.rand(3, 1, 256, 256, generator=torch.Generator().manual_seed(clip))
                frames = noise.expand(-1, 24, -1, -1).clone()
                for frame in range(24):
                    frames[:, frame, 100:140, 4 * frame : 4 * frame + 40] = 0.9
                write_video(path, frames, 12.0)
                clips.append(ClipRecord(path, f"Prompt {prompt}", f"model-{clip}", "base"))
        ids = store.add_clips(clips)
        groups = [ids[CLIPS * p : CLIPS * p + CLIPS] for p in range(PROMPTS)]
        store.create_tasks(
            [groups[i % PROMPTS] for i in range(tasks)],
            need=NEED,
            presentation=PresentationConfig(min_side=256),
        )
        return _sign_everyone_in(store)


def _sign_everyone_in(store: Store) -> list[tuple[str, str]]:
    """Accounts and sessions straight into the tables: 200 password hashes are not what is measured."""
    now, signed_in = store.now_ms(), []
    with store.write() as connection:
        for number in range(ANNOTATORS):
            account = connection.execute(
                sa.insert(t.account).values(
                    name=f"load{number}",
                    password_hash="none",
                    role="annotator",
                    pseudonym=f"annotator-load{number}",
                    simulated=True,
                    created_ms=now,
                )
            ).inserted_primary_key
            assert account is not None
            cookie, csrf = secrets.token_urlsafe(32), secrets.token_urlsafe(24)
            connection.execute(
                sa.insert(t.session).values(
                    token_hash=hashlib.sha256(cookie.encode()).hexdigest(),
                    account_id=account[0],
                    csrf=csrf,
                    expires_ms=now + 12 * 3_600_000,
                )
            )
            signed_in.append((cookie, csrf))
    return signed_in


@contextlib.contextmanager
def served(folder: Path, workers: int) -> Iterator[tuple[int, int]]:
    """`reelhf annotate serve` as people start it; yields its port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "reelhf", "annotate", "serve", str(folder), "--port", str(port)]
    log = folder / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*line, "--workers", str(workers)], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), 1) as s,
            ):
                s.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if s.recv(20).startswith(b"HTTP/1.1 200"):
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text()}")
            time.sleep(0.2)
        time.sleep(SETTLE_SECONDS)
        yield port, server.pid
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()


# --- the client ------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What one stage saw: latencies in seconds by kind of request, and answers that were not 2xx."""

    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: Counter[str] = field(default_factory=Counter)
    sums: list[float] = field(default_factory=list)
    """Claim plus submit of each judgment."""


class Annotator:
    """One signed-in browser on one kept-alive connection; requests of one annotator follow each other."""

    def __init__(self, port: int, cookie: str, csrf: str):
        self._port = port
        self._head = f"Host: 127.0.0.1\r\nCookie: {COOKIE}={cookie}\r\nX-CSRF-Token: {csrf}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._turn = asyncio.Lock()
        self.task: dict[str, Any] | None = None
        self.claim_latency = 0.0
        self.receipts: dict[str, int] = {}

    async def request(
        self,
        stage: Stage,
        kind: str,
        at: float,
        method: str,
        path: str,
        body: object = None,
        extra: str = "",
    ) -> bytes | None:
        """Sends one request when its turn has come; its latency counts from `at`. None if it failed."""
        async with self._turn:
            payload = b"" if body is None else json.dumps(body).encode()
            head = f"{method} {path} HTTP/1.1\r\n{self._head}{extra}Content-Length: {len(payload)}\r\n\r\n"
            try:
                status, answer = await self._exchange(head.encode() + payload)
            except (OSError, asyncio.IncompleteReadError):
                self._streams = None
                stage.failures[f"{kind}: connection lost"] += 1
                return None
        stage.latencies[kind].append(time.perf_counter() - at)
        if status not in (200, 206):
            stage.failures[f"{kind}: {status}"] += 1
            return None
        return answer

    async def _exchange(self, data: bytes) -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            if line[:15].lower() == b"content-length:":
                length = int(line[15:])
        return int(head[9:12]), await reader.readexactly(length)

    async def claim(self, stage: Stage, at: float) -> None:
        answer = await self.request(stage, "claim", at, "POST", "/api/claim", {})
        self.claim_latency = time.perf_counter() - at
        self.task = None if answer is None else json.loads(answer)["task"]
        if answer is not None and self.task is None:
            stage.failures["claim: nothing open"] += 1

    async def submit(self, stage: Stage, at: float) -> None:
        assert self.task is not None
        key = secrets.token_urlsafe(18)
        choices = [{"dimension": name, "best": 0, "worst": 1} for name in self.task["dimensions"]]
        body = {
            "presentation": self.task["presentation"],
            "idempotency_key": key,
            "verdict": {"choices": choices, "seconds": 12.5},
        }
        answer = await self.request(stage, "submit", at, "POST", "/api/submit", body)
        if answer is not None:
            self.receipts[key] = json.loads(answer)["judgment_id"]
            stage.sums.append(self.claim_latency + time.perf_counter() - at)
        self.task = None

    async def progress(self, stage: Stage, at: float) -> None:
        await self.request(stage, "progress", at, "GET", "/api/progress")

    async def draft(self, stage: Stage, at: float) -> None:
        assert self.task is not None
        body = {"presentation": self.task["presentation"], "draft": '{"answers": []}' * 20}
        await self.request(stage, "draft", at, "POST", "/api/draft", body)

    async def heartbeat(self, stage: Stage, at: float) -> None:
        assert self.task is not None
        body = {"presentation": self.task["presentation"]}
        await self.request(stage, "heartbeat", at, "POST", "/api/heartbeat", body)

    async def media(self, stage: Stage, at: float, number: int) -> None:
        assert self.task is not None
        url = self.task["clips"][number]["url"]
        await self.request(stage, "media", at, "GET", url, extra="Range: bytes=0-\r\n")


async def steady(crowd: list[Annotator], seconds: float) -> Stage:
    """Everyone judges one task per 20 s, evenly spread; stops after the last full judgment."""
    stage, begin = Stage(), time.perf_counter() + 0.5

    async def work(index: int, one: Annotator) -> None:
        start = begin + SECONDS_PER_JUDGMENT * index / len(crowd)
        for number in range(max(1, int(seconds / SECONDS_PER_JUDGMENT))):
            intended = start + number * SECONDS_PER_JUDGMENT
            await _until(intended)
            await one.claim(stage, intended)
            if one.task is None:
                continue
            await one.progress(stage, time.perf_counter())
            for clip in range(CLIPS):
                await one.media(stage, time.perf_counter(), clip)
            for share, act in (
                (0.3, one.draft),
                (0.5, one.heartbeat),
                (0.7, one.draft),
                (0.9, one.submit),
            ):
                await _until(moment := intended + share * SECONDS_PER_JUDGMENT)
                await act(stage, moment)

    await asyncio.gather(*(work(index, one) for index, one in enumerate(crowd)))
    return stage


async def rate(crowd: list[Annotator], per_second: float, seconds: float) -> Stage:
    """Requests at a fixed rate, each annotator in turn: a claim, then a submit with a clip, draft or heartbeat before it."""
    stage, begin, running = Stage(), time.perf_counter() + 0.2, set()
    per_second /= REQUESTS_PER_TURN

    async def turn(one: Annotator, number: int, intended: float, busy: asyncio.Lock) -> None:
        async with busy:
            if one.task is None:
                await one.claim(stage, intended)
                return
            now = time.perf_counter()
            beside = number // len(crowd) // 2 + number
            if beside % 3 == 0:
                await one.media(stage, now, number % CLIPS)
            else:
                await (one.draft if beside % 3 == 1 else one.heartbeat)(stage, now)
            waited = time.perf_counter() - now
            await one.submit(stage, intended + waited)

    locks = [asyncio.Lock() for _ in crowd]
    for number in range(int(per_second * seconds)):
        intended = begin + number / per_second
        await _until(intended)
        who = number % len(crowd)
        task = asyncio.create_task(turn(crowd[who], number, intended, locks[who]))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return stage


async def _until(moment: float) -> None:
    wait = moment - time.perf_counter()
    if wait > 0:
        await asyncio.sleep(wait)


# --- figures ---------------------------------------------------------------------------------------


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not pass; NaN of none."""
    if not values:
        return float("nan")
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, -(-int(share * 1000) * len(ranked) // 1000) - 1))]


def summary(stage: Stage) -> dict:
    """Milliseconds by kind of request; `hot` is claims and submits together."""
    hot = stage.latencies["claim"] + stage.latencies["submit"]
    groups = {"hot": hot, "claim_plus_submit": stage.sums, **stage.latencies}
    rows = {
        name: {
            "n": len(values),
            "p50": round(1000 * percentile(values, 0.5), 1),
            "p95": round(1000 * percentile(values, 0.95), 1),
            "p99": round(1000 * percentile(values, 0.99), 1),
            "max": round(1000 * max(values, default=float("nan")), 1),
        }
        for name, values in groups.items()
    }
    return {"ms": rows, "failures": dict(stage.failures)}


def baseline(folder: Path, port: int) -> dict:
    """What this machine does while nobody labels."""
    started = time.perf_counter()
    digest = b""
    for _ in range(400_000):
        digest = hashlib.sha256(digest).digest()
    cpu = time.perf_counter() - started
    syncs = []
    for number in range(30):
        with (folder / "probe").open("wb") as file:
            begin = time.perf_counter()
            file.write(bytes([number]) * 4096)
            file.flush()
            os.fsync(file.fileno())
            syncs.append(time.perf_counter() - begin)
    idle = []
    with socket.create_connection(("127.0.0.1", port)) as s:
        for _ in range(50):
            begin = time.perf_counter()
            s.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            s.recv(4096)
            idle.append(time.perf_counter() - begin)
    return {
        "cpu_400k_sha256_s": round(cpu, 3),
        "fsync_p50_ms": round(1000 * statistics.median(syncs), 2),
        "healthz_p50_ms": round(1000 * statistics.median(idle), 2),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def cpu_seconds(pid: int) -> float:
    """Of a server and its worker processes, those that have ended too, user and system."""
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, parts[11:15])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(cpu_seconds(int(child)) for child in children)


def audit(folder: Path, crowd: list[Annotator]) -> dict[str, int]:
    """Searches the database for what must not be."""
    receipts = {key: number for one in crowd for key, number in one.receipts.items()}
    with Store.open(folder) as store, store.read() as connection:
        found = connection.execute(sa.select(t.judgment.c.idempotency_key, t.judgment.c.id))
        stored = {row.idempotency_key: row.id for row in found}
        pairs = Counter(
            tuple(row)
            for row in connection.execute(sa.select(t.judgment.c.task_id, t.judgment.c.account_id))
        )
        counted = Counter(
            connection.execute(
                sa.select(t.judgment.c.task_id).where(~t.judgment.c.surplus)
            ).scalars()
        )
        tasks = connection.execute(
            sa.select(t.task.c.id, t.task.c.need_n, t.task.c.num_judgments)
        ).all()
        surplus = sum(connection.execute(sa.select(t.judgment.c.surplus)).scalars())
    return {
        "confirmed": len(receipts),
        "stored": len(stored),
        "lost": sum(stored.get(key) != number for key, number in receipts.items()),
        "duplicated": sum(n - 1 for n in pairs.values()) + len(stored) - len(set(stored.values())),
        "over_overlap": sum(counted[row.id] > row.need_n for row in tasks),
        "miscounted": sum(counted[row.id] != row.num_judgments for row in tasks),
        "surplus": surplus,
    }


def spent(server: int, database: int | None) -> dict[str, float]:
    """CPU seconds so far of the server, the database server and this client."""
    found = {"server": cpu_seconds(server), "client": time.process_time()}
    return found if database is None else {**found, "database": cpu_seconds(database)}


@contextlib.contextmanager
def cores(server: int, database: int | None) -> Iterator[dict[str, float]]:
    """Cores that each of the three used on average; filled in at the end."""
    found: dict[str, float] = {}
    before, begin = spent(server, database), time.perf_counter()
    yield found
    seconds = time.perf_counter() - begin
    for name, value in spent(server, database).items():
        found[name] = round((value - before[name]) / seconds, 2)


async def measure(
    options: argparse.Namespace,
    folder: Path,
    signed_in: list[tuple[str, str]],
    database: int | None = None,
) -> dict:
    """One repeat against one server. `database` is the process id of the database server, if there is one."""
    with served(folder, options.workers) as (port, pid):
        result: dict = {"baseline": baseline(folder, port)}
        print("  baseline", json.dumps(result["baseline"]), flush=True)
        crowd = [Annotator(port, cookie, csrf) for cookie, csrf in signed_in]
        if "steady" in options.stages:
            with cores(pid, database) as used:
                result["steady"] = summary(await steady(crowd, options.minutes * 60))
            result["steady"]["cores"] = used
            show("steady", result["steady"])
        if "burst" in options.stages:
            per_second = options.rate or BURST_RATE[options.database]
            with cores(pid, database) as used:
                result["burst"] = summary(await rate(crowd, per_second, options.burst_seconds))
            result["burst"] |= {"rate": per_second, "cores": used}
            show(f"burst at {per_second:.0f}/s", result["burst"])
        if "knee" in options.stages:
            result["knee"] = await knee(crowd, options.rate or BURST_RATE[options.database])
        result["audit"] = audit(folder, crowd)
        print("  audit", json.dumps(result["audit"]), flush=True)
    return result


async def knee(crowd: list[Annotator], first: float) -> dict:
    """The fastest rate whose p95 stays under 100 ms with nothing failing, and the first that does not."""
    good, per_second, steps = 0.0, first, []
    while per_second <= MAX_KNEE_RATE:
        begin = time.perf_counter()
        stage = await rate(crowd, per_second, KNEE_STEP_SECONDS)
        done = sum(map(len, stage.latencies.values()))
        achieved = done / (time.perf_counter() - begin)
        p95 = percentile(stage.latencies["claim"] + stage.latencies["submit"], 0.95)
        steps.append(
            {"asked": round(per_second), "done": round(achieved), "p95_ms": round(1000 * p95, 1)}
        )
        print("  knee", json.dumps(steps[-1]), dict(stage.failures), flush=True)
        if p95 > KNEE_P95 or stage.failures:
            break
        good, per_second = per_second, per_second * KNEE_FACTOR
    return {"good": round(good), "steps": steps}


def show(name: str, found: dict) -> None:
    used = ", ".join(f"{who} {value}" for who, value in found["cores"].items())
    print(f"  {name}: cores used: {used}; failures {found['failures'] or 0}")
    for kind, row in found["ms"].items():
        print(
            f"    {kind:<18}" + "  ".join(f"{key} {value}" for key, value in row.items()),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--database", choices=sorted(BURST_RATE), default="sqlite")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the steady stage")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="server processes")
    parser.add_argument("--stages", nargs="*", default=["steady", "burst", "knee"])
    parser.add_argument("--burst-seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, help="of the burst, requests per second of all kinds")
    parser.add_argument("--tasks", type=int, help="[default: what the stages can use up]")
    parser.add_argument("--out", type=Path, help="write all figures here as JSON")
    options = parser.parse_args()
    per_second = options.rate or BURST_RATE[options.database]
    judgments = ANNOTATORS * options.minutes * 3 + per_second / 3 * options.burst_seconds
    judgments += MAX_KNEE_RATE / 3 * KNEE_STEP_SECONDS * 4 if "knee" in options.stages else 0
    tasks = options.tasks or int(judgments / NEED) + 2 * ANNOTATORS
    results = []
    with contextlib.ExitStack() as stack:
        cluster = None
        if options.database == "postgres":
            cluster = Cluster(durable=True)
            stack.callback(cluster.stop)
        for repeat in range(options.repeats):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reelhf-load-")))
            print(
                f"{options.database}, repeat {repeat + 1} of {options.repeats}: {tasks} tasks",
                flush=True,
            )
            url, database = (cluster.new_database(), cluster.pid()) if cluster else (None, None)
            signed_in = make_project(folder, url, tasks)
            results.append(asyncio.run(measure(options, folder, signed_in, database)))
    if options.out:
        options.out.write_text(json.dumps(results, indent=2))
        print(f"figures: {options.out}")
    wrong = [
        r["audit"]
        for r in results
        if any(r["audit"][k] for k in ("lost", "duplicated", "over_overlap", "miscounted"))
    ]
    if wrong:
        sys.exit(f"the database is wrong: {wrong}")


if __name__ == "__main__":
    main()
