"""Leave-one-prompt-out and leave-one-generator-out accuracy on FETV's twenty rated prompts, beside what knows nothing of quality.

    OMP_NUM_THREADS=1 python benchmarks/rewards_fetv.py ../shared/data/fetv --out runs/fetv

Clips are made alike first (64 x 64, 8 frames at 5 per second). Tiny backbones are pre-trained on these clips and their prompts, never on
ratings; then every fold trains its rewards anew. Started again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from annotation.records import read_preferences
from reelhf.config import load_config
from rewards.aesthetic import AestheticConfig
from rewards.evaluation.cross_validate import (
    CrossValidateConfig,
    cross_validate,
    format_cross_validation,
)
from rewards.foundational import FoundationalConfig
from rewards.importers.alike import Alike
from rewards.importers.fetv import read_fetv
from rewards.importers.tables import write_tasks
from rewards.motion import MotionConfig
from rewards.pretrain import pretrain_backbones
from rewards.pretraining.config import PretrainConfig, StageConfig

ALIKE = Alike(size=64, fps=5.0, num_frames=8)
WIDTH = {"hidden_size": 64, "num_layers": 2}
STAGE = StageConfig(num_steps=60, batch_size=8)
BACKBONES = PretrainConfig(
    foundational=FoundationalConfig(**WIDTH, area=48 * 48, num_frames=4),
    motion=MotionConfig(**WIDTH, area=48 * 48),
    aesthetic=AestheticConfig(**WIDTH, area=64 * 64),
    foundational_stage=STAGE,
    motion_stage=STAGE,
    aesthetic_stage=STAGE,
    num_frames=8,
    fps=ALIKE.fps,
    size=64,
    max_windows=80,
)


def captions_of(preferences: Path) -> Path:
    """captions.jsonl beside the clips that were made alike; returns their folder."""
    media = preferences / "media"
    rows = [
        {"path": Path(row["uri"]).name, "caption": row["prompt"]}
        for row in read_preferences(preferences).clips
    ]
    (media / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return media


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fetv", type=Path, help="folder with ratings.jsonl and clips/")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    started = time.monotonic()
    preferences = options.out / "preferences"
    if not (preferences / "manifest.json").is_file():
        counts = write_tasks(read_fetv(options.fetv), preferences, project="fetv", alike=ALIKE)
        print(counts, flush=True)
    backbones = pretrain_backbones(BACKBONES, captions_of(preferences), options.out / "backbones")
    config = load_config(CrossValidateConfig, "configs/rewards/fetv_folds.yaml")
    path = cross_validate(config, preferences, backbones, options.out)
    print(format_cross_validation(json.loads(path.read_text(encoding="utf-8"))))
    print(f"{path}; {time.monotonic() - started:.0f} s in all, less what an earlier start had done")


if __name__ == "__main__":
    main()
