"""Merging is averaging: closed forms on weights, a sweep that finds the better parent, and refusals that name what differs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from generator.checkpoint import load_generator
from generator.merge import (
    average_states,
    check_mergeable,
    merge_generators,
    normalised_weights,
    weight_grid,
)
from reelhf.cli import main
from reelhf.errors import UserError
from reelhf.video import write_video


@pytest.fixture
def parents(tiny_generator, tmp_path) -> list[Path]:
    """Two of one family, apart in their weights."""
    first = tiny_generator("base", 32)
    first.save(tmp_path / "a")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in first.denoiser.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    first.save(tmp_path / "b")
    return [tmp_path / "a", tmp_path / "b"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_generator(folder).denoiser.state_dict()


def test_the_merged_weights_are_the_average(parents, tmp_path):
    a, b = (weights_of(folder) for folder in parents)
    assert merge_generators(parents, tmp_path / "m", weights=[3, 1]) == []
    merged = weights_of(tmp_path / "m")
    for name in a:
        torch.testing.assert_close(merged[name], 0.75 * a[name] + 0.25 * b[name])
    card = json.loads((tmp_path / "m/merge.json").read_text())
    assert card["weights"] == [0.75, 0.25]
    alone = merge_generators(parents, tmp_path / "alone", weights=[0, 1])
    assert alone == []
    assert all(torch.equal(v, b[k]) for k, v in weights_of(tmp_path / "alone").items())


def test_averaging_is_done_in_single_precision_and_keeps_types():
    states = [{"w": torch.full((3,), v).bfloat16(), "n": torch.tensor(7)} for v in (1.0, 1.0078125)]
    merged = average_states(states, [0.5, 0.5])
    assert merged["w"].dtype == torch.bfloat16
    assert merged["n"] == 7
    thirds = average_states([{"w": torch.ones(2)}] * 3, normalised_weights(None, 3))
    torch.testing.assert_close(thirds["w"], torch.ones(2))


def test_the_grid_holds_every_mixture_once():
    for count, parts in ((2, 4), (3, 5), (4, 3)):
        points = list(weight_grid(count, parts))
        assert len(points) == len(set(points)) == math.comb(parts + count - 1, count - 1)
        assert all(math.fsum(point) == pytest.approx(1) and min(point) >= 0 for point in points)
        corners = {tuple(float(i == j) for j in range(count)) for i in range(count)}
        assert corners <= set(points)


def test_a_sweep_scores_every_mixture_and_keeps_the_best(parents, tmp_path, capsys):
    clips = tmp_path / "clips"
    for index in range(4):
        torch.manual_seed(index)
        write_video(clips / f"{index}.mp4", torch.rand(3, 5, 32, 32), 8.0)
        (clips / f"{index}.txt").write_text("a red circle")
    # the second parent is a wreck: all of the weight must go to the first
    wreck = load_generator(parents[1])
    with torch.no_grad():
        for value in wreck.denoiser.parameters():
            value.mul_(5)
    wreck.save(tmp_path / "wreck")
    scored = merge_generators(
        [tmp_path / "wreck", parents[0]], tmp_path / "best", sweep=3, clips=clips
    )
    assert len(scored) == 4
    assert [one.loss for one in scored] == sorted(one.loss for one in scored)
    assert scored[0].weights == (0.0, 1.0)
    assert scored[-1].loss > scored[0].loss
    best = weights_of(tmp_path / "best")
    assert all(torch.equal(v, best[k]) for k, v in weights_of(parents[0]).items())
    main(
        ["generator", "merge", *map(str, parents), "--sweep", "2", "--clips", str(clips)]
        + ["--out", str(tmp_path / "by_command")]
    )
    said = capsys.readouterr().out
    assert said.count("loss ") == 3
    assert "next: reelhf generator sample" in said


def test_what_cannot_be_merged_is_refused_in_one_line_and_nothing_is_written(
    tiny_generator, parents, tmp_path
):
    out = tmp_path / "out"

    def refused(folders: list[Path], match: str, **options) -> None:
        with pytest.raises(UserError, match=match):
            merge_generators(folders, out, **options)
        assert not out.exists()

    tiny_generator("refiner", 64).save(tmp_path / "refiner")
    refused(parents[:1], "1 generator to merge; expected at least 2")
    refused([parents[0], tmp_path], "is not a generator folder")
    refused([parents[0], tmp_path / "refiner"], "cannot be merged: their role differs")
    other = replace(load_generator(parents[1]), fps=12.0)
    other.save(tmp_path / "other")
    refused([parents[0], tmp_path / "other"], r"their fps differs \(8.0 and 12.0\)")
    strange = load_generator(parents[1])
    with torch.no_grad():
        next(strange.vae.parameters()).add_(1)
    strange.save(tmp_path / "strange")
    refused([parents[0], tmp_path / "strange"], "they have another vae")
    refused(parents, "3 weights for 2 generators", weights=[1, 1, 1])
    refused(parents, "expected none below zero", weights=[1.5, -0.5])
    refused(parents, "give --clips, no --weights", sweep=2)
    (parents[1] / "denoiser.safetensors").write_bytes(b"short")
    refused(parents, "denoiser.safetensors")
    with pytest.raises(UserError, match=r"denoiser\.safetensors"):
        check_mergeable(parents)
