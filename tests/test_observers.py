from __future__ import annotations

import numpy as np
import pytest

from qdeploy.core.observers import BINS, Extent, Histogram, mse_range, percentile_range


def histogram(values: np.ndarray) -> Histogram:
    result = Histogram(float(values.min()), float(values.max()))
    result.update(values)
    return result


def test_an_extent_is_the_same_however_the_values_are_split(rng):
    values = rng.normal(size=1000).astype(np.float32)
    whole, parts = Extent(), Extent()
    whole.update(values)
    for part in np.split(values, 10):
        parts.update(part)
    assert (whole.low, whole.high) == (parts.low, parts.high) == (values.min(), values.max())


def test_a_histogram_counts_every_value_once(rng):
    values = rng.normal(size=5000).astype(np.float32)
    assert histogram(values).counts.sum() == 5000


def test_a_percentile_leaves_out_the_tails(rng):
    values = np.concatenate([rng.uniform(-1, 1, 99_800), np.full(100, 50.0), np.full(100, -50.0)])
    low, high = percentile_range(histogram(values.astype(np.float32)), 99.7)
    assert -1.1 < low < -0.9
    assert 0.9 < high < 1.1


def test_the_floor_of_a_relu_is_no_tail(rng):
    values = np.maximum(rng.normal(size=10_000), 0).astype(np.float32)
    low, high = percentile_range(histogram(values), 99.0)
    assert low == 0
    assert 2 < high < values.max()


def test_mse_shrinks_a_range_with_an_outlier_but_not_a_uniform_one(rng):
    uniform = rng.uniform(0, 1, 100_000).astype(np.float32)
    assert mse_range(histogram(uniform))[1] == pytest.approx(uniform.max())
    outlier = np.append(rng.normal(size=1_000_000), 40.0).astype(np.float32)
    assert mse_range(histogram(outlier), levels=15)[1] < 30


def test_a_constant_tensor_has_an_empty_range():
    constant = Histogram(0.0, 0.0)
    constant.update(np.zeros(10, np.float32))
    assert percentile_range(constant, 99.0) == mse_range(constant) == (0.0, 0.0)
    assert constant.counts.size == BINS
