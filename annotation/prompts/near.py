"""Near-duplicate prompts: MinHash finds candidates, the exact Jaccard similarity decides.

The cluster of a prompt is the unit of the train / validation / test split, so it never changes once given: a prompt joins the first
cluster whose leader it nearly equals, or leads one of its own. Only leaders are compared, so clusters never chain.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from annotation.records import normalise_prompt

if TYPE_CHECKING:
    import numpy as np

NEAR_DUPLICATE_JACCARD = 0.9
NUM_BANDS, ROWS_PER_BAND = 16, 8
"""At Jaccard 0.9 a pair shares a band with probability 1 - (1 - 0.9^8)^16 = 0.9999."""
PRIME = (1 << 61) - 1
SEED = 20_260


def shingles(text: str) -> frozenset[str]:
    """Words and word pairs; single characters where a text has no spaces (Chinese)."""
    normalised = normalise_prompt(text)
    words = normalised.split()
    if any("\u4e00" <= character <= "\u9fff" for character in normalised):
        words = [character for character in normalised if not character.isspace()]
    return frozenset(words) | {f"{a} {b}" for a, b in pairwise(words)}


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Shared share of two sets, 0 to 1; two empty sets are equal."""
    return len(one & other) / len(one | other) if one or other else 1.0


def minhash(items: frozenset[str]) -> np.ndarray:
    """Signature of a set, [NUM_BANDS * ROWS_PER_BAND] of 32 bits: two sets agree in an entry as often as their Jaccard says.

    Source: Broder (1997); each entry is the least of (a x + b) mod 2^32 over 32-bit hashes x, with a odd.
    """
    import numpy as np

    hashes = [
        int.from_bytes(hashlib.blake2b(i.encode(), digest_size=4).digest(), "big") for i in items
    ]
    values = np.array(hashes or [0], np.uint64)
    rng = np.random.default_rng(SEED)
    size = NUM_BANDS * ROWS_PER_BAND
    factor = rng.integers(0, 2**31, size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shift = rng.integers(0, 2**32, size, dtype=np.uint64)
    mixed = (values[:, None] * factor + shift) & np.uint64(0xFFFFFFFF)
    # a product's low bits follow the factor's low bits alone: fold the high half in
    mixed = (mixed ^ (mixed >> np.uint64(16))) * np.uint64(0x45D9F3B) & np.uint64(0xFFFFFFFF)
    return mixed.min(axis=0)


class ClusterIndex:
    """The leaders of all clusters; finds the one that a text nearly equals without comparing it to each."""

    def __init__(self) -> None:
        self._leaders: list[tuple[str, frozenset[str]]] = []
        self._bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._leaders)

    def add(self, cluster: str, text: str) -> None:
        """Makes `text` the leader of `cluster`."""
        items = shingles(text)
        for key in _band_keys(items):
            self._bands[key].append(len(self._leaders))
        self._leaders.append((cluster, items))

    def nearest(self, text: str) -> str | None:
        """The first cluster (in the order added) whose leader is a near-duplicate of `text`; None if there is none."""
        items = shingles(text)
        candidates = {place for key in _band_keys(items) for place in self._bands.get(key, ())}
        for place in sorted(candidates):
            cluster, leader = self._leaders[place]
            if jaccard(items, leader) >= NEAR_DUPLICATE_JACCARD:
                return cluster
        return None


def _band_keys(items: frozenset[str]) -> list[tuple[int, bytes]]:
    signature = minhash(items).reshape(NUM_BANDS, ROWS_PER_BAND)
    return [(band, row.tobytes()) for band, row in enumerate(signature)]
