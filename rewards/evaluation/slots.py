"""Is the best clip found in every slot of the annotation page equally often?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from annotation.records import PreferenceData


def slot_test(
    data: PreferenceData,
    *,
    annotators: Collection[str] | None = None,
    prompt_ids: Collection[str] | None = None,
) -> dict[str, Any]:
    """Is the best clip found in every slot equally often? Chi-square per number of clips, free picks only.

    Returns: {"K": {"counts", "chi_square", "p"}} for each K seen.
    """
    counts: dict[int, list[int]] = {}
    for row in data.judgments:
        free = row["pick"] == "first" or not row["constrained"]
        if (
            row["kind"] != "best_worst"
            or not free
            or row["best"] is None
            or (annotators is not None and row["annotator"] not in annotators)
            or (prompt_ids is not None and row["prompt_id"] not in prompt_ids)
        ):
            continue
        num = len(row["candidates"])
        counts.setdefault(num, [0] * num)[row["best"]] += 1
    return {str(k): {"counts": c, **chi_square_uniform(c)} for k, c in sorted(counts.items())}


def chi_square_uniform(counts: Sequence[int]) -> dict[str, float]:
    """Pearson's test against equal shares; p from the regularised upper incomplete gamma function."""
    expected = sum(counts) / len(counts)
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.double)
    p = torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.double))
    return {"chi_square": statistic, "p": float(p)}
