"""Peak memory of decoding a clip, against its length: in one shot, and as a stream of pictures into a file.

    python benchmarks/vae_memory.py                       # 9 to 257 frames; a GPU is used where there is one
    python benchmarks/vae_memory.py --size 480 --tile 256

Each cell is a process of its own: on a CPU its peak resident memory less that of a process which only builds the VAE and the latents, on a
GPU the peak of torch's allocator less the same. One shot is what a caller of `VideoVAE.decode` and `write_video(frames)` has: all frames as
floats. The stream is `decode_stream` into `write_video`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from generator.streaming import DECODE_CHUNK, decode_stream
from generator.tiling import Tiling
from generator.vae import VAEConfig, VideoVAE
from reelhf.video import write_video

FRAMES = (9, 33, 65, 129, 257)
FPS = 24.0
MIB = 2**20


def build(num_frames: int, size: int, device: str) -> tuple[VideoVAE, torch.Tensor]:
    torch.manual_seed(0)
    vae = VideoVAE(VAEConfig()).requires_grad_(False).to(device)
    shape = vae.spec.latent_shape(num_frames, size, size)
    return vae, (0.3 * torch.randn(1, *shape)).to(device)


@torch.no_grad()
def measure(way: str, num_frames: int, options: argparse.Namespace) -> float:
    """Run one way in this process; its peak in MiB."""
    vae, latents = build(num_frames, options.size, options.device)
    path = options.folder / f"{way}_{num_frames}.mp4"
    tiling = None if not options.tile else Tiling(size=options.tile, overlap=options.tile_overlap)
    if way == "one shot":
        write_video(path, vae.decode(latents)[0][0], FPS, preset="ultrafast")
    elif way == "stream":
        decode = partial(vae.decode, tiling=tiling)
        chunks = decode_stream(decode, latents, chunk=options.chunk)
        write_video(path, (frames[0] for frames in chunks), FPS, preset="ultrafast")
    else:
        assert way == "nothing"
        write_video(path, torch.zeros(3, 1, options.size, options.size), FPS, preset="ultrafast")
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_own_process(way: str, num_frames: int, options: argparse.Namespace) -> float:
    words = [
        *("--cell", way, str(num_frames)),
        *("--size", str(options.size), "--chunk", str(options.chunk), "--device", options.device),
        *("--tile", str(options.tile), "--tile-overlap", str(options.tile_overlap)),
        *("--folder", str(options.folder)),
    ]
    # glibc raises its threshold for giving memory back as blocks are freed; held still, the peak is what was in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(
        [sys.executable, __file__, *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=320, help="side of the frames in pixels")
    parser.add_argument("--chunk", type=int, default=DECODE_CHUNK, help="latent frames at a time")
    parser.add_argument("--tile", type=int, default=0, help="side of a tile in the stream; 0: none")
    parser.add_argument("--tile-overlap", type=int, default=96)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(options.cell[0], int(options.cell[1]), options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
        tiles = (
            f"tiles of {options.tile}, overlap {options.tile_overlap}"
            if options.tile
            else "no tiles"
        )
        print(
            f"{options.size} x {options.size} pixels, {options.chunk} latent frames at a time, {tiles}; "
            f"{options.device} {name}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n"
        )
        idle = in_own_process("nothing", 9, options)
        print(f"process without decoding: {idle:,.0f} MiB, subtracted below\n")
        print("| frames | one shot, MiB | stream, MiB | one shot / stream |\n|---|---|---|---|")
        for frames in FRAMES:
            one, stream = (
                in_own_process(way, frames, options) - idle for way in ("one shot", "stream")
            )
            print(f"| {frames} | {one:,.0f} | {stream:,.0f} | {one / stream:.1f} |", flush=True)


if __name__ == "__main__":
    main()
