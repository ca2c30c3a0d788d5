from __future__ import annotations

import numpy as np
import pytest

from qdeploy.core.moments import FloatInputMoments, PairedMoments


@pytest.fixture
def layer(rng):
    """Weights, rounded weights, float inputs and the inputs a quantized prefix gives instead."""
    weight = rng.normal(size=(2, 3, 5)).astype(np.float32)
    rounded = np.round(weight * 2) / 2
    x = rng.normal(1.0, 1.0, size=(2, 400, 5)).astype(np.float32)
    return weight, rounded.astype(np.float64), x, x + rng.normal(0, 0.1, x.shape).astype(np.float32)


def outputs(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.einsum("grk,gsk->gsr", weight, x)


def test_the_quadratic_is_the_mean_squared_output_error(layer):
    weight, rounded, x, _ = layer
    moments = FloatInputMoments(weight)
    for part in np.split(x, 4, axis=1):
        moments.update(part)
    want = ((outputs(rounded, x) - outputs(weight, x)) ** 2).mean(axis=1)
    np.testing.assert_allclose(moments.quadratic(centred=False).error(rounded), want, rtol=1e-4)


def test_the_centred_quadratic_is_the_error_left_after_the_best_bias(layer):
    weight, rounded, x, _ = layer
    moments = FloatInputMoments(weight)
    moments.update(x)
    difference = outputs(rounded, x) - outputs(weight, x)
    np.testing.assert_allclose(
        moments.quadratic(centred=True).error(rounded), difference.var(axis=1), rtol=1e-4
    )
    np.testing.assert_allclose(
        moments.bias_correction(rounded), -difference.mean(axis=1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("centred", [False, True])
def test_with_quantized_inputs_the_wanted_output_is_still_the_float_one(layer, centred):
    weight, rounded, x, x_quantized = layer
    wanted = outputs(weight, x).astype(np.float32)
    moments = PairedMoments(weight)
    for rows, want in zip(np.split(x_quantized, 4, 1), np.split(wanted, 4, 1), strict=True):
        moments.update(rows, want)
    difference = outputs(rounded, x_quantized) - wanted
    error = difference.var(axis=1) if centred else (difference**2).mean(axis=1)
    np.testing.assert_allclose(moments.quadratic(centred=centred).error(rounded), error, rtol=1e-3)
    np.testing.assert_allclose(
        moments.bias_correction(rounded), -difference.mean(axis=1), rtol=1e-3, atol=1e-5
    )


def test_both_kinds_agree_where_the_prefix_changes_nothing(layer):
    weight, rounded, x, _ = layer
    alone, paired = FloatInputMoments(weight), PairedMoments(weight)
    alone.update(x)
    paired.update(x, outputs(weight, x).astype(np.float32))
    np.testing.assert_allclose(
        alone.quadratic(centred=True).error(rounded), paired.quadratic(centred=True).error(rounded),
        rtol=1e-3,
    )  # fmt: skip


def test_quadratics_of_several_uses_add_up(layer):
    weight, rounded, x, _ = layer
    moments = FloatInputMoments(weight)
    moments.update(x)
    one = moments.quadratic(centred=True)
    np.testing.assert_allclose((one + one).error(rounded), 2 * one.error(rounded))


def offset_inputs(rng: np.random.Generator) -> np.ndarray:
    """Activations after a ReLU: far from 0 against their spread, many of them."""
    return (3 + 0.1 * rng.normal(size=(200, 1, 512, 12))).astype(np.float32)


def test_float32_is_enough_where_the_mean_is_taken_off_first(rng):
    weight = rng.normal(size=(1, 4, 12)).astype(np.float32)
    batches = offset_inputs(rng)
    moments = FloatInputMoments(weight)
    for rows in batches:
        moments.update(rows)
    got = moments.quadratic(centred=True).gram[0]
    want = np.cov(batches.reshape(-1, 12).astype(np.float64).T, bias=True)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < 1e-5
    total = np.zeros((12, 12), np.float32)
    mean = np.zeros(12, np.float32)
    for rows in batches[:, 0]:
        total += rows.T @ rows
        mean += rows.sum(axis=0)
    count = np.float32(batches.shape[0] * batches.shape[2])
    in_float32 = total / count - np.outer(mean / count, mean / count)
    assert np.abs(in_float32 - want).max() / np.abs(want).max() > 1000 * error


@pytest.mark.parametrize("centred", [False, True])
def test_the_size_of_the_parts_changes_nothing_that_matters(rng, centred):
    weight = rng.normal(size=(2, 4, 12)).astype(np.float32)
    rows = np.concatenate([offset_inputs(rng)[:4].reshape(1, -1, 12)] * 2)
    whole, parts = FloatInputMoments(weight), FloatInputMoments(weight)
    whole.update(rows)
    for part in np.array_split(rows, 37, axis=1):
        parts.update(part)
    a, b = (moments.quadratic(centred=centred) for moments in (whole, parts))
    np.testing.assert_allclose(a.gram, b.gram, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(a.energy, b.energy, rtol=1e-4)


def test_the_slope_is_that_of_the_error(layer):
    weight, rounded, x, x_quantized = layer
    moments = PairedMoments(weight)
    moments.update(x_quantized, outputs(weight, x).astype(np.float32))
    quadratic = moments.quadratic(centred=True)
    slope = quadratic.slope(rounded)
    step = np.zeros_like(rounded)
    step[0, 1, 2] = 1e-3
    more, less = (quadratic.error(rounded + sign * step)[0, 1] for sign in (1, -1))
    assert (more - less) / 4e-3 == pytest.approx(slope[0, 1, 2], rel=1e-3)


def test_a_sample_of_importance_2_counts_twice(rng):
    weight = rng.normal(size=(2, 3, 5)).astype(np.float32)
    rows = rng.normal(size=(2, 40, 5)).astype(np.float32)
    counts = rng.integers(1, 4, (2, 40))
    weighted, repeated = (FloatInputMoments(weight[:1]) for _ in "ab")
    weighted.update(rows[:1], counts[:1].astype(np.float32))
    repeated.update(np.repeat(rows[:1], counts[0], axis=1))
    for centred in (True, False):
        a, b = (moments.quadratic(centred=centred) for moments in (weighted, repeated))
        np.testing.assert_allclose(a.gram, b.gram, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a.energy, b.energy, rtol=1e-5)
