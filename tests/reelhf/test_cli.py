"""The front door: help, one-line errors with exit code 2, tracebacks on request, our own packages only."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import typer

from reelhf import cli
from reelhf.cli_config import config_command
from reelhf.config import Config
from reelhf.errors import UserError


class TrainConfig(Config):
    num_steps: int = 3
    """Steps."""


def train(config, *, clips, vae, out):
    if clips.name == "broken":
        raise UserError("clips are broken; mend them.")
    return f"{out}/{config.num_steps}-{clips}-{vae}"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run one command line against a small app under the verb `toy`; returns exit code, stdout, stderr."""
    app = typer.Typer()

    @app.command()
    def crash():
        raise RuntimeError("a bug of ours")

    @app.command()
    def needs():
        import not_there_at_all  # noqa: F401

    config_command(
        app,
        "train",
        f"{__name__}:TrainConfig",
        f"{__name__}:train",
        help="Train a toy.",
        paths={"clips": "folder of clips", "vae?": "VAE folder"},
        next_step="reelhf toy use {out}",
    )
    monkeypatch.setitem(
        sys.modules, __name__, sys.modules.get(__name__) or types.ModuleType(__name__)
    )
    vars(sys.modules[__name__]).update(TrainConfig=TrainConfig, train=train, app=app)
    monkeypatch.setitem(cli.VERBS, "toy", cli.Verb(f"{__name__}:app", "a toy"))

    def run(*words):
        try:
            cli.main(words)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(run, words):
    code, out, _ = run(*words)
    assert code == 0
    for verb in cli.VERBS:
        assert f"\n  {verb} " in out


def test_version(run):
    assert run("--version")[1].startswith("reelhf 0.")


def test_a_config_command_runs_its_function_and_says_what_is_next(run):
    code, out, _ = run("toy", "train", "num_steps=7", "--clips", "a", "--out", "o")
    assert code == 0
    assert out == "written to o/7-a-None\nnext: reelhf toy use o/7-a-None\n"


def test_a_config_command_reads_a_file_and_dry_run_stops_before_the_work(run, tmp_path):
    (tmp_path / "toy.yaml").write_text("num_steps: 5")
    code, out, _ = run("toy", "train", str(tmp_path / "toy.yaml"), "--dry-run")
    assert (code, out) == (0, "num_steps: 5\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tyo"], "no verb 'tyo'. Did you mean 'toy'?"),
        (["toy", "trian"], "No such command 'trian'"),
        (["toy", "train", "--clps", "x"], "No such option"),
        (
            ["toy", "train", "num_stps=1"],
            "unknown key 'num_stps' (value 1). Did you mean 'num_steps'?",
        ),
        (["toy", "train", "gone.yaml"], "no config file at gone.yaml"),
        (["toy", "train"], "missing --out, --clips"),
        (["toy", "train", "--clips", "broken", "--out", "o"], "clips are broken; mend them."),
        (["toy", "needs"], "the package 'not_there_at_all' is not installed"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, words, message):
    code, out, err = run(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(run):
    with pytest.raises(UserError, match="clips are broken"):
        run("toy", "train", "--clips", "broken", "--out", "o", "--debug")


def test_a_bug_keeps_its_traceback(run):
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run("toy", "crash")


def test_only_rank_0_says_what_is_wrong(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("toy", "train") == (2, "", "")


def test_every_verb_answers_help(run):
    for verb in cli.VERBS:
        code, out, err = run(verb, "--help")
        assert code == 0, err
        assert f"reelhf {verb}" in out


def test_packages_of_that_name_from_elsewhere_are_refused(tmp_path, monkeypatch):
    cli.check_packages()
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    with pytest.raises(UserError) as error:
        cli.check_packages()
    assert str(tmp_path / "rewards" / "__init__.py") in str(error.value)
    assert str(Path(cli.__file__).parent.parent / "rewards" / "__init__.py") in str(error.value)
