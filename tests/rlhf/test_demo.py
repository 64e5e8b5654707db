"""The demo's own parts: checks before any work, a person as the annotator, the project kept for judging."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import httpx
import pytest

from annotation.client import AnnotationClient
from annotation.records import Choice, Verdict
from annotation.store import Store
from generator.toyworld import render, scene_from_caption
from reelhf.errors import UserError
from reelhf.video import write_video
from rlhf.demo import (
    DemoOptions,
    check_first,
    command_line,
    human_judge,
    keep_other_project,
    print_tunnel,
)
from rlhf.judging import HUMAN, PROJECT, JudgingConfig
from rlhf.stages import Stage, StageRunner
from rlhf.world import PromptsConfig, toy_world


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_page(port: int) -> str:
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            if httpx.get(f"{url}/healthz", trust_env=False).status_code == 200:
                return url
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("the page did not open")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "smok"}, "Did you mean 'smoke'"),
        ({"annotator": "humn"}, "Did you mean 'human'"),
        ({"top_up": True}, "needs --annotator human"),
        ({"annotator": "human", "serve": False}, "leave out --no-serve"),
    ],
)
def test_contradictions_are_found_before_any_work(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        check_first(DemoOptions(out=tmp_path / "demo", **options))
    assert not (tmp_path / "demo").exists()


def test_simulated_votes_cannot_top_up_real_clips(tmp_path):
    options = DemoOptions(annotator="human", top_up=True, clips=tmp_path, out=tmp_path / "demo")
    with pytest.raises(UserError, match="real clips have none"):
        check_first(options)


def test_the_command_line_can_be_typed_again(tmp_path):
    options = DemoOptions(preset="smoke", clips=tmp_path / "my clips", overrides=("seed=3",))
    assert command_line(options).startswith("reelhf demo seed=3 --preset smoke --clips '")


def test_over_ssh_the_tunnel_line_names_both_ports(monkeypatch, capsys):
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    print_tunnel([7860, 7861])
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.5 50000 10.0.0.9 22")
    monkeypatch.setenv("USER", "ada")
    print_tunnel([7860, 7861])
    assert (
        "ssh -L 7860:127.0.0.1:7860 -L 7861:127.0.0.1:7861 ada@10.0.0.9" in capsys.readouterr().out
    )


def test_a_project_of_other_clips_is_moved_aside_never_overwritten(tmp_path):
    folder = tmp_path / "project"
    keep_other_project(folder, "one")
    (folder / "votes").write_text("mine")
    keep_other_project(folder, "one")
    assert (folder / "votes").exists()
    keep_other_project(folder, "two")
    assert not (folder / "votes").exists()
    assert (tmp_path / "project.1" / "votes").read_text() == "mine"


def test_a_person_judges_at_the_page_and_the_loop_gets_a_stage(tmp_path, monkeypatch):
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    world = toy_world(PromptsConfig(feedback=3, held_out=2, training=3, validation=1, test=2))
    folder = tmp_path / "candidates"
    rows = []
    for task, prompt in enumerate([*world.prompts.feedback, *world.prompts.held_out]):
        scene = scene_from_caption(prompt)
        assert scene is not None
        for slot in range(4):
            frames = render(scene, num_frames=5, size=32, fps=8, seed=slot) * (1 - 0.2 * slot)
            write_video(folder / f"{task}_{slot}.mp4", frames, 8.0)
            row = {"prompt": prompt, "task": task, "stage": "base", "seed": slot, "model": "toy"}
            rows.append(row | {"path": f"{task}_{slot}.mp4", "checkpoint": "abc", "fps": 8.0})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = DemoOptions(annotator="human", port=free_port(), out=tmp_path / "demo")
    config = SimpleNamespace(judging=JudgingConfig(human_tasks=3))
    stage = Stage("candidates", "key", folder, folder, 1.0, 0)

    def person() -> None:
        database = options.out / "project" / PROJECT
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if (database / "annotation.db").exists():
                with Store.open(database) as store:
                    if store.find_user(HUMAN) is not None and store.counts()["tasks"] == 3:
                        store.set_password(HUMAN, "a long password")
                        break
            time.sleep(0.2)
        with AnnotationClient(wait_for_page(options.port), HUMAN, "a long password") as client:
            while (task := client.claim()) is not None:
                client.submit(task, Verdict(tuple(Choice(d, 0, 3) for d in task.dimensions)))

    judging = threading.Thread(target=person)
    judging.start()
    runner = StageRunner(tmp_path / "cache", echo=lambda line: None)
    with ExitStack() as pages:
        result = human_judge(options, config, world, pages)(runner, "", stage)  # type: ignore[arg-type]
    judging.join()
    assert runner.stages["annotation"] is result
    summary = json.loads((result.path / "judging.json").read_text())
    assert summary["counts"]["human_judgments"] == 3
    assert summary["counts"]["simulated_judgments"] == 0
