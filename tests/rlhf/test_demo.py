"""The demo's own parts: the words it refuses, a person as the annotator, the project kept for judging."""

from __future__ import annotations

import _thread
import queue
import socket
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import httpx
import pytest
from rendered_candidates import write_candidates

from annotation.records import read_preferences
from reelhf.errors import UserError
from rewards.train import RewardTrainConfig, train_rewards
from rlhf import human_judging
from rlhf.demo import human
from rlhf.demo.human import human_judge, own_folder
from rlhf.demo.options import DemoOptions
from rlhf.demo.printing import print_tunnel
from rlhf.judging import PREFERENCES, JudgingConfig, read_groups
from rlhf.stages import Stage, StageRunner
from rlhf.world import PromptsConfig, toy_world
from tests.rewards.tiny_rewards import tiny_models

WORLD = toy_world(PromptsConfig(feedback=3, held_out=2, training=3, validation=1, test=2))


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
        DemoOptions(out=tmp_path / "demo", **options)


def test_simulated_votes_cannot_top_up_real_clips(tmp_path):
    with pytest.raises(UserError, match="real clips have none"):
        DemoOptions(annotator="human", top_up=True, clips=tmp_path, out=tmp_path / "demo")


def test_the_command_line_can_be_typed_again(tmp_path):
    options = DemoOptions(preset="smoke", clips=tmp_path / "my clips", overrides=("seed=3",))
    assert options.command_line.startswith("reelhf demo seed=3 --preset smoke --clips '")


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


def test_a_project_of_other_clips_is_moved_aside_and_comes_back_with_its_clips(tmp_path):
    folder = own_folder(tmp_path / "project", "one")
    (folder / "votes").write_text("mine")
    assert (own_folder(folder, "one") / "votes").exists()
    assert not (own_folder(folder, "two") / "votes").exists()
    assert (tmp_path / "project.1" / "votes").read_text() == "mine"
    assert (own_folder(folder, "one") / "votes").read_text() == "mine"


class Browser(threading.Thread):
    """A person at the page: opens the printed link and judges task after task over HTTP, as the page's script does.

    Args:
        turns: how many tasks they judge at each link they are given.
        leave: after those of the first link, Ctrl-C in the terminal.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *turns: int, leave: bool = False):
        super().__init__(daemon=True)
        self.turns, self.leave, self.judged = turns, leave, []
        self.links: queue.Queue[str] = queue.Queue()
        monkeypatch.setattr(human, "print_turn", lambda _number, link: self.links.put(link))
        self.start()

    def run(self) -> None:
        for count in self.turns:
            link = httpx.URL(self.links.get(timeout=120))
            with httpx.Client(
                base_url=link.copy_with(path="/"), trust_env=False, timeout=60
            ) as page:
                page.get(link.path)
                page.headers["X-CSRF-Token"] = page.get("/api/me").json()["csrf"]
                for _ in range(count):
                    self.judge(page)
            if self.leave:
                _thread.interrupt_main()

    def judge(self, page: httpx.Client) -> None:
        task = page.post("/api/claim", json={}).json()["task"]
        for clip in task["clips"]:
            assert page.get(clip["url"]).headers["content-type"] == "video/mp4"
        length = task["num_frames"] / task["fps"]
        choices = [{"dimension": d, "best": 0, "worst": 3} for d in task["dimensions"]]
        body = {
            "presentation": task["presentation"],
            "idempotency_key": f"key-{task['presentation']}",
            "verdict": {"choices": choices, "watched_seconds": [length] * len(task["clips"])},
        }
        time.sleep(length / 2)  # at twice the speed, the clips have been seen by then
        self.judged.append(page.post("/api/submit", json=body).raise_for_status().json())


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """What the loop hands to its judge: `run(suffix)` judges the candidates of one round."""
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.setattr("rlhf.human_judging._POLL_SECONDS", 0.05)
    asked, deadline = human_judging.answered, time.monotonic() + 120

    def answered(*args):
        assert time.monotonic() < deadline, "nobody judges: the browser's thread failed"
        return asked(*args)

    monkeypatch.setattr(human_judging, "answered", answered)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = DemoOptions(annotator="human", port=port, out=tmp_path / "demo")
    config = SimpleNamespace(judging=JudgingConfig(human_tasks=3))
    folder = write_candidates(
        tmp_path / "candidates", [*WORLD.prompts.feedback, *WORLD.prompts.held_out]
    )
    runner = StageRunner(tmp_path / "cache", echo=lambda line: None)

    def run(*suffixes: str) -> list[Stage]:
        with ExitStack() as pages:
            judge = human_judge(options, config, WORLD, pages)  # type: ignore[arg-type]
            return [
                judge(runner, suffix, Stage("candidates", f"key{suffix}", folder, folder, 1.0, 0))
                for suffix in suffixes
            ]

    return SimpleNamespace(run=run, runner=runner, options=options)


def train_on(runner: StageRunner, judging: Stage, backbones, who: str) -> Stage:
    """The stage after judging, as a round runs it."""
    groups = read_groups(judging.path)
    return runner.run(
        who,
        lambda out: train_rewards(
            RewardTrainConfig(epochs=1),
            judging.path / PREFERENCES,
            backbones,
            out,
            annotators=getattr(groups, f"{who}_annotators"),
            prompt_ids=getattr(groups, f"{who}_prompt_ids"),
            splits=None,
        ),
        inputs={"judging": judging},
        source="rewards.train",
    )


def test_what_a_person_judged_at_the_page_teaches_the_rewards(loop, tmp_path, monkeypatch):
    from rewards import load_reward

    browser = Browser(monkeypatch, 3)
    (judging,) = loop.run("")
    browser.join()
    assert loop.runner.stages["annotation"] is judging
    data = read_preferences(judging.path / PREFERENCES)
    assert len({row["task_id"] for row in data.judgments}) == 3
    assert not any(row["simulated"] for row in data.judgments)

    for name, model in tiny_models().items():
        model.save(tmp_path / "backbones" / name)
    trained = train_on(loop.runner, judging, tmp_path / "backbones", "feedback")
    train_on(loop.runner, judging, tmp_path / "backbones", "held_out")
    assert load_reward(trained.path / "motion").dimensions == ("motion_quality",)

    (again,) = loop.run("")
    assert again.key == judging.key, "nothing is asked twice"
    assert train_on(loop.runner, again, tmp_path / "backbones", "feedback").cached


def test_a_person_who_stops_in_the_middle_goes_on_there(loop, monkeypatch):
    first = Browser(monkeypatch, 1, leave=True)
    with pytest.raises(KeyboardInterrupt):
        loop.run("")
    first.join()
    second = Browser(monkeypatch, 2)
    (judging,) = loop.run("")
    second.join()
    stored = [one["judgment_id"] for one in first.judged + second.judged]
    assert len(set(stored)) == 3
    data = read_preferences(judging.path / PREFERENCES)
    assert len({row["task_id"] for row in data.judgments}) == 3
    assert not list(loop.options.out.glob("project.*")), "the project was not begun afresh"


def test_a_second_round_asks_at_the_same_address(loop, monkeypatch):
    browser = Browser(monkeypatch, 3, 3)
    judged = loop.run("", "_round2")
    browser.join()
    assert len(browser.judged) == 6
    assert [stage.path.name for stage in judged] == ["project", "project_round2"]
