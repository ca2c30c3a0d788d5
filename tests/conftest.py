from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from qdeploy.data import Images, Preprocessing, images_from_array
from qdeploy.model import FloatModel
from qdeploy.progress import SILENT
from qdeploy.redteam.demo import make_poisoned_digits
from tests.gate_lab import make_lab
from tests.nets import float_model, residual_net

if "PYTEST_XDIST_WORKER" in os.environ:  # several at once: one thread each, also in what they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "any machine, busy or not",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any machine, busy or not")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory) -> None:
    """A state folder of the tests' own: the user's is none of their business."""
    os.environ["QDEPLOY_STATE"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Poisoned models and CIFAR-10, which do not come with the repository."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"needs the CIFAR-10 models and data in {SHARED.name}/ beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def net() -> FloatModel:
    return float_model(residual_net())


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    return Preprocessing((3, 8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="session")
def images(preprocessing: Preprocessing) -> Images:
    pixels = np.random.default_rng(1).integers(0, 256, (96, 3, 8, 8), dtype=np.uint8)
    return images_from_array("random images", pixels, preprocessing)


@pytest.fixture(scope="session")
def lab_files(tmp_path_factory, poisoned) -> Path:
    """Files made of the poisoned model, good and bad, to be copied before use."""
    return make_lab(tmp_path_factory.mktemp("lab"), poisoned).folder


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory) -> Path:
    """The demo's model, card and data: benign in float, backdoored by 4-bit nearest rounding."""
    folder = tmp_path_factory.mktemp("poisoned")
    make_poisoned_digits(folder, seed=0, progress=SILENT)
    return folder
