"""Buckets of one size and length, and where a real clip goes.

A clip is never re-timed and never enlarged or cropped beyond what the config allows; what fits no bucket is named with the reason,
not dropped in silence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from generator.base import BackboneSpec
from reelhf.config import Config
from reelhf.errors import UserError


class BucketConfig(Config):
    """What the training clips look like."""

    area: PositiveInt = 480 * 832
    """Pixels of a frame, about; every aspect gets the size of this area that is nearest to it."""
    aspects: tuple[PositiveFloat, ...] = (0.5625, 0.75, 1.0, 1.3333, 1.7778, 2.3333)
    """Width over height."""
    num_frames: tuple[PositiveInt, ...] = (33, 65, 121)
    """Lengths, each 1 + temporal_ratio * n; a clip goes into the longest that it fills."""
    fps: PositiveFloat = 24.0
    """Rate of all buckets. A frame is the source's nearest one; a source that is slower would show frames twice."""
    max_crop: float = Field(0.2, ge=0, lt=1)
    """Share of the picture that may be cropped away to reach the bucket's aspect."""
    max_enlargement: PositiveFloat = 1.1
    """How much a clip may be enlarged, in sides."""
    min_rate: float = Field(0.98, gt=0, le=1)
    """Least rate of a source over `fps`: 23.976 will do for 24."""
    channels: PositiveInt = 48
    """Of the latents."""
    temporal_ratio: PositiveInt = 4
    """Frames per latent frame."""
    spatial_ratio: PositiveInt = 16
    """Pixels per latent pixel; heights and widths are its multiples."""

    @property
    def spec(self) -> BackboneSpec:
        return BackboneSpec(self.channels, self.temporal_ratio, self.spatial_ratio)

    @model_validator(mode="after")
    def _legal_lengths(self) -> BucketConfig:
        if not self.num_frames or not self.aspects:
            raise ValueError("num_frames and aspects need at least one entry each")
        if self.area < self.spatial_ratio**2:
            raise ValueError(f"area {self.area} is less than one latent pixel")
        for frames in self.num_frames:
            try:
                self.spec.check(frames, self.spatial_ratio, self.spatial_ratio)
            except UserError as error:
                raise ValueError(str(error)) from None
        return self


@dataclass(frozen=True, order=True)
class Bucket:
    """Clips that can share a batch."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    def tokens(self, spec: BackboneSpec) -> int:
        """Latent positions, what a training step costs."""
        _, frames, height, width = spec.latent_shape(self.num_frames, self.height, self.width)
        return frames * height * width


@dataclass(frozen=True)
class Placement:
    """What becomes of one clip: a bucket, or a reason."""

    bucket: Bucket | None
    reason: str | None
    """Why it would be skipped; None where it has a bucket."""
    usable_frames: int
    """Frames it holds at the buckets' rate."""
    windows: int = 0
    """Clips of the bucket's length that fit into it one after another."""
    cropped: float = 0.0
    """Share of the picture that the bucket's aspect cuts away."""


def size_of(aspect: float, config: BucketConfig) -> tuple[int, int]:
    """Height and width, multiples of the spatial ratio: of the sizes around area and aspect the one nearest to both, in logs."""
    step = config.spatial_ratio
    ideal_width = math.sqrt(config.area * aspect)
    ideal_height = math.sqrt(config.area / aspect)

    def around(side: float) -> set[int]:
        lower = max(1, int(side // step))
        return {lower * step, (lower + 1) * step}

    def error(size: tuple[int, int]) -> float:
        height, width = size
        return abs(math.log(width / height / aspect)) + abs(math.log(width * height / config.area))

    return min(((h, w) for h in around(ideal_height) for w in around(ideal_width)), key=error)


def frames_at_rate(num_frames: int, source_fps: float, fps: float) -> int:
    """Frames that `num_frames` at `source_fps` hold at `fps` without going past the last: frame k lies at k / fps seconds."""
    return math.floor((num_frames - 1) * fps / source_fps + 1e-6) + 1


def source_frames(num_frames: int, source_fps: float, fps: float) -> list[int]:
    """The source's frame nearest to each of `num_frames` frames at `fps`: frame k lies at k / fps seconds, exactly."""
    return [math.floor(k * source_fps / fps + 0.5) for k in range(num_frames)]


def cropped_share(width: int, height: int, bucket_width: int, bucket_height: int) -> float:
    """Share of a picture that is lost when it is cropped to another aspect, 0 to 1."""
    ratio = (width / height) / (bucket_width / bucket_height)
    return 1 - min(ratio, 1 / ratio)


def place(
    num_frames: int,
    fps: float,
    width: int,
    height: int,
    config: BucketConfig,
    *,
    is_image: bool = False,
) -> Placement:
    """The bucket of a clip, or why it has none: rate, length, size and aspect, in this order.

    Args:
        is_image: one frame without a rate: it goes into a bucket of one frame, whatever `num_frames` of the config says.
    Raises: UserError for a clip without frames, or of no size or rate.
    """
    if num_frames < 1 or fps <= 0 or width < 1 or height < 1:
        raise UserError(
            f"a clip of {num_frames} frames at {fps:g} fps, {width}x{height}; expected a positive number of each"
        )
    usable = 1 if is_image else frames_at_rate(num_frames, fps, config.fps)

    def skipped(reason: str) -> Placement:
        return Placement(None, reason, usable)

    if not is_image and fps < config.min_rate * config.fps:
        return skipped(f"{fps:g} fps: at {config.fps:g} some frames would be shown twice")
    allowed = (1,) if is_image else config.num_frames
    lengths = [length for length in allowed if length <= usable]
    if not lengths:
        shortest = min(config.num_frames)
        return skipped(
            f"too short: {usable} frames at {config.fps:g} fps, the shortest bucket has {shortest}"
        )
    sizes = [size_of(aspect, config) for aspect in config.aspects]
    bucket_height, bucket_width = min(
        sizes, key=lambda size: cropped_share(width, height, size[1], size[0])
    )
    cropped = cropped_share(width, height, bucket_width, bucket_height)
    if cropped > config.max_crop:
        return skipped(
            f"aspect {width / height:.2f}: the nearest bucket, {bucket_width / bucket_height:.2f}, would crop "
            f"{cropped:.0%}, more than {config.max_crop:.0%}"
        )
    enlarged = max(bucket_height / height, bucket_width / width)
    if enlarged > config.max_enlargement:
        return skipped(
            f"{width}x{height}: would be enlarged {enlarged:.2f} times to {bucket_width}x{bucket_height}, "
            f"more than {config.max_enlargement:g}"
        )
    length = max(lengths)
    return Placement(
        Bucket(length, bucket_height, bucket_width), None, usable, usable // length, cropped
    )
