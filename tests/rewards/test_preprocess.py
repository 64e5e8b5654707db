from __future__ import annotations

import pytest
import torch

from rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    clamp_straight_through,
    normalise,
    pad_frames,
    patchify_qwen,
    resize,
)
from rewards.sizes import fit_area


def test_the_clamp_clips_values_and_keeps_the_gradient() -> None:
    x = torch.tensor([-0.5, 0.5, 1.5], requires_grad=True)
    y = clamp_straight_through(x)
    y.sum().backward()
    assert (
        y.tolist() == [0.0, 0.5, 1.0] and x.grad is not None and x.grad.tolist() == [1.0, 1.0, 1.0]
    )


def test_patches_equal_those_of_the_transformers_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, do_resize=False
    )
    image = torch.rand(3, 32, 48)
    theirs = processor(
        image.permute(1, 2, 0).numpy(),
        do_rescale=False,
        return_tensors="pt",
        input_data_format="channels_last",
    )
    frames = normalise(image[None, :, None].expand(1, 3, 2, 32, 48), CLIP_MEAN, CLIP_STD)
    ours, grid = patchify_qwen(frames, patch=8, merge=2, temporal=2)
    torch.testing.assert_close(ours, theirs["pixel_values"], atol=1e-5, rtol=0)
    assert list(grid) == theirs["image_grid_thw"][0].tolist()


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (90, 160), (20, 300)])
def test_fitting_an_area_keeps_multiples_and_about_the_area(size: tuple[int, int]) -> None:
    height, width = fit_area(*size, area=64 * 64, multiple=16)
    assert height % 16 == 0 and width % 16 == 0
    assert 0.6 < height * width / (64 * 64) < 1.6


def test_resizing_keeps_the_mean_and_each_frame_apart() -> None:
    frames = torch.zeros(1, 3, 2, 40, 40)
    frames[:, :, 1] = 1.0
    small = resize(frames, (16, 16))
    torch.testing.assert_close(small[:, :, 0], torch.zeros(1, 3, 16, 16))
    torch.testing.assert_close(small[:, :, 1], torch.ones(1, 3, 16, 16))


def test_odd_clips_are_padded_by_repeating_the_last_frame() -> None:
    frames = torch.rand(1, 3, 5, 4, 4)
    padded = pad_frames(frames, 2)
    assert padded.shape[2] == 6
    torch.testing.assert_close(padded[:, :, 5], frames[:, :, 4])
    assert pad_frames(padded, 2) is padded
