"""What a gradient may count on, for every model and every head.

The derivative of the score with respect to pixels is finite and reaches every frame that is looked at; along itself it equals a finite
difference; a clip scores alone as in a batch; recomputing layers changes no gradient, and does recompute; bfloat16 turns it by next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from tiny_backbones import WRITERS, reward_on
from tiny_rewards import AESTHETIC, CAPTIONS, FOUNDATIONAL, MOTION, SIZES, smooth_clip, tiny_models
from torch import Tensor

from rewards.aesthetic import AestheticReward
from rewards.backbones import LANGUAGE
from rewards.ensemble import EnsembleReward
from rewards.foundational import FoundationalReward
from rewards.generative import GenerativeConfig, GenerativeReward
from rewards.heads import set_heads
from rewards.lora import LoraSettings, add_lora
from rewards.module import RewardModule
from rewards.motion import MotionReward
from rewards.tokens import train_tokenizer

GENERATIVE = GenerativeConfig(**SIZES, vision_layers=1, area=32 * 32, num_frames=4, vocab_size=300)
HEADS: dict[str, Callable[[], RewardModule]] = {
    "foundational": lambda: tiny_models()["foundational"],
    "motion": lambda: tiny_models()["motion"],
    "aesthetic": lambda: tiny_models()["aesthetic"],
    "foundational_uncertain": lambda: uncertain(FoundationalReward, FOUNDATIONAL, "foundational"),
    "motion_uncertain": lambda: uncertain(MotionReward, MOTION, "motion"),
    "aesthetic_uncertain": lambda: uncertain(AestheticReward, AESTHETIC, "aesthetic"),
    "motion_sub_scores": lambda: also_scoring(MotionReward, MOTION, SUB_SCORES, "motion"),
    "texture": lambda: also_scoring(AestheticReward, AESTHETIC, ("texture_quality",), "aesthetic"),
    "ensemble": lambda: ensemble(),
    "foundational_heads": lambda: several_heads(tiny_models()["foundational"]),
    "motion_heads": lambda: several_heads(tiny_models()["motion"]),
    "aesthetic_heads": lambda: several_heads(tiny_models()["aesthetic"]),
    "motion_uncertain_heads": lambda: several_heads(HEADS["motion_uncertain"]()),
    "generative": lambda: generative(),
    "generative_qwen3": lambda: generative(family="qwen3_vl"),
    "generative_internvl": lambda: generative(family="internvl"),
    "generative_single": lambda: generative(asks="single"),
}
SUB_SCORES = ("motion_quality", "motion_artefacts", "motion_amplitude", "motion_vividness")
WITH_DELTAS = ("qwen3_vl_lora", "internvl_lora", "vjepa2_lora")
READS_TOKENS = ("qwen2_5_vl_tokens", "qwen3_vl_tokens", "internvl_tokens")
NAMES = (*HEADS, *WRITERS, *READS_TOKENS, *WITH_DELTAS)


def also_scoring(
    kind: type, settings: object, dimensions: tuple[str, ...], name: str
) -> RewardModule:
    tokenizer = tiny_models()[name].tokenizer
    torch.manual_seed(0)
    model = kind(settings.model_copy(update={"dimensions": dimensions}), tokenizer)
    if hasattr(model, "words"):
        model.words.count(model.encode_prompts(CAPTIONS))
    return model.freeze()


def uncertain(kind: type, settings: object, name: str) -> RewardModule:
    tokenizer = tiny_models()[name].tokenizer
    torch.manual_seed(0)
    model = kind(settings.model_copy(update={"uncertainty": True}), tokenizer)
    torch.nn.init.normal_(model.spread.weight, std=0.1)
    return model.freeze()


def generative(**settings: object) -> RewardModule:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=300)
    return GenerativeReward(GENERATIVE.model_copy(update=settings), tokenizer).freeze()


def several_heads(model: RewardModule) -> RewardModule:
    torch.manual_seed(2)
    set_heads(model, 3)
    model.head_std.fill_(0.1)
    if model.settings.uncertainty:
        for head in model.other_heads:
            torch.nn.init.normal_(head.spread.weight, std=0.1)
    return model.freeze()


def ensemble() -> EnsembleReward:
    members = [tiny_models(seed)["motion"] for seed in (0, 1)]
    for member in members:
        member.std.fill_(0.1)
    return EnsembleReward(members).freeze()


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RewardModule]:
    folder = tmp_path_factory.mktemp("contract")

    def build(name: str) -> RewardModule:
        if name in HEADS:
            return HEADS[name]()
        base = name.removesuffix("_tokens").removesuffix("_lora")
        settings = {"reads": "reward_tokens"} if name in READS_TOKENS else {}
        model = reward_on(base, folder / base, **settings)
        if name in WITH_DELTAS:
            add_lora(model, LoraSettings(rank=2, alpha=4))
            for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
                torch.nn.init.normal_(parameter, std=0.1)
        return model.freeze()

    return build


def clips(count: int = 2) -> Tensor:
    """Frames inside (0.05, 0.95), where no clamp acts."""
    return torch.stack([0.1 + 0.8 * smooth_clip(i, 5, 40) for i in range(count)])


def scores(model: RewardModule, frames: Tensor, first: int = 0) -> Tensor:
    """All that a model says of each clip, [B, D] or with its spread [B, 2 D]."""
    reference = clips(4)[2:3].to(frames).expand_as(frames) if model.compares else None
    out = model.score(
        frames,
        selection=model.select(5, 8.0),
        fps=8.0,
        prompts=CAPTIONS[first : first + len(frames)],
        reference=reference,
    )
    return out.values if out.std is None else torch.cat([out.values, out.std], dim=1)


def gradient(model: RewardModule, frames: Tensor) -> Tensor:
    frames = frames.detach().requires_grad_()
    (out,) = torch.autograd.grad(scores(model, frames).sum(), frames)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_it_is_finite_and_reaches_every_selected_frame_in_every_dimension(
    make: Callable[[str], RewardModule], name: str
) -> None:
    model = make(name)
    frames = clips().requires_grad_()
    selection = model.select(5, 8.0)
    chosen = torch.zeros(5, dtype=torch.bool)
    chosen[selection.needed(5)] = True
    for value in scores(model, frames).sum(0):
        (own,) = torch.autograd.grad(value, frames, retain_graph=True)
        assert own.isfinite().all()
        touched = own.abs().amax(dim=(1, 3, 4)) > 0  # [B, F]
        assert touched.equal(chosen.expand_as(touched))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_finite_difference_along_itself(
    make: Callable[[str], RewardModule], name: str
) -> None:
    model, frames = make(name).double(), clips(1).double()
    own = gradient(model, frames)
    step = 1e-3 * own / own.norm()
    with torch.no_grad():
        ahead, behind = (scores(model, frames + sign * step).sum() for sign in (1, -1))
    assert ((ahead - behind) / 2e-3).item() == pytest.approx(own.norm().item(), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_scores_alone_as_in_a_batch(make: Callable[[str], RewardModule], name: str) -> None:
    model, frames = make(name), clips(3)
    with torch.no_grad():
        together = scores(model, frames)
        alone = torch.cat([scores(model, frames[i : i + 1], first=i) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)


def layers(model: RewardModule) -> list[torch.nn.Module]:
    """The feed-forward parts of the backbone's numbered layers, which every forward pass through it runs once."""
    return [
        part
        for name, part in model.named_modules()
        if re.search(r"\.\d+\.(mlp|intermediate)$", name) and "predictor" not in name
    ]


@pytest.mark.parametrize("name", NAMES)
def test_recomputing_layers_changes_no_gradient_and_does_recompute(
    make: Callable[[str], RewardModule], name: str
) -> None:
    model, frames = make(name), clips(1)
    plain = gradient(model, frames)
    calls: dict[int, int] = {}

    def count(part: torch.nn.Module, _: object) -> None:
        calls[id(part)] = calls.get(id(part), 0) + 1

    for part in layers(model):
        part.register_forward_pre_hook(count)
    gradient(model, frames)
    once = dict(calls)
    assert len(once) >= 2
    assert set(once.values()) == {1}
    model.recompute_layers()
    calls.clear()
    again = gradient(model, frames)
    assert calls == dict.fromkeys(once, 2)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_turns_it_by_next_to_nothing(
    make: Callable[[str], RewardModule], name: str
) -> None:
    model, frames = make(name), clips(1)
    exact = gradient(model, frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradient(model, frames)
    assert rounded.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize("name", ["foundational", *LANGUAGE, *READS_TOKENS])
def test_what_is_read_before_the_prompt_is_moved_by_it_by_exactly_nothing(
    make: Callable[[str], RewardModule], name: str
) -> None:
    model, frames = make(name), clips(1)
    with torch.no_grad():
        change = (scores(model, frames) - scores(model, frames, first=5))[0]
    moved = dict(zip(model.dimensions, change.tolist(), strict=True))
    assert moved["structural_stability"] == 0.0
    assert abs(moved["prompt_following"]) > 1e-5
