from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import parser

from qdeploy.core.grids import (
    Grid,
    IntType,
    asymmetric_grid,
    dequantize,
    quantize,
)
from qdeploy.core.weight_grids import absmax_grid
from qdeploy.errors import ShapeError

floats = st.floats(-1e4, 1e4, width=32)
weights = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=floats)


def run_onnx(text: str, **inputs: np.ndarray) -> np.ndarray:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def ort_quantize(x: np.ndarray, grid: Grid, dtype: type) -> np.ndarray:
    name = {np.int8: "int8", np.uint8: "uint8"}[dtype]
    text = (
        f"q (float[R,C] x, float[N] s, {name}[N] z) => ({name}[R,C] y)"
        " { y = QuantizeLinear <axis = 0> (x, s, z) }"
    )
    scale, zero = grid.scale, grid.zero_point.astype(dtype)
    if grid.axis is None:
        text, scale, zero = text.replace("[N]", "").replace("<axis = 0> ", ""), scale[0], zero[0]
    return run_onnx(text, x=x, s=np.asarray(scale), z=np.asarray(zero)).astype(np.int32)


@given(weight=weights, max_code=st.sampled_from([7, 64, 127]))
def test_round_trip_moves_no_weight_more_than_half_a_step(weight, max_code):
    grid = absmax_grid(weight, axis=0, max_code=max_code)
    error = np.abs(dequantize(quantize(weight, grid), grid) - weight)
    assert np.all(error <= grid.scale[:, None] * 0.5 * (1 + 1e-4))


@given(weight=weights)
def test_symmetric_codes_are_those_of_the_runtime(weight):
    grid = absmax_grid(weight, axis=0, max_code=127)
    np.testing.assert_array_equal(quantize(weight, grid), ort_quantize(weight, grid, np.int8))


@given(x=weights, low=floats, high=floats)
def test_asymmetric_codes_are_those_of_the_runtime_also_outside_of_the_range(x, low, high):
    grid = asymmetric_grid(low, high)
    np.testing.assert_array_equal(quantize(x, grid), ort_quantize(x, grid, np.uint8))


def test_dequantized_values_are_those_of_the_runtime(rng):
    weight = rng.normal(size=(5, 9)).astype(np.float32)
    grid = absmax_grid(weight, axis=0, max_code=127)
    codes = quantize(weight, grid)
    text = (
        "d (int8[R,C] x, float[R] s, int8[R] z) => (float[R,C] y)"
        " { y = DequantizeLinear <axis = 0> (x, s, z) }"
    )
    want = run_onnx(text, x=codes.astype(np.int8), s=grid.scale, z=grid.zero_point.astype(np.int8))
    np.testing.assert_array_equal(dequantize(codes, grid), want)


@given(low=floats, high=floats)
def test_zero_is_exact_in_every_asymmetric_grid(low, high):
    grid = asymmetric_grid(low, high)
    zero = np.zeros(1, np.float32)
    np.testing.assert_array_equal(dequantize(quantize(zero, grid), grid), zero)


def test_a_channel_of_zeros_keeps_its_zeros():
    weight = np.array([[0, 0, 0], [1, -2, 3]], np.float32)
    grid = absmax_grid(weight, axis=0, max_code=7)
    np.testing.assert_array_equal(quantize(weight, grid)[0], 0)
    assert grid.scale[0] == 1


def test_ties_go_to_the_even_code():
    grid = Grid(np.ones(1, np.float32), np.zeros(1, np.int32), -7, 7, None)
    np.testing.assert_array_equal(
        quantize(np.array([0.5, 1.5, -2.5], np.float32), grid), [0, 2, -2]
    )


def test_scales_must_be_positive():
    with pytest.raises(ShapeError, match="1 of 2 scales"):
        Grid(np.array([1, 0], np.float32), np.zeros(2, np.int32), -7, 7, 0)


def test_a_grid_refuses_a_tensor_with_other_channels():
    grid = absmax_grid(np.ones((2, 3), np.float32), axis=0, max_code=7)
    with pytest.raises(ShapeError, match="2 channels"):
        quantize(np.ones((3, 2), np.float32), grid)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(IntType.INT4, -8, 7), (IntType.INT8, -128, 127), (IntType.UINT8, 0, 255)],
)
def test_integer_types_know_their_ends(dtype, low, high):
    assert (dtype.qmin, dtype.qmax) == (low, high)
