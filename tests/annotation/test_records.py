from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from annotation.records import (
    DIMENSIONS,
    SPLIT_FRACTIONS,
    Choice,
    PromptRecord,
    load_guideline,
    normalise_prompt,
    prompt_id,
    read_preferences,
    split_of,
)
from reelhf.errors import UserError
from tests.annotation.example_preferences import write_example_preferences


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    return write_example_preferences(folder, num_prompts=2, num_frames=2, size=16)


@pytest.fixture
def copied(example: Path, tmp_path: Path) -> Path:
    for file in example.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_every_dimension_has_a_question_and_only_image_tasks_ask_for_preservation():
    guideline = load_guideline()
    assert guideline.dimensions("i2v") == DIMENSIONS
    assert guideline.dimensions("t2v") == DIMENSIONS[:4]
    assert all(q.question.endswith((".", "?")) for q in guideline.questions.values())


def test_the_same_prompt_has_the_same_id_whatever_its_case_and_punctuation():
    assert prompt_id("A  red Ball, rolling.") == prompt_id("a red ball rolling")
    assert prompt_id("一个红色的球。") == prompt_id("一个红色的球")
    assert prompt_id("a red ball") != prompt_id("a blue ball")
    assert normalise_prompt("Ａ ＲＥＤ-ball") == "a red ball"


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="prompt is empty"):
        PromptRecord("  ")


def test_the_split_is_stable_and_has_the_stated_fractions():
    assert split_of("p1") == split_of("p1")
    counts = Counter(split_of(f"p{i}") for i in range(4000))
    for name, fraction in SPLIT_FRACTIONS.items():
        assert counts[name] / 4000 == pytest.approx(fraction, abs=0.03)


def test_a_free_pick_is_its_own_first_pick_and_a_constrained_one_is_not():
    assert Choice("motion_quality", 0, 1).with_first() == Choice(
        "motion_quality", 0, 1, first_best=0, first_worst=1
    )
    constrained = Choice("motion_quality", 0, 1, first_best=2, first_worst=3, constrained=True)
    assert constrained.with_first() == constrained


def test_the_example_reads_back_with_its_clips(example: Path):
    data = read_preferences(example)
    assert len(data.clips) == 8
    assert len(data.judgments) == 8
    assert len(data.preferences) == 8 * 5
    assert all(data.clip_path(clip["sha256"]).is_file() for clip in data.clips)
    with pytest.raises(UserError, match="no clip nonsense"):
        data.clip_path("nonsense")


def test_another_schema_version_is_refused_by_number(copied: Path):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["schema_version"] = 99
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="preference schema version 99; this program reads version"):
        read_preferences(copied)


def test_a_table_cut_short_is_named(copied: Path):
    path = copied / "preferences.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"preferences\.parquet has \d+ bytes .* cut short"):
        read_preferences(copied)


def test_a_table_changed_after_the_export_is_named(copied: Path):
    path = copied / "judgments.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"judgments\.parquet does not match the sha256"):
        read_preferences(copied)


def test_a_missing_table_and_a_missing_manifest_are_named(copied: Path):
    (copied / "clips.parquet").unlink()
    with pytest.raises(UserError, match=r"clips\.parquet is missing"):
        read_preferences(copied)
    assert read_preferences(copied, tables=["judgments"]).judgments
    (copied / "manifest.json").unlink()
    with pytest.raises(UserError, match="not preference data: cannot read manifest"):
        read_preferences(copied)
    (copied / "manifest.json").write_text('{"schema": "other"}')
    with pytest.raises(UserError, match="not a preference manifest"):
        read_preferences(copied)
