"""Every YAML under configs/ loads with its class and says what it shows and how it is launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelhf.cli import load
from reelhf.config import Config, load_config, to_yaml

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CLASSES = {  # the first pattern that fits names the class
    "generator/*vae*.yaml": "generator.training.vae:VAETrainConfig",
    "generator/*text*.yaml": "generator.training.text:TextTrainConfig",
    "generator/*.yaml": "generator.training.denoiser:DenoiserTrainConfig",
    "distill/consistency*.yaml": "distill.consistency:ConsistencyConfig",
    "rewards/texture*.yaml": "rewards.texture:TextureConfig",
    "rewards/*backbones*.yaml": "rewards.pretrain:PretrainConfig",
    "rewards/*folds*.yaml": "rewards.evaluation.cross_validate:CrossValidateConfig",
    "rewards/*.yaml": "rewards.train:RewardTrainConfig",
    "rlhf/*.yaml": "rlhf.direct_run:DirectRun",
    "loop/*.yaml": "rlhf.rounds:LoopConfig",
    "annotation/candidates*.yaml": "annotation.candidates.generate:CandidatesConfig",
    "annotation/mix*.yaml": "annotation.candidates.mix:MixConfig",
    "annotation/*.yaml": "annotation.config:AnnotationConfig",
}
NAMES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


def config_class(name):
    target = next(
        (target for pattern, target in CLASSES.items() if Path(name).match(pattern)), None
    )
    assert target, f"no class for configs/{name}: add its pattern to CLASSES"
    return load(target)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_and_its_resolved_form_loads_again(name, tmp_path):
    cls = config_class(name)
    config = load_config(cls, CONFIGS / name)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(cls, tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("name", NAMES)
def test_a_config_opens_with_what_it_shows_and_its_launch_line(name):
    comment = []
    for line in (CONFIGS / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line)
    assert comment, "the file opens with a comment"
    assert any("reelhf" in line for line in comment), "the comment holds the launch line"


SPEAK_FOR_THEMSELVES = {  # the same words everywhere; the engine's are explained in `reelhf.engine.EngineConfig`
    *("seed", "type", "title", "zero_stage", "bf16"),
    *("validate_every", "validation_batch", "checkpoint_every", "keep_checkpoints"),
}


def fields_without_help(cls):
    """Names of fields nobody explained; a nested config explains itself."""
    return [
        name
        for name, field in cls.model_fields.items()
        if not field.description
        and name not in SPEAK_FOR_THEMSELVES
        and not (isinstance(field.annotation, type) and issubclass(field.annotation, Config))
    ]


@pytest.mark.parametrize("target", sorted({CLASSES[p] for p in CLASSES if list(CONFIGS.glob(p))}))
def test_every_field_of_a_config_is_documented(target):
    assert fields_without_help(load(target)) == []
