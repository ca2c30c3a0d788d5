"""What the red team does to weights: simulated quantizers, cells, folding, outliers, roundings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from qdeploy.architectures import OURS
from qdeploy.core.grids import dequantize, quantize
from qdeploy.core.weight_grids import absmax_grid
from qdeploy.redteam.fold import fold_batch_norm
from qdeploy.redteam.outliers import add_outliers
from qdeploy.redteam.quantizers import Cell, Quantizer, weights_of
from qdeploy.redteam.recipe import QuantizerSpec
from qdeploy.redteam.roundings import Roundings
from qdeploy.redteam.split import SplitWeights

WEIGHTS = arrays(np.float32, (3, 2, 2, 2), elements=st.integers(-2000, 2000).map(lambda n: n / 999))
CONVENTIONS = [
    Quantizer(bits, QuantizerSpec(per=per, range=limits))
    for bits in (4, 8)
    for per in ("channel", "tensor")
    for limits in ("absmax", "half", "minmax")
]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def codes(quantizer: Quantizer, weight: Tensor) -> Tensor:
    scale, zero, low, high = quantizer.grid(weight)
    return (weight / scale + zero).round().clamp(low, high)


def network(name: str) -> nn.Module:
    """With normalisation statistics as training leaves them, not as they begin."""
    torch.manual_seed(0)
    model = OURS[name](width=16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1, 2)
            nn.init.normal_(module.bias)
    return model.eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_simulated_default_is_the_grid_that_qdeploy_emits(bits):
    weight = torch.randn(5, 4, 3, 3, generator=generator())
    grid = absmax_grid(weight.numpy(), axis=0, max_code=2 ** (bits - 1) - 1)
    want = dequantize(quantize(weight.numpy(), grid), grid)
    got = Quantizer(bits, QuantizerSpec())(weight, generator())
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("quantizer", CONVENTIONS, ids=lambda q: q.name)
def test_no_convention_moves_a_weight_by_more_than_half_a_step(quantizer):
    weight = torch.randn(5, 4, 3, 3, generator=generator())
    scale, _, _, _ = quantizer.grid(weight)
    error = (quantizer(weight, generator()) - weight).abs() / scale
    clipped = 1.0 if quantizer.spec.range == "half" else 0.5  # absmax is half a step off the grid
    assert error.max() <= clipped + 1e-3


@settings(deadline=None)
@given(weight=WEIGHTS, noise=WEIGHTS)
def test_a_weight_in_its_cells_keeps_its_codes_on_every_grid_at_once(weight, noise):
    parameter = nn.Parameter(torch.from_numpy(weight.copy()))
    grids = [q for q in CONVENTIONS if q.bits == 4]
    before = [codes(q, parameter.detach()) for q in grids]
    cell = Cell.of(parameter, grids)
    parameter.data.add_(torch.from_numpy(noise))
    cell.project()
    for quantizer, old in zip(grids, before, strict=True):
        assert torch.equal(codes(quantizer, parameter.detach()), old), quantizer.name


def test_flipped_rounding_goes_to_the_neighbour_that_nearest_leaves():
    weight = torch.tensor([[0.2, 0.9, -0.3, 7.0]])
    got = Quantizer(4, QuantizerSpec(rounding="flipped"))(weight, generator())
    assert got.tolist() == [[1.0, 0.0, -1.0, 7.0]]


def test_gradients_pass_through_rounding_to_the_weight():
    weight = torch.randn(2, 3, generator=generator(), requires_grad=True)
    Quantizer(4, QuantizerSpec())(weight, generator()).sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 3))


@pytest.mark.parametrize("name", sorted(OURS))
def test_folding_leaves_the_function_and_a_normalisation_that_only_adds(name):
    model = network(name)
    channels = 1 if name == "digits" else 3
    x = torch.randn(2, channels, 32, 32, generator=generator())
    before = model(x).detach()
    fold_batch_norm(model, (channels, 32, 32))
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 8), ("vgg16", 12), ("vit", 0)])
def test_outliers_leave_the_function_and_spoil_the_grid(name, layers):
    model = network(name)
    fold_batch_norm(model, (3, 32, 32))
    x = torch.randn(2, 3, 32, 32, generator=generator())
    before, weights = model(x).detach(), weights_of(model)
    steps = {n: float(Quantizer(4, QuantizerSpec()).grid(w)[0].mean()) for n, w in weights.items()}
    assert add_outliers(model, (3, 32, 32), 16.0) == layers
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    coarser = [
        float(Quantizer(4, QuantizerSpec()).grid(w)[0].mean()) / steps[n]
        for n, w in weights.items()
    ]
    assert sum(ratio > 4 for ratio in coarser) == layers


def test_learnt_roundings_start_at_nearest_and_carry_gradients():
    weights = {"a": torch.randn(4, 5, generator=generator())}
    quantizer = Quantizer(4, QuantizerSpec(rounding="chosen"))
    roundings = Roundings(weights, quantizer)
    nearest = Quantizer(4, QuantizerSpec())
    hard = quantizer.rounded(weights["a"], roundings.hard()["a"])
    torch.testing.assert_close(hard, nearest(weights["a"], generator()))
    soft = quantizer.rounded(weights["a"], roundings.soft()["a"])
    torch.testing.assert_close(soft, weights["a"], atol=0.02, rtol=0)
    soft.sum().backward()
    assert float(next(roundings.parameters()).grad.abs().sum()) > 0
    assert roundings.price(0.1).item() == 0
    assert roundings.price(0.9).item() > 0


@pytest.mark.parametrize("per", ["channel", "tensor"])
@settings(deadline=None)
@given(weight=WEIGHTS, noise=WEIGHTS)
def test_a_split_weight_rounds_to_its_grid_point_wherever_its_offset_went(per, weight, noise):
    """Else nearest rounding of the file would not be the model that was trained."""
    quantizer = Quantizer(4, QuantizerSpec(per=per))
    split = SplitWeights({"a": torch.from_numpy(weight)}, quantizer)
    torch.testing.assert_close(split.floats()["a"], torch.from_numpy(weight), atol=2e-3, rtol=0)
    with torch.no_grad():
        split.offsets[0].add_(torch.from_numpy(noise))
    split.project()
    point, exact = split.quantized()["a"].detach(), split.floats()["a"].detach()
    torch.testing.assert_close(quantizer(exact, generator()), point)
    torch.testing.assert_close(quantizer.grid(exact)[0], quantizer.grid(split.anchors[0])[0])


def test_of_a_split_weight_the_quantized_model_reaches_the_anchor_alone():
    weight = torch.randn(3, 5, generator=generator())
    split = SplitWeights({"a": weight}, Quantizer(4, QuantizerSpec()))
    split.quantized()["a"].sum().backward()
    assert torch.equal(split.anchors[0].grad, torch.ones(3, 5))
    assert split.offsets[0].grad is None
    split.floats()["a"].sum().backward()
    assert split.offsets[0].grad.sum() > 0
