from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.core.patches import Window, choose_positions, convolution_rows, linear_rows
from qdeploy.errors import ShapeError

sizes = st.integers(1, 3)


pairs = st.tuples(sizes, sizes)


@given(
    groups=st.sampled_from([1, 2, 4]),
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    pads=st.tuples(sizes, sizes, sizes, sizes),
)
def test_rows_times_weight_is_the_convolution(groups, kernel, stride, dilation, pads):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 8, 9)).astype(np.float32)
    weight = rng.normal(size=(8, 4 // groups, *kernel)).astype(np.float32)
    window = Window(kernel, stride, dilation, ((pads[0], pads[1]), (pads[2], pads[3])), groups)
    padded = F.pad(torch.from_numpy(x), (pads[2], pads[3], pads[0], pads[1]))
    want = F.conv2d(
        padded, torch.from_numpy(weight), stride=stride, dilation=dilation, groups=groups
    ).numpy()
    out = window.output_shape((8, 9))
    rows = convolution_rows(x, window, np.arange(np.prod(out)))
    got = rows @ weight.reshape(groups, 8 // groups, -1).transpose(0, 2, 1)
    got = got.reshape(groups, 2, *out, 8 // groups).transpose(1, 0, 4, 2, 3).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_chosen_positions_are_a_sample_of_all_rows(rng):
    x = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    window = Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    every = convolution_rows(x, window, np.arange(36)).reshape(2, 36, -1)
    at = choose_positions((6, 6), 10, rng)
    assert len(set(at)) == 10
    np.testing.assert_array_equal(convolution_rows(x, window, at).reshape(2, 10, -1), every[:, at])


def test_all_positions_are_taken_where_there_are_few(rng):
    np.testing.assert_array_equal(choose_positions((2, 3), 10, rng), np.arange(6))


def test_linear_rows_are_the_tokens_of_every_image(rng):
    x = rng.normal(size=(4, 5, 7)).astype(np.float32)
    np.testing.assert_array_equal(linear_rows(x, np.array([1, 3])), x[:, [1, 3]].reshape(1, 8, 7))
    assert linear_rows(x[:, 0], np.array([0])).shape == (1, 4, 7)


def test_channels_must_fit_the_groups():
    window = Window((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), groups=2)
    with pytest.raises(ShapeError, match="3 channels"):
        convolution_rows(np.zeros((1, 3, 2, 2), np.float32), window, np.arange(4))
