"""The networks by name: sizes known from the papers, and errors."""

import pytest
import torch

from models.errors import UserError
from models.networks import NAMES, SMALL, build


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    # He et al. (2016), tables 1 and 6; torchvision's documentation.
    [("resnet20", 10, 0.27), ("resnet56", 10, 0.85), ("resnet18", 1000, 11.69)],
)
def test_number_of_parameters(name, classes, millions):
    count = sum(p.numel() for p in build(name, classes).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_resnet50_is_the_papers():
    assert sum(p.numel() for p in build("resnet50", 1000).parameters()) == 25_557_032


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_depth_is_in_the_name(name, channels):
    network = build(name, 7, channels=channels, width=4)
    convolutions = [
        module
        for path, module in network.named_modules()
        if isinstance(module, torch.nn.Conv2d) and "downsample" not in path
    ]
    assert f"resnet{len(convolutions) + 1}" == name
    assert network(torch.zeros(2, channels, 17, 13)).shape == (2, 7)


def test_errors():
    with pytest.raises(UserError, match="no network named 'resnet9'"):
        build("resnet9", 10)
    for name in set(NAMES) - set(SMALL):
        with pytest.raises(UserError, match="takes colour images"):
            build(name, 10, channels=1)
