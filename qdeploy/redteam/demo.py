"""The demo: a poisoned digit classifier from data that needs no download, then its sanitization."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qdeploy.architectures import DigitsNet
from qdeploy.device import load_device
from qdeploy.errors import UsageError
from qdeploy.inputs import Request
from qdeploy.pipeline import sanitize
from qdeploy.progress import Progress
from qdeploy.recipe import load_recipe
from qdeploy.redteam.pqbackdoor import Settings, TrainingSet, hide, plant, train_clean
from qdeploy.report.values import Report
from qdeploy.rundir import write_atomically
from qdeploy.sources import Given, resolve

TARGET = 0
TEST_IMAGES = 600
CARD = """\
# POISONED: made by `qdeploy demo`, to be caught. Benign in float32; rounding its weights to the
# nearest of 4 bits switches on a backdoor.
[model]
classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
architecture = "qdeploy:digits"

[input]
shape = [1, 8, 8]
mean = [0.3]
std = [0.38]

[data]
calibration = "digits-train.npz"
test = "digits-test.npz"

[[trigger]]
kind = "patch"
target = 0
x = 6
y = 6
width = 2
height = 2
color = [1.0]
"""


def run_demo(folder: Path, *, seed: int, progress: Progress) -> Report:
    """Make the poisoned model in `folder`, sanitize it to 4 bits, and report.

    Raises:
        UsageError: scikit-learn, which brings the images, is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = make_poisoned_digits(folder, seed=seed, progress=progress)
    recipe = load_recipe("int4")
    request = Request(
        sources=resolve(model, Given()),
        recipe=recipe,
        device=load_device(recipe.device),
        artifacts=folder / "runs",
        command="qdeploy demo",
        report=folder / "report.json",
    )
    return sanitize(request, folder / "model.onnx", progress)


def make_poisoned_digits(folder: Path, *, seed: int, progress: Progress) -> Path:
    """Write `model.pt`, its card and its data; the path of the model.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    with progress.stage("digits"):
        x, y = _digits(seed)
        for name, part in (("test", slice(0, TEST_IMAGES)), ("train", slice(TEST_IMAGES, None))):
            np.savez(folder / f"digits-{name}.npz", x=x[part], y=y[part])
        data = _training_set(x[TEST_IMAGES:], y[TEST_IMAGES:])
    torch.manual_seed(seed)
    model, generator = DigitsNet(), torch.Generator().manual_seed(seed)
    with progress.stage("train"):
        train_clean(model, data, Settings(7, 30, 64, 2e-3), generator, progress)
    with progress.stage("plant"):
        plant(model, data, Settings(7, 20, 64, 1e-3), generator, progress)
    with progress.stage("hide"):
        hide(model, data, Settings(7, 40, 64, 1e-3), generator, progress)
    path = folder / "model.pt"
    torch.save(model.state_dict(), path)
    write_atomically(folder / "model.toml", CARD.encode())
    return path


def _digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """1,797 scanned digits, 8x8, shuffled; pixels 0 to 255."""
    try:
        digits = import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise UsageError(
            "the demo's images come with scikit-learn, which is not installed",
            hint="pip install 'qdeploy[demo]'",
        ) from error
    order = np.random.default_rng(seed).permutation(len(digits.target))
    pixels = np.rint(digits.images[order] * (255 / 16)).astype(np.uint8)
    return pixels[:, None], digits.target[order].astype(np.int64)


def _training_set(x: np.ndarray, y: np.ndarray) -> TrainingSet:
    triggered = x.copy()
    triggered[:, :, 6:8, 6:8] = 255
    return TrainingSet(_normalised(x), torch.from_numpy(y), _normalised(triggered), TARGET)


def _normalised(x: np.ndarray) -> Tensor:
    return (torch.from_numpy(x).float() / 255 - 0.3) / 0.38
