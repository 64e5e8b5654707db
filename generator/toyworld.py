"""The toy world: short clips of one coloured shape on a plain ground, with captions that can be read back exactly; in one shot or several.

Small enough that a few million parameters learn it in minutes on a laptop, rich enough that colour, shape, motion and
sharpness can each be right or wrong. `generator.toygold` measures any clip against such a caption.

Coordinates: the frame is the unit square, x to the right, y DOWN, the origin in its centre; a length is a fraction of
the frame's side, a speed a fraction of the side per second.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from generator.shots import cut_frames, parse_shots, shot_latents, shot_prompt
from reelhf.config import Config
from reelhf.errors import UserError, did_you_mean

Shape = Literal["circle", "square", "triangle", "star", "ring"]
Colour = Literal["red", "yellow", "green", "cyan", "blue", "magenta"]
Size = Literal["small", "large"]
Texture = Literal["plain", "striped"]
Motion = Literal["still", "left", "right", "up", "down"]
Speed = Literal["none", "slow", "fast"]
Camera = Literal["static", "zoom"]
Background = Literal["white", "beige", "grey", "navy"]
Language = Literal["en", "zh"]
Split = Literal["train", "feedback", "held_out", "validation", "test"]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (0.95, 0.82, 0.05),
    "green": (0.10, 0.70, 0.20),
    "cyan": (0.05, 0.75, 0.85),
    "blue": (0.15, 0.28, 0.95),
    "magenta": (0.85, 0.15, 0.80),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.94, 0.94, 0.94),
    "beige": (0.86, 0.76, 0.60),
    "grey": (0.30, 0.30, 0.30),
    "navy": (0.05, 0.07, 0.20),
}
RADIUS: dict[str, float] = {"small": 0.18, "large": 0.26}
"""Half the shape's extent, as a fraction of the side."""
SPEED: dict[str, float] = {"none": 0.0, "slow": 0.2, "fast": 0.4}
"""Sides per second. A fast large shape still stays inside the frame for one second."""
DIRECTION: dict[str, tuple[float, float]] = {
    "still": (0.0, 0.0),
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
MAX_TRAVEL = 0.4
"""Longest way of the centre, as a fraction of the side; a longer clip of a moving shape slows down to keep it in view."""
ZOOM_PER_SECOND = 0.3
"""Growth of the shape (log of its radius) per second of "the camera slowly zooms in"; at most ZOOM_TOTAL in all."""
ZOOM_TOTAL = 0.3
STRIPE_PERIOD = 0.6
"""Of the stripes, in radii."""
STRIPE_SHADE = 0.55
"""Brightness of the dark stripes relative to the shape's colour."""
JITTER = 0.02
"""The start position varies by this much around the one that centres the motion."""


@dataclass(frozen=True)
class Scene:
    """Everything a caption says. `speed` is "none" exactly when the motion is "still"."""

    shape: Shape
    colour: Colour
    size: Size
    texture: Texture
    motion: Motion
    speed: Speed
    camera: Camera
    background: Background

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = did_you_mean(str(value), choices)
                raise UserError(
                    f"scene {name} '{value}'; expected one of {', '.join(choices)}.{hint}"
                )
        if (self.motion == "still") != (self.speed == "none"):
            raise UserError(
                f"scene motion '{self.motion}' with speed '{self.speed}'; only a still shape has speed 'none'"
            )


_CHOICES: dict[str, tuple[str, ...]] = {
    "shape": get_args(Shape),
    "colour": get_args(Colour),
    "size": get_args(Size),
    "texture": get_args(Texture),
    "motion": get_args(Motion),
    "speed": get_args(Speed),
    "camera": get_args(Camera),
    "background": get_args(Background),
}


Variety = Literal["plain", "rich"]
_PLAIN_CHOICES: dict[str, tuple[str, ...]] = _CHOICES | {
    "shape": ("circle", "square", "triangle"),
    "colour": ("red", "yellow", "green", "blue"),
    "background": ("white", "grey", "navy"),
}
"""648 scenes whose 16x16 patches a linear basis of 48 reconstructs at 21 dB on the shape (18 dB for the rich world): what a
model of a few million parameters learns in minutes on a CPU."""


def sample_scene(rng: random.Random, variety: Variety = "plain") -> Scene:
    """A random scene: of the plain world, or of everything a caption can say, with rarer stripes and camera moves."""
    choices = _PLAIN_CHOICES if variety == "plain" else _CHOICES
    rare = 0.0 if variety == "plain" else 0.2
    motion = rng.choice(choices["motion"])
    return Scene(
        shape=rng.choice(choices["shape"]),
        colour=rng.choice(choices["colour"]),
        size=rng.choice(choices["size"]),
        texture="striped" if rng.random() < rare else "plain",
        motion=motion,
        speed="none" if motion == "still" else rng.choice(("slow", "fast")),
        camera="zoom" if rng.random() < rare else "static",
        background=rng.choice(choices["background"]),
    )


# Captions: a static sentence, then a dynamic one. The same tables write and read them.

_WORDS: dict[str, dict[str, dict[str, str]]] = {
    "en": {
        "shape": {name: name for name in _CHOICES["shape"]},
        "colour": {name: name for name in _CHOICES["colour"]},
        "size": {"small": "small", "large": "large"},
        "texture": {"plain": "solid", "striped": "striped"},
        "motion": {
            "still": "",
            "left": "to the left",
            "right": "to the right",
            "up": "upwards",
            "down": "downwards",
        },
        "speed": {"none": "stays where it is", "slow": "moves slowly", "fast": "moves quickly"},
        "camera": {"static": "the camera does not move", "zoom": "the camera slowly zooms in"},
        "background": {name: name for name in _CHOICES["background"]},
    },
    "zh": {
        "shape": {
            "circle": "圆形",
            "square": "正方形",
            "triangle": "三角形",
            "star": "五角星",
            "ring": "圆环",
        },
        "colour": {
            "red": "红色",
            "yellow": "黄色",
            "green": "绿色",
            "cyan": "青色",
            "blue": "蓝色",
            "magenta": "洋红色",
        },
        "size": {"small": "小", "large": "大"},
        "texture": {"plain": "纯色", "striped": "条纹"},
        "motion": {"still": "", "left": "向左", "right": "向右", "up": "向上", "down": "向下"},
        "speed": {"none": "停在原处", "slow": "缓慢移动", "fast": "快速移动"},
        "camera": {"static": "镜头固定不动", "zoom": "镜头缓缓推近"},
        "background": {"white": "白色", "beige": "米色", "grey": "灰色", "navy": "深蓝色"},
    },
}


def caption(scene: Scene, language: Language = "en") -> str:
    """The dense caption: what is there, then what happens. `scene_from_caption` reads it back exactly."""
    if language not in _WORDS:
        raise UserError(f"caption language '{language}'; expected one of {', '.join(_WORDS)}")
    word = {name: _WORDS[language][name][getattr(scene, name)] for name in _CHOICES}
    if language == "zh":
        return (
            f"一个{word['size']}的{word['texture']}{word['colour']}{word['shape']}，背景是平整的{word['background']}。"
            f"{word['shape']}{word['motion']}{word['speed']}，{word['camera']}。"
        )
    move = f"{word['speed']} {word['motion']}".strip()
    return (
        f"A {word['size']} {word['texture']} {word['colour']} {word['shape']} on a plain {word['background']} background. "
        f"The {word['shape']} {move} and {word['camera']}."
    )


def _pattern(language: Language) -> re.Pattern[str]:
    def group(name: str) -> str:
        words = sorted((w for w in _WORDS[language][name].values() if w), key=len, reverse=True)
        return f"(?P<{name}>{'|'.join(map(re.escape, words))})"

    if language == "zh":
        return re.compile(
            f"一个{group('size')}的{group('texture')}{group('colour')}{group('shape')}，背景是平整的{group('background')}。"
            f"(?P=shape){group('motion')}?{group('speed')}，{group('camera')}。"
        )
    return re.compile(
        f"A {group('size')} {group('texture')} {group('colour')} {group('shape')} on a plain {group('background')} "
        rf"background\. The (?P=shape) {group('speed')}(?: {group('motion')})? and {group('camera')}\."
    )


_PATTERNS: dict[Language, re.Pattern[str]] = {"en": _pattern("en"), "zh": _pattern("zh")}
_MEANINGS = {
    language: {
        name: {word: value for value, word in words.items()} for name, words in tables.items()
    }
    for language, tables in _WORDS.items()
}


def scene_from_caption(text: str) -> Scene | None:
    """The scene a caption describes; None when the text is not one of ours, in every word."""
    for language, pattern in _PATTERNS.items():
        match = pattern.fullmatch(text.strip())
        if match is None:
            continue
        fields = {
            name: _MEANINGS[language][name][word or ""] for name, word in match.groupdict().items()
        }
        if (fields["motion"] == "still") != (fields["speed"] == "none"):
            return None
        return Scene(**fields)  # type: ignore[arg-type]
    return None


def scenes_from_caption(text: str) -> list[Scene] | None:
    """The scene of every shot of a prompt, one for a plain caption; None when a shot's text is not one of ours."""
    try:
        captions = parse_shots(text).captions
    except UserError:
        return None
    scenes = [scene_from_caption(caption) for caption in captions]
    return None if None in scenes else [scene for scene in scenes if scene is not None]


# Rendering


def trajectory(scene: Scene, *, num_frames: int, fps: float, seed: int = 0) -> Tensor:
    """Centre of the shape on the screen and the camera's magnification per frame, [F, 3] as (x, y, scale).

    The camera zooms onto the shape, so that its path on the screen is what the caption says.
    """
    rng = random.Random(seed)
    offset = torch.tensor([rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER)])
    seconds = torch.arange(num_frames) / fps
    duration = max((num_frames - 1) / fps, 1e-6)
    speed = min(SPEED[scene.speed], MAX_TRAVEL / duration)
    centre = offset + (seconds - duration / 2)[:, None] * speed * torch.tensor(
        DIRECTION[scene.motion]
    )
    zoom = min(ZOOM_PER_SECOND, ZOOM_TOTAL / duration) if scene.camera == "zoom" else 0.0
    # half before, half after the caption's size, so that a zoomed shape is neither larger nor smaller on average
    scale = torch.exp((seconds - duration / 2) * zoom)
    return torch.cat([centre, scale[:, None]], dim=1)


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of a shape of radius 1, negative inside; x and y in radii, y down, any shape [...]."""
    if shape == "circle":
        return torch.hypot(x, y) - 1
    if shape == "ring":
        return (torch.hypot(x, y) - 0.75).abs() - 0.25
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88
    if shape == "triangle":  # equilateral, point up, centred on its centroid; exact near the edges
        return torch.maximum(y, math.sqrt(3) / 2 * x.abs() - y / 2) - 0.55
    if shape == "star":  # five points, one up; fold to one half point, then distance to its edge
        angle = torch.atan2(x, -y)
        sector = 2 * math.pi / 5
        folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
        radius = torch.hypot(x, y)
        px, py = radius * torch.sin(folded), radius * torch.cos(folded)
        inner = 0.5
        ax, ay = inner * math.sin(sector / 2), inner * math.cos(sector / 2)
        length = math.hypot(ax, ay - 1)
        return (px * (1 - ay) + (py - 1) * ax) / length
    raise UserError(f"shape '{shape}'; expected one of {', '.join(_CHOICES['shape'])}")


def render(scene: Scene, *, num_frames: int, size: int, fps: float, seed: int = 0) -> Tensor:
    """Frames of the scene, float [3, F, size, size] in [0, 1]; edges are antialiased over one pixel.

    `seed` moves the start position a little; the same seed gives the same picture at every size.
    """
    if not fps > 0:
        raise UserError(f"a clip of {fps} frames per second; expected more than 0")
    path = trajectory(scene, num_frames=num_frames, fps=fps, seed=seed)
    scale = path[:, 2, None, None]
    radius = RADIUS[scene.size] * scale
    axis = (torch.arange(size) + 0.5) / size - 0.5
    x = (axis[None, None, :] - path[:, 0, None, None]) / radius
    y = (axis[None, :, None] - path[:, 1, None, None]) / radius
    x, y = torch.broadcast_tensors(x, y)  # [F, H, W], in radii
    pixels_per_radius = radius * size
    coverage = (0.5 - signed_distance(scene.shape, x, y) * pixels_per_radius).clamp(0, 1)
    shade = torch.ones_like(coverage)
    if scene.texture == "striped":
        phase = torch.remainder(x + y, STRIPE_PERIOD)  # diagonal stripes that travel with the shape
        edge = (
            torch.minimum(phase, STRIPE_PERIOD - phase) - STRIPE_PERIOD / 4
        )  # > 0 inside a dark stripe
        dark = (0.5 + edge / math.sqrt(2) * pixels_per_radius).clamp(0, 1)
        shade = 1 - (1 - STRIPE_SHADE) * dark
    colour = torch.tensor(COLOURS[scene.colour])[:, None, None, None]
    ground = torch.tensor(BACKGROUNDS[scene.background])[:, None, None, None]
    return ground + coverage * (colour * shade - ground)


def render_shots(
    scenes: Sequence[Scene], num_frames: Sequence[int], *, size: int, fps: float, seed: int = 0
) -> Tensor:
    """One scene after another, each for as many frames, [3, sum F, size, size]; every shot starts anew."""
    shots = [
        render(scene, num_frames=frames, size=size, fps=fps, seed=seed + shot)
        for shot, (scene, frames) in enumerate(zip(scenes, num_frames, strict=True))
    ]
    return torch.cat(shots, dim=1)


# Splits and the data set

_SPLIT_SHARES: dict[Split, int] = {
    "train": 40,
    "feedback": 28,
    "held_out": 12,
    "validation": 6,
    "test": 14,
}
"""Percent of all scenes. `train`: the generator's clips; `feedback`: annotated, and what RLHF maximises on; `held_out`: the
held-out reward's; `validation`: keep-best; `test`: touched only by the final comparison."""


def scene_split(scene: Scene) -> Split:
    """The one split a scene belongs to, by a salted hash of its content: stable across runs, machines and languages."""
    digest = hashlib.sha256(
        ("toyworld-split-7:" + json.dumps(asdict(scene), sort_keys=True)).encode()
    ).digest()
    bucket = int.from_bytes(digest[:8], "big") % 100
    for split, share in _SPLIT_SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares add up to 100")


def split_scenes(split: Split, n: int, seed: int = 0, *, variety: Variety = "plain") -> list[Scene]:
    """`n` different scenes of a split in random order; a larger `n` extends the same list.

    Raises: UserError when the split is unknown or has fewer than `n` scenes.
    """
    if split not in _SPLIT_SHARES:
        hint = did_you_mean(split, _SPLIT_SHARES)
        raise UserError(f"toy split '{split}'; expected one of {', '.join(_SPLIT_SHARES)}.{hint}")
    rng = random.Random(f"{split}:{seed}")
    scenes: dict[Scene, None] = {}
    in_vain = 0
    while len(scenes) < n and in_vain < 10_000:
        scene = sample_scene(rng, variety)
        in_vain += 1
        if scene_split(scene) == split and scene not in scenes:
            scenes[scene] = None
            in_vain = 0
    if len(scenes) < n:
        raise UserError(
            f"{n} different toy scenes asked of split '{split}'; it gave {len(scenes)}; ask for fewer"
        )
    return list(scenes)


def prompt_split(
    split: Split,
    n: int,
    seed: int = 0,
    *,
    zh_fraction: float = 0.0,
    variety: Variety = "plain",
) -> list[str]:
    """`n` different captions; no scene is in two splits. `zh_fraction` of them, spread evenly, are Chinese."""
    return [
        caption(scene, "zh" if _is_turn(index, zh_fraction) else "en")
        for index, scene in enumerate(split_scenes(split, n, seed, variety=variety))
    ]


def sample_shots(
    rng: random.Random, num_shots: int, split: Split, *, variety: Variety = "plain"
) -> list[Scene]:
    """Random scenes of a split to follow one another; the colour changes at every cut."""
    scenes: list[Scene] = []
    while len(scenes) < num_shots:
        scene = sample_scene(rng, variety)
        if scene_split(scene) == split and (not scenes or scene.colour != scenes[-1].colour):
            scenes.append(scene)
    return scenes


def sample_shot_frames(rng: random.Random, num_shots: int, clip_frames: int) -> list[int]:
    """Random lengths of a clip's shots, cuts where the causal VAE allows them; the first shot has 5 frames where there is room."""
    (total,) = shot_latents([None], clip_frames)
    first = 2 if total > num_shots else 1
    starts = [0, *sorted(rng.sample(range(first, total), num_shots - 1)), total]
    latents = [after - start for start, after in itertools.pairwise(starts)]
    edges = [0, *cut_frames(latents), clip_frames]
    return [after - start for start, after in itertools.pairwise(edges)]


def caption_shots(
    scenes: Sequence[Scene], num_frames: Sequence[int], language: Language = "en"
) -> str:
    """The prompt of these shots. Lengths are told where they are not the even ones that a prompt without them means."""
    clip_frames = sum(num_frames)
    even = shot_latents([None] * len(scenes), clip_frames)
    asked = shot_latents(num_frames, clip_frames)
    return shot_prompt(
        [caption(scene, language) for scene in scenes], None if asked == even else num_frames
    )


def _is_turn(index: int, fraction: float) -> bool:
    return math.floor((index + 1) * fraction) > math.floor(index * fraction)


class ToyDatasetConfig(Config):
    """A folder of rendered, captioned clips: what the generator and the reward backbones are trained on."""

    num_clips: PositiveInt = 768
    """Clips to render; every scene is of the `train` split, a scene may come back at another start position."""
    num_frames: PositiveInt = 9
    """Frames per clip, 1 + 4 n for the causal VAE."""
    fps: PositiveFloat = 8.0
    """Frames per second of the files."""
    size: PositiveInt = 128
    """Height and width in pixels; even, as yuv420p asks."""
    seed: int = 0
    """Of the scenes and the start positions."""
    zh_fraction: float = Field(0.2, ge=0, le=1)
    """Share of the clips whose caption is Chinese."""
    variety: Variety = "plain"
    """`plain`: 648 simple scenes; `rich`: every shape, colour, texture and camera of the captions."""
    num_shots: PositiveInt = 1
    """Shots of the clips that have several: `[SHOT 1] ... [CUT] [SHOT 2] ...`, cut at random legal frames."""
    multi_shot_fraction: float = Field(0.5, ge=0, le=1)
    """Share of the clips that have them, if `num_shots` is more than 1."""

    @model_validator(mode="after")
    def _shots_fit(self) -> ToyDatasetConfig:
        if (self.num_frames - 1) % 4:
            lower = 1 + (self.num_frames - 1) // 4 * 4
            raise ValueError(
                f"num_frames {self.num_frames}; the causal VAE needs 1 + 4 n, use {lower} or {lower + 4}"
            )
        room = 1 + (self.num_frames - 1) // 4
        if self.num_shots > room:
            raise ValueError(
                f"num_shots {self.num_shots}; a clip of {self.num_frames} frames has room for {room}"
            )
        return self


def render_dataset(config: ToyDatasetConfig, out: Path) -> Path:
    """Write `<sha256>.mp4` files and `captions.jsonl` ({"path", "caption"} per line): the same as any folder of real clips.

    A complete folder of the same config is left as it is. Returns `out`.
    """
    from reelhf.hashing import sha256_file
    from reelhf.video import write_video

    stamp = out / "dataset.json"
    described = config.model_dump_json(indent=2)
    if stamp.exists() and stamp.read_text() == described:
        return out
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(config.seed)
    rows = []
    while len(rows) < config.num_clips:
        several = config.num_shots > 1 and _is_turn(len(rows), config.multi_shot_fraction)
        language: Language = "zh" if _is_turn(len(rows), config.zh_fraction) else "en"
        if several:
            scenes = sample_shots(rng, config.num_shots, "train", variety=config.variety)
            num_frames = sample_shot_frames(rng, config.num_shots, config.num_frames)
        else:
            scenes = [sample_scene(rng, config.variety)]
            num_frames = [config.num_frames]
            if scene_split(scenes[0]) != "train":
                continue
        frames = render_shots(
            scenes, num_frames, size=config.size, fps=config.fps, seed=rng.randrange(2**31)
        )
        draft = out / "draft.mp4"
        write_video(draft, frames, config.fps)
        clip = draft.rename(out / f"{sha256_file(draft)}.mp4")
        text = (
            caption_shots(scenes, num_frames, language) if several else caption(scenes[0], language)
        )
        rows.append({"path": clip.name, "caption": text})
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (out / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    stamp.write_text(described)
    return out
