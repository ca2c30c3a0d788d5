"""VGG-16 for small images."""

from __future__ import annotations

from torch import Tensor, nn

LAYERS = (1, 1, "pool", 2, 2, "pool", 4, 4, 4, "pool", 8, 8, 8, "pool", 8, 8, 8, "pool")


class VGG16(nn.Module):
    """Thirteen convolutions with batch normalisation and one linear layer.

    Simonyan and Zisserman, ICLR 2015; `width` channels in the first stage, 64 in the original. The
    hidden linear layers are left out, as usual for 32x32.
    """

    def __init__(self, width: int = 64, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = channels
        for layer in LAYERS:
            if isinstance(layer, str):
                layers.append(nn.MaxPool2d(2))
                continue
            out = layer * width
            layers += [nn.Conv2d(before, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)]
            layers.append(nn.ReLU())
            before = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
