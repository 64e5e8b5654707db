"""Latents and prompt embeddings on disk, keyed by content: encoded once, read by every training run that needs them.

store.json                          what encoded them: hashes of the VAE's and the text encoder's weights
latents/ab/<key>.safetensors        one window's latents; key = VAE, source file's bytes, frame numbers, size
low_res/ab/<key>.safetensors        what a refiner is given for one window; key = base, how it is made, the window's latents
text/ab/<key>.safetensors           one caption's embeddings (of several shots: one shot's); key = text encoder, caption
sets/<bucket config's hash>/        windows.parquet, skipped.parquet, config.yaml: which windows those buckets hold
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generator.data.buckets import Bucket, BucketConfig
from generator.data.manifest import CaptionKind
from generator.prompt_cache import PromptCache, read_tensors
from generator.shots import encode_shots
from reelhf.errors import UserError
from reelhf.hashing import content_hash

if TYPE_CHECKING:
    from torch import Tensor

    from generator.base import Condition

STORE_FORMAT = 1


@dataclass(frozen=True)
class Window:
    """One training clip: where its latents lie, what is said of it, where it comes from."""

    key: str
    num_frames: int
    height: int
    width: int
    source: str
    """sha256 of the file it was cut from: windows of one file are never split between training and validation."""
    name: str
    """Of that file in the manifest."""
    start: float
    """Seconds into it."""
    captions: dict[CaptionKind, str]
    tags: tuple[str, ...]

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.num_frames, self.height, self.width)

    def __str__(self) -> str:
        return f"{self.name} at {self.start:.2f} s ({self.bucket})"


@dataclass(frozen=True)
class Skipped:
    """One clip that is not in a set, and why."""

    name: str
    reason: str


class LatentStore:
    """The folder, opened for encoders of these weights.

    Args:
        vae: hash of its weights; text: `generator.prompt_cache.encoder_key`.
    Raises: UserError if the folder was encoded by others.
    """

    def __init__(self, folder: Path, *, vae: str, text: str, create: bool = False) -> None:
        self.folder, self.vae, self.text = Path(folder), vae, text
        self.prompts = PromptCache(self.folder / "text", text)
        card = {"format": STORE_FORMAT, "vae": vae, "text": text}
        file = self.folder / "store.json"
        if create and not file.is_file():
            from reelhf.run import write_text_atomic

            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text_atomic(file, json.dumps(card, indent=2) + "\n")
            except OSError as error:
                raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
        if not file.is_file():
            raise UserError(
                f"{folder} holds no encoded clips: it has no store.json; make them with `reelhf generator data encode`"
            )
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            raise UserError(f"{file} is damaged; restore it, or encode anew") from None
        for part, word in (("format", "format"), ("vae", "VAE"), ("text", "text encoder")):
            if found.get(part) != card[part]:
                raise UserError(
                    f"{folder} was encoded with another {word} than this run's; encode the clips anew into another folder"
                )

    def latent_file(self, key: str) -> Path:
        return self.folder / "latents" / key[:2] / f"{key}.safetensors"

    def low_res_file(self, key: str, how: str) -> Path:
        """Of a window's low-resolution latents; `how`: hash of the base and of how they are made."""
        own = content_hash(key, how)
        return self.folder / "low_res" / own[:2] / f"{own}.safetensors"

    def window_key(self, source: str, frames: Sequence[int], height: int, width: int) -> str:
        """Of the latents of these frames of a file, at this size."""
        return content_hash(self.vae, source, list(frames), height, width)

    def latents(self, window: Window) -> Tensor:
        """[C, T, h, w] fp32."""
        with _encode_again():
            return read_tensors(self.latent_file(window.key), str(window))["latents"]

    def low_res(self, window: Window, how: str) -> Tensor:
        """Likewise, what a refiner is given for the window."""
        with _encode_again():
            return read_tensors(self.low_res_file(window.key, how), str(window))["latents"]

    def condition(
        self, captions: Sequence[str], num_frames: Sequence[int], ratio: int
    ) -> Condition:
        """Encoded captions, each of a clip of so many frames.

        Args: ratio: frames per latent frame, which says where the cuts of several shots may fall.
        """
        with _encode_again():
            return encode_shots(self._captions, captions, num_frames, temporal_ratio=ratio)

    def _captions(self, captions: list[str]) -> Condition:
        from generator.base import Condition

        return Condition.cat([self.prompts.read(caption) for caption in captions])

    def set_folder(self, buckets: BucketConfig) -> Path:
        return self.folder / "sets" / content_hash(buckets)[:16]

    def write_set(
        self, buckets: BucketConfig, windows: Sequence[Window], skipped: Sequence[Skipped]
    ) -> None:
        """Make the windows of these buckets known, in the order of the manifest."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from reelhf.config import to_yaml
        from reelhf.run import write_text_atomic

        folder = self.set_folder(buckets)
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / "config.yaml", to_yaml(buckets))
        rows = [
            {**asdict(w), "captions": json.dumps(w.captions, ensure_ascii=False)} for w in windows
        ]
        for name, table, columns in (
            ("skipped", [asdict(one) for one in skipped], _SKIPPED_COLUMNS),
            ("windows", rows, _WINDOW_COLUMNS),
        ):
            aside = folder / f".{name}.{os.getpid()}.tmp"
            schema = pa.schema([(column, _arrow_type(kind)) for column, kind in columns.items()])
            pq.write_table(pa.Table.from_pylist(table, schema), aside)
            os.replace(aside, folder / f"{name}.parquet")

    def read_set(self, buckets: BucketConfig, *, what: str) -> list[Window]:
        """The windows of these buckets, all of them there.

        Args:
            what: who asks, for the error.
        Raises: UserError when the buckets were never encoded, hold nothing, or files are missing.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.set_folder(buckets) / "windows.parquet"
        if not file.is_file():
            raise UserError(
                f"{what}: {self.folder} holds no clips encoded for its buckets "
                f"(area {buckets.area}, frames {list(buckets.num_frames)} at {buckets.fps:g} fps); "
                "run `reelhf generator data encode` with this config"
            )
        try:
            rows = pq.read_table(file).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); encode again") from None
        windows = [_window(row) for row in rows]
        if not windows:
            raise UserError(
                f"{what}: no clip fits its buckets; {file.parent / 'skipped.parquet'} has the reasons"
            )
        here = {path.stem for path in (self.folder / "latents").glob("*/*.safetensors")}
        missing = [window for window in windows if window.key not in here]
        if missing:
            raise UserError(
                f"{what}: the latents of {len(missing)} of {len(windows)} windows are missing in {self.folder}, the first of "
                f"{missing[0]}; run `reelhf generator data encode` again, which makes only those"
            )
        return windows


@contextmanager
def _encode_again() -> Iterator[None]:
    """What to do about a file that cannot be read."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{error}; delete it and run `reelhf generator data encode` again"
        ) from None


_WINDOW_COLUMNS = {
    **dict.fromkeys(("key", "source", "name", "captions"), "text"),
    **dict.fromkeys(("num_frames", "height", "width"), "count"),
    "start": "number",
    "tags": "words",
}
_SKIPPED_COLUMNS = {"name": "text", "reason": "text"}


def _arrow_type(kind: str) -> Any:
    import pyarrow as pa

    return {
        "text": pa.string(),
        "count": pa.int64(),
        "number": pa.float64(),
        "words": pa.list_(pa.string()),
    }[kind]


def _window(row: dict[str, Any]) -> Window:
    return Window(**{**row, "captions": json.loads(row["captions"]), "tags": tuple(row["tags"])})
