"""Networks that a model card may name: ours, and those of torchvision and timm where installed.

A state dict is only tensors; it needs the code that says how they are used. Code never comes from
the card's author: the card picks a name from these lists, and numbers to build it with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from qdeploy.architectures.alexnet import AlexNet
from qdeploy.architectures.digits import DigitsNet
from qdeploy.architectures.mobilenet import MobileNetV2
from qdeploy.architectures.resnet import ResNet18
from qdeploy.architectures.vgg import VGG16
from qdeploy.architectures.vit import ViT
from qdeploy.errors import InputError

DOWNLOADS = re.compile("weights|pretrain|checkpoint|url|hub")

__all__ = ["OURS", "DigitsNet", "build_named", "construct"]

OURS: Mapping[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    "digits": DigitsNet,
    "mobilenetv2": MobileNetV2,
    "resnet18": ResNet18,
    "vgg16": VGG16,
    "vit": ViT,
}


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
                models.list_models(module=models),  # classifiers: others fetch their backbones
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
