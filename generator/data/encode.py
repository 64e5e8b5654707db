"""`reelhf generator data encode`: clips become latents on disk, each once; what fits no bucket is written down with the reason.

May be interrupted and run again: what is there is not made again. Under torchrun the processes share the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from generator.data.buckets import Bucket, BucketConfig, source_frames
from generator.data.manifest import ManifestClip, caption_counts, place_clip
from generator.data.store import LatentStore, Skipped, Window
from generator.prompt_cache import write_tensors
from generator.shots import parse_shots
from reelhf.clips import resize_frames
from reelhf.engine import barrier, device, is_main, rank, world_size
from reelhf.errors import UserError
from reelhf.hashing import sha256_file
from reelhf.progress import track
from reelhf.video import iterate_frames, probe_video

if TYPE_CHECKING:
    from generator.data.low_res import LowResMaker
    from generator.text import TextEncoder
    from generator.vae import VideoVAE

ENCODED_AT_ONCE = 8
"""Windows of one bucket in a pass of the VAE."""
CAPTIONS_AT_ONCE = 32


@dataclass(frozen=True)
class Cut:
    """One window of a clip, before it is decoded."""

    window: Window
    clip: ManifestClip
    frames: tuple[int, ...]
    """Frame numbers of the file; a number may stand twice where the source is a little slower."""


def encode_set(
    store: LatentStore,
    clips: Sequence[ManifestClip],
    buckets: BucketConfig,
    vae: VideoVAE,
    text: TextEncoder,
    low_res: LowResMaker | None = None,
) -> tuple[list[Window], list[Skipped]]:
    """Encode what is not there yet, and make the set known; every process calls it and gets the whole set.

    `low_res` makes a refiner's inputs too.

    Raises: UserError when the buckets are not those of the VAE.
    """
    spec = vae.spec
    if (spec.temporal_ratio, spec.spatial_ratio) != (buckets.temporal_ratio, buckets.spatial_ratio):
        raise UserError(
            f"the VAE compresses {spec.temporal_ratio} frames and {spec.spatial_ratio} pixels into one; the buckets say "
            f"{buckets.temporal_ratio} and {buckets.spatial_ratio}"
        )
    mine = range(rank(), len(clips), world_size())
    found: list[tuple[int, list[Window], Skipped | None]] = []
    waiting: dict[Bucket, list[tuple[Cut, Tensor]]] = {}
    for index in track(mine, label="encoding clips"):
        cuts: list[Cut] = []
        skipped = None
        try:
            cuts, skipped = cut_clip(store, clips[index], buckets)
        except UserError as error:
            skipped = Skipped(clips[index].name, f"unreadable: {error}")
        decoded = decode_cuts(
            [
                cut
                for cut in cuts
                if not store.latent_file(cut.window.key).is_file()
                or not (low_res is None or low_res.is_there(store, cut.window))
            ]
        )
        while True:
            try:
                one = next(decoded, None)
            except UserError as error:
                cuts, skipped = [], Skipped(clips[index].name, f"unreadable: {error}")
                break
            if one is None:
                break
            ready = waiting.setdefault(one[0].window.bucket, [])
            ready.append(one)
            if len(ready) == ENCODED_AT_ONCE:
                _flush(store, vae, waiting.pop(one[0].window.bucket), low_res)
        found.append((index, [cut.window for cut in cuts], skipped))
    for ready in waiting.values():
        _flush(store, vae, ready, low_res)
    texts = sorted(
        {caption for _, windows, _ in found for w in windows for caption in w.captions.values()}
    )
    encode_captions(store, texts, text)
    everywhere = sorted(_from_all(found), key=lambda one: one[0])
    windows = [window for _, own, _ in everywhere for window in own]
    left_out = [skipped for *_, skipped in everywhere if skipped is not None]
    if is_main():
        store.write_set(buckets, windows, left_out)
    barrier()
    return windows, left_out


def cut_clip(
    store: LatentStore, clip: ManifestClip, buckets: BucketConfig
) -> tuple[list[Cut], Skipped | None]:
    """All windows that fit one after another into a clip, at the buckets' exact rate; or why there is none."""
    info = probe_video(clip.path)
    where = place_clip(clip, info, buckets)
    if where.bucket is None:
        return [], Skipped(clip.name, where.reason or "")
    first, _ = clip.frame_range(info.frames, info.fps)
    bucket = where.bucket
    source = sha256_file(clip.path)
    steps = source_frames(where.windows * bucket.num_frames, info.fps, buckets.fps)
    cuts = []
    for number in range(where.windows):
        here = steps[number * bucket.num_frames : (number + 1) * bucket.num_frames]
        frames = tuple(first + step for step in here)
        window = Window(
            store.window_key(source, frames, bucket.height, bucket.width),
            bucket.num_frames,
            bucket.height,
            bucket.width,
            source,
            clip.name,
            frames[0] / info.fps,
            clip.captions,
            clip.tags,
        )
        cuts.append(Cut(window, clip, frames))
    return cuts, None


def decode_cuts(cuts: Sequence[Cut]) -> Iterator[tuple[Cut, Tensor]]:
    """Windows of one file, decoded in one pass: uint8 [3, F, H, W] at the bucket's size."""
    if not cuts:
        return
    path = cuts[0].clip.path
    numbers = sorted({frame for cut in cuts for frame in cut.frames})
    pictures = zip(numbers, iterate_frames(path, indices=numbers), strict=False)
    number, small = -1, None
    for cut in cuts:  # in order of time, without overlap
        size = (cut.window.height, cut.window.width)
        taken = []
        for wanted in cut.frames:
            if wanted != number:
                number, picture = next(pictures, (-1, None))
                if number != wanted:
                    raise UserError(f"{path} is damaged: frame {wanted} cannot be decoded")
                pixels = torch.from_numpy(picture).permute(2, 0, 1)[:, None]
                small = resize_frames(pixels, size).mul(255).round().to(torch.uint8)
            taken.append(small)
        yield cut, torch.cat(taken, dim=1)


@torch.no_grad()
def encode_captions(store: LatentStore, captions: Sequence[str], text: TextEncoder) -> None:
    """Embeddings of the captions that have none yet; of several shots, of each shot's."""
    shots = sorted({shot for caption in captions for shot in parse_shots(caption).captions})
    missing = [shot for shot in shots if not store.prompts.file(shot).is_file()]
    for start in range(0, len(missing), CAPTIONS_AT_ONCE):
        part = missing[start : start + CAPTIONS_AT_ONCE]
        store.prompts.write(part, text.encode(part).to("cpu"))


@torch.no_grad()
def _flush(
    store: LatentStore,
    vae: VideoVAE,
    ready: list[tuple[Cut, Tensor]],
    low_res: LowResMaker | None,
) -> None:
    frames = torch.stack([pixels for _, pixels in ready]).to(device()).float() / 255
    latents = vae.encode(frames).float().cpu()
    for (cut, _), own in zip(ready, latents, strict=True):
        write_tensors(store.latent_file(cut.window.key), latents=own.clone())
    for cut, pixels in ready:
        if low_res is not None and not low_res.is_there(store, cut.window):
            low_res.make(store, cut.window, pixels)


def _from_all(found: list) -> list:
    """Every process's rows, on every process."""
    if world_size() == 1:
        return found
    from torch import distributed

    gathered: list[list] = [[] for _ in range(world_size())]
    distributed.all_gather_object(gathered, found)
    return [row for rows in gathered for row in rows]


def format_set(buckets: BucketConfig, windows: Sequence[Window], skipped: Sequence[Skipped]) -> str:
    """What each bucket holds, which captions there are, and every clip that was left out with its reason."""
    from reelhf.tables import format_table

    held = Counter(window.bucket for window in windows)
    table = [
        [str(bucket), str(count), str(bucket.tokens(buckets.spec))]
        for bucket, count in sorted(held.items())
    ]
    kinds = caption_counts([window.captions for window in windows])
    named = ", ".join(f"{count} with {kind}" for kind, count in kinds.items())
    parts = [
        format_table(["bucket", "windows", "tokens per window"], table),
        f"{len(windows)} windows of {len({w.name for w in windows})} clips: {named}",
    ]
    if skipped:
        rows = [[one.name, one.reason] for one in skipped]
        parts.append(f"{len(skipped)} clips fit no bucket:")
        parts.append(format_table(["clip", "reason"], rows))
    return "\n".join(parts)
