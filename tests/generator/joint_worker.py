"""Trainings of a VAE, a text encoder and both networks of a generator outside the test process: `joint_worker.py SCENARIOS.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from generator.training.denoiser import DenoiserTrainConfig, train_base
from generator.training.text import TextTrainConfig, train_text_encoder
from generator.training.vae import VAETrainConfig, train_vae


def train(kind: str, config: dict, folders: list[str]) -> None:
    paths = [Path(folder) for folder in folders]
    if kind == "vae":
        train_vae(VAETrainConfig.model_validate(config), *paths)
    elif kind == "text":
        train_text_encoder(TextTrainConfig.model_validate(config), *paths)
    else:
        train_base(DenoiserTrainConfig.model_validate(config), *paths)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        train(**scenario)
