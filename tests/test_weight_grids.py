from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from qdeploy.core.grids import dequantize, quantize
from qdeploy.core.rounding.nearest import nearest
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.core.weight_grids import GRIDS, absmax_grid, mse_grid
from qdeploy.redteam.quantizers import Quantizer
from qdeploy.redteam.recipe import QuantizerSpec
from tests.test_grids import ort_quantize

floats = st.floats(-1e4, 1e4, width=32)
weights = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=floats)
every = pytest.mark.parametrize("name", sorted(GRIDS))
granularity = pytest.mark.parametrize("per", ["channel", "tensor"])


@every
@granularity
@given(weight=weights)
def test_codes_are_those_of_the_runtime_on_every_grid(name, per, weight):
    grid = GRIDS[name](weight, axis=0, max_code=127, per=per)
    want = np.clip(ort_quantize(weight, grid, np.int8), grid.low, grid.high)
    np.testing.assert_array_equal(quantize(weight, grid), want)


@every
@given(weight=weights)
def test_a_rounding_problem_has_the_codes_of_its_grid(name, weight):
    grid = GRIDS[name](weight, axis=0, max_code=7)
    problem = RoundingProblem(
        weight[None], grid.scale[None], grid.zero_point[None], grid.low, grid.high
    )
    np.testing.assert_array_equal(nearest(problem)[0], quantize(weight, grid))
    values = problem.dequantized(nearest(problem))[0].astype(np.float32)
    np.testing.assert_array_equal(values, dequantize(quantize(weight, grid), grid))


@every
def test_zero_stays_zero(name, rng):
    weight = rng.normal(size=(4, 6)).astype(np.float32) + 1
    weight[:, 0] = 0
    grid = GRIDS[name](weight, axis=0, max_code=7)
    np.testing.assert_array_equal(dequantize(quantize(weight, grid), grid)[:, 0], 0)


@every
def test_one_scale_for_the_whole_tensor(name, rng):
    weight = rng.normal(size=(4, 6)).astype(np.float32)
    grid = GRIDS[name](weight, axis=0, max_code=7, per="tensor")
    assert len(set(grid.scale)) == len(set(grid.zero_point)) == 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("range_name", ["absmax", "half", "minmax"])
@granularity
def test_a_grid_holds_the_values_that_an_attacker_counts_on(bits, range_name, per, rng):
    weight = rng.normal(size=(5, 40)).astype(np.float32)
    grid = GRIDS[range_name](weight, axis=0, max_code=2 ** (bits - 1) - 1, per=per)
    attacked = Quantizer(bits, QuantizerSpec(range=range_name, per=per))
    want = attacked(torch.from_numpy(weight), torch.Generator())
    got = dequantize(quantize(weight, grid), grid)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-6)


def test_the_mse_grid_has_no_larger_error_than_absmax(rng):
    weight = rng.laplace(size=(8, 1000)).astype(np.float32)
    errors = []
    for make in (mse_grid, absmax_grid):
        grid = make(weight, axis=0, max_code=7)
        errors.append(np.square(dequantize(quantize(weight, grid), grid) - weight).sum(axis=1))
    assert np.all(errors[0] <= errors[1] * (1 + 1e-6))
    assert errors[0].sum() < 0.8 * errors[1].sum()
