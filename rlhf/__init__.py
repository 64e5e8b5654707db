"""Reinforcement learning from human feedback: direct reward maximisation, candidates, rounds, comparison, review.

Each algorithm is one module, read from top to bottom; nothing heavy is imported here.
"""

from __future__ import annotations

TRAINERS: dict[str, str] = {
    "direct": "rlhf.direct:train_direct",  # gradient of the reward through the sampler and the VAE decoder
}
"""The `type` of a training YAML -> the function that runs it, imported when it is called."""
