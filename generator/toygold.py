"""Ground truth of the toy world: how good a clip is for its prompt, per dimension, measured from pixels alone.

This is the laboratory's yardstick, never a training signal: the simulated annotators look through it and the final
reports quote it; no reward, trainer or checkpoint selection may import it.

Everything is soft. A score falls smoothly with the error, `falloff(error, half)` = 1 / (1 + (error / half)^2), so that
blurry, blocky, half-right clips of a weak generator are still told apart; nothing is thresholded, nothing becomes NaN.
Lengths are fractions of the frame's side, colours are RGB in [0, 1].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from generator.shots import cut_frames, parse_shots, shot_latents
from generator.toyworld import (
    BACKGROUNDS,
    COLOURS,
    DIRECTION,
    RADIUS,
    SPEED,
    STRIPE_SHADE,
    ZOOM_PER_SECOND,
    Scene,
    scenes_from_caption,
    signed_distance,
)
from reelhf.errors import UserError

GOLD_DIMENSIONS: tuple[str, ...] = (
    "prompt_following",
    "motion_quality",
    "aesthetic_quality",
    "structural_stability",
)
"""Always measured. `preservation` joins them when the first frame was given."""
COMPOSITE_WEIGHTS: dict[str, float] = {
    "prompt_following": 0.3,
    "motion_quality": 0.25,
    "aesthetic_quality": 0.2,
    "structural_stability": 0.25,
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
COARSE, FINE = 64, 2 * 64
"""Sides of the grids that masks (coarse) and edges (fine) are measured on, whatever the clip's size."""
STRIPE_GAP = 4
"""Widest dark stripe, in pixels of the coarse grid."""
PATCH = 24
"""Side of the canonical picture of a shape: centred on its centroid, scaled by its area."""
PATCH_REACH = 2.2
"""Half the canonical picture's side, in radii of the disc of the same area."""
STRIPE_VARIATION = 0.22
"""Relative standard deviation of the brightness inside a rendered striped shape, measured on the coarse grid."""
MIN_CONTRAST = 0.12
"""A foreground nearer than this to its background, in RGB distance, does not count as present."""


def falloff(error: Tensor, half: float) -> Tensor:
    """1 at no error, 1/2 at `half`, with a long tail: clips that are all bad still differ."""
    return 1 / (1 + (error / half) ** 2)


def measure(
    frames: Tensor, prompt: str, fps: float, first_frame: Tensor | None = None
) -> dict[str, float]:
    """Score one clip against its caption.

    Args:
        frames: [3, F, H, W], float in [0, 1] (values outside are clamped) or uint8; any size, black bars are cut off.
        prompt: a caption of the toy world, either language, or a prompt of several shots: each is then judged on its own frames.
        fps: frames per second of `frames`.
        first_frame: what an image-to-video clip had to start from, [3, H, W]; adds "preservation".
    Returns: the GOLD_DIMENSIONS, each in [0, 1], and "motion_amplitude", the speed of the shape in sides per second,
        at most 1, which is no quality. A clip of several shots has the mean over its frames, and "cuts": how clean the cuts are at
        the frames where the prompt puts them.
    Raises: UserError when the prompt is not a toy caption or `frames` is no clip.
    """
    scenes = scenes_from_caption(prompt)
    if scenes is None:
        raise UserError(f"'{prompt[:80]}' is not a toy caption: only those have a gold score")
    if frames.ndim != 4 or frames.shape[0] != 3 or frames.shape[1] < 1:
        raise UserError(f"a clip of shape {tuple(frames.shape)}; expected [3, F, H, W]")
    if not fps > 0:
        raise UserError(f"a clip of {fps} frames per second; expected more than 0")
    if len(scenes) == 1:
        return _measure_shot(frames, scenes[0], fps, first_frame)
    edges = _edges(prompt, frames.shape[1])
    shots = [
        _measure_shot(frames[:, start:end], scene, fps, first_frame if start == 0 else None)
        for scene, (start, end) in zip(scenes, itertools.pairwise(edges), strict=True)
    ]
    shares = [(end - start) / frames.shape[1] for start, end in itertools.pairwise(edges)]
    scores = {
        name: sum(share * shot[name] for share, shot in zip(shares, shots, strict=True))
        for name in shots[-1]
    }
    if first_frame is not None:
        scores["preservation"] = shots[0]["preservation"]
    return scores | {"cuts": _cut_score(_standard(frames), edges[1:-1])}


def _measure_shot(
    frames: Tensor, scene: Scene, fps: float, first_frame: Tensor | None
) -> dict[str, float]:
    """`measure` of one scene."""
    with torch.no_grad():
        fine = _standard(frames)
        seen = _see(fine, scene, fps)
        scores = {
            "prompt_following": _prompt_following(seen, scene),
            "motion_quality": _motion_quality(seen, scene),
            "aesthetic_quality": _aesthetic_quality(fine, seen, scene),
            "structural_stability": _structural_stability(seen),
        }
        if first_frame is not None:
            scores["preservation"] = _preservation(fine, seen, _standard(first_frame[:, None]))
        scores["motion_amplitude"] = seen.velocity.norm().clamp(max=1)
    return {name: float(value) for name, value in scores.items()}


@dataclass(frozen=True)
class SeenShots:
    """What a clip shows where a prompt asks for shots; for counting, where `measure` is for grading."""

    cuts: list[int]
    """The first frames after the largest changes of picture, as many as the prompt has cuts, in order."""
    subjects: list[tuple[str, str]]
    """(shape, colour) most like what is in each asked shot; ("nothing", "nothing") where there is no foreground."""
    asked_cuts: list[int]
    asked_subjects: list[tuple[str, str]]


@torch.no_grad()
def see_shots(frames: Tensor, prompt: str, fps: float) -> SeenShots:
    """Cuts and subjects of a clip [3, F, H, W] beside those that its prompt asks for. Raises: UserError for a prompt of another world."""
    scenes = scenes_from_caption(prompt)
    if scenes is None:
        raise UserError(f"'{prompt[:80]}' is not a toy caption: nothing to compare the shots with")
    edges = _edges(prompt, frames.shape[1])
    changes = _changes(_standard(frames))
    largest = changes.topk(len(scenes) - 1).indices + 1
    subjects = [
        _subject(_see(_standard(frames[:, start:end]), scene, fps), scene.texture)
        for scene, (start, end) in zip(scenes, itertools.pairwise(edges), strict=True)
    ]
    asked = [(scene.shape, scene.colour) for scene in scenes]
    return SeenShots(sorted(largest.tolist()), subjects, edges[1:-1], list(asked))


def _edges(prompt: str, num_frames: int) -> list[int]:
    """Where the shots that a prompt asks for begin, and the end of the clip."""
    latents = shot_latents(parse_shots(prompt).num_frames, num_frames)
    return [0, *cut_frames(latents), num_frames]


def _changes(fine: Tensor) -> Tensor:
    """Mean absolute change of RGB from each frame to the next, [F - 1]."""
    return fine.diff(dim=1).abs().mean(dim=(0, 2, 3))


def _cut_score(fine: Tensor, cuts: list[int]) -> float:
    """How far the picture changes at the cuts against where it changes most elsewhere: 1/2 when as much, near 1 for a clean cut."""
    changes = _changes(fine)
    at_cuts = changes[[cut - 1 for cut in cuts]]
    elsewhere = changes.clone()
    elsewhere[[cut - 1 for cut in cuts]] = 0
    return float((at_cuts / (at_cuts + elsewhere.max() + 1e-6)).mean())


def _subject(seen: _Seen, texture: str) -> tuple[str, str]:
    """The template and the colour of the palette that lie nearest."""
    if seen.presence < 0.3:
        return "nothing", "nothing"
    shape = SHAPES[int(_overlaps(seen).mean(0).argmax())]
    distances = (_palette(texture) - seen.colour.mean(0)).norm(dim=-1)
    return shape, list(COLOURS)[int(distances.argmin())]


def composite(gold: Mapping[str, float]) -> float:
    """The weighted mean of the GOLD_DIMENSIONS, in [0, 1]; weights fixed once, above."""
    return sum(weight * gold[name] for name, weight in COMPOSITE_WEIGHTS.items())


# Seeing: from pixels to a soft mask, a path, a colour and a canonical picture of the shape


@dataclass(frozen=True)
class _Seen:
    seconds: Tensor
    """Time of each frame, [F]."""
    coarse: Tensor
    """[3, F, COARSE, COARSE]"""
    contrast: Tensor
    """RGB distance of the foreground from the background, scalar."""
    mask: Tensor
    """Soft foreground, [F, COARSE, COARSE] in [0, 1]."""
    presence: Tensor
    """Is anything there at all? scalar in [0, 1]."""
    area: Tensor
    """Of the mask, as a fraction of the frame, [F]."""
    centre: Tensor
    """Centroid, x right and y down from the middle, [F, 2]."""
    velocity: Tensor
    """Sides per second, least squares over all frames, [2]."""
    jerk: Tensor
    """Root mean square of the path's second difference, in sides: 0 for any steady motion."""
    colour: Tensor
    """Mean foreground RGB per frame, [F, 3]."""
    ground: Tensor
    """Background RGB per frame, [F, 3]."""
    shape: Tensor
    """Canonical picture, [F, PATCH, PATCH]."""
    inside: Tensor
    """Share of the mask within the shape's own reach: 1 for a single blob, [F]."""


def _standard(frames: Tensor) -> Tensor:
    """Float in [0, 1], black bars cut off, at the FINE size; [3, F, H, W] -> [3, F, FINE, FINE]."""
    frames = frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()
    frames = frames.nan_to_num(0.5).clamp(0, 1)
    lit = frames.amax(dim=(0, 1)) > 0.08  # bars are black in every frame; the darkest ground is not
    rows, columns = lit.any(1).nonzero(), lit.any(0).nonzero()
    if len(rows) >= 8 and len(columns) >= 8:
        frames = frames[
            :, :, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1
        ]
    if frames.shape[-2:] == (FINE, FINE):
        return frames
    return F.interpolate(
        frames.transpose(0, 1), size=(FINE, FINE), mode="bilinear", antialias=True
    ).transpose(0, 1)


def _soften(frames: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels, the outermost rows and columns repeated; [3, F, H, W] -> the same."""
    rows = torch.cat([frames[..., :1, :], frames, frames[..., -1:, :]], dim=-2)
    frames = (rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]) / 3
    columns = torch.cat([frames[..., :1], frames, frames[..., -1:]], dim=-1)
    return (columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:]) / 3


def _distance(frames: Tensor, ground: Tensor) -> Tensor:
    """RGB distance from the background, [3, F, H, W] and [F, 3] -> [F, H, W]."""
    return (frames - ground.T[:, :, None, None]).square().sum(0).sqrt()


def _contrast(distance: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The mean distance weighted by its own cube: that of the foreground, whatever its size."""
    cube = distance.square() * distance
    return (cube * distance).sum(dim) / cube.sum(dim).clamp(min=1e-8)


def _close(mask: Tensor, gap: int) -> Tensor:
    """Fill gaps of up to `gap` pixels (even): stripes are part of the shape, [F, H, W]."""
    grown = F.max_pool2d(mask[:, None], gap + 1, stride=1, padding=gap // 2)
    return -F.max_pool2d(-grown, gap + 1, stride=1, padding=gap // 2)[:, 0]


def _soft_mask(distance: Tensor, contrast: Tensor, striped: bool) -> Tensor:
    mask = ((distance / contrast - 0.25) / 0.5).clamp(0, 1)  # one half stays one half
    return _close(mask, STRIPE_GAP) if striped else mask


def _see(fine: Tensor, scene: Scene, fps: float) -> _Seen:
    coarse = (fine[..., 0::2, :] + fine[..., 1::2, :]) / 2  # FINE is twice COARSE
    coarse = (coarse[..., 0::2] + coarse[..., 1::2]) / 2
    num_frames = coarse.shape[1]
    ring = COARSE // 16
    border = torch.ones(COARSE, COARSE, dtype=torch.bool)
    border[ring:-ring, ring:-ring] = False
    ground = coarse[:, :, border].median(dim=2).values.T  # [F, 3]
    # shape and motion are judged through a little blur, so that grain costs looks and not structure
    distance = _distance(_soften(coarse), ground)
    raw_contrast = _contrast(distance, dim=(0, 1, 2))
    mask = _soft_mask(distance, raw_contrast.clamp(min=MIN_CONTRAST), scene.texture == "striped")

    axis = (torch.arange(COARSE) + 0.5) / COARSE - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grid = torch.stack([x, y], dim=-1)  # [H, W, 2]
    centre = _centroid(mask, grid)
    for _ in range(2):  # forget far specks: look again through a window around the last answer
        window = torch.exp(-(grid - centre[:, None, None]).square().sum(-1) / (2 * 0.2**2))
        centre = _centroid(mask * window, grid, fallback=centre)
    area = mask.mean(dim=(1, 2))
    smallest = RADIUS["small"] ** 2 * min(_unit_area(shape) for shape in SHAPES)
    # something, but not everything: a picture that is all foreground shows no shape, [F]
    there = (area / (0.3 * smallest)).clamp(0, 1) / (1 + (area / 0.42) ** 8)
    presence = ((raw_contrast - 0.02) / (2 * MIN_CONTRAST)).clamp(0, 1) * there.mean()

    seconds = torch.arange(num_frames) / fps
    weight = there + 1e-3
    time = seconds - (weight * seconds).sum() / weight.sum()
    spread = (weight * time.square()).sum().clamp(min=1e-8)
    velocity = (weight[:, None] * time[:, None] * centre).sum(0) / spread
    second = centre[2:] - 2 * centre[1:-1] + centre[:-2]
    jerk = second.square().sum(-1).mean().sqrt() if num_frames > 2 else torch.zeros(())

    core = mask.square()
    colour = (coarse * core).sum(dim=(2, 3)).T / core.sum(dim=(1, 2)).clamp(min=1e-3)[:, None]
    radius = (area / math.pi).sqrt().clamp(min=0.02)
    reach = (grid - centre[:, None, None]).norm(dim=-1) / radius[:, None, None]
    near = torch.sigmoid((1.7 - reach) / 0.1)  # the tips of a star lie at 1.5 radii of its disc
    inside = (mask * near).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1e-3)
    return _Seen(
        seconds=seconds,
        coarse=coarse,
        contrast=raw_contrast,
        mask=mask,
        presence=presence,
        area=area,
        centre=centre,
        velocity=velocity if num_frames > 1 else torch.zeros(2),
        jerk=jerk,
        colour=colour,
        ground=ground,
        shape=_canonical(mask, centre, radius),
        inside=inside,
    )


def _centroid(mask: Tensor, grid: Tensor, fallback: Tensor | None = None) -> Tensor:
    """[F, H, W] -> [F, 2]; an empty mask falls back softly to the middle, or to the centre given."""
    mass = mask.sum(dim=(1, 2))[:, None]
    home = torch.zeros(mask.shape[0], 2) if fallback is None else fallback
    return ((mask[..., None] * grid).sum(dim=(1, 2)) + 1e-2 * home) / (mass + 1e-2)


def _canonical(mask: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """The mask seen in units of its own radius around its own centroid, [F, H, W] -> [F, PATCH, PATCH]."""
    axis = (torch.arange(PATCH) + 0.5) / PATCH * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    patch = torch.stack([x, y], dim=-1) * PATCH_REACH
    where = centre[:, None, None] + radius[:, None, None, None] * patch  # [F, PATCH, PATCH, 2]
    return F.grid_sample(mask[:, None], where * 2, align_corners=False)[:, 0]


@lru_cache(maxsize=1)
def _templates() -> Tensor:
    """Canonical pictures of the five shapes, [5, PATCH, PATCH], made by the same measurement."""
    axis = ((torch.arange(COARSE) + 0.5) / COARSE - 0.5) / RADIUS["large"]
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixels = RADIUS["large"] * COARSE
    masks = torch.stack([(0.5 - signed_distance(s, x, y) * pixels).clamp(0, 1) for s in SHAPES])
    grid = torch.stack([x, y], dim=-1) * RADIUS["large"]
    radius = (masks.mean(dim=(1, 2)) / math.pi).sqrt()
    return _canonical(masks, _centroid(masks, grid), radius)


@lru_cache(maxsize=len(SHAPES))
def _unit_area(shape: str) -> float:
    """Area of the shape of radius 1."""
    axis = (torch.arange(400) + 0.5) / 100 - 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return float((signed_distance(shape, x, y) < 0).float().sum() / 100**2)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Soft intersection over union of masks, over the last two axes."""
    return torch.minimum(a, b).sum((-2, -1)) / torch.maximum(a, b).sum((-2, -1)).clamp(min=1e-3)


def _overlaps(seen: _Seen) -> Tensor:
    """Each frame's canonical picture against the five templates, [F, 5]."""
    return _overlap(seen.shape[:, None], _templates()[None])


# Judging


def _progress(seen: _Seen, scene: Scene) -> Tensor:
    """Does it go where the prompt says, as fast as it says? 1 = exactly, 0.2 = not at all."""
    if scene.motion == "still":
        return falloff(seen.velocity.norm(), 0.1)
    along = (seen.velocity * torch.tensor(DIRECTION[scene.motion])).sum() / SPEED[scene.speed]
    return falloff(along - 1, 0.5)


def _motion_quality(seen: _Seen, scene: Scene) -> Tensor:
    """The way asked, at the speed asked, straight and without jerks."""
    direction = torch.tensor(DIRECTION[scene.motion])
    astray = (seen.velocity - (seen.velocity * direction).sum() * direction).norm()
    straight = falloff(astray, 0.15) if scene.motion != "still" else torch.ones(())
    steady = falloff(seen.jerk, 0.06)
    return seen.presence * _progress(seen, scene) * (0.4 + 0.6 * steady * straight)


def _prompt_following(seen: _Seen, scene: Scene) -> Tensor:
    """Colour, shape, background, motion, size, texture and camera as the caption says."""
    shade = (1 + STRIPE_SHADE) / 2 if scene.texture == "striped" else 1.0
    colour_error = (seen.colour.mean(0) - shade * torch.tensor(COLOURS[scene.colour])).norm()
    ground_error = (seen.ground.mean(0) - torch.tensor(BACKGROUNDS[scene.background])).norm()
    overlaps = _overlap(seen.shape[:, None], _templates()[None]).mean(0)  # [5]
    shape = torch.softmax(overlaps / 0.06, dim=0)[SHAPES.index(scene.shape)]
    radius = (seen.area / _unit_area(scene.shape)).sqrt().clamp(min=0.01)  # [F]
    size = falloff((radius.mean() / RADIUS[scene.size]).log(), 0.2)
    growth = _slope(radius.log(), seen.seconds)
    camera = falloff(growth - (ZOOM_PER_SECOND if scene.camera == "zoom" else 0.0), 0.2)
    foreground = (
        0.34 * falloff(colour_error, 0.3)
        + 0.20 * shape
        + 0.16 * _progress(seen, scene)
        + 0.08 * size
        + 0.05 * _texture(seen, scene)
        + 0.03 * camera
    )
    return seen.presence * foreground + 0.14 * falloff(ground_error, 0.2)


def _texture(seen: _Seen, scene: Scene) -> Tensor:
    """Brightness varies inside the shape as much as stripes do, or not at all."""
    core = -F.max_pool2d(-seen.mask[:, None], 3, stride=1, padding=1)[:, 0]
    light = seen.coarse.sum(0)
    mass = core.sum().clamp(min=1e-3)
    mean = (core * light).sum() / mass
    variation = ((core * (light - mean).square()).sum() / mass).sqrt() / mean.clamp(min=0.1)
    return falloff(variation - (STRIPE_VARIATION if scene.texture == "striped" else 0.0), 0.1)


def _aesthetic_quality(fine: Tensor, seen: _Seen, scene: Scene) -> Tensor:
    """Crisp edges, the palette's saturated colours, a clean ground, a clean shape, no seams; whatever was asked for."""
    distance = _distance(fine, seen.ground)
    far = 1 - F.max_pool2d(seen.mask[:, None], 5, stride=1, padding=2)
    far = F.interpolate(far, scale_factor=FINE // COARSE, mode="nearest")[:, 0]
    rough = ((far * distance.square()).sum() / far.sum().clamp(min=1)).sqrt()
    flat = falloff(rough, 0.06) * (far.mean() / 0.3).clamp(max=1)  # no ground left: not a clean one

    # each frame against its own contrast: a lamp that flickers blurs nothing
    contrast = _contrast(distance, dim=(1, 2)).clamp(min=MIN_CONTRAST)[:, None, None]
    coverage = (distance / contrast - 0.1) / 0.8
    coverage = coverage.clamp(0, 1) * (1 - far)
    if scene.texture == "striped":
        coverage = _close(coverage, STRIPE_GAP * FINE // COARSE)
    # across an edge that rises linearly over w the first sum grows by 2 w / 3, the second by 1, whatever the outline
    blur = (4 * coverage * (1 - coverage)).sum()
    across = coverage.diff(dim=-1)[..., :-1, :].square() + coverage.diff(dim=-2)[..., :-1].square()
    outline = (across + 1e-10).sqrt().sum()
    crisp = falloff(1.5 * blur / outline.clamp(min=1.0) / FINE, 0.035)

    vivid = falloff(_nearest(seen.colour.mean(0), _palette(scene.texture)), 0.3)
    seams = falloff(_seams(fine), 0.012)
    foreground = seen.presence * (0.45 * crisp + 0.2 * vivid)
    return foreground + (0.3 + 0.7 * seen.presence) * (0.22 * flat + 0.13 * seams)


def _palette(texture: str) -> Tensor:
    colours = torch.tensor(list(COLOURS.values()))
    return colours * (1 + STRIPE_SHADE) / 2 if texture == "striped" else colours


def _nearest(colour: Tensor, palette: Tensor) -> Tensor:
    return (palette - colour).norm(dim=-1).min()


def _seams(fine: Tensor) -> Tensor:
    """How much steeper the picture is across the lines of an 8 x 8 grid than beside them, in RGB units."""
    cell = FINE // 8
    excess = []
    for steps in (
        fine.diff(dim=-1).abs().mean(dim=(0, 1, 2)),
        fine.diff(dim=-2).abs().mean(dim=(0, 1, 3)),
    ):
        at = steps[cell - 1 :: cell]
        beside = (steps[cell - 4 :: cell][: len(at)] + steps[cell + 2 :: cell][: len(at)]) / 2
        excess.append((at - beside).mean())
    return torch.stack(excess).mean().clamp(min=0)


def _structural_stability(seen: _Seen) -> Tensor:
    """One intact body that keeps its area, outline and colour from frame to frame; how it moves does not matter."""
    steady_area = falloff(_wobble(seen.area.clamp(min=1e-3).log(), seen.seconds), 0.15)
    outline = _overlap(seen.shape, seen.shape.mean(0, keepdim=True)).mean()
    intact = _overlap(seen.shape[:, None], _templates()[None]).amax(1).mean()
    change = (seen.colour - seen.colour.mean(0)).square().sum(-1).mean().sqrt()
    flicker = (seen.ground - seen.ground.mean(0)).square().sum(-1).mean().sqrt()
    steady_colour = falloff(change, 0.06) * falloff(flicker, 0.03)
    return seen.presence * (
        0.15 * steady_area
        + 0.27 * falloff(1 - outline, 0.15)
        + 0.27 * falloff(1 - intact, 0.25)
        + 0.1 * seen.inside.mean()
        + 0.21 * steady_colour
    )


def _preservation(fine: Tensor, seen: _Seen, first: Tensor) -> Tensor:
    """The given first frame is kept, and later frames keep its colours."""
    kept = falloff((fine[:, :1] - first).square().mean().sqrt(), 0.1)
    drift = (seen.colour - seen.colour[:1]).norm(dim=-1) + (seen.ground - seen.ground[:1]).norm(
        dim=-1
    )
    return 0.7 * kept + 0.3 * seen.presence * falloff(drift.mean(), 0.15)


def _slope(values: Tensor, seconds: Tensor) -> Tensor:
    """Least squares slope of [F] over [F] seconds; 0 for a single frame."""
    time = seconds - seconds.mean()
    return (time * values).sum() / time.square().sum().clamp(min=1e-8)


def _wobble(values: Tensor, seconds: Tensor) -> Tensor:
    """Root mean square around the straight line through [F] values."""
    time = seconds - seconds.mean()
    return (values - values.mean() - _slope(values, seconds) * time).square().mean().sqrt()
