"""Networks that a model card may name: ours, and those of torchvision and timm where installed.

A state dict is only tensors; it needs the code that says how they are used. Code never comes from
the card's author: the card picks a name from these lists, and numbers to build it with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qdeploy.errors import InputError

DOWNLOADS = re.compile("weights|pretrain|checkpoint|url|hub")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images; `width` channels in the first stage, 64 in the original."""

    def __init__(self, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage in range(4):
            out = width * 2**stage
            blocks = (BasicBlock(channels, out, 1 if stage == 0 else 2), BasicBlock(out, out, 1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            channels = out
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DigitsNet(nn.Module):
    """A small convolutional network for 8x8 gray images."""

    def __init__(self, width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


OURS: Mapping[str, Callable[..., nn.Module]] = {"resnet18": ResNet18, "digits": DigitsNet}


def build_named(name: str, arguments: Mapping[str, bool | int | float]) -> nn.Module:
    """The network `LIBRARY:NAME` of the allow-list, without any weights being fetched.

    Raises:
        InputError: the list has no such name, its library is not installed, or the arguments do
            not fit.
    """
    library, _, model = name.partition(":")
    downloads = [key for key in arguments if DOWNLOADS.search(key)]
    if downloads:
        raise InputError(f"architecture {name}: argument {downloads[0]!r} would fetch weights")
    try:
        if library == "qdeploy":
            known, make = tuple(OURS), OURS.get(model, nn.Module)
        elif library == "torchvision":
            models = import_module("torchvision.models")
            known, make = (
                models.list_models(),
                lambda **a: models.get_model(model, weights=None, **a),
            )
        else:
            timm = import_module("timm")
            known, make = (
                timm.list_models(),
                lambda **a: timm.create_model(model, pretrained=False, **a),
            )
    except ImportError as error:
        raise InputError(f"architecture {name}: {library} is not installed") from error
    if model not in known:
        raise InputError(
            f"architecture {name}: {library} has no {model!r}",
            hint=f"have {', '.join(sorted(known)[:8])}{', ...' if len(known) > 8 else ''}",
        )
    return construct(make, arguments, name)


def construct(factory: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> nn.Module:
    """`factory(**arguments)`, which must give a torch module.

    Raises:
        InputError: it raises, or gives something else.
    """
    try:
        module = factory(**arguments)
    except Exception as error:
        raise InputError(
            f"architecture {name}: {type(error).__name__}: {error}", hint="check --arch-args"
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(
            f"architecture {name}: gives a {type(module).__name__}, not a torch module"
        )
    return module
