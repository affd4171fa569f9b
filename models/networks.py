"""Residual networks by name: torchvision's for ImageNet, and small ones for small images."""

from __future__ import annotations

import re

import torch
from torch import nn
from torchvision.models import resnet

from models.errors import UserError

TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101")
SMALL = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56")
NAMES = SMALL + TORCHVISION


def build(name: str, num_classes: int, *, channels: int = 3, width: int = 16) -> nn.Module:
    """Builds a network with freshly drawn weights.

    Args:
        name: One of `NAMES`. resnet18 to resnet101 are torchvision's; the others are those of
            He et al. (2016), section 4.2, for images of 16 to 64 pixels.
        num_classes: Number of logits.
        channels: Image channels, 3 or 1; torchvision's networks take 3.
        width: Channels of the first stage of the small networks.

    Returns:
        A module from float32 [B, channels, H, W] to logits [B, num_classes].

    Raises:
        UserError: The name is not known, or a torchvision network is to take grey images.
    """
    if name in TORCHVISION:
        if channels != 3:
            raise UserError(f"{name} takes colour images: use `--channels 3` or one of {SMALL}")
        return getattr(resnet, name)(num_classes=num_classes, zero_init_residual=True)
    if name not in SMALL:
        raise UserError(f"no network named {name!r}: choose one of {', '.join(NAMES)}")
    depth = int(re.sub(r"\D", "", name))
    return SmallResNet((depth - 2) // 6, num_classes, channels=channels, width=width)


class SmallResNet(nn.Module):
    """The 6n+2-layer network of He et al. (2016): three stages of n blocks at full, 1/2, 1/4 size.

    Shortcuts that change the shape are 1x1 convolutions (option B), as in torchvision.
    """

    def __init__(
        self, blocks: int, num_classes: int, *, channels: int = 3, width: int = 16
    ) -> None:
        """Builds the network.

        Args:
            blocks: Residual blocks in a stage, n.
            num_classes: Number of logits.
            channels: Image channels.
            width: Channels of the first stage; the others have 2 and 4 times as many.
        """
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        inner = width
        for stage in range(3):
            outer = width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut = None
                if stride != 1 or inner != outer:
                    shortcut = nn.Sequential(
                        nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
                    )
                stages.append(resnet.BasicBlock(inner, outer, stride, shortcut))
                inner = outer
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inner, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes] of images [B, channels, H, W]."""
        features = self.stages(torch.relu(self.norm(self.conv(images))))
        return self.head(features.mean(dim=(2, 3)))
