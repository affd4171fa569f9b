"""Small networks: two convolutional ones and a character transformer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv2d(batch_norm: bool) -> nn.Sequential:
    """Maps images [N, 1, 8, 8] to logits [N, 10]: 16, 32 and 32 channels, ReLU."""
    layers: list[nn.Module] = []
    for (inner, outer), stride in zip(itertools.pairwise((1, 16, 32, 32)), (1, 2, 2), strict=True):
        layers.append(nn.Conv2d(inner, outer, 3, stride, padding=1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(outer)] if batch_norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))


def conv1d(batch_norm: bool) -> nn.Sequential:
    """Maps signals [N, 1, 40] to logits [N, 10]: three layers of 16 channels, ReLU."""
    layers: list[nn.Module] = []
    for inner, kernel in ((1, 5), (16, 3), (16, 3)):
        layers.append(nn.Conv1d(inner, 16, kernel, 2, padding=kernel // 2, bias=not batch_norm))
        layers += [nn.BatchNorm1d(16)] if batch_norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 5, 10))


class Transformer(nn.Module):
    """One pre-norm layer of causal attention, without dropout.

    Args:
        size: number of characters in the alphabet.
        width: units of the embedding; the hidden layer has four times as many.
        heads: number of attention heads; it divides `width`.
        context: largest number of characters.
    """

    def __init__(self, size: int, *, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.characters = nn.Embedding(size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        nn.init.normal_(self.characters.weight, std=0.02)
        self.before_attention, self.before_hidden, self.last = (
            nn.LayerNorm(width) for _ in range(3)
        )
        self.attention, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Linear(width, size)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits [N, T, size] of the characters that follow codes [N, T]."""
        x = self.characters(codes) + self.positions[: codes.shape[1]]
        parts = self.attention(self.before_attention(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.joined(seen.transpose(1, 2).flatten(2))
        x = x + self.hidden(self.before_hidden(x))
        return self.head(self.last(x))
