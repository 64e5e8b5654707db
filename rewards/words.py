"""Which words a clip calls for: a bag-of-words reading of visual features, and how well a prompt matches it.

Predicting the words of a caption from pooled features teaches a small encoder in a hundred steps what contrastive or
generative captioning teaches in thousands. Source: SuperClass, 2411.03313, eq. 1-2 (softmax over sub-word tokens,
weighted by inverse document frequency). The match of a prompt, with a learned weight per word, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_GAIN = 5.0
"""Word weights are stored divided by this, so that an optimizer's step moves them that much faster than a matrix."""
TYPICAL_LOG_PROB = -4.0
"""Of a word that the caption holds, in nats; subtracted so that a good match is positive."""


class WordHead(nn.Module):
    """Features [B, H] -> log-probabilities of words."""

    idf: Tensor

    def __init__(self, features: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.project = nn.Linear(features, vocab_size)
        self.register_buffer("idf", torch.ones(vocab_size))

    @torch.no_grad()
    def count(self, prompts: Sequence[Sequence[int]]) -> None:
        """Set the inverse document frequencies: words of every caption say nothing and weigh nothing."""
        present = self.bag(prompts).sum(0)
        self.idf.copy_((len(prompts) / (1 + present)).log().clamp_min(0) * (present > 0))

    def bag(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """1 where a token occurs in the prompt, [B, V]."""
        out = torch.zeros(len(prompts), self.project.out_features)
        for row, prompt in zip(out, prompts, strict=True):
            row[torch.as_tensor(list(prompt))] = 1
        return out.to(self.idf.device)

    def forward(self, features: Tensor) -> Tensor:
        return F.log_softmax(self.project(self.norm(features)), dim=-1)

    def loss(self, log_probs: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Cross-entropy in nats between the words' softmax and the caption's words, weighted by idf."""
        wanted = self.bag(prompts) * self.idf
        wanted = wanted / wanted.sum(1, keepdim=True).clamp_min(1e-6)
        return -(wanted * log_probs).sum(1).mean()


class MatchingWords(WordHead):
    """A word head that also says how well a prompt matches."""

    def __init__(self, features: int, vocab_size: int, num_matches: int = 2) -> None:
        super().__init__(features, vocab_size)
        self.weight = nn.Parameter(torch.zeros(num_matches, vocab_size))

    @torch.no_grad()
    def count(self, prompts: Sequence[Sequence[int]]) -> None:
        """Set the inverse document frequencies, and weigh words by them."""
        super().count(prompts)
        weight = self.idf / self.idf.max().clamp_min(1e-6) / WEIGHT_GAIN
        self.weight.copy_(weight.expand_as(self.weight))

    def match(self, log_probs: Tensor, prompts: Sequence[Sequence[int]], weight: Tensor) -> Tensor:
        """Log-probability of each prompt's words weighted by `weight` [num_matches, V], [B, num_matches]; of the order of one."""
        bag = self.bag(prompts)
        return ((log_probs - TYPICAL_LOG_PROB) * bag) @ (WEIGHT_GAIN * weight).T / 2
