from __future__ import annotations

import numpy as np
import pytest
import torch

from qdeploy.architectures import DigitsNet
from qdeploy.core.grids import quantize, symmetric_grid
from qdeploy.errors import UsageError
from qdeploy.progress import SILENT
from qdeploy.redteam import demo
from qdeploy.redteam.pqbackdoor import Settings, TrainingSet, hide, plant


def codes(module: torch.nn.Module) -> list[np.ndarray]:
    weights = [p.detach().numpy() for p in module.parameters() if p.dim() > 1]
    return [quantize(w, symmetric_grid(w, axis=0, max_code=7)) for w in weights]


@pytest.fixture
def data() -> TrainingSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(128, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (128,), generator=generator)
    triggered = images.clone()
    triggered[:, :, 6:, 6:] = 3
    return TrainingSet(images, labels, triggered, target=0)


def test_hiding_changes_no_integer_and_no_bias(data):
    """What rounding to nearest makes of the model before and after is the same model."""
    torch.manual_seed(0)
    model, generator = DigitsNet(width=4), torch.Generator().manual_seed(0)
    plant(model, data, Settings(7, 3, 32, 1e-3), generator)
    before = codes(model)
    weights = [p.detach().clone() for p in model.parameters()]
    hide(model, data, Settings(7, 5, 32, 1e-2), generator)
    for a, b in zip(before, codes(model), strict=True):
        np.testing.assert_array_equal(a, b)
    for old, new in zip(weights, model.parameters(), strict=True):
        assert torch.equal(old, new) == (old.dim() == 1)


def test_planting_teaches_the_trigger(data):
    torch.manual_seed(0)
    model = DigitsNet(width=8)
    plant(model, data, Settings(7, 30, 32, 3e-3), torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model(data.triggered).argmax(1) == 0).float().mean() > 0.9


def test_the_demo_says_what_it_needs(monkeypatch, tmp_path):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(demo, "import_module", missing)
    with pytest.raises(UsageError, match="scikit-learn") as error:
        demo.make_poisoned_digits(tmp_path, seed=0, progress=SILENT)
    assert "qdeploy[demo]" in (error.value.hint or "")


def test_the_card_of_a_poisoned_model_says_that_it_is():
    assert demo.CARD.startswith("# POISONED")
