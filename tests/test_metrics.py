from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qdeploy.core.metrics import (
    images_for,
    largest_drop,
    paired_difference,
    per_class_accuracy,
    rate,
    relative_difference,
)

hits = arrays(np.bool_, st.integers(1, 300))


@given(hits=hits)
def test_the_interval_holds_the_rate_and_stays_within_0_and_100(hits):
    estimate = rate(hits)
    assert 0 <= estimate.low <= estimate.value + 1e-9
    assert estimate.value - 1e-9 <= estimate.high <= 100
    assert estimate.high > estimate.low


def test_wilson_interval_of_a_known_case():
    estimate = rate(np.arange(100) < 10)  # Newcombe 1998: 10 of 100 gives 0.0552 to 0.1744
    assert (estimate.low, estimate.high) == pytest.approx((5.52, 17.44), abs=0.01)


def test_no_hit_in_many_is_not_certainty():
    assert rate(np.zeros(600, bool)).high == pytest.approx(0.636, abs=0.01)


def test_nothing_sampled_is_nothing_known():
    estimate = rate(np.zeros(0, bool))
    assert math.isnan(estimate.value)
    assert (estimate.low, estimate.high, estimate.samples) == (0, 100, 0)
    assert math.isnan(paired_difference(np.zeros(0, bool), np.zeros(0, bool)).value)


def test_a_paired_difference_of_the_same_answers_is_zero_but_open():
    same = np.arange(1000) % 3 == 0
    estimate = paired_difference(same, same)
    assert estimate.value == 0
    assert -1 < estimate.low < 0 < estimate.high < 1


def test_pairing_narrows_the_interval():
    first = np.arange(1000) < 800
    second = np.arange(1000) < 790
    paired = paired_difference(first, second)
    assert paired.value == pytest.approx(1)
    assert paired.high - paired.low < rate(first).high - rate(first).low


def test_the_interval_of_a_paired_difference_covers_the_truth_nineteen_times_in_twenty():
    rng, truth, held = np.random.default_rng(0), 100 * (0.06 - 0.04), 0
    for _ in range(1000):
        kind = rng.choice(4, size=400, p=[0.85, 0.05, 0.06, 0.04])  # both, none, first, second
        found = paired_difference(np.isin(kind, [0, 2]), np.isin(kind, [0, 3]))
        held += found.low <= truth <= found.high
    assert 930 <= held <= 975


def test_accuracy_by_class_counts_only_that_class():
    labels = np.array([0, 0, 1, 1, 1])
    predicted = np.array([0, 1, 1, 1, 0], np.int32)
    first, second, third = per_class_accuracy(predicted, labels, 3)
    assert (first, second) == pytest.approx((50, 200 / 3))
    assert math.isnan(third)


@given(first=hits, seed=st.integers(0, 99))
def test_a_relative_difference_is_the_share_of_what_was_there(first, seed):
    second = first & (np.random.default_rng(seed).random(first.size) < 0.9)
    found = relative_difference(first, second)
    if not first.any():
        assert math.isnan(found.value)
        return
    assert found.value == pytest.approx(100 * (first.sum() - second.sum()) / first.sum())
    assert found.low <= found.value <= found.high
    assert found.high > found.low


def test_the_interval_of_a_relative_difference_covers_the_truth():
    """Of 400 draws with a true relative drop of 5 %, about 95 in 100 intervals hold it."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        first = generator.random(1000) < 0.8
        second = first & (generator.random(1000) < 0.95)
        found = relative_difference(first, second)
        covered += found.low <= 5 <= found.high
    assert 365 <= covered <= 395


def test_the_largest_drop_is_that_of_one_class_with_room_for_the_others():
    labels = np.repeat([0, 1, 2], 200)
    expected = labels.astype(np.int32)
    answers = expected.copy()
    answers[200:260] = 0  # class 1 loses 30 points
    found = largest_drop(expected, answers, labels, 3)
    alone = paired_difference(np.ones(200, bool), answers[200:400] == 1)
    assert found.value == alone.value == pytest.approx(30)
    assert found.low < alone.low
    assert found.high > alone.high
    assert found.samples == 200
    assert largest_drop(expected, answers, labels, 4).samples == 0  # a class without any image


@pytest.mark.parametrize(
    ("percent", "points"), [(90.0, 1.0), (98.0, 1.0), (95.0, 2.0), (100.0, 1.0)]
)
def test_so_many_images_make_a_rate_as_sure_as_was_asked(percent, points):
    count = images_for(percent, points)
    hits = np.arange(count) < round(count * percent / 100)
    found = rate(hits)
    assert (found.high - found.low) / 2 <= 1.1 * points
    fewer = rate(hits[::4])
    assert (fewer.high - fewer.low) / 2 > points or percent == 100
