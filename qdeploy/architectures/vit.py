"""A small vision transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 16  # channels of an attention head


class EncoderBlock(nn.Module):
    """Attention and a two-layer perceptron, each behind a normalisation and beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.reduce = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.projection(self._attend(self.norm1(x)))
        return x + self.reduce(F.gelu(self.expand(self.norm2(x))))

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        return (weights @ value).transpose(1, 2).reshape(batch, tokens, width)


class ViT(nn.Module):
    """Dosovitskiy et al., ICLR 2021: patches as tokens, mean of the tokens for the class.

    Args:
        width: Channels of a token; a multiple of 16.
        size: Side of the square image.
        patch: Side of a patch.
    """

    def __init__(
        self,
        width: int = 96,
        num_classes: int = 10,
        channels: int = 3,
        *,
        size: int = 32,
        patch: int = 4,
        depth: int = 6,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.classifier(self.norm(self.blocks(tokens)).mean(1))
