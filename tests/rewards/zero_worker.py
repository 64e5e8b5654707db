"""Trains one tiny reward on whatever processes launched this file: `zero_worker.py ROOT OUT key=value ...`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from reelhf.cli_config import read_config_words
from rewards.train import train_rewards
from rewards.training.config import RewardTrainConfig

if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    config = read_config_words(RewardTrainConfig, sys.argv[3:])
    train_rewards(config, root / "data", root / "backbones", Path(sys.argv[2]), splits=None)
