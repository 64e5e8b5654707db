"""The diffusion transformer: alternating spatial and temporal layers over latents, text beside them; or layers of full attention.

Input channels: noisy latents (48), condition latents (48), condition mask (1), and for the refiner the low-resolution
latents (48) through a zero-initialised projection of their own, so that a refiner starts bit-equal to its base.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from generator.blocks import SpatialBlock, TemporalBlock, modulate, window_map, window_packing
from generator.packed import FramePacking
from generator.parallel import FrameShards, SequenceGroup
from generator.rope import (
    grid_positions,
    rope_angles,
    shot_positions,
    shots_of_frames,
    text_positions,
    video_positions,
)
from reelhf.config import Config
from reelhf.errors import UserError

WHITENING_FLOOR = 1e-2
"""Of the mean variance: directions of the pooled prompt that are quieter than this are not amplified further."""


class DiTConfig(Config):
    """Architecture of the denoiser; it travels with the checkpoint."""

    channels: PositiveInt = 48
    """Latent channels, as the VAE has them."""
    width: PositiveInt = 192
    """Channels of a token."""
    num_heads: PositiveInt = 6
    """Attention heads; each has width / num_heads channels, at least 6 for the three rotary axes."""
    num_pairs: PositiveInt = 3
    """Pairs of one spatial and one temporal layer."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the vision MLPs over `width`."""
    text_mlp_ratio: float = Field(2.0, gt=0)
    """Hidden width of the text MLPs over `width`."""
    text_width: PositiveInt = 128
    """Channels of the text encoder's hidden states."""
    layers: Literal["factorised", "full"] = "factorised"
    """`full`: every layer attends to all positions of the clip and all of its text, in place of layers in frames and in windows through
    time; costs grow with the square of the clip (`reelhf plan` says by how much)."""
    window: tuple[PositiveInt, PositiveInt] = (2, 2)
    """Height and width of a temporal window, in latent positions; 4x4 or more is better on a GPU."""
    window_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Latent height and width that `window` is meant for: on another grid a window keeps its share of the picture, so its sides grow
    with the root of the area. None: `window` on every grid."""
    rope_theta: float = Field(100.0, gt=0)
    """Base of the rotary frequencies. 10000 suits long clips; a few latent frames need faster rotation."""
    low_res: bool = False
    """Whether low-resolution latents are an input: true in a refiner."""
    checkpointing: bool | Literal["attention"] = False
    """Recompute each layer in the backward pass (non-reentrant) instead of keeping its activations: false keeps them all, true none,
    `attention` the outputs of attention, which cost most to compute again and are small."""
    compile: bool = False
    """Compile each layer (torch.compile); the first pass of every clip size takes a minute. How a run computes, so a
    generator folder does not carry it."""
    attention: Literal["sdpa", "packed"] = "sdpa"
    """`sdpa` pads prompts and windows and masks the padding. `packed` lays what exists one after another, for batches of prompts, shots
    and windows of unequal size: a flash kernel in bfloat16 on CUDA, the same sequences padded elsewhere. Not in a generator folder either."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DiTConfig:
        if self.width % self.num_heads or self.width // self.num_heads < 6:
            raise ValueError(
                f"width {self.width} over {self.num_heads} heads: expected a whole number of at least 6"
            )
        return self

    def window_for(self, height: int, width: int) -> tuple[int, int]:
        """Sides of a temporal window on a latent grid of this size, in positions."""
        if self.window_grid is None:
            return self.window
        scale = math.sqrt(height * width / math.prod(self.window_grid))
        tall, wide = (max(1, math.floor(side * scale + 0.5)) for side in self.window)
        return tall, wide


HOW_LAYERS_RUN = frozenset({"checkpointing", "compile", "attention"})
"""Keys of the architecture that change no result: a run may set them for a network that it takes over from a folder."""
ATTENTION_OPERATORS = frozenset(
    f"aten::_scaled_dot_product_{kind}"
    for kind in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "attention_math",
    )
) | {"torch_attn::_varlen_attn"}
"""What `scaled_dot_product_attention` becomes, by device and mask; and packed attention's kernel."""


def _keep_attention(_context: Any, operator: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    """Policy of selective checkpointing: outputs of attention are kept, all else is computed again."""
    if operator.name() in ATTENTION_OPERATORS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def sigma_embedding(sigma: Tensor, width: int) -> Tensor:
    """Sinusoids of 1000 * sigma, fp32 [..., width] (Ho et al. 2006.11239)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=sigma.device) / half)
    angles = 1000.0 * sigma.float()[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def place_features(num_frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """Where a token is: sine and cosine of its time, y and x at three octaves, [T, h * w, 18] fp32.

    Rotary attention sees differences of position only. Height and width are fractions of the picture, so a refiner finds the middle
    where its base did; time counts latent frames, so the first one, which the VAE codes differently, is known as such.
    """
    t = torch.arange(num_frames, device=device) / 8
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    place = torch.stack(torch.meshgrid(t, y, x, indexing="ij"), dim=-1).flatten(1, 2)
    angles = math.pi * (place[..., None] * torch.tensor([1.0, 2.0, 4.0], device=device)).flatten(-2)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class DiT(nn.Module):
    """Predicts the velocity of noisy latents; see the module's docstring."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.full = config.layers == "full"
        width, heads = config.width, config.num_heads
        self.input = nn.Linear(2 * config.channels + 1, width)
        self.low_res_input = (
            nn.Linear(config.channels, width, bias=False) if config.low_res else None
        )
        self.place_input = nn.Linear(18, width, bias=False)
        self.text_norm = nn.RMSNorm(config.text_width, eps=1e-6)
        self.text_input = nn.Linear(config.text_width, width)
        self.pooled_text_input = nn.Linear(config.text_width, width)
        self.sigma_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.vision_modulation = nn.Linear(width, 6 * width)
        self.text_modulation = nn.Linear(width, 6 * width)
        self.spatial = nn.ModuleList(
            SpatialBlock(
                width,
                heads,
                config.mlp_ratio,
                config.text_mlp_ratio,
                text_is_read_only=not self.full and index == config.num_pairs - 1,
                over_clip=self.full,
            )
            for index in range(config.num_pairs)
        )
        self.temporal = nn.ModuleList(
            SpatialBlock(
                width,
                heads,
                config.mlp_ratio,
                config.text_mlp_ratio,
                text_is_read_only=index == config.num_pairs - 1,
                over_clip=True,
            )
            if self.full
            else TemporalBlock(width, heads, config.mlp_ratio)
            for index in range(config.num_pairs)
        )
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, config.channels)
        self.sequence_group: SequenceGroup | None = None
        """The processes that share each clip; all of them then call this network with the same inputs and get the whole result."""
        self._initialise()
        if config.compile:
            self.compile_layers()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        depth = 2 * self.config.num_pairs
        for block in (*self.spatial, *self.temporal):
            for name, module in block.named_modules():
                if name.endswith(
                    (".out", ".down")
                ):  # residual branches start small: variance 1 / depth (GPT-2)
                    module.weight.data.mul_(1 / math.sqrt(2 * depth))
        zero = (self.vision_modulation, self.text_modulation, self.output_modulation, self.output)
        for module in (*zero, *((self.low_res_input,) if self.low_res_input is not None else ())):
            nn.init.zeros_(module.weight)

    def compile_layers(self, **options: Any) -> None:
        """From now on each spatial and temporal layer runs compiled; names and values of the weights stay.

        Layers of one kind and shape share their compiled code. A copy of this module is not compiled.

        Args: options: of torch.compile, such as `mode`.
        Raises: UserError where there is no C++ compiler, which torch.compile calls on every device.
        """
        compilers = [os.environ.get("CXX", "g++"), "clang++", "cl"]
        if not any(shutil.which(name) for name in compilers):
            raise UserError(
                f"compile: torch.compile needs a C++ compiler and found none of {', '.join(compilers)}; install one, or set compile=false"
            )
        for layer in (*self.spatial, *self.temporal):
            layer.compile(**options)

    def run_as(self, config: DiTConfig) -> DiT:
        """From now on layers run the way a config says, as far as it says anything (`HOW_LAYERS_RUN`); returns itself."""
        asked = {key: getattr(config, key) for key in config.model_fields_set & HOW_LAYERS_RUN}
        compiled = self.config.compile
        self.config = self.config.model_copy(update=asked)
        if self.config.compile and not compiled:
            self.compile_layers()
        return self

    @torch.no_grad()
    def fit_pooled_text(
        self, embeds: Tensor, mask: Tensor, token_shots: Tensor | None = None
    ) -> None:
        """Initialise the projection of the pooled prompt so that these prompts leave it centred and decorrelated.

        Means over the tokens of captions lie close together: what tells one from another is a few percent of their length, and
        a denoiser that starts from them as they are takes thousands of steps to hear it.

        Args: embeds, mask, token_shots: prompts of the training set, as in `forward`; every shot counts as a prompt.
        """
        normed = self.text_norm(embeds)
        shots = range(1 if token_shots is None else int(token_shots.max()) + 1)
        masks = [mask if token_shots is None else mask & (token_shots == shot) for shot in shots]
        pooled = torch.cat([self._pool(normed, of_shot)[of_shot.any(1)] for of_shot in masks])
        mean = pooled.mean(0)
        variances, directions = torch.linalg.eigh(
            torch.cov((pooled - mean).T.double(), correction=0)
        )
        floor = WHITENING_FLOOR * variances.mean().clamp(min=1e-12)
        scale = (variances.clamp(min=0) + floor).rsqrt()
        whitened_variance = (variances.clamp(min=0) * scale.square()).sum()
        linear = self.pooled_text_input
        mix = torch.randn(linear.out_features, len(variances)).to(directions)
        weight = (
            mix / whitened_variance.sqrt() * scale
        ) @ directions.T  # outputs of about unit variance
        linear.weight.copy_(weight)
        linear.bias.copy_(-weight.to(mean) @ mean)

    @staticmethod
    def _pool(tokens: Tensor, mask: Tensor) -> Tensor:
        """Mean over each prompt's tokens, zero where there are none; [B, E]."""
        return (tokens * mask[..., None]).sum(1) / mask.sum(1).clamp(min=1)[:, None]

    def forward(
        self,
        noisy: Tensor,
        sigma: Tensor,
        embeds: Tensor,
        mask: Tensor,
        condition_latents: Tensor,
        condition_mask: Tensor,
        low_res_latents: Tensor | None = None,
        features: Sequence[int] = (),
        token_shots: Tensor | None = None,
        shot_starts: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Velocity [B, C, T, h, w] fp32, and the hidden states [B, T, h, w, width] of the layers in `features`.

        Args:
            noisy: [B, C, T, h, w]; sigma: [B] or [B, T].
            embeds, mask: the prompt, [B, L, E] and [B, L]; a row without any token is unconditional.
            condition_latents, condition_mask: [B, C, T, h, w] and [B, 1, T, h, w].
            low_res_latents: [B, C, T, h, w], given exactly when the architecture has that input.
            features: layer indices, 0 .. 2 * num_pairs - 1.
            token_shots, shot_starts: clips of several shots, [B, L] and [B, shots], see `generator.base.Condition`.
        """
        if (low_res_latents is None) != (self.low_res_input is None):
            state = "missing" if low_res_latents is None else "given"
            raise ValueError(
                f"low_res_latents are {state}; this denoiser has low_res={self.config.low_res}"
            )
        frames, height, width = noisy.shape[2:]
        dtype = self.input.weight.dtype

        # 1. Tokens: one per latent position, no patchify. [B, T, h * w, width]
        stacked = torch.cat((noisy, condition_latents, condition_mask), dim=1).to(dtype)
        vision = self.input(stacked.permute(0, 2, 3, 4, 1).flatten(2, 3))
        if self.low_res_input is not None:
            assert low_res_latents is not None
            vision = vision + self.low_res_input(
                low_res_latents.to(dtype).permute(0, 2, 3, 4, 1).flatten(2, 3)
            )
        places = place_features(frames, height, width, noisy.device)
        vision = vision + self.place_input(places.to(dtype))
        normed = self.text_norm(embeds.to(dtype))
        text = self.text_input(normed)  # [B, L, width]

        # 2. Which frames read which tokens: all of them, or those of their own shot. [B, 1 or T, L]
        reads, share = mask[:, None], None
        if token_shots is not None and not self.full:
            assert shot_starts is not None
            same = token_shots[:, None] == shots_of_frames(shot_starts, frames)[..., None]
            reads = reads & same
            share = same.float() / same.sum(dim=1, keepdim=True).clamp(min=1)  # [B, T, L]

        # 3. Modulation, rotary angles, and the layers.
        vector, of_vision, of_text = self._modulation(sigma, normed, mask, reads, share, frames)
        grid = grid_positions(frames, height, width, noisy.device)
        angles = self._angles(grid, mask, token_shots, shot_starts)
        vision, hidden = self._through_layers(
            vision, text, of_vision, of_text, angles, reads, share, (height, width), features
        )

        # 4. Velocity.
        shift, scale = self.output_modulation(vector).unsqueeze(2).chunk(2, dim=-1)
        velocity = self.output(modulate(vision, shift, scale)).float()
        velocity = velocity.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)
        if not features:
            return velocity
        return velocity, {index: hidden[index].unflatten(2, (height, width)) for index in features}

    def _modulation(
        self,
        sigma: Tensor,
        normed: Tensor,
        mask: Tensor,
        reads: Tensor,
        share: Tensor | None,
        frames: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From sigma (per frame) and the pooled prompt: the frames' vectors [B, T, width], and what all layers share for vision
        [B, T, 1, 6, width] and for text [B, 1 or L, 6, width]."""
        per_frame = sigma[:, None].expand(-1, frames) if sigma.ndim == 1 else sigma
        vector = self.sigma_mlp(sigma_embedding(per_frame, self.config.width).to(normed.dtype))
        if share is None:
            pooled = self._pool(normed, mask)[:, None]
        else:
            pooled = reads.to(normed) @ normed / reads.sum(-1, keepdim=True).clamp(min=1)
        vector = nn.functional.silu(vector + self.pooled_text_input(pooled))
        vision_shared = self.vision_modulation(vector).unflatten(-1, (6, -1)).unsqueeze(2)
        if share is None:
            of_text = vector.mean(dim=1, keepdim=True)
        else:
            of_text = share.to(vector).transpose(1, 2) @ vector
        return vector, vision_shared, self.text_modulation(of_text).unflatten(-1, (6, -1))

    def _angles(
        self, grid: Tensor, mask: Tensor, token_shots: Tensor | None, shot_starts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotary angles of vision and text in spatial layers, and of vision in temporal ones: text at its index, the frames after
        their own shot's text."""
        if token_shots is None or shot_starts is None:
            text_places = text_positions(mask.shape[1], mask.device)
            vision_places = video_positions(grid, mask.sum(dim=1))
            window_places = grid
        else:
            text_places, vision_places = shot_positions(grid, mask, token_shots, shot_starts)
            # attention between frames sees differences only: cuts widen them by the text between
            window_places = (vision_places - vision_places[:, :1, :1, :1])[:, None]
            text_places = text_places[:, None]
        head_dim, theta = self.config.width // self.config.num_heads, self.config.rope_theta
        places = vision_places.flatten(2, 3), text_places, window_places.flatten(-4, -2)
        vision, text, windows = (rope_angles(place, head_dim, theta=theta) for place in places)
        return vision, text, windows

    def _through_layers(
        self,
        vision: Tensor,
        text: Tensor,
        vision_shared: Tensor,
        text_shared: Tensor,
        angles: tuple[Tensor, Tensor, Tensor],
        reads: Tensor,
        share: Tensor | None,
        size: tuple[int, int],
        features: Sequence[int],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Tokens [B, T, h * w, width] after all layers, and those after the layers in `features`.

        Each process of a sequence group takes its own frames through them. Every other temporal layer has its windows moved by half.
        """
        frames, shards = vision.shape[1], None
        whole = frames
        vision_angles, text_angles, grid_angles = angles
        if self.sequence_group is not None:
            shards = FrameShards(self.sequence_group, frames)
            if self.full and self.config.num_heads % self.sequence_group.size:
                raise UserError(
                    f"sequence_parallel {self.sequence_group.size} does not divide {self.config.num_heads} heads, which layers of full "
                    "attention are shared by"
                )
            vision, vision_shared, vision_angles = (
                shards.local(x, dim=1) for x in (vision, vision_shared, vision_angles)
            )
            if share is not None:
                reads, share = (shards.local(x, dim=1) for x in (reads, share))
            by_frame = grid_angles.unflatten(-2, (frames, -1))
            grid_angles = shards.local(by_frame, dim=by_frame.ndim - 3).flatten(-3, -2)
            frames = 1  # of the map: windows are dealt out per frame
        places = [
            (frames, *size, self.config.window_for(*size), shifted, vision.device)
            for shifted in (False, True)
        ]
        of_frames, packings = None, [None, None]
        if self.config.attention == "packed":
            shape = (1, whole * vision.shape[2]) if self.full else vision.shape[1:3]
            of_frames = FramePacking.of(reads, *shape)
            if shards is None:  # frames of several processes meet in padded windows
                packings = [window_packing(len(vision), *place) for place in places]
        windows = [
            (*window_map(*place), shards, packing)
            for place, packing in zip(places, packings, strict=True)
        ]
        of_spatial = vision_shared, text_shared, vision_angles, text_angles, reads, share, shards
        hidden: dict[int, Tensor] = {}
        for pair, (spatial, temporal) in enumerate(zip(self.spatial, self.temporal, strict=True)):
            vision, text = self._layer(spatial, vision, text, *of_spatial, of_frames)
            if 2 * pair in features:
                hidden[2 * pair] = vision
            if self.full:
                vision, text = self._layer(temporal, vision, text, *of_spatial, of_frames)
            else:
                of_windows = windows[pair % 2]
                vision = self._layer(temporal, vision, vision_shared, grid_angles, *of_windows)
            if 2 * pair + 1 in features:
                hidden[2 * pair + 1] = vision
        if shards is None:
            return vision, hidden
        return shards.whole(vision), {index: shards.whole(x) for index, x in hidden.items()}

    def _layer(self, layer: nn.Module, *args: Any) -> Any:
        if not self.config.checkpointing or not torch.is_grad_enabled():
            return layer(*args)
        if self.config.checkpointing == "attention":
            return checkpoint(
                layer,
                *args,
                use_reentrant=False,
                context_fn=partial(create_selective_checkpoint_contexts, _keep_attention),
            )
        return checkpoint(layer, *args, use_reentrant=False)
