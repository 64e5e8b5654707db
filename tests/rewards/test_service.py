"""The scoring service over HTTP: what it answers, and what it refuses and why."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tiny_rewards import smooth_clip, tiny_models

from reelhf.errors import UserError
from reelhf.video import write_video
from rewards.scoring.scorer import Scorer, ScoreSettings
from rewards.scoring.service import Limits, create_app, serve
from rewards.scoring.sources import Item

LOOK = "aesthetic_quality"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    folder = tmp_path_factory.mktemp("rewards")
    model = tiny_models()["aesthetic"]
    model.low.fill_(-1.0)
    model.save(folder / "aesthetic")
    return Scorer(folder, ScoreSettings({}))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    write_video(path, smooth_clip(0, 5, 32), 8.0)
    return path


def post(
    client: TestClient, clip: bytes, *, name: str = "clip.mp4", prompt: str = "a disc", **more
):
    return client.post("/score", files={"clip": (name, clip)}, data={"prompt": prompt}, **more)


def test_health_and_dimensions(scorer: Scorer):
    client = TestClient(create_app(scorer))
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/health").json()["rewards"] == scorer.hash
    described = client.get("/dimensions").json()["dimensions"]
    assert described == {LOOK: {"weight": 1.0, "validated_range": [-1.0, None]}}


def test_an_uploaded_clip_gets_the_score_of_the_file(scorer: Scorer, clip: Path):
    answer = post(TestClient(create_app(scorer)), clip.read_bytes())
    assert answer.status_code == 200
    (row,) = scorer.score_items([Item(clip, "a disc")])
    assert answer.json()["total"] == pytest.approx(row["total"])
    assert answer.json()["dimensions"][LOOK]["value"] == pytest.approx(row["dimensions"][LOOK]["value"])  # fmt: skip


def test_what_is_refused_says_why(scorer: Scorer, clip: Path):
    data = clip.read_bytes()
    client = TestClient(create_app(scorer, Limits(max_megabytes=len(data) / 1e6, max_prompt=20)))
    assert post(client, data).status_code == 200

    def refused(code: int, words: str, *arguments, **options) -> None:
        answer = post(client, *arguments, **options)
        assert answer.status_code == code, answer.text
        assert words in answer.json()["detail"]

    refused(413, "more than", data + b"0" * 100)
    refused(415, "'clip.txt' is no video file; expected .mp4", data, name="clip.txt")
    refused(422, "clip.mp4 cannot be read as a video", b"nothing")
    refused(422, "21 characters; expected 1 to 20", data, prompt="x" * 21)
    refused(422, "expected 1 to 20", data, prompt=" ")
    assert client.post("/score", data={"prompt": "x"}).status_code == 422  # no clip
    small = TestClient(create_app(scorer, Limits(max_frames=4)))
    answer = post(small, data)
    assert (answer.status_code, answer.json()["detail"][:22]) == (413, "5 frames of 32 x 32; a")
    assert "/tmp" not in post(client, b"nothing").text


def test_with_a_token_only_its_bearer_may_score(scorer: Scorer, clip: Path):
    client = TestClient(create_app(scorer, token="secret"))
    data = clip.read_bytes()
    assert post(client, data).status_code == 401
    assert post(client, data, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert post(client, data, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health").status_code == 200


def test_more_requests_than_may_wait_are_sent_away(scorer: Scorer, clip: Path):
    client = TestClient(create_app(scorer, Limits(max_waiting=1)))
    data = clip.read_bytes()
    answers = []

    class Slow:
        """Another request arrives while the first is being scored."""

        def __getattr__(self, name: str):
            return getattr(scorer, name)

        def score_clips(self, clips, prompts):
            if not answers:
                answers.append(None)
                answers[0] = post(client2, data)
            return scorer.score_clips(clips, prompts)

    client2 = TestClient(create_app(Slow(), Limits(max_waiting=1)))
    assert post(client2, data).status_code == 200
    assert answers[0].status_code == 503
    assert post(client, data).status_code == 200


def test_a_taken_port_is_one_line(scorer: Scorer):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1:\d+: .*--port"):
            serve(create_app(scorer), "127.0.0.1", taken.getsockname()[1])
