"""The text encoder: tokenizer, batching, languages, the empty prompt, files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generator.prompt_cache import encoder_key
from generator.text import TextEncoder, TextEncoderConfig, train_tokenizer
from reelhf.errors import UserError

CAPTIONS = [
    "A small red circle moves slowly to the left on a white ground.",
    "A large blue square stands still on a grey ground.",
    "一个红色的小圆形在白色背景上慢慢向左移动。",
    "一个蓝色的大正方形静止在灰色背景上。",
]
TINY = TextEncoderConfig(hidden_size=32, num_layers=2, mlp_size=48, vocab_size=400)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder.build(TINY, CAPTIONS).eval()


def test_any_text_survives_the_tokenizer():
    tokenizer = train_tokenizer(CAPTIONS, TINY)
    for text in (*CAPTIONS, "An unseen ünïcode 句子 🎬, with  two spaces"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_training_captions_need_fewer_tokens_than_bytes():
    tokenizer = train_tokenizer(CAPTIONS, TINY)
    for text in CAPTIONS:
        assert len(tokenizer(text)["input_ids"]) < len(text.encode()) / 2


def test_a_chinese_character_is_the_same_token_in_any_clause():
    tokenizer = train_tokenizer(CAPTIONS * 10, TINY)
    red = tokenizer("红", add_special_tokens=False)["input_ids"]
    blue = tokenizer("蓝", add_special_tokens=False)["input_ids"]
    assert len(red) == 1
    swapped = tokenizer(CAPTIONS[2].replace("红", "蓝"))["input_ids"]
    assert swapped == [blue[0] if t == red[0] else t for t in tokenizer(CAPTIONS[2])["input_ids"]]


def test_a_prompt_is_encoded_alike_alone_and_in_a_batch(encoder):
    batch = encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        length = alone.mask.sum()
        assert alone.mask.all() and batch.mask[row].sum() == length
        torch.testing.assert_close(
            batch.embeds[row, :length], alone.embeds[0], rtol=1e-4, atol=1e-5
        )


def test_padding_is_on_the_right_and_zero(encoder):
    batch = encoder.encode([CAPTIONS[0], "red"])
    assert batch.mask[1].int().diff().max() <= 0
    assert (batch.embeds[~batch.mask] == 0).all()


def test_embeddings_have_unit_scale(encoder):
    batch = encoder.encode(CAPTIONS)
    scale = batch.embeds[batch.mask].square().mean(-1).sqrt()
    torch.testing.assert_close(scale, torch.ones_like(scale), rtol=1e-2, atol=1e-2)


def test_different_prompts_in_both_languages_differ(encoder):
    last = [encoder.encode([caption]).embeds[0, -1] for caption in CAPTIONS]
    for i, one in enumerate(last):
        assert all((one - other).abs().max() > 1e-2 for other in last[i + 1 :])


@pytest.mark.parametrize("prompts", [[""], ["", CAPTIONS[0]], ["   "]])
def test_the_empty_prompt_is_the_unconditional_one(encoder, prompts):
    condition = encoder.encode(prompts)
    assert condition.embeds.shape[1] >= 1
    assert not condition.mask[0].any() and (condition.embeds[0] == 0).all()


def test_a_long_prompt_is_cut(encoder):
    config = TINY.model_copy(update={"max_tokens": 8})
    short = TextEncoder(config, encoder.language_model, encoder.tokenizer)
    assert short.encode([CAPTIONS[0] * 5]).embeds.shape[1] == 8


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_save_and_load_give_equal_embeddings(architecture, tmp_path):
    torch.manual_seed(0)
    config = TINY.model_copy(update={"architecture": architecture})
    encoder = TextEncoder.build(config, CAPTIONS).eval()
    loaded = TextEncoder.load(encoder.save(tmp_path / "text"))
    assert loaded.config == config
    before, after = encoder.encode(CAPTIONS), loaded.encode(CAPTIONS)
    assert torch.equal(before.embeds, after.embeds) and torch.equal(before.mask, after.mask)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_saved_encoder_serves_as_a_pretrained_path(encoder, tmp_path):
    encoder.save(tmp_path / "text")
    again = TextEncoder.build(TextEncoderConfig(path=str(tmp_path / "text")), []).eval()
    assert torch.equal(again.encode(CAPTIONS).embeds, encoder.encode(CAPTIONS).embeds)


def test_bad_input_is_named(encoder, tmp_path):
    with pytest.raises(UserError, match="text encoder folder"):
        TextEncoder.load(tmp_path)
    with pytest.raises(UserError, match="not a readable language model"):
        TextEncoder.build(TextEncoderConfig(path=str(tmp_path / "nowhere")), [])
    with pytest.raises(UserError, match="needs captions"):
        TextEncoder.build(TINY, [])
    with pytest.raises(UserError, match="3 hidden states"):
        TextEncoder(
            TINY.model_copy(update={"hidden_layer": 7}), encoder.language_model, encoder.tokenizer
        )


TEMPLATE = "<|begin|>Describe the video with its motion:\n{}\nAnswer:"


@pytest.fixture(scope="module")
def templated(encoder) -> TextEncoder:
    config = TINY.model_copy(update={"template": TEMPLATE, "hidden_layer": 2})
    return TextEncoder(config, encoder.language_model, encoder.tokenizer).eval()


def test_what_stands_before_the_prompt_is_read_and_then_dropped(encoder, templated):
    """Rows of several lengths are, from their first own token on, the hidden states of the whole text."""
    condition = templated.encode(CAPTIONS)
    before, after = TEMPLATE.split("{}")
    whole = TextEncoder(
        TINY.model_copy(update={"hidden_layer": 2}), encoder.language_model, encoder.tokenizer
    )
    for row, caption in enumerate(CAPTIONS):
        text = f"{before}{caption}{after}"
        dropped = len(encoder.tokenizer(before)["input_ids"]) - 1  # without the mark of the end
        expected = whole.encode([text]).embeds[0, dropped:]
        own = condition.embeds[row][condition.mask[row]]
        assert len(own) == len(expected) > 5
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
        assert condition.mask[row].int().diff().max() <= 0  # to the front
    plain = whole.encode(CAPTIONS[:1]).embeds[0]
    assert (condition.embeds[0, :5] - plain[1:6]).abs().max() > 1e-2  # the instruction was read


def test_an_empty_prompt_in_a_template_is_the_unconditional_one(templated):
    condition = templated.encode(["", CAPTIONS[0]])
    assert not condition.mask[0].any() and (condition.embeds[0] == 0).all()
    assert condition.mask[1].any()
    assert templated.encode([""]).embeds.shape[:2] == (1, 1)


def test_a_template_costs_a_long_prompt_none_of_its_tokens(encoder):
    config = TINY.model_copy(update={"max_tokens": 8, "template": TEMPLATE})
    short = TextEncoder(config, encoder.language_model, encoder.tokenizer)
    before = len(encoder.tokenizer(TEMPLATE.split("{}")[0])["input_ids"])
    tokens = short.tokenize([CAPTIONS[0] * 5])
    assert tokens.mask.sum() == 8 + before
    assert 8 <= tokens.own.sum() <= 9


def test_a_template_travels_and_is_trained_in(templated, tmp_path):
    loaded = TextEncoder.load(templated.save(tmp_path / "text"))
    assert loaded.config.template == TEMPLATE
    assert torch.equal(loaded.encode(CAPTIONS).embeds, templated.encode(CAPTIONS).embeds)
    loss = templated.caption_loss(CAPTIONS[:1])
    tokens = templated.tokenize(CAPTIONS[:1])
    logits = templated.language_model(input_ids=tokens.ids).logits[0, :-1].log_softmax(-1)
    each = -logits.gather(1, tokens.ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(
        loss, each[tokens.own[0, 1:]].mean()
    )  # the instruction is not learned
    with pytest.raises(ValueError, match="a template with 0 places"):
        TextEncoderConfig(template="no place for it")


def test_embeddings_are_kept_on_disk_by_encoder_and_text(encoder, tmp_path, monkeypatch):
    folder = encoder.save(tmp_path / "text")
    expected = encoder.encode(CAPTIONS)
    cached = TextEncoder.load(folder).use_cache(tmp_path / "cache", folder)
    first = cached.encode(["", *CAPTIONS[:2]])
    torch.testing.assert_close(first.embeds[1, :5], expected.embeds[0, :5], rtol=1e-4, atol=1e-5)
    assert torch.equal(
        first.mask[1:, : expected.mask[:2].sum(1).max()],
        expected.mask[:2, : expected.mask[:2].sum(1).max()],
    )
    assert not first.mask[0].any()

    encoded = []
    embed = TextEncoder.embed
    monkeypatch.setattr(
        TextEncoder, "embed", lambda self, prompts: encoded.extend(prompts) or embed(self, prompts)
    )
    again = TextEncoder.load(folder).use_cache(tmp_path / "cache", folder)
    assert torch.equal(again.encode(["", *CAPTIONS[:2]]).embeds, first.embeds)
    assert encoded == []
    again.cache.file(CAPTIONS[0]).write_bytes(b"cut short")
    assert torch.equal(again.encode(["", *CAPTIONS[:3]]).mask[:3, :5], first.mask[:, :5])
    assert encoded == sorted([CAPTIONS[0], CAPTIONS[2]])
    assert not list((tmp_path / "cache").rglob("*.tmp"))

    # another layer or template of the same weights is another encoder
    for change in ({"hidden_layer": 2}, {"template": TEMPLATE}):
        other = TextEncoder(
            encoder.config.model_copy(update=change), encoder.language_model, encoder.tokenizer
        )
        assert encoder_key(other.save(tmp_path / "other")) != encoder_key(folder)


def test_processes_may_share_the_kept_embeddings(encoder, tmp_path):
    """Two write, read and delete the same prompts at once."""
    folder = encoder.save(tmp_path / "text")
    code = (
        "import sys; from pathlib import Path; from generator.text import TextEncoder\n"
        "text = TextEncoder.load(sys.argv[1]).use_cache(Path(sys.argv[2]), Path(sys.argv[1]))\n"
        "for _ in range(5):\n"
        "    [file.unlink(missing_ok=True) for file in Path(sys.argv[2]).rglob('*.safetensors')]\n"
        "    assert text.encode([f'a red circle {n}' for n in range(20)]).mask.any(1).all()\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    root = Path(__file__).parents[2]
    running = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_saving_and_loading_say_nothing_in_the_middle_of_our_own_progress(tmp_path):
    """In a process of its own: transformers keeps the switch of its bars for good."""
    code = (
        "import sys; from generator.text import TextEncoder, TextEncoderConfig as Config\n"
        "config = Config(hidden_size=32, num_layers=1, mlp_size=48, vocab_size=300)\n"
        "TextEncoder.load(TextEncoder.build(config, ['a red circle']).save(sys.argv[1]))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
