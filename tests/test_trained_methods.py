"""The methods that train their choices: AdaRound, BRECQ, PD-Quant, FlexRound."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qdeploy.core.rounding.adaround import AdaroundSettings, adaround, decide_loss, sharpness
from qdeploy.core.rounding.brecq import fisher_loss
from qdeploy.core.rounding.flexround import flexround
from qdeploy.core.rounding.nearest import nearest
from qdeploy.core.rounding.pdquant import prediction_loss
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.core.rounding.trained import Schedule, Unit
from qdeploy.errors import DivergedError
from tests.test_adam import make_unit, output_error

SCHEDULE = Schedule(600, 32, 1e-2)
SETTINGS = AdaroundSettings(SCHEDULE, 0.01, 0.2, (20.0, 2.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def problem(rng) -> RoundingProblem:
    weight = rng.normal(size=(1, 8, 24)).astype(np.float32)
    return RoundingProblem.symmetric(weight, np.abs(weight).max(-1) / np.float32(7), 7)


def test_adaround_lowers_the_output_error_and_stays_within_the_cell(rng, problem):
    unit = make_unit(rng, problem)
    codes = adaround(problem, unit, SETTINGS, generator())
    assert output_error(problem, unit, codes) < 0.7 * output_error(problem, unit, nearest(problem))
    assert np.all(np.abs(codes - problem.steps) <= 1)


@pytest.mark.parametrize("seed", range(6))
def test_flexround_lowers_the_output_error_and_may_leave_the_cell(seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(1, 8, 24)).astype(np.float32)
    problem = RoundingProblem.symmetric(weight, np.abs(weight).max(-1) / np.float32(7), 7)
    unit = make_unit(rng, problem)
    codes = flexround(problem, unit, SCHEDULE, generator())
    assert output_error(problem, unit, codes) < 0.8 * output_error(problem, unit, nearest(problem))
    assert np.abs(codes).max() <= 7


@pytest.mark.parametrize("method", [partial(adaround, settings=SETTINGS)])
def test_the_same_seed_gives_the_same_codes(rng, problem, method):
    unit = make_unit(rng, problem)
    first, second = (method(problem, unit, generator=generator(3)) for _ in "ab")
    np.testing.assert_array_equal(first, second)


def test_without_steps_every_method_is_nearest(rng, problem):
    unit, none = make_unit(rng, problem), Schedule(0, 32, 1e-2)
    settings = AdaroundSettings(none, 0.01, 0.2, (20.0, 2.0))
    for codes in (
        adaround(problem, unit, settings, generator()),
        flexround(problem, unit, none, generator()),
    ):
        np.testing.assert_array_equal(codes, nearest(problem))


def test_brecq_spends_its_error_where_the_loss_does_not_look(rng, problem):
    """The first half of the images counts; the second, which is louder, does not."""
    quiet, loud = make_unit(rng, problem), make_unit(rng, problem)
    inputs = np.concatenate([quiet.inputs[:128], 5 * np.abs(loud.inputs[128:])])
    unit = Unit(quiet.forward, inputs, inputs @ problem.weight[0].T)
    importance = np.zeros_like(unit.wanted)
    importance[: len(importance) // 2] = 1
    half = Unit(unit.forward, unit.inputs[:128], unit.wanted[:128])
    weighted = adaround(problem, unit, SETTINGS, generator(), error=fisher_loss(importance))
    even = adaround(problem, unit, SETTINGS, generator())
    assert output_error(problem, half, weighted) < output_error(problem, half, even)


def test_importance_is_relative():
    got, wanted = torch.randn(4, 3), torch.zeros(4, 3)
    loss = fisher_loss(np.full((4, 3), 1e-7, np.float32))
    want = got.square().sum(1).mean()
    torch.testing.assert_close(loss(got, wanted, torch.arange(4)), want)


def test_pdquant_keeps_the_prediction(rng, problem):
    """Only one direction of the output matters to the classes; errors go to the others."""
    unit = make_unit(rng, problem)
    head = torch.zeros(2, 8)
    head[0, 0], head[1, 0] = 8.0, -8.0
    logits = unit.wanted @ head.numpy().T

    def predict(y: torch.Tensor, _chosen: torch.Tensor) -> torch.Tensor:
        return F.linear(y, head)

    error = prediction_loss(predict, logits, temperature=1.0)
    aware = adaround(problem, unit, SETTINGS, generator(), error=error)
    blind = adaround(problem, unit, SETTINGS, generator())

    def moved(codes: np.ndarray) -> float:
        got = unit.inputs @ problem.dequantized(codes)[0].T.astype(np.float32)
        return float(np.square(got[:, 0] - unit.wanted[:, 0]).mean())

    assert moved(aware) <= moved(blind)
    loss = prediction_loss(predict, logits, 1.0)
    exact = torch.from_numpy(unit.wanted)
    assert loss(exact, exact, torch.arange(len(exact))) == pytest.approx(0, abs=1e-6)


def test_a_loss_that_is_not_finite_is_an_error(rng, problem):
    unit = make_unit(rng, problem)
    broken = Unit(unit.forward, unit.inputs * np.float32(np.nan), unit.wanted)
    for run in (
        lambda: adaround(problem, broken, SETTINGS, generator()),
        lambda: flexround(problem, broken, SCHEDULE, generator()),
    ):
        with pytest.raises(DivergedError, match="step 0"):
            run()


def test_undecided_choices_are_free_at_first_and_then_ever_dearer():
    assert sharpness(0.1, SETTINGS) is None
    assert sharpness(0.2, SETTINGS) == pytest.approx(20)
    assert sharpness(1.0, SETTINGS) == pytest.approx(2)
    near = torch.tensor([0.2])
    assert decide_loss(near, 20.0) > decide_loss(near, 2.0)
    assert decide_loss(torch.tensor([0.0, 1.0]), 3.0) == 0
