from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.data import Preprocessing
from qdeploy.inputs.synthesize import COUNT, synthesize

PRE = Preprocessing((3, 8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def statistics(module: nn.Module, x: np.ndarray) -> float:
    """How far the inputs of the first BatchNorm are from what it was trained with."""
    convolution, norm = module[0], module[1]
    with torch.no_grad():
        y = convolution(torch.from_numpy(x))
    distance = (y.mean((0, 2, 3)) - norm.running_mean).square() / norm.running_var
    return float(distance.mean())


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    result = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    result.train()
    with torch.no_grad():
        for _ in range(20):
            result(torch.rand(32, 3, 8, 8) * 0.5 + 1.0)  # bright images
    return result.eval()


def pixels(synthetic) -> np.ndarray:
    return PRE.normalise(next(synthetic.images.batches(COUNT)).pixels)


def test_images_have_the_statistics_the_model_was_trained_with(module):
    made = synthesize(module, PRE, seed=0)
    assert made.method == "BatchNorm statistics"
    noise = np.random.default_rng(0).normal(size=(COUNT, 3, 8, 8)).astype(np.float32)
    assert statistics(module, pixels(made)) < 0.1 * statistics(module, noise)


def test_the_model_is_left_as_it_was(module):
    before = {key: value.clone() for key, value in module.state_dict().items()}
    wanted = [p.requires_grad for p in module.parameters()]
    synthesize(module, PRE, seed=0)
    torch.testing.assert_close(module.state_dict(), before)
    assert [p.requires_grad for p in module.parameters()] == wanted
    assert not module[1]._forward_pre_hooks


@pytest.mark.parametrize(
    "content", [b"an ONNX message", nn.Conv2d(3, 4, 3), torch.jit.script(nn.BatchNorm2d(3))]
)
def test_where_there_are_no_statistics_it_says_that_it_is_noise(content):
    made = synthesize(content, PRE, seed=0)
    assert made.method.startswith("noise")
    assert len(made.images) == COUNT


def test_the_seed_decides(module):
    first, again, other = (synthesize(module, PRE, seed).images.decoded()[1] for seed in (0, 0, 1))
    assert first == again != other
