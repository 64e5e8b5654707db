"""Content hashes: equal content, equal key; anything else, another key."""

from __future__ import annotations

import hashlib

import pytest

from reelhf.config import Config
from reelhf.hashing import content_hash, sha256_file, weight_hashes


class One(Config):
    size: int = 1


class Two(Config):
    size: int = 1


def test_sha256_file_is_the_standard_one(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_key_order_does_not_matter_and_argument_order_does():
    assert content_hash({"a": 1, "b": [2, None]}) == content_hash({"b": [2, None], "a": 1})
    assert content_hash(1, 2) != content_hash(2, 1)
    assert content_hash([1, 2]) != content_hash(1, 2)
    assert content_hash("1") != content_hash(1)
    assert content_hash("ab", "c") != content_hash("a", "bc")


def test_models_count_by_class_and_fields():
    assert content_hash(One()) == content_hash(One(size=1))
    assert content_hash(One()) != content_hash(One(size=2))
    assert content_hash(One()) != content_hash(Two())


def test_paths_count_by_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "f.txt").write_text("same")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    before = content_hash(tmp_path / "a")
    assert before != content_hash(str(tmp_path / "a"))
    (tmp_path / "a" / "sub" / "f.txt").write_text("other")
    assert content_hash(tmp_path / "a") != before
    (tmp_path / "b" / "sub" / "f.txt").rename(tmp_path / "b" / "f.txt")
    assert content_hash(tmp_path / "b") != before


def test_what_has_no_content_is_refused():
    with pytest.raises(TypeError, match="object"):
        content_hash(object())


def test_every_weight_file_counts_under_its_own_folder(tmp_path):
    for member in ("member_0", "member_1"):
        (tmp_path / member).mkdir()
        (tmp_path / member / "model.safetensors").write_bytes(member.encode())
    (tmp_path / "member_0" / "reward.json").write_text("{}")
    before = weight_hashes(tmp_path)
    assert set(before) == {f"member_{i}/model.safetensors" for i in range(2)}
    (tmp_path / "member_0" / "model.safetensors").write_bytes(b"other")
    assert weight_hashes(tmp_path) != before
