"""A complete video generator: VAE, text encoder, diffusion transformer, refiner, sampler, training; and the toy world."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from generator.checkpoint import load_generator

__all__ = ["load_generator"]


def __getattr__(name: str) -> object:
    # `from generator import load_generator` must not make `import generator` load torch
    if name == "load_generator":
        from generator.checkpoint import load_generator

        return load_generator
    raise AttributeError(f"module 'generator' has no attribute '{name}'")
