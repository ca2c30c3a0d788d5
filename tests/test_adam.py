from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qdeploy.core.rounding.adam import AdamSettings, adam, decide_loss, flip_loss
from qdeploy.core.rounding.nearest import nearest
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.core.rounding.trained import Schedule, Unit, output_loss
from qdeploy.errors import DivergedError


def make_unit(rng: np.random.Generator, problem: RoundingProblem) -> Unit:
    shape = (256, problem.weight.shape[-1])
    shared = rng.normal(size=(256, 1))  # correlated inputs: rounding errors can cancel
    inputs = (shared + 0.3 * rng.normal(size=shape)).astype(np.float32)
    return Unit(lambda w, x: F.linear(x, w[0]), inputs, inputs @ problem.weight[0].T)


def settings(flip_weight: float, decide_weight: float = 0.01) -> AdamSettings:
    return AdamSettings(Schedule(800, 32, 1e-2), flip_weight, decide_weight)


@pytest.fixture
def problem(rng) -> RoundingProblem:
    weight = rng.normal(size=(1, 8, 24)).astype(np.float32)
    return RoundingProblem.symmetric(weight, np.abs(weight).max(-1) / np.float32(7), 7)


def output_error(problem: RoundingProblem, unit: Unit, codes: np.ndarray) -> float:
    return float(np.square(unit.inputs @ problem.dequantized(codes)[0].T - unit.wanted).mean())


def test_without_the_flip_term_it_lowers_the_output_error(rng, problem):
    unit = make_unit(rng, problem)
    codes = adam(problem, unit, settings(0.0), torch.Generator().manual_seed(0))
    assert output_error(problem, unit, codes) < output_error(problem, unit, nearest(problem))


def test_with_a_huge_flip_term_it_flips_all_but_what_lies_next_to_a_code(rng, problem):
    unit = make_unit(rng, problem)
    codes = adam(problem, unit, settings(1e4), torch.Generator().manual_seed(0))
    within_reach = problem.free & (problem.error > 0.02)  # in 800 steps of 0.01
    assert within_reach.mean() > 0.8
    assert np.all((codes != nearest(problem))[within_reach])


def test_the_same_seed_gives_the_same_codes(rng, problem):
    unit = make_unit(rng, problem)
    first, second = (
        adam(problem, unit, settings(1.0), torch.Generator().manual_seed(3)) for _ in "ab"
    )
    np.testing.assert_array_equal(first, second)


def test_a_loss_that_is_not_finite_is_an_error(rng, problem):
    unit = make_unit(rng, problem)
    broken = Unit(unit.forward, unit.inputs * np.float32(np.nan), unit.wanted)
    with pytest.raises(DivergedError, match="step 0"):
        adam(problem, broken, settings(1.0), torch.Generator().manual_seed(0))


def test_the_flip_loss_is_zero_at_the_flipped_choice_and_weighted_by_the_error():
    nearest_up, error = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.1])
    assert flip_loss(1 - nearest_up, nearest_up, error) == 0
    soft = torch.tensor([0.5, 0.5])
    assert flip_loss(soft, nearest_up, error) == pytest.approx(0.6 * np.log(2))


def test_the_decide_loss_is_zero_at_the_ends_and_one_in_the_middle():
    assert decide_loss(torch.tensor([0.0, 1.0])) == 0
    assert decide_loss(torch.tensor([0.5])) == 1


def test_the_output_loss_sums_channels_and_averages_the_rest():
    got = torch.zeros(2, 3, 4, 4)
    assert output_loss(got, got + 2) == pytest.approx(3 * 4)
