"""LPIPS as published, from files in torchvision's and LPIPS's own layout (random weights here: the formula, not the judgment)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from generator.training.perceptual import ConvFeatures, Lpips, feature_distance
from reelhf.errors import UserError

TORCHVISION_VGG16 = [
    64,
    64,
    "M",
    128,
    128,
    "M",
    256,
    256,
    256,
    "M",
    512,
    512,
    512,
    "M",
    512,
    512,
    512,
    "M",
]


def torchvision_vgg16() -> nn.Sequential:
    """`torchvision.models.vgg16().features`, written out."""
    layers, inputs = [], 3
    for width in TORCHVISION_VGG16:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
    return nn.Sequential(*layers)


def torchvision_alexnet() -> nn.Sequential:
    """`torchvision.models.alexnet().features`, written out."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )


NETWORKS = {  # name -> torchvision's layers, and the positions after which LPIPS reads
    "vgg16": (torchvision_vgg16, [3, 8, 15, 22, 29]),
    "alexnet": (torchvision_alexnet, [1, 4, 7, 9, 11]),
}


@pytest.fixture(scope="module", params=NETWORKS)
def files(request, tmp_path_factory):
    """(name, reference network, taps, linear weights, features file, linear file)."""
    torch.manual_seed(0)
    make, taps = NETWORKS[request.param]
    reference = make()
    folder = tmp_path_factory.mktemp(request.param)
    state = {f"features.{name}": value for name, value in reference.state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, folder / "net.pth")
    widths = ConvFeatures(request.param).widths
    heads = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(widths)}
    save_file(heads, folder / "lin.safetensors")
    return (
        request.param,
        reference,
        taps,
        list(heads.values()),
        folder / "net.pth",
        folder / "lin.safetensors",
    )


def test_the_distance_is_that_of_the_paper_on_torchvisions_network(files):
    name, reference, taps, heads, features, linear = files
    one, other = torch.rand(2, 2, 3, 64, 48)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    expected, hidden = torch.zeros(2), [((2 * x - 1) - shift) / scale for x in (one, other)]
    with torch.no_grad():
        for index, layer in enumerate(reference[: taps[-1] + 1]):
            hidden = [layer(x) for x in hidden]
            if index in taps:
                a, b = (F.normalize(x, dim=1) for x in hidden)
                expected += F.conv2d((a - b) ** 2, heads[taps.index(index)]).mean((1, 2, 3))
        model = Lpips.load(name, features, linear)
        torch.testing.assert_close(model(one, other), expected, rtol=1e-4, atol=1e-6)
        assert model(one, one).abs().max() == 0
        torch.testing.assert_close(model(one, other), model(other, one))


def test_it_is_frozen_and_passes_gradients_to_the_frames(files):
    name, *_, features, linear = files
    model = Lpips.load(name, features, linear)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    frames = torch.rand(1, 3, 64, 64, requires_grad=True)
    model(frames, torch.rand(1, 3, 64, 64)).sum().backward()
    assert frames.grad.abs().max() > 0


def test_orthogonal_features_are_two_apart():
    one, other = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    one[:, 0], other[:, 1] = 5.0, 0.1  # lengths do not count
    weight = torch.tensor([0.25, 0.75])
    assert feature_distance(one, other, weight).item() == pytest.approx(1.0)
    assert feature_distance(one, other, torch.ones(2)).item() == pytest.approx(2.0)


def test_files_that_do_not_fit_are_one_clear_line(files, tmp_path):
    name, *_, features, linear = files
    other = "alexnet" if name == "vgg16" else "vgg16"
    with pytest.raises(UserError, match=f"torchvision's {other}: features"):
        Lpips.load(other, features, linear)
    with pytest.raises(UserError, match=r"LPIPS for .* lin0.model.1.weight, lin1"):
        Lpips.load(name, features, features)
    with pytest.raises(UserError, match="there is no such file"):
        Lpips.load(name, tmp_path / "none.pth", linear)
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"broken.pth cannot be read"):
        Lpips.load(name, tmp_path / "broken.pth", linear)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="expected a state dict, got list"):
        Lpips.load(name, tmp_path / "list.pth", linear)
    wrong = {f"lin{i}.model.1.weight": torch.rand(1, 2, 1, 1) for i in range(5)}
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"lin0.model.1.weight is \(1, 2, 1, 1\)"):
        Lpips.load(name, features, tmp_path / "wrong.pth")
