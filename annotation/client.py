"""An annotator as a program: what a browser does, over the same HTTP endpoints."""

from __future__ import annotations

import secrets
import time
from typing import Any

import httpx

from annotation.records import TaskView, Verdict

RETRIES = 3
"""How often a request whose answer was lost is sent."""
PATIENCE_SECONDS = 60.0
"""How long a database that is away may keep a request waiting; the server says when to ask again."""


class SubmissionRefused(Exception):
    """The server did not store the answer. `problems` says why; `status` is the HTTP code."""

    def __init__(self, status: int, detail: str, problems: list[str]):
        super().__init__(detail)
        self.status = status
        self.problems = problems


class AnnotationClient:
    """Signs in when made. One client per annotator and thread; use it in a `with` block or call `close`."""

    def __init__(self, base_url: str, name: str, password: str, *, timeout: float = 60.0):
        self._http = httpx.Client(base_url=base_url, timeout=timeout, trust_env=False)
        self._keys: dict[str, str] = {}
        answer = self._http.post("/api/login", json={"name": name, "password": password})
        self._raise(answer)
        self._http.headers["X-CSRF-Token"] = answer.headers["X-CSRF-Token"]

    def claim(self) -> TaskView | None:
        """The next task, or the one already held; None when nothing is open."""
        raw = self._post("/api/claim", {})["task"]
        return None if raw is None else TaskView.from_json(raw)

    def media(self, url: str) -> bytes:
        """The bytes of a clip or first frame as an annotator's browser would get them."""
        answer = self._http.get(url)
        self._raise(answer)
        return answer.content

    def submit(self, task: TaskView, verdict: Verdict) -> int:
        """Stores the verdict once, however often the network makes us repeat it. Returns the judgment id.

        Raises: SubmissionRefused if the answers break a rule or the task was judged already.
        """
        key = self._keys.setdefault(task.presentation, secrets.token_urlsafe(18))
        body = {
            "presentation": task.presentation,
            "idempotency_key": key,
            "verdict": verdict.to_json(),
        }
        judgment_id = int(self._post("/api/submit", body)["judgment_id"])
        self._keys.pop(task.presentation, None)
        return judgment_id

    def skip(self, task: TaskView, reason: str, note: str = "") -> None:
        self._post("/api/skip", {"presentation": task.presentation, "reason": reason, "note": note})

    def progress(self) -> dict[str, Any]:
        """`judged`, `wanted`, `seconds_per_task`, `eta_seconds`."""
        answer = self._http.get("/api/progress")
        self._raise(answer)
        return dict(answer.json())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> AnnotationClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE_SECONDS
        while (answer := self._sent(path, body)).status_code in (503, 507):
            if time.monotonic() > until:
                break
            time.sleep(float(answer.headers.get("Retry-After", 1)))
        self._raise(answer)
        return dict(answer.json())

    def _sent(self, path: str, body: dict[str, Any]) -> httpx.Response:
        for _ in range(RETRIES - 1):
            try:
                return self._http.post(path, json=body)
            except httpx.TransportError:
                continue
        return self._http.post(path, json=body)

    @staticmethod
    def _raise(answer: httpx.Response) -> None:
        if answer.status_code in (400, 401, 403, 404, 409, 422, 429):
            try:
                raw = answer.json()
            except ValueError:
                raw = {"detail": answer.text}
            raise SubmissionRefused(
                answer.status_code, str(raw.get("detail")), list(raw.get("problems", ()))
            )
        answer.raise_for_status()
