"""The usual normalisation that a model was trained with, by how many pictures it gets right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qdeploy.core.metrics import Estimate, paired_difference, rate
from qdeploy.data import Preprocessing
from qdeploy.inputs.sources import Sources
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.card import InputSection
from qdeploy.values import FloatModel

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
CAFFE = {"range": (0, 255), "mean": (104, 117, 123), "std": (1, 1, 1), "channel_order": "bgr"}
# By what they are known as; those of three channels only for such.
ANY: Mapping[str, Mapping[str, Any]] = {
    "[0, 1]": {"range": (0, 1)},
    "[-1, 1]": {"range": (-1, 1)},
    "[0, 255]": {"range": (0, 255)},
}
COLOUR: Mapping[str, Mapping[str, Any]] = {
    "ImageNet's": IMAGENET, "CIFAR-10's": CIFAR, "Caffe's, BGR": CAFFE,
    "[0, 1], BGR": {"range": (0, 1), "channel_order": "bgr"},
    "ImageNet's, BGR": {
        "mean": IMAGENET["mean"][::-1], "std": IMAGENET["std"][::-1], "channel_order": "bgr",
    },
}  # fmt: skip
GREY: Mapping[str, Mapping[str, Any]] = {"MNIST's": {"mean": (0.1307,), "std": (0.3081,)}}
IMAGES, BATCH = 512, 64
LEARNT = 0.25  # of the way from chance to all right, for a model to have learnt something


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What becomes of pixels, and what the model makes of labelled pictures then."""

    name: str
    fields: Mapping[str, Any]  # of a card's [input]
    right: Estimate
    learnt: bool = True  # that is far more than by chance
    clear: bool = False  # the next best gets fewer right, with its whole interval
    next_best: str = ""


def best_normalisation(
    model: FloatModel, sources: Sources, resize: int | None, seed: int = 0
) -> Normalisation:
    """The one that most pictures of the test data are classified rightly with.

    Args:
        sources: Whose test data is labelled.
        resize: Shorter side before the crop; None where pictures are as large as the input.

    Raises:
        InputError: the pictures cannot be read, or their labels are no classes of the model.
    """
    channels = model.input_shape[0]
    plain = Preprocessing(model.input_shape, (0.0,) * channels, (1.0,) * channels, resize)
    images = sources.test_images_as(plain, IMAGES, seed, model.classes)
    answers = open_session(model.onnx, optimizations="off").logits
    hits: dict[str, list[np.ndarray]] = {}
    tried = {**ANY, **(COLOUR if channels == 3 else GREY)}
    for batch in images.batches(BATCH):
        for name, fields in tried.items():
            inputs = _preprocessing(plain, fields).normalise(batch.pixels)
            right = answers(np.ascontiguousarray(inputs)).argmax(axis=1) == batch.labels
            hits.setdefault(name, []).append(right)
    found = {name: np.concatenate(parts) for name, parts in hits.items()}
    first, second, *_ = sorted(found, key=lambda name: -int(found[name].sum()))
    right, ahead = rate(found[first]), paired_difference(found[first], found[second])
    chance = 100 / model.classes
    learnt = right.low - chance > LEARNT * (100 - chance)
    said = f"{second}: {rate(found[second]).value:.1f} %"
    return Normalisation(first, tried[first], right, learnt, ahead.low > 0, said)


def _preprocessing(plain: Preprocessing, fields: Mapping[str, Any]) -> Preprocessing:
    spec = InputSection(shape=plain.shape, **fields)
    bgr = spec.channel_order == "bgr"
    return replace(plain, mean=spec.unit_mean, std=spec.unit_std, bgr=bgr)


def as_toml(value: Any) -> str:
    """Numbers in a list, or a word."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(str(number) for number in value) + "]"
    return f'"{value}"'
