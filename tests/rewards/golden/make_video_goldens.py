"""Writes video_processors.npz: what transformers' video processors do to one small clip. Run once, by hand; nothing imports this file.

The video processors need torchvision, whose wheels are linked to CUDA and cannot be imported beside a CPU torch, and whose mere presence breaks
transformers there. So it is put into a folder outside every environment, and the operators it registers and we never call are declared
empty before it is imported:

    pip install --no-deps --target /tmp/torchvision torchvision==0.28.0     # the release that pins the torch in use
    python tests/rewards/golden/make_video_goldens.py /tmp/torchvision

Written with torch 2.13.0, transformers 5.23.0, torchvision 0.28.0. Outputs are thinned out (every STRIDE-th number) to stay small.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

STRIDE = 37
OPERATORS = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward"),
    *("ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward", "_cuda_version"),
)
BOUNDS = {
    "up": (15_000, 40_000),
    "down": (3_000, 6_000),
}  # Qwen: pixels that enlarge and that shrink
CLIP_BOUNDS = {"up": (60_000, 120_000), "down": (9_000, 20_000)}


def import_processors(torchvision: str) -> dict[str, object]:
    sys.path.insert(0, torchvision)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    from transformers import (
        InternVLVideoProcessor,
        Qwen2VLVideoProcessor,
        VideoMAEVideoProcessor,
        VJEPA2VideoProcessor,
    )
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    def size(bounds: tuple[int, int]) -> dict[str, int]:
        return {"shortest_edge": bounds[0], "longest_edge": bounds[1]}

    return {
        **{
            f"qwen2_5_{way}": Qwen2VLVideoProcessor(size=size(b), cap_pixels_per_frame=False)
            for way, b in BOUNDS.items()
        },
        **{
            f"qwen3_{way}": Qwen3VLVideoProcessor(size=size(b), cap_pixels_per_frame=False)
            for way, b in CLIP_BOUNDS.items()
        },
        "internvl": InternVLVideoProcessor(size={"height": 56, "width": 56}),
        "vjepa2": VJEPA2VideoProcessor(crop_size=64),
        "videomae": VideoMAEVideoProcessor(
            size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
        ),
    }


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 5, 9, 13, generator=generator)
    clip = torch.nn.functional.interpolate(coarse, size=(5, 70, 104), mode="trilinear")[0]
    clip = (1.1 * clip - 0.05).clamp(0, 1)
    clip = (clip * 255).round().byte().transpose(0, 1)  # [F, 3, H, W]
    out = {"clip": clip.transpose(0, 1).numpy()}
    for name, processor in import_processors(sys.argv[1]).items():
        for kind, frames, rescale in (
            ("float", clip.float() / 255, False),
            ("bytes", clip, True),
        ):
            made = processor(
                [frames], do_rescale=rescale, do_sample_frames=False, return_tensors="pt"
            )
            values = made.get("pixel_values_videos", made.get("pixel_values"))
            out[f"{name}_{kind}"] = values.flatten()[::STRIDE].float().numpy()
            out[f"{name}_shape"] = np.array(values.shape)
            if "video_grid_thw" in made:
                out[f"{name}_grid"] = made["video_grid_thw"][0].numpy()
    np.savez_compressed(Path(__file__).with_name("video_processors.npz"), **out)


if __name__ == "__main__":
    main()
