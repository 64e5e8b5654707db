from __future__ import annotations

from pathlib import Path

import pytest

from distill.consistency import ConsistencyConfig
from reelhf.cli import main
from reelhf.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs" / "distill"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_distillation_yaml_loads(path, capsys):
    assert load_config(ConsistencyConfig, path).num_segments == 4
    main(["distill", "train", str(path), "optimizer.lr=1e-4", "--dry-run"])
    assert "lr: 0.0001" in capsys.readouterr().out


def test_missing_folders_are_named(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["distill", "train", "configs/distill/consistency_toy.yaml"])
    assert exit_.value.code == 2
    assert "missing --out, --teacher, --base, --clips" in capsys.readouterr().err
