"""The generative reward: yes or no, against a reference clip."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_rewards import CAPTIONS, SIZES, smooth_clip, tiny_pretrain_config, write_tiny_preferences
from torch import Tensor
from typer.testing import CliRunner

from reelhf.errors import UserError
from rewards import load_reward, references, train
from rewards.backbones import LANGUAGE, family
from rewards.commands import app
from rewards.data import Clip, RewardTask, Vote, score_clips
from rewards.evaluation.held_out import evaluate_rewards
from rewards.generative import ASSISTANT, Answer, GenerativeConfig, GenerativeReward
from rewards.pretrain import build_models, pretrain_backbones
from rewards.references import best_of, comparisons, win_counts
from rewards.tokens import load_tokenizer, train_tokenizer
from rewards.training.answers import answer_loss, load_rationales
from rewards.training.config import LossConfig, RewardTrainConfig

GENERATIVE = GenerativeConfig(**SIZES, vision_layers=1, area=32 * 32, num_frames=4, vocab_size=300)
ANSWERS = LossConfig(kind="answers")


def tiny(model_type: str = "qwen2_5_vl", **settings: object) -> GenerativeReward:
    torch.manual_seed(0)
    config = GENERATIVE.model_copy(update={"family": model_type, **settings})
    return GenerativeReward(config, train_tokenizer(CAPTIONS, vocab_size=300))


def clips(count: int = 3, size: int = 32) -> Tensor:
    return torch.stack([smooth_clip(i, 5, size) for i in range(count)])


def score(model: GenerativeReward, frames: Tensor, reference: Tensor | None = None) -> Tensor:
    return model.score(
        frames,
        selection=model.select(frames.shape[2], 8.0),
        fps=8.0,
        prompts=CAPTIONS[: len(frames)],
        reference=reference,
    ).values


@pytest.mark.parametrize("model_type", LANGUAGE)
def test_beating_a_clip_is_losing_to_it_turned_round(model_type: str) -> None:
    model, frames = tiny(model_type), clips(2)
    prompts = [CAPTIONS[0]] * 2
    options = {"selection": model.select(5, 8.0), "fps": 8.0, "prompts": prompts}
    one = model.score(frames, reference=frames.flip(0), **options)
    torch.testing.assert_close(one.values, -one.values.flip(0), atol=1e-5, rtol=1e-4)
    assert (one.values.abs() > 1e-5).all()
    own = model.score(frames, reference=frames, **options)
    torch.testing.assert_close(own.values, torch.zeros(2, 2), atol=1e-5, rtol=0)
    assert own.parts["position_flip"].tolist() == [1.0, 1.0]  # the same answer in either place


@pytest.mark.parametrize("model_type", LANGUAGE)
def test_a_reference_of_another_size_and_length_will_do_and_a_broken_one_will_not(
    model_type: str,
) -> None:
    model, frames = tiny(model_type), clips(2)
    reference = torch.stack([smooth_clip(9, 7, 48)] * 2)
    expected = score(model, frames, reference)
    reference[0] = float("nan")
    values = score(model, frames, reference)
    assert values[0].isnan().all()
    torch.testing.assert_close(values[1], expected[1], atol=1e-5, rtol=1e-4)


def test_a_comparison_without_a_reference_is_refused_and_a_single_clip_is_assessed() -> None:
    with pytest.raises(UserError, match="give `reference`"):
        score(tiny(), clips())
    model = tiny(asks="single")
    values = score(model, clips())
    assert values.isfinite().all()
    torch.testing.assert_close(score(model, clips(), clips().flip(0)), values)


def test_each_dimension_is_asked_its_own_question_in_its_own_words() -> None:
    model = tiny(questions={"prompt_following": "Which is redder?"})
    assert "Which is redder?" in model.question("prompt_following")
    assert "intact" in model.question("structural_stability")
    model.tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    chat = GenerativeReward(GENERATIVE, model.tokenizer)
    assert chat.question("structural_stability").endswith(ASSISTANT)


@pytest.mark.parametrize("model_type", LANGUAGE)
def test_yes_minus_no_is_the_logit_gap_of_the_transformers_model(
    model_type: str, tmp_path: Path
) -> None:
    """Loaded from a folder whose output weights are not tied to its embeddings."""
    import transformers

    kind = family(LANGUAGE, model_type)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=300)
    config = kind.tiny_config(settings=GENERATIVE, tokenizer=tokenizer)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    name = kind.model_class().__name__.replace("Model", "ForConditionalGeneration")
    getattr(transformers, name)(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = GENERATIVE.model_copy(update={"backbone": str(tmp_path / "base")})
    model = GenerativeReward(settings, load_tokenizer(settings.backbone))
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "base")
    torch.manual_seed(0)  # the rows of the two new answers are drawn
    theirs.resize_token_embeddings(len(model.tokenizer))
    theirs.model.load_state_dict(model.backbone.state_dict())
    theirs.lm_head.weight.data.copy_(model.vocabulary.weight)

    frames, prompt = clips(2), model.encode_text(CAPTIONS[0])
    seen = model.see(list(frames.split(1)), [8.0, 8.0])
    ours = model.yes_minus_no(seen, [((1, 0), prompt, "prompt_following")])
    ids = torch.tensor([model.sequence(seen, (1, 0), prompt, "prompt_following")])
    patches, grid = model.patches(frames.flip(0))
    if model_type == "internvl":
        given = {"pixel_values": patches.transpose(1, 2).flatten(0, 1)}
    else:
        given = {
            "pixel_values_videos": patches,
            "video_grid_thw": torch.tensor([grid, grid]),
            "mm_token_type_ids": 2 * (ids == model.backbone.config.video_token_id).long(),
            **kind.timing(torch.tensor([8.0, 8.0]), 2),
        }
    logits = theirs(input_ids=ids, **given).logits[:, -1]
    gap = logits[:, model.yes] - logits[:, model.no]
    torch.testing.assert_close(ours, gap, atol=1e-5, rtol=1e-4)
    again = load_reward(model.save(tmp_path / "reward"))
    torch.testing.assert_close(
        score(again, frames, frames.flip(0)), score(model, frames, frames.flip(0))
    )


def test_the_answers_loss_is_the_cross_entropy_of_the_whole_vocabulary() -> None:
    model, frames = tiny(), list(clips(2).split(1))
    prompt = model.encode_text(CAPTIONS[0])
    yes, no, tie = (Answer((0, 1), prompt, "prompt_following", y) for y in (1.0, 0.0, 0.5))
    told = Answer((0, 1), prompt, "prompt_following", 1.0, "clip 2 is red")
    losses, why, gaps = model(frames, [8.0, 8.0], answers=[yes, no, tie, told])
    assert (gaps[0] - gaps).abs().max() < 1e-5  # what follows the answer changes no answer
    assert (losses[1] - losses[0]).item() == pytest.approx(gaps[0].item(), abs=1e-5)
    assert losses[2].item() == pytest.approx((losses[0] + losses[1]).item() / 2, rel=1e-5)
    assert losses[3].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert why[:3].tolist() == [0, 0, 0]
    assert 0.3 * math.log(300) < why[3].item() < 3 * math.log(300)


def brightness_tasks() -> tuple[list[RewardTask], dict[str, Clip]]:
    draws = torch.Generator().manual_seed(0)
    tasks, made = [], {}
    for i in range(12):
        levels = torch.rand(3, generator=draws).tolist()
        names = tuple(f"{i}-{k}" for k in range(3))
        for name, level in zip(names, levels, strict=True):
            made[name] = Clip((torch.full((3, 2, 32, 32), level) * 255).byte(), 8.0)
        votes = tuple(
            Vote(a, b, "prompt_following", 1 if levels[a] > levels[b] else -1, 1.0, True, True)
            for a, b in ((0, 1), (1, 2), (2, 0))
        )
        tasks.append(RewardTask(f"t{i}", CAPTIONS[i % 8], "p", "train", names, votes))
    return tasks, made


@pytest.mark.slow
def test_it_learns_which_clip_is_brighter_in_either_place() -> None:
    model = tiny(num_frames=2, area=16 * 16, questions={"prompt_following": "Light?"})
    tasks, made = brightness_tasks()
    config = RewardTrainConfig(loss=ANSWERS, epochs=60, head_lr=3e-3, backbone_lr=3e-3, shift=0)
    model, metrics = train.fit(model, tasks, made, config, label="foundational")
    assert sum(row["accuracy"] for row in metrics[-5:]) / 5 > 0.85
    model.freeze()
    scores = score_clips(model, made, [(sha, t.prompt) for t in tasks for sha in t.clips])
    right = [
        (scores[t.clips[v.a], t.prompt][0] > scores[t.clips[v.b], t.prompt][0])
        == (v.preference > 0)
        for t in tasks
        for v in t.votes
    ]
    assert sum(map(bool, right)) / len(right) > 0.85


def test_orders_are_drawn_and_the_words_follow_them(tmp_path: Path) -> None:
    path = tmp_path / "why.jsonl"
    row = {"clip_a": "b", "clip_b": "a", "dimension": "prompt_following"}
    path.write_text(json.dumps(row | {"text": "{winner} is red, {loser} is not"}) + "\n")
    model, seen = tiny(), []
    made = {n: Clip((smooth_clip(i) * 255).byte(), 8.0) for i, n in enumerate("ab")}
    vote = Vote(0, 1, "prompt_following", 1, 1.0, True, True)  # a is better
    task = RewardTask("t", CAPTIONS[0], "p", "train", ("a", "b"), (vote,))
    own = model.answer_losses
    model.answer_losses = lambda *a, answers: seen.extend(answers) or own(*a, answers=answers)
    options = {"config": ANSWERS, "rationales": load_rationales(path)}
    answer_loss(model, [task], made, **options)
    assert (seen[0].clips, seen[0].yes) == ((0, 1), 0.0)  # fixed: b stands second and is worse
    draws = torch.Generator().manual_seed(0)
    for _ in range(8):
        answer_loss(model, [task], made, generator=draws, **options)
    assert {a.clips for a in seen} == {(0, 1), (1, 0)}
    for a in seen:
        place = a.clips.index(0) + 1
        assert a.rationale == f"clip {place} is red, clip {3 - place} is not"
        assert a.yes == (place == 2)


def test_an_invalid_clip_is_left_out_of_the_questions() -> None:
    model = tiny()
    made = {n: Clip((smooth_clip(i) * 255).byte(), 8.0) for i, n in enumerate("abc")}
    made["c"] = Clip(torch.full((3, 5, 32, 32), float("nan")), 8.0)
    votes = [Vote(0, b, "prompt_following", 1, 1.0, True, True) for b in (1, 2)]
    names = ("a", "b", "c")
    both = RewardTask("t", CAPTIONS[0], "p", "train", names, tuple(votes))
    one = RewardTask("t", CAPTIONS[0], "p", "train", names, tuple(votes[:1]))
    none = RewardTask("t", CAPTIONS[0], "p", "train", names, tuple(votes[1:]))
    options = {"config": ANSWERS, "rationales": {}}
    loss, metrics = answer_loss(model, [both], made, **options)
    expected, _ = answer_loss(model, [one], made, **options)
    torch.testing.assert_close(loss, expected)
    assert (metrics["votes"], metrics["valid_fraction"]) == (1, pytest.approx(2 / 3))
    loss, metrics = answer_loss(model, [none], made, **options)
    loss.backward()
    assert (loss.item(), metrics["votes"]) == (0, 0)


def test_a_line_that_is_no_rationale_is_named(tmp_path: Path) -> None:
    path = tmp_path / "why.jsonl"
    path.write_text('{"clip_a": "a", "clip_b": "b", "dimension": "x", "text": "{best}"}\n')
    with pytest.raises(UserError, match=r"line 1: expected clip_a.*\{winner\} or \{loser\}"):
        load_rationales(path)
    with pytest.raises(UserError, match="no rationales at"):
        load_rationales(tmp_path / "missing")


def test_the_best_of_n_wins_most_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    beats = torch.tensor(
        [[0.0, -1.0, 2.0], [1.0, 0.0, 0.5], [-2.0, -0.5, 0.0]], dtype=torch.double
    )[..., None]
    assert win_counts(beats)[:, 0].tolist() == [1, 2, 0]
    monkeypatch.setattr(references, "comparisons", lambda *a: beats)
    assert best_of(tiny(), clips(), 8.0, CAPTIONS[0], keep=2) == [1, 0]


def test_kept_references_stand_in_travel_and_are_missed_by_name(tmp_path: Path) -> None:
    from reelhf.video import read_video, write_video

    model, rows = tiny(), []
    for i in range(4):  # two captions of two clips each
        write_video(tmp_path / f"{i}.mp4", smooth_clip(i), 8.0)
        rows.append(json.dumps({"path": f"{i}.mp4", "caption": CAPTIONS[i // 2]}))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    answer = CliRunner().invoke(
        app,
        [
            *("references", str(model.save(tmp_path / "plain"))),
            *("--clips", str(tmp_path), "--out", str(tmp_path / "with")),
        ],
    )
    assert answer.exit_code == 0, answer.output
    kept = load_reward(tmp_path / "with")
    chosen = []
    for caption, own in zip(CAPTIONS[:2], ((0, 1), (2, 3)), strict=True):
        both = torch.stack([read_video(tmp_path / f"{i}.mp4")[0] for i in own])
        (best,) = best_of(model, both.float() / 255, 8.0, caption)
        chosen.append(both[best].float() / 255)
    frames = clips(2)
    torch.testing.assert_close(score(kept, frames), score(model, frames, torch.stack(chosen)))
    with pytest.raises(UserError, match="no reference clip for"):
        score(kept, clips(3))
    with pytest.raises(UserError, match="expected one length and size"):
        kept.keep_reference(CAPTIONS[3], (smooth_clip(0, 7) * 255).byte())
    with pytest.raises(UserError, match="judges a clip by itself"):
        references.choose_references(tiny(asks="single").save(tmp_path / "s"), tmp_path, tmp_path)


def test_comparisons_are_antisymmetric() -> None:
    beats = comparisons(tiny(), clips(3), 8.0, CAPTIONS[0])
    torch.testing.assert_close(beats, -beats.transpose(0, 1))
    assert (beats != 0).sum() == 12


def test_a_model_and_a_loss_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match=r"gives answers.*expected loss\.kind answers, got pairs"):
        train.fit(tiny(), [], {}, RewardTrainConfig(), label="foundational")
    config = RewardTrainConfig(loss=ANSWERS)
    with pytest.raises(UserError, match=r"expected loss\.kind pairs"):
        train.fit(tiny(asks="single"), [], {}, config, label="foundational")


def test_the_whole_way_from_pre_training_to_evaluation(tmp_path: Path) -> None:
    from reelhf.video import write_video

    clips_folder = tmp_path / "clips"
    clips_folder.mkdir()
    rows = []
    for i, text in enumerate(CAPTIONS):
        write_video(clips_folder / f"{i}.mp4", smooth_clip(i), 8.0)
        rows.append(json.dumps({"path": f"{i}.mp4", "caption": text}))
    (clips_folder / "captions.jsonl").write_text("\n".join(rows))
    config = tiny_pretrain_config().model_copy(update={"generative": GENERATIVE})
    random = build_models(config, CAPTIONS)["foundational"]
    backbones = pretrain_backbones(config, clips_folder, tmp_path / "backbones")
    loaded = load_reward(backbones / "foundational")
    assert loaded.kind == "qwen_vl_generative"
    key = "language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(loaded.backbone.state_dict()[key], random.backbone.state_dict()[key])
    data = write_tiny_preferences(
        tmp_path / "data",
        quality=float,
        make=smooth_clip,
        num_tasks=16,
        clips_per_task=3,
        dimensions=("prompt_following", "structural_stability"),
    )
    training = RewardTrainConfig(
        models=("foundational",), epochs=0.5, own={"foundational": {"loss": {"kind": "answers"}}}
    )
    out = train.train_rewards(training, data, backbones, tmp_path / "rewards")
    result = evaluate_rewards(out, data, tmp_path / "eval", split=None)
    assert result["dimensions"]["prompt_following"]["accuracy"] is not None
    model = load_reward(out / "foundational")
    assert (model.std > 1e-4).all()
