"""Our preprocessing is each model's own, up to float rounding, and one grey level for 8-bit pictures.

The image processors run here as they are (PIL). The video processors need torchvision, which is never installed: what they answered once lies in
golden/video_processors.npz, see make_video_goldens.py beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_rewards import CAPTIONS, smooth_clip
from torch import Tensor

from rewards.backbones.image import Clip, Siglip, Siglip2
from rewards.backbones.internvl import InternVL
from rewards.backbones.language import Qwen3, Qwen25
from rewards.backbones.video import VideoMae, VJepa2
from rewards.preprocess import (
    fixed_rate_frames,
    pad_frames,
    patchify_naflex,
    patchify_qwen,
    timestamps,
)
from rewards.recipes import PixelRecipe
from rewards.sizes import fit_patches, fit_pixels
from rewards.tokens import train_tokenizer

STRIDE = 37
GREY_LEVEL = 1 / 255
MOST_LEVELS = 1.1
"""Between 8-bit and float: a processor rounds after the resize, PIL once per direction."""
BOUNDS = {"up": (15_000, 40_000), "down": (3_000, 6_000)}
CLIP_BOUNDS = {"up": (60_000, 120_000), "down": (9_000, 20_000)}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(Path(__file__).parent / "golden" / "video_processors.npz") as file:
        return dict(file)


def qwen(recipe: PixelRecipe, bounds: tuple[int, int], patch: int, frames: Tensor) -> Any:
    recipe = recipe.model_copy(
        update={"min_pixels": bounds[0], "max_pixels": bounds[1], "multiple": 2 * patch}
    )
    padded = pad_frames(recipe(frames), 2)
    return patchify_qwen(padded, patch=patch, merge=2, temporal=2), recipe


def ours(name: str, frames: Tensor, *, clamp: bool) -> tuple[Tensor, PixelRecipe, Any]:
    """What we make of frames [1, 3, F, H, W], the recipe, and the grid of a Qwen."""
    family, _, way = name.rpartition("_")
    if family in ("qwen2_5", "qwen3"):
        recipe = (Qwen25 if family == "qwen2_5" else Qwen3).recipe
        bounds, patch = (BOUNDS, 14) if family == "qwen2_5" else (CLIP_BOUNDS, 16)
        recipe = recipe.model_copy(update={"clamp": clamp})
        (patches, grid), recipe = qwen(recipe, bounds[way], patch, frames)
        return patches, recipe, grid
    if name == "internvl":
        recipe = InternVL().recipe_of(
            SimpleNamespace(vision_config=SimpleNamespace(image_size=[56, 56]))
        )
        recipe = recipe.model_copy(update={"clamp": clamp})
    elif name == "vjepa2":
        recipe = VJepa2().recipe(SimpleNamespace(crop_size=64))
    else:
        recipe = VideoMae().recipe(SimpleNamespace(image_size=48))
    return recipe(frames).transpose(1, 2), recipe, None


NAMES = ("qwen2_5_up", "qwen2_5_down", "qwen3_up", "qwen3_down", "internvl", "vjepa2", "videomae")


@pytest.mark.parametrize("name", NAMES)
def test_video_pixels_equal_the_processors(golden: dict[str, Any], name: str) -> None:
    clip = torch.from_numpy(golden["clip"])[None].float() / 255  # [1, 3, F, H, W]
    values, recipe, grid = ours(name, clip, clamp=False)
    assert list(values.shape) == golden[f"{name}_shape"].tolist()
    assert grid is None or list(grid) == golden[f"{name}_grid"].tolist()
    thin = values.flatten()[::STRIDE]
    expected = torch.from_numpy(golden[f"{name}_float"])
    torch.testing.assert_close(thin, expected, atol=1e-5, rtol=0)
    # the processor rounds to whole grey levels after the resize; a gradient could not pass through that
    values, recipe, _ = ours(name, clip, clamp=True)
    of_bytes = torch.from_numpy(golden[f"{name}_bytes"])
    most = MOST_LEVELS * GREY_LEVEL / min(recipe.std)
    torch.testing.assert_close(values.flatten()[::STRIDE], of_bytes, atol=most, rtol=0)


def images() -> tuple[Tensor, list[Any]]:
    """Two smooth pictures [2, 3, 1, H, W] in [0, 1] and the same for PIL."""
    clip = torch.stack([smooth_clip(i, 1, 96)[..., :70, :] for i in range(2)])
    level = (clip * 255).round().byte()
    return level.float() / 255, [p[:, 0].permute(1, 2, 0).numpy() for p in level]


def test_siglip_pixels_equal_the_processor() -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    frames, pictures = images()
    theirs = SiglipImageProcessorPil(size={"height": 64, "width": 64})(
        pictures, return_tensors="pt"
    )["pixel_values"]
    recipe = Siglip().recipe(SimpleNamespace(image_size=64))
    most = MOST_LEVELS * GREY_LEVEL / min(recipe.std)
    torch.testing.assert_close(recipe(frames)[:, :, 0], theirs, atol=most, rtol=0)
    wrong = recipe.model_copy(update={"kernel": "bilinear"})(frames)[:, :, 0]
    assert (wrong - theirs).abs().max() > 2 * most  # the kernel is seen by this test


def test_clip_pixels_equal_the_processor() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    frames, pictures = images()
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )(pictures, return_tensors="pt")["pixel_values"]
    recipe = Clip().recipe(SimpleNamespace(image_size=48))
    most = MOST_LEVELS * GREY_LEVEL / min(recipe.std)
    torch.testing.assert_close(recipe(frames)[:, :, 0], theirs, atol=most, rtol=0)


def test_siglip2_patches_equal_the_processor() -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    frames, pictures = images()
    theirs = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=40)(
        pictures, return_tensors="pt"
    )
    recipe = Siglip2().recipe(SimpleNamespace(patch_size=8, num_patches=40))
    pixels = recipe(frames)[:, :, 0]
    rows, columns = (side // 8 for side in pixels.shape[-2:])
    assert theirs["spatial_shapes"].tolist() == [[rows, columns]] * 2
    patches = patchify_naflex(pixels, patch=8)
    real = theirs["pixel_values"][:, : rows * columns]
    assert theirs["pixel_attention_mask"].sum(1).tolist() == [rows * columns] * 2
    torch.testing.assert_close(patches, real, atol=MOST_LEVELS * GREY_LEVEL / 0.5, rtol=0)


def test_sizes_equal_the_processors_for_any_picture() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as of_clip
    from transformers.models.siglip2.image_processing_pil_siglip2 import (
        get_image_size_for_max_num_patches,
    )

    draws = torch.Generator().manual_seed(0)
    for _ in range(300):
        height, width = torch.randint(17, 1500, (2,), generator=draws).tolist()
        frames = int(torch.randint(2, 40, (), generator=draws))
        bounds = {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28}
        assert fit_pixels(height, width, multiple=28, **bounds) == smart_resize(
            height, width, 28, **bounds
        )
        bounds = {"min_pixels": 128 * 32 * 32, "max_pixels": 3000 * 32 * 32}
        assert fit_pixels(height, width, multiple=32, copies=frames, **bounds) == of_clip(
            frames, height, width, 2, 32, **bounds
        )
        assert fit_patches(height, width, patch=16, max_patches=256) == (
            get_image_size_for_max_num_patches(height, width, 16, 256)
        )
    with pytest.raises(ValueError, match="200 times apart"):
        fit_pixels(10, 3000, multiple=28, min_pixels=1, max_pixels=10**6)


@pytest.mark.parametrize("num_frames", [1, 4, 5])
def test_the_text_of_a_qwen3_clip_equals_its_processors(num_frames: int) -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    grid, fps = (-(-num_frames // 2), 4, 6), 3.0
    stand_in = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
        _calculate_timestamps=lambda *a: Qwen3VLProcessor._calculate_timestamps(None, *a),
    )
    metadata = SimpleNamespace(fps=fps, frames_indices=np.arange(num_frames))
    text = Qwen3VLProcessor.replace_video_token(
        stand_in, {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata]}, 0
    )
    tokenizer = train_tokenizer([*CAPTIONS, "<0.3 seconds>"], vocab_size=320)
    tokens = Qwen3().video_tokens(
        grid, merge=2, temporal=2, num_frames=num_frames, fps=fps, tokenizer=tokenizer
    )
    assert tokenizer.decode(tokens).replace(" ", "") == text.replace(" ", "")


def test_the_text_of_an_internvl_clip_equals_its_processors() -> None:
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    grid = (3, 4, 6)  # 2 x 3 places per frame
    stand_in = SimpleNamespace(
        start_image_token="<img>",
        image_token="<IMG_CONTEXT>",
        end_image_token="</img>",
        image_seq_length=6,
    )
    frames = {"pixel_values_videos": torch.zeros(1, 3, 1)}
    text = InternVLProcessor.replace_video_token(stand_in, frames, 0)
    tokenizer = train_tokenizer([*CAPTIONS, "Frame1: Frame2: Frame3:"], vocab_size=320)
    tokenizer.add_tokens(["<img>", "<IMG_CONTEXT>", "</img>"], special_tokens=True)
    tokens = InternVL().video_tokens(
        grid, merge=2, temporal=1, num_frames=3, fps=8.0, tokenizer=tokenizer
    )
    assert tokenizer.decode(tokens).replace(" ", "") == text.replace(" ", "")


def test_the_time_of_a_chunk_is_the_middle_of_its_frames() -> None:
    assert timestamps(5, 2.0, temporal=2) == pytest.approx([0.25, 1.25, 2.0])


def test_a_processors_file_sets_the_numbers(tmp_path: Path) -> None:
    file = tmp_path / "video_preprocessor_config.json"
    file.write_text(
        json.dumps(
            {
                "size": {"shortest_edge": 5000, "longest_edge": 9000},
                "resample": 2,
                "image_mean": [0.1, 0.2, 0.3],
                "image_std": [1, 2, 3],
            }
        )
    )
    recipe = Qwen25.recipe.from_folder(str(tmp_path))
    assert (recipe.min_pixels, recipe.max_pixels, recipe.kernel) == (5000, 9000, "bilinear")
    assert (recipe.mean, recipe.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert Qwen3.recipe.from_folder(str(tmp_path.parent)) == Qwen3.recipe
    crop = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}}
    recipe = VideoMae().recipe(SimpleNamespace(image_size=224)).updated(crop)
    assert (recipe.side, recipe.crop) == (40, 32)


def test_a_clamped_overshoot_keeps_its_gradient() -> None:
    frames = torch.zeros(1, 3, 1, 20, 20)
    frames[..., 10:] = 1.0  # an edge, which bicubic overshoots
    frames.requires_grad_()
    recipe = Siglip().recipe(SimpleNamespace(image_size=33))
    out = recipe(frames)
    assert out.min() >= -1
    assert out.max() <= 1
    free = recipe.model_copy(update={"clamp": False})(frames)
    assert free.max() > 1
    (gradient,) = torch.autograd.grad(out.sum(), frames, retain_graph=True)
    (without,) = torch.autograd.grad(free.sum(), frames)
    torch.testing.assert_close(gradient, without)


def test_frames_are_taken_at_fixed_seconds_whatever_the_rate() -> None:
    for fps in (8.0, 24.0, 30.0):
        seconds = fixed_rate_frames(round(4 * fps), fps, rate=2.0) / fps
        torch.testing.assert_close(
            seconds, torch.arange(8, dtype=torch.float32) / 2 + 0.25, atol=1 / fps, rtol=0
        )
    assert fixed_rate_frames(5, 1.0, rate=2.0).tolist() == [0, 1, 2, 3, 4]  # slower than asked
    assert len(fixed_rate_frames(1, 30.0, rate=2.0)) == 1
    assert len(fixed_rate_frames(300, 30.0, rate=2.0, at_most=6)) == 6
    draws = torch.Generator().manual_seed(0)
    drawn = {tuple(fixed_rate_frames(48, 24.0, rate=2.0, generator=draws).tolist()) for _ in "abc"}
    assert len(drawn) == 3
    assert all(list(d) == sorted(set(d)) and d[-1] < 48 for d in drawn)


def test_a_recipe_without_its_numbers_names_them() -> None:
    with pytest.raises(ValueError, match="sizing crop without side; expected a number"):
        PixelRecipe(
            sizing="crop", kernel="bilinear", mean=(0, 0, 0), std=(1, 1, 1), crop=32, area=1024
        )
