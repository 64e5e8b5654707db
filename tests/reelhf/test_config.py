"""Configs: what is read, what is refused, and the words of each refusal."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, ValidationError, model_validator

from reelhf.config import Config, find_config, load_config, packaged_configs, to_yaml
from reelhf.errors import UserError, did_you_mean


class SamplerConfig(Config):
    num_steps: PositiveInt = 10
    """Denoiser calls per clip."""
    kind: Literal["euler", "renoise"] = "euler"


class RewardConfig(Config):
    name: str
    weight: float = 1.0


class RunConfig(Config):
    seed: int = 0
    lr: float = Field(1e-3, gt=0)
    sampler: SamplerConfig = SamplerConfig()
    refiner: SamplerConfig | None = None
    rewards: list[RewardConfig] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.seed == 13:
            raise ValueError("seed 13 is unlucky; choose another")
        return self


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_then_overrides(tmp_path):
    path = write(
        tmp_path, "lr: 2e-4\nsampler: {num_steps: 4}\nrewards: [{name: motion}, {name: look}]"
    )
    config = load_config(
        RunConfig, path, ["sampler.kind=renoise", "rewards.1.weight=0.5", "seed=7"]
    )
    assert config.lr == 2e-4
    assert config.sampler == SamplerConfig(num_steps=4, kind="renoise")
    assert [reward.weight for reward in config.rewards] == [1.0, 0.5]
    assert config.seed == 7


def test_an_override_may_open_a_section_the_file_does_not_have():
    config = load_config(RunConfig, None, ["refiner.num_steps=2", "sampler.num_steps=1e1"])
    assert config.refiner == SamplerConfig(num_steps=2)
    assert config.sampler.num_steps == 10


@given(
    seed=st.integers(14, 10**9),
    lr=st.floats(1e-12, 1e3),
    steps=st.integers(1, 99),
    names=st.lists(st.text("abc 模型:#'\"\n", max_size=9), max_size=3),
)
def test_yaml_round_trip_gives_an_equal_config(tmp_path_factory, seed, lr, steps, names):
    config = RunConfig(
        seed=seed,
        lr=lr,
        sampler=SamplerConfig(num_steps=steps),
        rewards=[RewardConfig(name=name) for name in names],
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(RunConfig, path) == config


def test_configs_are_frozen_and_documented():
    with pytest.raises(ValidationError):
        SamplerConfig().num_steps = 3
    assert SamplerConfig.model_fields["num_steps"].description == "Denoiser calls per clip."


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("sede: 1", [], ["'sede'", "Did you mean 'seed'?", "run.yaml"]),
        (
            "",
            ["sampler.num_stps=4"],
            ["'sampler.num_stps'", "value 4", "Did you mean 'num_steps'?"],
        ),
        ("", ["rewards=[{name: a, wieght: 1}]"], ["'rewards.0.wieght'", "Did you mean 'weight'?"]),
        ("refiner: {zzz: 1}", [], ["'refiner.zzz'", "Expected one of: kind, num_steps"]),
        ("lr: -1", [], ["'lr'", "-1", "greater than 0"]),
        ("sampler: {kind: eular}", [], ["'sampler.kind'", "'eular'", "Did you mean 'euler'?"]),
        ("rewards: [{}]", [], ["'rewards.0.name'", "missing"]),
        ("seed: 13", [], ["seed 13 is unlucky; choose another"]),
        ("seed: [", [], ["not valid YAML"]),
        ("- 1", [], ["holds a list"]),
        ("", ["seed"], ["no '='", "key=value"]),
        ("rewards: [{name: a}]", ["rewards.3.name=b"], ["'3' is not a position", "1 items"]),
    ],
)
def test_bad_configs_are_one_line_that_names_the_key_and_the_cure(tmp_path, text, overrides, words):
    with pytest.raises(UserError) as error:
        load_config(RunConfig, write(tmp_path, text), overrides)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_many_errors_are_counted_not_listed():
    with pytest.raises(UserError, match="and 2 more"):
        load_config(RunConfig, None, ["a=1", "b=1", "c=1", "d=1", "e=1"])


def test_a_missing_file_suggests_the_packaged_name(monkeypatch, tmp_path):
    monkeypatch.setattr("reelhf.config.PACKAGED_CONFIGS", tmp_path / "_configs")
    (tmp_path / "_configs" / "rlhf").mkdir(parents=True)
    (tmp_path / "_configs" / "rlhf" / "toy_direct.yaml").write_text("seed: 3")
    assert packaged_configs() == ["rlhf/toy_direct.yaml"]
    with pytest.raises(UserError, match=r"Did you mean 'configs/rlhf/toy_direct\.yaml'"):
        find_config("configs/rlhf/toy_drect.yaml")
    monkeypatch.chdir(tmp_path)
    for name in ("configs/rlhf/toy_direct.yaml", "rlhf/toy_direct.yaml"):
        assert load_config(RunConfig, name).seed == 3
    (tmp_path / "rlhf").mkdir()
    (tmp_path / "rlhf" / "toy_direct.yaml").write_text("seed: 4")
    assert (
        load_config(RunConfig, "rlhf/toy_direct.yaml").seed == 4
    )  # the working directory goes first


def test_did_you_mean_keeps_quiet_when_nothing_is_close():
    assert did_you_mean("motoin", ["motion", "look"]) == " Did you mean 'motion'?"
    assert did_you_mean("zzz", ["motion", "look"]) == ""
