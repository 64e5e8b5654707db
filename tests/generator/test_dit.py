from __future__ import annotations

import copy
import itertools
import shutil
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from generator.blocks import SpatialBlock, TemporalBlock, window_edges, window_map
from generator.dit import ATTENTION_OPERATORS, DiT, DiTConfig
from generator.rope import (
    apply_rope,
    axis_dim,
    grid_positions,
    rope_angles,
    text_positions,
    video_positions,
)
from reelhf.errors import UserError

TINY = DiTConfig(channels=4, width=24, num_heads=2, num_pairs=2, text_width=8)


def tiny_inputs(
    batch: int = 2, frames: int = 3, size: int = 4, length: int = 5
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "noisy": torch.randn(batch, 4, frames, size, size, generator=generator),
        "sigma": torch.rand(batch, generator=generator),
        "embeds": torch.randn(batch, length, 8, generator=generator),
        "mask": mask,
        "condition_latents": torch.zeros(batch, 4, frames, size, size),
        "condition_mask": torch.zeros(batch, 1, frames, size, size),
    }


def randomised(config: DiTConfig) -> DiT:
    """A DiT whose zero-initialised layers speak too, so that a test sees every path."""
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_attention_after_rotation_depends_on_relative_positions_only():
    """<rope(q, p), rope(k, r)> == <rope(q, p + s), rope(k, r + s)> for shifts s along each axis, in fp32 and from bf16."""
    head_dim = 32
    q, k = torch.randn(2, 6, head_dim)
    at, other = torch.randint(0, 9, (2, 6, 3))
    for shift in (torch.tensor([7, 0, 0]), torch.tensor([0, 5, 3]), torch.tensor([50, 50, 50])):
        products = [
            (
                apply_rope(q, rope_angles(at + move, head_dim, theta=100.0))
                * apply_rope(k, rope_angles(other + move, head_dim, theta=100.0))
            ).sum(-1)
            for move in (0, shift)
        ]
        torch.testing.assert_close(products[0], products[1], rtol=1e-4, atol=1e-4)
    assert rope_angles(at, head_dim, theta=100.0).dtype == torch.float32
    assert apply_rope(q.bfloat16(), rope_angles(at, head_dim, theta=100.0)).dtype == torch.bfloat16


def test_rotation_keeps_lengths_and_leaves_the_remainder_of_the_head():
    head_dim = 32  # 10 channels per axis, 2 left over
    assert axis_dim(head_dim) == 10
    x = torch.randn(4, head_dim)
    turned = apply_rope(x, rope_angles(torch.randint(0, 9, (4, 3)), head_dim, theta=100.0))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 30:], x[:, 30:])


def test_text_has_one_id_on_three_axes_and_the_clip_starts_after_it():
    assert text_positions(3).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    positions = video_positions(grid_positions(2, 1, 2), torch.tensor([3, 7]))
    assert positions[0].flatten(0, 2).tolist() == [[3, 0, 0], [3, 0, 1], [4, 0, 0], [4, 0, 1]]
    assert positions[1, :, 0, 0, 0].tolist() == [7, 8]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 8)])
@pytest.mark.parametrize("window", [(1, 1), (2, 2), (4, 3)])
def test_windows_cover_every_position_exactly_once(size, window, shifted):
    frames = 3
    members, valid, slots = window_map(frames, *size, window, shifted)
    assert sorted(members[valid].tolist()) == list(range(frames * size[0] * size[1]))
    assert torch.equal(members.flatten()[slots], torch.arange(frames * size[0] * size[1]))
    assert valid.flatten()[slots].all()


def test_a_shifted_window_is_clipped_at_the_border_not_rolled():
    assert window_edges(4, 2, shifted=False) == [(0, 2), (2, 4)]
    assert window_edges(4, 2, shifted=True) == [(0, 1), (1, 3), (3, 4)]


def test_a_temporal_layer_mixes_all_frames_of_one_window_and_nothing_else():
    torch.manual_seed(0)
    block = TemporalBlock(24, 2, 2.0)
    angles = rope_angles(grid_positions(3, 4, 4).flatten(0, 2), 12, theta=100.0)
    windows = window_map(3, 4, 4, (2, 2), False)
    vision = torch.randn(1, 3, 16, 24)
    shared = torch.zeros(1, 3, 1, 6, 24)
    before = block(vision, shared, angles, *windows)
    moved = vision.clone()
    moved[0, 0, 0] += torch.randn(24)  # frame 0, row 0, column 0: the first window
    changed = (block(moved, shared, angles, *windows) - before).abs().amax(-1)[0].view(
        3, 4, 4
    ) > 1e-6
    assert changed[:, :2, :2].all()
    assert changed.sum() == 3 * 4


def test_a_layer_of_full_attention_is_a_spatial_layer_over_one_long_frame():
    torch.manual_seed(0)
    block = SpatialBlock(24, 2, 2.0, 2.0, over_clip=True)
    within = SpatialBlock(24, 2, 2.0, 2.0)
    within.load_state_dict(block.state_dict())
    vision, text = torch.randn(2, 3, 4, 24), torch.randn(2, 5, 24)
    of_vision, of_text = torch.randn(2, 3, 1, 6, 24), torch.randn(2, 1, 6, 24)
    angles, text_angles = torch.randn(2, 3, 4, 6), torch.randn(5, 6)
    mask = torch.tensor([[[True] * 5], [[True] * 2 + [False] * 3]])
    made, told = block(vision, text, of_vision, of_text, angles, text_angles, mask)
    long = vision.flatten(1, 2)[:, None]
    shared = of_vision.expand(-1, -1, 4, -1, -1).flatten(1, 2)[:, None]
    one, other = within(
        long, text, shared, of_text, angles.flatten(1, 2)[:, None], text_angles, mask
    )
    torch.testing.assert_close(made.flatten(1, 2), one[:, 0])
    torch.testing.assert_close(told, other)


def test_full_attention_reaches_every_frame_in_one_pair_and_uses_every_weight():
    config = TINY.model_copy(update={"layers": "full", "num_pairs": 1, "window": (1, 1)})
    model, inputs = randomised(config), tiny_inputs(frames=4)
    noisy = inputs["noisy"].clone().requires_grad_(True)
    model(**{**inputs, "noisy": noisy})[:, :, 0, 0, 0].sum().backward()
    assert (
        noisy.grad.abs().sum(1) > 0
    ).all()  # one corner of the first frame sees every place of every frame
    model.zero_grad()
    model(**inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert model.state_dict().keys() - randomised(TINY).state_dict().keys() >= {
        "temporal.0.text_attention.kv.weight"
    }


def test_text_is_updated_with_the_mean_over_frames():
    """Each frame attends with the text on its own; the text that leaves the layer averages what the frames gave it."""
    torch.manual_seed(0)
    block = SpatialBlock(24, 2, 2.0, 2.0)
    block.text_mlp.down.weight.data.zero_()  # the MLP is not linear; the mean is taken before it
    vision, text = torch.randn(1, 3, 4, 24), torch.randn(1, 5, 24)
    angles = rope_angles(
        video_positions(grid_positions(3, 2, 2), torch.tensor([5])).flatten(2, 3), 12, theta=100.0
    )
    text_angles = rope_angles(text_positions(5), 12, theta=100.0)
    mask = torch.ones(1, 5, dtype=torch.bool)

    def text_after(rows: list[int]) -> torch.Tensor:
        shared = torch.zeros(1, len(rows), 1, 6, 24)
        return block(
            vision[:, rows], text, shared, shared[:, 0], angles[:, rows], text_angles, mask[:, None]
        )[1]

    single = torch.stack([text_after([frame]) for frame in range(3)])
    torch.testing.assert_close(text_after([0, 1, 2]), single.mean(0))
    assert (single[0] - single[1]).abs().max() > 1e-4


def test_a_prompt_means_the_same_whatever_its_padding_and_its_batch():
    model, inputs = randomised(TINY), tiny_inputs()
    alone = {name: value[:1] for name, value in inputs.items()}
    alone["embeds"], alone["mask"] = alone["embeds"][:, :3], alone["mask"][:, :3]
    torch.testing.assert_close(model(**inputs)[:1], model(**alone), rtol=1e-4, atol=1e-5)


def test_a_dropped_prompt_is_finite_and_ignores_the_words():
    model, inputs = randomised(TINY), tiny_inputs()
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    velocity = model(**inputs)
    assert velocity.isfinite().all()
    torch.testing.assert_close(
        model(**inputs | {"embeds": torch.randn(2, 5, 8)}), velocity, rtol=1e-4, atol=1e-5
    )


def test_one_sigma_for_all_frames_equals_the_same_sigma_per_frame():
    model, inputs = randomised(TINY), tiny_inputs()
    per_frame = inputs | {"sigma": inputs["sigma"][:, None].expand(2, 3)}
    torch.testing.assert_close(model(**inputs), model(**per_frame))


def test_a_fitted_projection_spreads_prompts_that_lie_close_together():
    """Pooled states that differ by a percent of their length come out centred and of unit variance."""
    torch.manual_seed(0)
    model = DiT(TINY)
    embeds = 10 * torch.randn(1, 1, 8) + 0.2 * torch.randn(200, 5, 8)
    mask = torch.ones(200, 5, dtype=torch.bool)
    model.fit_pooled_text(embeds, mask)
    outputs = model.pooled_text_input(model.text_norm(embeds).mean(1))
    assert outputs.mean(0).abs().max() < 1e-2
    assert outputs.var(0).mean().item() == pytest.approx(1.0, rel=0.3)


def test_tokens_know_where_they_are_without_any_text():
    """The same content everywhere and no prompt: rotary attention alone could not tell one position from another."""
    model, inputs = randomised(TINY), tiny_inputs(batch=1)
    inputs["noisy"] = torch.ones_like(inputs["noisy"])
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    velocity = model(**inputs)[0]  # [C, T, h, w]
    assert velocity.std(dim=(1, 2, 3)).max() > 1e-3


@pytest.mark.parametrize(
    "name", ["noisy", "sigma", "embeds", "condition_latents", "condition_mask", "low_res_latents"]
)
def test_every_input_matters(name):
    model = randomised(TINY.model_copy(update={"low_res": True}))
    inputs = tiny_inputs() | {"low_res_latents": torch.randn(2, 4, 3, 4, 4)}
    moved = model(**inputs | {name: inputs[name] + 0.3})
    assert (moved - model(**inputs)).abs().max() > 1e-4


def test_a_refiner_at_step_zero_equals_its_base_bit_for_bit():
    base = randomised(TINY)
    refiner = DiT(TINY.model_copy(update={"low_res": True}))
    missing = refiner.load_state_dict(base.state_dict(), strict=False).missing_keys
    assert missing == ["low_res_input.weight"]
    inputs = tiny_inputs()
    assert torch.equal(
        refiner(**inputs, low_res_latents=torch.randn(2, 4, 3, 4, 4)), base(**inputs)
    )
    with pytest.raises(ValueError, match="low_res_latents are missing"):
        refiner(**inputs)
    with pytest.raises(ValueError, match="low_res_latents are given"):
        base(**inputs, low_res_latents=torch.zeros(2, 4, 3, 4, 4))


class CountedOperators(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def attentions(self) -> int:
        """Forward passes of attention."""
        return sum(n for name, n in self.calls.items() if name in ATTENTION_OPERATORS)

    @property
    def products(self) -> int:
        """Matrix products of the linear layers, forward and backward."""
        return self.calls["aten::mm"] + self.calls["aten::addmm"]


def test_recomputed_layers_give_the_same_gradients_and_run_again_only_what_was_not_kept():
    inputs, gradients, counts = tiny_inputs(), {}, {}
    for kept in (False, True, "attention"):
        model = randomised(TINY.model_copy(update={"checkpointing": kept}))
        with CountedOperators() as counts[kept]:
            model(**inputs).square().mean().backward()
        gradients[kept] = [p.grad for p in model.parameters()]
    for recomputed in (True, "attention"):
        for one, other in zip(gradients[False], gradients[recomputed], strict=True):
            assert torch.equal(one, other)
    layers = 2 * TINY.num_pairs
    assert counts[False].attentions == layers
    assert counts[True].attentions == 2 * layers  # once more in the backward pass
    assert counts["attention"].attentions == layers
    assert counts["attention"].products == counts[True].products > counts[False].products
    with pytest.raises(ValueError, match="checkpointing"):
        DiTConfig(checkpointing="mlp")


def test_without_gradients_nothing_is_recomputed():
    model = randomised(TINY.model_copy(update={"checkpointing": "attention"}))
    with CountedOperators() as count, torch.no_grad():
        model(**tiny_inputs())
    assert count.attentions == 2 * TINY.num_pairs


def test_layer_outputs_that_nobody_asked_for_are_let_go():
    """Without gradients at most the input and the output of a layer are alive, however deep the model."""
    model, alive, most = randomised(TINY.model_copy(update={"num_pairs": 4})), [], 0

    def watch(_module, _inputs, output):
        nonlocal most
        vision = output[0] if isinstance(output, tuple) else output
        alive.append(weakref.ref(vision))
        most = max(most, sum(ref() is not None for ref in alive))

    for block in (*model.spatial, *model.temporal):
        block.register_forward_hook(watch)
    with torch.no_grad():
        model(**tiny_inputs())
    assert len(alive) == 8
    assert most <= 3


def test_padding_changes_no_sample_of_a_batch():
    """Attention under a mask, in one batch, against every sample on its own without any padding."""
    model, inputs = randomised(TINY), tiny_inputs(batch=3)
    inputs["mask"] = torch.arange(5) < torch.tensor([[5], [2], [0]])
    together = model(**inputs)
    for row, length in enumerate((5, 2, 1)):  # the last one has no prompt; it keeps a masked token
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        alone |= {name: alone[name][:, :length] for name in ("embeds", "mask")}
        torch.testing.assert_close(together[row : row + 1], model(**alone), rtol=1e-4, atol=1e-5)


def test_layers_are_traced_whole_for_compilation():
    torch.compiler.reset()
    config = TINY.model_copy(update={"num_pairs": 1})
    plain, traced = randomised(config), randomised(config)
    traced.compile_layers(backend="eager", fullgraph=True)  # a break in the graph would raise
    assert list(traced.state_dict()) == list(plain.state_dict())
    inputs = tiny_inputs()
    assert torch.equal(traced(**inputs), plain(**inputs))
    assert torch.equal(copy.deepcopy(traced)(**inputs), plain(**inputs))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, "attention"])
def test_compiled_layers_compute_the_same(checkpointing):
    """Velocity and gradients, at two clip sizes and prompt lengths."""
    torch.compiler.reset()
    config = TINY.model_copy(update={"num_pairs": 1, "checkpointing": checkpointing})
    plain, compiled = randomised(config), DiT(config.model_copy(update={"compile": True}))
    compiled.load_state_dict(plain.state_dict())
    for inputs in (tiny_inputs(), tiny_inputs(size=5, length=7)):
        velocities = []
        for model in (plain, compiled):
            model.zero_grad()
            velocities.append(model(**inputs))
            velocities[-1].square().mean().backward()
        torch.testing.assert_close(*velocities, rtol=1e-4, atol=1e-5)
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5)


def test_compilation_without_a_compiler_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs a C\+\+ compiler and found none of .*compile=false"
    ):
        DiT(TINY.model_copy(update={"compile": True}))


def test_every_parameter_receives_a_gradient():
    model = randomised(TINY.model_copy(update={"low_res": True}))
    inputs = tiny_inputs() | {"low_res_latents": torch.randn(2, 4, 3, 4, 4)}
    model(**inputs).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # the read-only text of the last layer uses shift and scale only, so nothing is left over
    assert silent == []


def test_hidden_states_are_returned_when_asked_for():
    model, inputs = randomised(TINY), tiny_inputs()
    velocity, hidden = model(**inputs, features=(0, 3))
    assert torch.equal(velocity, model(**inputs))
    assert {index: tuple(h.shape) for index, h in hidden.items()} == {
        0: (2, 3, 4, 4, 24),
        3: (2, 3, 4, 4, 24),
    }


def test_images_and_clips_of_other_sizes_pass_the_same_weights():
    model = randomised(TINY)
    for frames, size in itertools.product((1, 2), (2, 5)):
        inputs = tiny_inputs(frames=frames, size=size)
        assert model(**inputs).shape == inputs["noisy"].shape


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 24 over 5 heads"):
        DiTConfig(width=24, num_heads=5)
