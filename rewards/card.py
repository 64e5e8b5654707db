"""The model card of a reward: what it scores, what it learned from, how well, and on what scale, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(described: Mapping[str, Any]) -> str:
    """Markdown from the contents of a reward.json."""
    training = described.get("training") or {}
    held_out = training.get("held_out", {})
    rows = [
        "| dimension | mean | std | validated range | tie width | held-out accuracy |",
        "|---|---|---|---|---|---|",
    ]
    ties = described.get("tie_width") or [None] * len(described["dimensions"])
    for index, name in enumerate(described["dimensions"]):
        low, high = described["validation_range"][index]
        score = held_out.get(name)
        rows.append(
            f"| {name} | {described['mean'][index]:.3g} | {described['std'][index]:.3g} | {_number(low)} to {_number(high)} "
            f"| {_number(ties[index])} | {'not measured' if score is None else _accuracy(score)} |"
        )
    lines = [
        f"# Reward: {described['type']}",
        "",
        *rows,
        "",
        "Values are raw logits: they have no fixed zero and no fixed unit. Compare them through mean and std; outside the validated range the model "
        "extrapolates, which is what reward hacking looks like.",
        "",
        f"- Learned from: {_lessons(training)}; hash of the data {described.get('data_hash') or 'unknown'}.",
        f"- Preprocessing: {_listed(described.get('preprocessing') or {})}.",
    ]
    if described.get("heads", 1) > 1:
        lines.append(
            f"- {described['heads']} heads on one backbone: a value is the mean of their z-scores, and their disagreement its uncertainty."
        )
    if described.get("base"):
        lines.append(
            f"- Low-rank deltas on {described['base']['path']}: `reelhf rewards merge` makes it stand alone."
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _accuracy(score: Mapping[str, Any]) -> str:
    return f"{score['accuracy']:.2f} of {score['verdicts']} verdicts"


def _lessons(training: Mapping[str, Any]) -> str:
    if not training:
        return "no verdicts"
    where = "prompts held out" if training.get("held_out_prompts") else "no prompts held out"
    return f"{training['verdicts']} verdicts on {training['tasks']} tasks, {where}, seed {training['seed']}"


def _listed(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in numbers.items()) or "unknown"
