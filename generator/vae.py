"""A temporally causal video autoencoder: 4 x 16 x 16 pixels become one latent position of 48 channels; the ratios are a matter of config.

The first frame is coded alone and each later latent frame covers four frames, so F = 1 + 4n frames give T = 1 + n latents and
an image is a clip of one frame (Seedance 1.0, arXiv 2506.09113, 2.1; MAGVIT-v2, arXiv 2310.05737). Two paths are added:

* a linear shortcut fitted in closed form within seconds (`shortcut.py`): the encoder projects patches (1 x 16 x 16 pixels of the first frame,
  4 x 16 x 16 of later ones) on their principal components, the decoder is a regression of patches on the latents around them;
* a learned residual path of causal convolutions (`causal.py`) on two grids: fine tokens (4 x 4 pixels) and the latent grid (16 x 16).

All time mixing is causal convolution along the latent axis, and every normalisation is per position, so nothing leaks from later
to earlier frames and any chunking gives the same result. Streaming state is a flat tuple of tensors that `decode` and
`encode_chunk` take and return; nothing is kept on the module. Memory is bounded in time by chunks (recomputed in the backward pass:
`checkpoint_chunk`; or decoded one after another: `streaming.py`) and in space by tiles (`tiling.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generator.base import BackboneSpec
from generator.causal import (
    CausalBlock,
    ChannelNorm,
    LappedPatches,
    PixelsToTokens,
    Stream,
    StreamState,
    TokensToPixels,
    patchify,
    unpatchify,
)
from generator.shortcut import fit_shortcuts
from generator.tiling import Tiling, run_tiled
from reelhf.config import Config
from reelhf.errors import UserError

WEIGHTS_NAME, CONFIG_NAME = "vae.safetensors", "vae.json"
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -12.0, 4.0


class VAEConfig(Config):
    """Compression, and widths of the learned residual path."""

    channels: PositiveInt = 48
    """Latent channels."""
    temporal_ratio: PositiveInt = 4
    """Frames per latent frame, after the first, which is coded alone."""
    spatial_ratio: PositiveInt = 16
    """Side in pixels of a latent position."""
    fine_size: PositiveInt = 4
    """Side in pixels of a fine token; divides the spatial ratio."""
    encoder_fine_width: PositiveInt = 64
    """Channels on the fine grid of the encoder."""
    encoder_fine_blocks: NonNegativeInt = 1
    encoder_width: PositiveInt = 128
    """Channels on the latent grid of the encoder."""
    encoder_blocks: NonNegativeInt = 2
    decoder_width: PositiveInt = 128
    """Channels on the latent grid of the decoder."""
    decoder_blocks: NonNegativeInt = 2
    decoder_fine_width: PositiveInt = 64
    """Channels on the fine grid of the decoder: most of the cost of a reward gradient."""
    decoder_fine_blocks: NonNegativeInt = 2


class Posterior(NamedTuple):
    """Gaussian over un-normalised latents, each [B, C, T, h, w]."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + noise * (0.5 * self.log_variance).exp()

    def kl(self) -> Tensor:
        """Divergence from N(0, 1) in nats per latent element, a scalar."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).mean()


class Encoder(nn.Module):
    """Frames -> posterior: the shortcut's mean plus a residual, and a log-variance."""

    def __init__(self, config: VAEConfig, spec: BackboneSpec) -> None:
        super().__init__()
        group, size = spec.temporal_ratio, spec.spatial_ratio
        self.fold = size // config.fine_size
        self.radius = config.encoder_blocks + math.ceil(config.encoder_fine_blocks / self.fold)
        """How far a latent sees to each side, in latent positions."""
        self.shortcut = PixelsToTokens(size, group, config.channels)
        self.tokens = PixelsToTokens(config.fine_size, group, config.encoder_fine_width)
        self.fine = nn.ModuleList(
            CausalBlock(config.encoder_fine_width) for _ in range(config.encoder_fine_blocks)
        )
        self.down = nn.Conv3d(config.encoder_fine_width * self.fold**2, config.encoder_width, 1)
        self.coarse = nn.ModuleList(
            CausalBlock(config.encoder_width) for _ in range(config.encoder_blocks)
        )
        self.norm = ChannelNorm(config.encoder_width)
        self.head = nn.Conv3d(config.encoder_width, 2 * config.channels, 1)

    def forward(self, frames: Tensor, state: StreamState | None) -> tuple[Posterior, StreamState]:
        starts_clip, stream = state is None, Stream(state)
        frames = frames - 0.5  # centred
        hidden = self.tokens(frames, starts_clip)  # [B, fine width, T, H / 4, W / 4]
        for block in self.fine:
            hidden = block(hidden, stream)
        hidden = self.down(patchify(hidden, 1, self.fold))  # [B, width, T, h, w]
        for block in self.coarse:
            hidden = block(hidden, stream)
        residual, log_variance = self.head(F.silu(self.norm(hidden))).chunk(2, dim=1)
        mean = self.shortcut(frames, starts_clip) + residual
        return Posterior(mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)), tuple(
            stream.outgoing
        )


class Decoder(nn.Module):
    """Un-normalised latents -> frames: the shortcut's plus a residual."""

    def __init__(self, config: VAEConfig, spec: BackboneSpec) -> None:
        super().__init__()
        group, size = spec.temporal_ratio, spec.spatial_ratio
        self.fold = size // config.fine_size
        # the shortcut reads the latents next to a patch, and the fine path reads the shortcut
        self.radius = max(config.decoder_blocks, 1) + math.ceil(
            config.decoder_fine_blocks / self.fold
        )
        """How far a pixel sees to each side, in latent positions."""
        self.shortcut = LappedPatches(config.channels, group, size)
        self.widen = nn.Conv3d(config.channels, config.decoder_width, 1)
        self.coarse = nn.ModuleList(
            CausalBlock(config.decoder_width) for _ in range(config.decoder_blocks)
        )
        self.up = nn.Conv3d(config.decoder_width, config.decoder_fine_width * self.fold**2, 1)
        self.tokens = PixelsToTokens(config.fine_size, group, config.decoder_fine_width)
        self.fine = nn.ModuleList(
            CausalBlock(config.decoder_fine_width) for _ in range(config.decoder_fine_blocks)
        )
        self.norm = ChannelNorm(config.decoder_fine_width)
        self.head = TokensToPixels(config.fine_size, group, config.decoder_fine_width)

    def forward(self, latents: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        starts_clip, stream = state is None, Stream(state)
        frames = self.shortcut(latents, stream)  # [B, 3, F, H, W], centred
        hidden = self.widen(latents)
        for block in self.coarse:
            hidden = block(hidden, stream)
        # the fine path sees the linear reconstruction of its neighbours, so it can mend the seams between patches
        hidden = unpatchify(self.up(hidden), 1, self.fold) + self.tokens(frames, starts_clip)
        for block in self.fine:
            hidden = block(hidden, stream)
        frames = frames + self.head(F.silu(self.norm(hidden)), starts_clip)
        return frames + 0.5, tuple(stream.outgoing)


class VideoVAE(nn.Module):
    """Frames [B, 3, F, H, W] in [0, 1] <-> latents [B, C, T, h, w], normalised per channel."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or VAEConfig()
        self.spec = BackboneSpec(
            self.config.channels, self.config.temporal_ratio, self.config.spatial_ratio
        )
        if self.spec.spatial_ratio % self.config.fine_size:
            raise UserError(
                f"fine_size {self.config.fine_size}: it must divide the spatial ratio {self.spec.spatial_ratio}"
            )
        self.encoder = Encoder(self.config, self.spec)
        self.decoder = Decoder(self.config, self.spec)
        self.register_buffer("latent_mean", torch.zeros(self.config.channels))
        self.register_buffer("latent_std", torch.ones(self.config.channels))
        with (
            torch.no_grad()
        ):  # the residual path starts small beside the shortcut, with a narrow posterior
            for head in (self.encoder.head, self.decoder.head.first, self.decoder.head.later):
                head.weight.mul_(0.1)
                assert head.bias is not None
                head.bias.zero_()
            self.encoder.head.bias[self.config.channels :] = -6.0

    def posterior(
        self,
        frames: Tensor,
        state: StreamState | None = None,
        *,
        checkpoint_chunk: int | None = None,
    ) -> tuple[Posterior, StreamState]:
        """Un-normalised posterior of a chunk of frames; without a state the chunk starts a clip.

        `checkpoint_chunk`: as in `decode`, in latent frames.
        """
        group = self.spec.temporal_ratio
        num_frames = frames.shape[2] + (state is not None)  # a later chunk has 4n frames
        self.spec.check(num_frames, *frames.shape[3:])
        if checkpoint_chunk is None:
            return self.encoder(frames, state)
        first = group * checkpoint_chunk - (group - 1 if state is None else 0)
        chunks = [frames[:, :, :first], *frames[:, :, first:].split(group * checkpoint_chunk, 2)]
        posteriors, state = _recomputed(self.encoder, (c for c in chunks if c.shape[2]), state)
        means, log_variances = zip(*posteriors, strict=True)
        return Posterior(torch.cat(means, dim=2), torch.cat(log_variances, dim=2)), state

    def shortcut(self, frames: Tensor) -> Tensor:
        """Reconstruction of whole clips by the linear paths alone."""
        latents = self.encoder.shortcut(frames - 0.5, True)
        return self.decoder.shortcut(latents, Stream(None)) + 0.5

    def forward(
        self, frames: Tensor, noise: Tensor, *, checkpoint_chunk: int | None = None
    ) -> tuple[Tensor, Posterior]:
        """The training pass: (reconstruction, posterior) of whole clips; `noise` [B, C, T, h, w] samples the posterior."""
        posterior, _ = self.posterior(frames, checkpoint_chunk=checkpoint_chunk)
        sample = posterior.sample(noise)
        reconstruction, _ = self._decode_part(sample, None, checkpoint_chunk=checkpoint_chunk)
        return reconstruction, posterior

    def encode_chunk(
        self,
        frames: Tensor,
        state: StreamState | None = None,
        *,
        checkpoint_chunk: int | None = None,
        tiling: Tiling | None = None,
    ) -> tuple[Tensor, StreamState]:
        """Streaming `encode`: 1 + 4n frames first, then 4n with the state that the chunk before returned."""

        def mean(part: Tensor, past: StreamState | None) -> tuple[Tensor, StreamState]:
            posterior, past = self.posterior(part, past, checkpoint_chunk=checkpoint_chunk)
            return posterior.mean, past

        latents, state = self._in_tiles(mean, frames, state, tiling, encoding=True)
        return (latents - self._per_channel(self.latent_mean)) / self._per_channel(
            self.latent_std
        ), state

    def encode(
        self, frames: Tensor, *, checkpoint_chunk: int | None = None, tiling: Tiling | None = None
    ) -> Tensor:
        """[B, 3, F, H, W] in [0, 1] -> the posterior's mean, normalised, [B, C, T, h, w]; options as in `decode`.

        Raises: UserError unless F = 1 + 4n and H, W are multiples of 16 (of this VAE's ratios).
        """
        return self.encode_chunk(frames, checkpoint_chunk=checkpoint_chunk, tiling=tiling)[0]

    def decode(
        self,
        latents: Tensor,
        state: StreamState | None = None,
        *,
        checkpoint_chunk: int | None = None,
        tiling: Tiling | None = None,
    ) -> tuple[Tensor, StreamState]:
        """Normalised latents [B, C, T, h, w] -> (frames [B, 3, F, H, W], NOT clamped to [0, 1]; state).

        Streaming: without a state the chunk starts a clip (F = 4T - 3), with one it goes on (F = 4T). Differentiable in
        the latents and in the state; any chunking gives the same frames and gradients.

        Args:
            checkpoint_chunk: latent frames per chunk whose activations are recomputed in the backward pass instead of kept
                (non-reentrant checkpointing); None keeps them all.
            tiling: square tiles one after another; None decodes whole frames. All chunks of a clip take the same tiling.
        """
        latents = latents * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)
        network = partial(self._decode_part, checkpoint_chunk=checkpoint_chunk)
        return self._in_tiles(network, latents, state, tiling, encoding=False)

    def _decode_part(
        self, latents: Tensor, state: StreamState | None, *, checkpoint_chunk: int | None
    ) -> tuple[Tensor, StreamState]:
        if checkpoint_chunk is None:
            return self.decoder(latents, state)
        chunks, state = _recomputed(self.decoder, latents.split(checkpoint_chunk, dim=2), state)
        return torch.cat(chunks, dim=2), state

    def _in_tiles(
        self,
        network: Callable[[Tensor, StreamState | None], tuple[Tensor, StreamState]],
        inputs: Tensor,
        state: StreamState | None,
        tiling: Tiling | None,
        *,
        encoding: bool,
    ) -> tuple[Tensor, StreamState]:
        if tiling is None:
            return network(inputs, state)
        ratio = self.spec.spatial_ratio
        if encoding:  # a frame that does not fit the ratio is named before it is cut
            self.spec.check(inputs.shape[2] + (state is not None), *inputs.shape[3:])
        return run_tiled(
            network,
            inputs,
            state,
            tiling,
            ratio=ratio,
            halo=self.encoder.radius if encoding else self.decoder.radius,
            scale_in=ratio if encoding else 1,
            scale_out=1 if encoding else ratio,
        )

    def reconstruct(self, frames: Tensor, *, tiling: Tiling | None = None) -> Tensor:
        """Whole clips through the posterior's mean, not clamped."""
        return self.decode(self.encode(frames, tiling=tiling), tiling=tiling)[0]

    def init_shortcut(
        self, clips: Sequence[Tensor], *, max_patches: int = 6144, seed: int = 0
    ) -> None:
        """Fit both linear shortcuts in closed form; latents of the encoder's are whitened: unit variance per channel.

        Args:
            clips: batches [N, 3, F, H, W] in [0, 1], F = 1 + 4n with n >= 1, of every size that will be used.
            max_patches: read per batch.
        """
        for frames in clips:
            self.spec.check(*frames.shape[2:])
        fit_shortcuts(
            self.encoder.shortcut,
            self.decoder.shortcut,
            clips,
            self.spec,
            max_patches=max_patches,
            seed=seed,
        )

    @torch.no_grad()
    def silence_residual(self) -> None:
        """From now on, until it is trained, the residual path adds nothing to what the shortcuts give."""
        for head in (self.encoder.head, self.decoder.head.first, self.decoder.head.later):
            head.weight.zero_()

    @torch.no_grad()
    def set_latent_statistics(self, latents: Sequence[Tensor]) -> None:
        """Store the mean and std per channel of un-normalised latents, batches [N, C, T, h, w] of any sizes."""
        by_channel = torch.cat([batch.transpose(0, 1).flatten(1) for batch in latents], dim=1)
        self.latent_mean.copy_(by_channel.mean(1))
        self.latent_std.copy_(by_channel.std(1).clamp_min(1e-4))

    def save(self, directory: str | Path) -> Path:
        """Write `vae.json` and `vae.safetensors`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_NAME).write_text(
            json.dumps(self.config.model_dump(mode="json"), indent=2) + "\n"
        )
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()
        }
        save_file(tensors, directory / WEIGHTS_NAME)
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> VideoVAE:
        """Read a folder written by `save`, in eval mode and frozen."""
        directory = Path(directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise UserError(f"{directory} is not a VAE folder: {name} is missing")
        vae = cls(VAEConfig.model_validate_json((directory / CONFIG_NAME).read_text()))
        vae.load_state_dict(load_file(directory / WEIGHTS_NAME))
        return vae.eval().requires_grad_(False)

    @staticmethod
    def _per_channel(values: Tensor) -> Tensor:
        return values.view(1, -1, 1, 1, 1)


def _recomputed(
    network: nn.Module, chunks: Iterable[Tensor], state: StreamState | None
) -> tuple[list[Any], StreamState]:
    """Outputs of consecutive chunks whose activations are computed again in the backward pass, and the last state."""
    outputs = []
    for chunk in chunks:
        output, state = checkpoint(network, chunk, state, use_reentrant=False)
        outputs.append(output)
    assert state is not None
    return outputs, state
