"""What a refiner is given for each window, made once and kept beside the window's latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from generator.data.store import LatentStore, Window
from generator.prompt_cache import write_tensors
from generator.refiner import LowResConfig, low_res_latents
from generator.shots import encode_shots
from reelhf.errors import UserError
from reelhf.hashing import content_hash, weight_hashes

if TYPE_CHECKING:
    from torch import Tensor

    from generator.checkpoint import DiTGenerator

SEED_DIGITS = 12


def low_res_key(base: Path, config: LowResConfig, seed: int) -> str:
    """Of what a base generator's folder and a config make of windows."""
    return content_hash(weight_hashes(base), config, seed)


@dataclass(frozen=True)
class LowResMaker:
    """A base generator that makes a refiner's inputs."""

    base: DiTGenerator
    config: LowResConfig
    key: str
    """`low_res_key`."""

    def is_there(self, store: LatentStore, window: Window) -> bool:
        return store.low_res_file(window.key, self.key).is_file()

    def make(self, store: LatentStore, window: Window, frames: Tensor) -> None:
        """Write those of one window; frames uint8 [3, F, H, W]. What is random about it follows from its content."""
        caption = window.captions["caption"]
        ratio = self.base.spec.temporal_ratio
        condition = encode_shots(
            self.base.text.encode, [caption], window.num_frames, temporal_ratio=ratio
        )
        seed = int(content_hash(window.key, self.key)[:SEED_DIGITS], 16)
        clip = frames[None].to(self.base.device).float() / 255
        latents = low_res_latents(
            self.base, clip, condition.to(self.base.device), self.config, seed
        )
        write_tensors(
            store.low_res_file(window.key, self.key), latents=latents[0].float().cpu().clone()
        )


def check_low_res(store: LatentStore, windows: Sequence[Window], key: str, *, what: str) -> None:
    """Raises: UserError when inputs are missing."""
    here = {path.stem for path in (store.folder / "low_res").glob("*/*.safetensors")}
    missing = [w for w in windows if store.low_res_file(w.key, key).stem not in here]
    if missing:
        raise UserError(
            f"{what}: the low-resolution inputs of {len(missing)} of {len(windows)} windows are missing in {store.folder}, the first of "
            f"{missing[0]}; run `reelhf generator data encode` with this config and --base"
        )
