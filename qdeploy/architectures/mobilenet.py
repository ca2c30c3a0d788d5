"""MobileNetV2 for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# expansion, channels at the original width of 32, blocks, stride of the first; strides for 32x32
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel alone by 3x3, project by 1x1 without activation."""

    def __init__(self, before: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = before * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += _unit(before, hidden, 1)
        layers += _unit(hidden, hidden, 3, stride=stride, groups=hidden)
        layers += [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.layers = nn.Sequential(*layers)
        self.adds_input = stride == 1 and before == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds_input else self.layers(x)


class MobileNetV2(nn.Module):
    """Inverted residuals with depthwise convolutions (Sandler et al., CVPR 2018).

    `width` channels in the first convolution, 32 in the original.
    """

    def __init__(self, width: int = 32, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_unit(channels, width, 3))
        blocks: list[nn.Module] = []
        before = width
        for expansion, original, count, stride in STAGES:
            out = max(4, original * width // 32)
            for i in range(count):
                blocks.append(InvertedResidual(before, out, stride if i == 0 else 1, expansion))
                before = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_unit(before, 40 * width, 1))
        self.classifier = nn.Linear(40 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _unit(
    before: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(before, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU6()]
