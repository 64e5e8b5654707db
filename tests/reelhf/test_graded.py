from __future__ import annotations

import pytest
import torch

from reelhf.errors import UserError
from reelhf.graded import GradedClips


@pytest.fixture
def clips() -> GradedClips:
    """The brightness of version g of clip n is 100 n + 10 g."""
    values = 100 * torch.arange(2)[:, None] + 10 * torch.arange(3)
    frames = values.view(2, 3, 1, 1, 1, 1).expand(2, 3, 3, 5, 4, 4).byte()
    return GradedClips(frames, torch.tensor([[0.0, 0.25, 1.0], [0.0, 0.5, 0.5]]), ["a", "b"], 8.0)


def test_pairs_are_of_one_clip_nearer_first_and_know_their_gap(clips):
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(2).repeat(50)
    nearer, further, gap = clips.pairs(rows, generator)
    near, far = (255 * x[:, 0, 0, 0, 0] for x in (nearer, further))
    assert torch.equal((near / 100).floor().long(), rows)
    assert torch.equal((far / 100).floor().long(), rows)
    versions = torch.stack([near, far], 1).round().long() % 100 // 10
    assert (versions[:, 0] < versions[:, 1]).all()
    torch.testing.assert_close(
        gap, clips.grades[rows, versions[:, 1]] - clips.grades[rows, versions[:, 0]]
    )
    assert len({tuple(pair) for pair in versions.tolist()}) == 3  # every pair of versions occurs


def test_what_is_saved_is_what_is_loaded(clips, tmp_path):
    loaded = GradedClips.load(clips.save(tmp_path / "graded"))
    assert torch.equal(loaded.frames, clips.frames)
    assert torch.equal(loaded.grades, clips.grades)
    assert (loaded.captions, loaded.fps) == (clips.captions, clips.fps)


def test_a_folder_without_them_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="holds no graded clips"):
        GradedClips.load(tmp_path)


def test_grades_that_do_not_ascend_are_refused(clips):
    with pytest.raises(ValueError, match="ascend"):
        GradedClips(clips.frames, clips.grades.flip(1), clips.captions, clips.fps)
