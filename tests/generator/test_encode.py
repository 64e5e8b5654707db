"""Clips become latents once: exact frames, nothing lost in silence, an interrupted encoding goes on."""

from __future__ import annotations

import json

import pytest
import torch

from generator.base import NO_SHOT
from generator.data import encode as encoding
from generator.data.buckets import frames_at_rate, source_frames
from generator.data.doctor import examine_clips
from generator.data.encode import cut_clip, decode_cuts, encode_set
from generator.data.manifest import read_clips
from generator.shots import encode_shots
from generator.training.progressive import encode_stages, open_store
from reelhf.cli import main
from reelhf.errors import UserError
from reelhf.video import write_video
from tests.generator.staged_parts import LONG, SMALL, buckets, staged, write_manifest


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("footage"))


@pytest.fixture
def store(tmp_path, tiny_folders):
    return open_store(tmp_path / "latents", *tiny_folders, create=True)


@pytest.mark.parametrize("source_fps", [8.0, 23.976, 24.0, 25.0, 29.97, 60.0])
def test_a_frame_is_the_sources_nearest_in_time_and_never_drifts(source_fps):
    """Over ten minutes no frame is further than half a source frame from its time; rounding each step would drift away."""
    frames = source_frames(4800, source_fps, 8.0)
    assert frames == sorted(frames)
    for k, frame in enumerate(frames):
        assert abs(frame / source_fps - k / 8.0) <= 0.5 / source_fps + 1e-9
    count = frames_at_rate(100, source_fps, 8.0)
    assert source_frames(count, source_fps, 8.0)[-1] <= 99


def test_the_windows_of_a_clip_are_the_frames_of_the_file(store, tmp_path):
    """A clip whose brightness is its frame number at 24 fps: windows of 8 fps hold every third."""
    levels = torch.arange(60.0) / 60
    write_video(tmp_path / "a.mp4", levels[None, :, None, None].expand(3, 60, 32, 32), 24.0, crf=0)
    (tmp_path / "m.jsonl").write_text(
        json.dumps({"path": "a.mp4", "caption": "x", "start": 0.25, "end": 2.2})
    )
    (clip,) = read_clips(tmp_path / "m.jsonl")
    cuts, skipped = cut_clip(store, clip, buckets(SMALL))
    assert skipped is None
    assert [cut.frames for cut in cuts] == [
        (6, 9, 12, 15, 18),
        (21, 24, 27, 30, 33),
        (36, 39, 42, 45, 48),
    ]
    for cut, frames in decode_cuts(cuts):
        assert frames.shape == (3, 5, 32, 32)
        shown = frames.float().mean(dim=(0, 2, 3)) / 255
        torch.testing.assert_close(shown, levels[list(cut.frames)], atol=0.01, rtol=0)
    assert cuts[1].window.start == pytest.approx(21 / 24)


def test_a_set_holds_what_its_buckets_do_and_says_what_it_leaves_out(store, manifest, tiny_parts):
    vae, text = tiny_parts
    clips = read_clips(manifest)
    windows, skipped = encode_set(store, clips, buckets(SMALL), vae, text)
    # 4 clips of 5, 9 and 20 frames: 1, 1 and 4 windows of 5; a quarter of them too wide; and 4 pictures
    wide = [int(w.name[:2]) % 4 == 0 for w in windows if w.num_frames > 1]
    assert not any(wide)
    assert sorted(one.name for one in skipped) == ["00.mp4", "04.mp4", "08.mp4"]
    assert all("would crop 50%" in one.reason for one in skipped)
    assert sum(w.num_frames == 1 for w in windows) == 4
    assert store.read_set(buckets(SMALL), what="stage") == windows
    both, none = encode_set(store, clips, buckets(LONG), vae, text)
    assert none == []
    assert {str(w.bucket) for w in both} == {"1x32x32", "5x32x32", "9x32x32", "5x16x32", "9x16x32"}
    latents = store.latents(both[0])
    assert latents.shape == (8, *vae.spec.latent_shape(5, 16, 32)[1:])
    (cut,), _ = cut_clip(store, clips[0], buckets(LONG))
    ((_, frames),) = decode_cuts([cut])
    with torch.no_grad():
        torch.testing.assert_close(latents, vae.encode(frames[None].float() / 255)[0])
        expected = text.encode([clips[0].captions["caption"]])
    condition = store.condition([clips[0].captions["caption"]], [5], 4)
    torch.testing.assert_close(condition.embeds, expected.embeds[:, : condition.embeds.shape[1]])
    assert condition.mask.all() and condition.mask.sum() == expected.mask.sum()


def test_a_caption_of_several_shots_is_encoded_shot_by_shot(store, tmp_path, tiny_parts):
    """As the generator encodes such a prompt; a clip that it does not fit is left out with the reason."""
    vae, text = tiny_parts
    texts = ["[SHOT 1] a red circle [CUT] [SHOT 2] a blue square", "a red circle"]
    too_long = "[SHOT 1: 9 frames] a red circle [CUT] [SHOT 2] a blue square"
    for name, frames in (("a", 5), ("b", 5), ("c", 5), ("d", 12)):
        write_video(tmp_path / f"{name}.mp4", torch.rand(3, frames, 32, 32), 8.0)
    names = zip("abcd", [*texts, too_long, texts[0]], strict=True)
    rows = [{"path": f"{name}.mp4", "caption": caption} for name, caption in names]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    windows, skipped = encode_set(
        store, read_clips(tmp_path / "m.jsonl"), buckets(SMALL), vae, text
    )
    assert [window.name for window in windows] == ["a.mp4", "b.mp4"]
    assert [one.name for one in skipped] == ["c.mp4", "d.mp4"]
    assert "do not make a clip of 5" in skipped[0].reason
    assert "cut into 2 windows" in skipped[1].reason
    listed = examine_clips(read_clips(tmp_path / "m.jsonl"), buckets(SMALL))
    assert [row.placement.reason for row in listed[2:]] == [one.reason for one in skipped]
    found = store.condition(texts, [5, 5], 4)
    expected = encode_shots(text.encode, texts, 5)
    assert torch.equal(found.mask, expected.mask)
    assert found.shot_starts.tolist() == [[0, 1], [0, NO_SHOT]]
    torch.testing.assert_close(found.embeds, expected.embeds)


def test_nothing_is_encoded_twice(store, manifest, tiny_parts, monkeypatch):
    clips = read_clips(manifest)
    windows, _ = encode_set(store, clips, buckets(SMALL), *tiny_parts)
    lost = store.latent_file(windows[3].key)
    before = store.latents(windows[3])
    lost.unlink()
    with pytest.raises(UserError, match=r"the latents of 1 of \d+ windows are missing"):
        store.read_set(buckets(SMALL), what="stage small")
    made = []
    flush = encoding._flush
    monkeypatch.setattr(
        encoding, "_flush", lambda s, v, ready, low: (made.extend(ready), flush(s, v, ready, low))
    )
    again, _ = encode_set(store, clips, buckets(SMALL), *tiny_parts)
    assert again == windows
    assert [cut.window.key for cut, _ in made] == [windows[3].key]
    torch.testing.assert_close(store.latents(windows[3]), before)


def test_a_damaged_file_is_a_row_and_not_the_end(store, manifest, tiny_parts):
    clips = read_clips(manifest)
    broken = manifest.parent / "broken.mp4"
    broken.write_bytes((manifest.parent / "01.mp4").read_bytes()[:600])
    rows = manifest.read_text() + "\n" + json.dumps({"path": "broken.mp4", "caption": "x"})
    (manifest.parent / "with_broken.jsonl").write_text(rows)
    windows, skipped = encode_set(
        store, read_clips(manifest.parent / "with_broken.jsonl"), buckets(LONG), *tiny_parts
    )
    assert len({w.name for w in windows}) == len(clips)
    assert [one.name for one in skipped] == ["broken.mp4"]
    assert skipped[0].reason.startswith("unreadable: ")


def test_a_store_of_other_encoders_or_none_is_refused(store, manifest, tiny_folders, tmp_path):
    vae, text = tiny_folders
    with pytest.raises(UserError, match="was encoded with another VAE than this run's"):
        open_store(store.folder, text, text)
    with pytest.raises(UserError, match="holds no encoded clips"):
        open_store(tmp_path / "empty", vae, text)
    with pytest.raises(
        UserError, match=r"stage x: .* holds no clips encoded for its buckets \(area 1024"
    ):
        store.read_set(buckets(SMALL), what="stage x")
    (store.folder / "store.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_store(store.folder, vae, text)


def test_a_latent_file_that_was_cut_short_is_named(store, manifest, tiny_parts):
    windows, _ = encode_set(store, read_clips(manifest)[:2], buckets(LONG), *tiny_parts)
    file = store.latent_file(windows[0].key)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(
        UserError, match=r"cannot be read .* delete it and run `reelhf generator data encode`"
    ):
        store.latents(windows[0])


def test_the_command_encodes_every_stage_and_says_what_lies_where(
    manifest, tiny_folders, tmp_path, capsys
):
    from reelhf.config import to_yaml

    vae, text = tiny_folders
    (tmp_path / "stages.yaml").write_text(to_yaml(staged()))
    command = [
        "generator",
        "data",
        "encode",
        str(tmp_path / "stages.yaml"),
        "--clips",
        str(manifest),
    ]
    main([*command, "--dry-run"])
    said = capsys.readouterr().out
    assert "pictures:" in said and "clips:" in said
    assert "3 would be skipped" in said
    out = tmp_path / "latents"
    assert not out.exists()
    main([*command, "--vae", str(vae), "--text", str(text), "--out", str(out)])
    said = capsys.readouterr().out
    assert "3 clips fit no bucket:" in said
    assert "22 windows of 13 clips: 22 with caption" in said
    assert "next: reelhf generator train" in said
    assert encode_stages(staged(), manifest, out, vae=vae, text=text) == out


@pytest.mark.realdata
def test_real_clips_of_other_rates_and_codecs_are_cut(real_data, store, tiny_parts):
    """Four files of several rates, shots and codecs, one window each checked for its place in time."""
    config = buckets({**SMALL, "area": 64 * 64, "aspects": [1.7778, 2.3333], "num_frames": [5, 17]})
    clips = read_clips(real_data / "clips")
    windows, skipped = encode_set(store, clips[:3], config, *tiny_parts)
    assert {w.name for w in windows} | {s.name for s in skipped} == {c.name for c in clips[:3]}
    assert windows
    for window in windows:
        assert torch.isfinite(store.latents(window)).all()
