from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.core.grids import quantize
from qdeploy.core.moments import FloatInputMoments, Quadratic
from qdeploy.core.rounding.descent import BLOCK, DescentSettings, descent, flip_price
from qdeploy.core.rounding.flip import flip
from qdeploy.core.rounding.gptq import GptqSettings, gptq
from qdeploy.core.rounding.nearest import nearest
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.core.rounding.stochastic import stochastic
from qdeploy.core.weight_grids import absmax_grid
from qdeploy.errors import DivergedError

UNBOUNDED = float("inf")
SETTINGS = DescentSettings(
    flip_weight=0.0, flip_bound=UNBOUNDED, start="nearest", sweeps=50, damping=0.0
)


def make_problem(
    rng: np.random.Generator, groups: int = 1, rows: int = 3, fan_in: int = 6, max_code: int = 7
) -> RoundingProblem:
    weight = rng.normal(size=(groups, rows, fan_in)).astype(np.float32)
    scale = np.abs(weight).max(-1) / np.float32(max_code)
    return RoundingProblem.symmetric(weight, scale, max_code)


def make_quadratic(
    rng: np.random.Generator, problem: RoundingProblem, samples: int = 300
) -> Quadratic:
    groups, _, fan_in = problem.weight.shape
    mix = rng.normal(size=(groups, fan_in, fan_in))
    moments = FloatInputMoments(problem.weight)
    moments.update((rng.normal(size=(groups, samples, fan_in)) @ mix).astype(np.float32))
    return moments.quadratic(centred=True)


def objective(
    problem: RoundingProblem, quadratic: Quadratic, codes: np.ndarray, flip_weight: float
) -> np.ndarray:
    """What descent is to minimise, row by row, written out."""
    agrees = codes == nearest(problem)
    price = flip_price(problem, quadratic, flip_weight, UNBOUNDED)
    return quadratic.error(problem.dequantized(codes)) + (price * agrees).sum(-1)


def test_nearest_is_what_the_grid_quantizes_to(rng):
    problem = make_problem(rng, rows=4, fan_in=50)
    grid = absmax_grid(problem.weight[0], axis=0, max_code=7)
    np.testing.assert_array_equal(nearest(problem)[0], quantize(problem.weight[0], grid))


@given(seed=st.integers(0, 2**32 - 1))
def test_every_method_chooses_one_of_the_two_neighbours(seed):
    rng = np.random.default_rng(seed)
    problem = make_problem(rng, groups=2)
    quadratic = make_quadratic(rng, problem)
    settings = DescentSettings(1.0, UNBOUNDED, "flipped", 5, 1e-4)
    for codes in (stochastic(problem, rng), descent(problem, quadratic, settings, rng)):
        assert np.all(np.abs(codes - problem.steps) <= 1)
        assert np.all(np.abs(codes) <= problem.high)


def test_weights_on_a_code_stay_there():
    weight = np.array([[[-7, -3, 0, 2, 7]]], np.float32)
    problem = RoundingProblem.symmetric(weight, np.ones((1, 1), np.float32), 7)
    quadratic = make_quadratic(np.random.default_rng(0), problem)
    flip = DescentSettings(100.0, UNBOUNDED, "flipped", 5, 0.0)
    assert not problem.free.any()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        np.testing.assert_array_equal(stochastic(problem, rng), weight)
        np.testing.assert_array_equal(descent(problem, quadratic, flip, rng), weight)


def test_stochastic_rounding_is_right_on_average(rng):
    problem = make_problem(rng)
    mean = np.mean([stochastic(problem, rng) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(mean, problem.steps, atol=0.05)


@pytest.mark.parametrize("flip_weight", [0.0, 0.3, 2.0])
def test_no_single_flip_improves_what_descent_found(rng, flip_weight):
    problem = make_problem(rng, groups=2, rows=4, fan_in=BLOCK + 20)
    quadratic = make_quadratic(rng, problem, samples=1000)
    settings = DescentSettings(flip_weight, UNBOUNDED, "nearest", 200, 0.0)
    codes = descent(problem, quadratic, settings, rng)
    best = objective(problem, quadratic, codes, flip_weight)
    floor = problem.floor.astype(np.int32)
    for i in range(problem.weight.shape[-1]):
        other = codes.copy()
        flipped = 2 * floor[:, :, i] + 1 - codes[:, :, i]
        other[:, :, i] = np.where(problem.free[:, :, i], flipped, codes[:, :, i])
        assert np.all(objective(problem, quadratic, other, flip_weight) >= best * (1 - 1e-9))


@pytest.mark.parametrize("flip_weight", [0.0, 0.5])
def test_descent_goes_half_of_the_way_to_the_best_of_all_choices_or_further(rng, flip_weight):
    problem = make_problem(rng, rows=8, fan_in=8)
    quadratic = make_quadratic(rng, problem)
    choices = []
    for bits in product([False, True], repeat=8):
        codes = problem.codes(np.broadcast_to(np.array(bits), problem.weight.shape))
        choices.append(objective(problem, quadratic, codes, flip_weight))
    best = np.min(choices, axis=0).sum()
    settings = DescentSettings(flip_weight, UNBOUNDED, "nearest", 50, 0.0)
    found = objective(
        problem, quadratic, descent(problem, quadratic, settings, rng), flip_weight
    ).sum()
    at_nearest = objective(problem, quadratic, nearest(problem), flip_weight).sum()
    assert found - best < 0.5 * (at_nearest - best)


def test_descent_lowers_the_output_error_of_nearest_rounding(rng):
    problem = make_problem(rng, rows=16, fan_in=64)
    quadratic = make_quadratic(rng, problem, samples=2000)
    codes = descent(problem, quadratic, SETTINGS, rng)
    before = quadratic.error(problem.dequantized(nearest(problem)))
    after = quadratic.error(problem.dequantized(codes))
    assert np.all(after <= before)
    assert after.sum() < 0.65 * before.sum()


def test_a_larger_flip_weight_flips_more(rng):
    problem = make_problem(rng, rows=16, fan_in=64)
    quadratic = make_quadratic(rng, problem, samples=2000)
    shares = []
    for flip_weight in (0.0, 0.5, 2.0, 1e3):
        settings = DescentSettings(flip_weight, UNBOUNDED, "nearest", 50, 0.0)
        codes = descent(problem, quadratic, settings, rng)
        shares.append((codes != nearest(problem)).mean())
    assert shares == sorted(shares)
    assert shares[-1] > 0.95


def test_inputs_that_clean_images_never_use_are_flipped_by_the_price_alone(rng):
    """A dormant input costs no output error: only the price is against the attacker's choice."""
    problem = make_problem(rng, fan_in=8)
    samples = rng.normal(size=(1, 500, 8)).astype(np.float32)
    samples[:, :, 5] = 0
    moments = FloatInputMoments(problem.weight)
    moments.update(samples)
    settings = DescentSettings(0.3, UNBOUNDED, "nearest", 20, 0.0)
    codes = descent(problem, moments.quadratic(centred=True), settings, rng)
    dormant = problem.free[:, :, 5] & (problem.error[:, :, 5] > 0)
    assert dormant.any()
    assert np.all((codes != nearest(problem))[:, :, 5][dormant])


def test_groups_are_solved_independently(rng):
    problem = make_problem(rng, groups=3, rows=2)
    quadratic = make_quadratic(rng, problem)
    together = descent(problem, quadratic, SETTINGS, rng)
    for g in range(3):
        one = slice(g, g + 1)
        part = RoundingProblem.symmetric(problem.weight[one], problem.scale[one], 7)
        own = Quadratic(quadratic.gram[one], quadratic.weight[one], quadratic.energy[one])
        alone = descent(part, own, SETTINGS, rng)
        np.testing.assert_array_equal(together[one], alone)


def test_the_price_is_relative_to_the_error_of_nearest(rng):
    problem = make_problem(rng, rows=4, fan_in=32)
    quadratic = make_quadratic(rng, problem)
    error = quadratic.error(problem.dequantized(nearest(problem))).sum()
    assert flip_price(problem, quadratic, 1.0, UNBOUNDED).sum() == pytest.approx(error)


def test_the_price_is_never_more_than_its_share_of_the_output(rng):
    problem = make_problem(rng, rows=4, fan_in=32)
    quadratic = make_quadratic(rng, problem)
    free, bounded = (flip_price(problem, quadratic, 1.0, bound) for bound in (UNBOUNDED, 1e-4))
    assert bounded.sum() == pytest.approx(1e-4 * quadratic.energy.sum())
    np.testing.assert_allclose(bounded / bounded.sum(), free / free.sum())


def test_inputs_that_are_not_finite_are_refused(rng):
    problem = make_problem(rng)
    bad = Quadratic(np.full((1, 6, 6), np.nan, np.float32), np.zeros((1, 3, 6)), np.zeros((1, 3)))
    with pytest.raises(DivergedError, match="not finite"):
        descent(problem, bad, SETTINGS, rng)


def test_flip_takes_the_other_neighbour_wherever_there_is_one(rng):
    problem = make_problem(rng)
    codes = flip(problem)
    assert problem.free.any()
    np.testing.assert_array_equal(codes != nearest(problem), problem.free)
    assert np.all(np.abs(codes - problem.steps) <= 1)


GPTQ = GptqSettings(damping=1e-6)


def test_gptq_lowers_the_output_error_of_nearest_rounding(rng):
    problem = make_problem(rng, groups=2, rows=16, fan_in=200)
    quadratic = make_quadratic(rng, problem, samples=4000)
    before, after = (
        quadratic.error(problem.dequantized(codes)).sum()
        for codes in (nearest(problem), gptq(problem, quadratic, GPTQ))
    )
    assert after < 0.5 * before


def test_gptq_is_nearest_where_inputs_have_nothing_in_common(rng):
    problem = make_problem(rng, rows=4, fan_in=40)
    weight = problem.weight.astype(np.float64)
    gram = np.diag(rng.uniform(1, 2, 40)).astype(np.float32)[None]
    quadratic = Quadratic(gram, weight, np.ones((1, 4)))
    np.testing.assert_array_equal(gptq(problem, quadratic, GPTQ), nearest(problem))


def test_gptq_is_nearest_in_a_group_whose_inputs_are_always_zero(rng):
    problem = make_problem(rng, groups=2)
    quadratic = make_quadratic(rng, problem)
    live = np.array([1.0, 0.0], np.float32)
    dead = Quadratic(
        quadratic.gram * live[:, None, None],
        quadratic.weight,
        quadratic.energy * live[:, None],
    )
    codes = gptq(problem, dead, GPTQ)
    np.testing.assert_array_equal(codes[1], nearest(problem)[1])
    np.testing.assert_array_equal(codes[0], gptq(problem, quadratic, GPTQ)[0])


def test_gptq_follows_the_reference_column_by_column(rng):
    """The authors' formulation: after each column the rest moves by its error (Hessian inverse)."""
    problem = make_problem(rng, rows=5, fan_in=30)
    quadratic = make_quadratic(rng, problem, samples=2000)
    gram = quadratic.gram[0] + GPTQ.damping * np.diagonal(quadratic.gram[0]).mean() * np.eye(30)
    order = list(np.argsort(-np.diagonal(quadratic.gram[0]), kind="stable"))
    target, want = problem.weight[0].astype(np.float64), np.zeros((5, 30))
    scale = problem.scale[0].astype(np.float64)
    for i, column in enumerate(order):
        rest = order[i:]
        inverse = np.linalg.inv(gram[np.ix_(rest, rest)])
        want[:, column] = np.clip(np.rint(target[:, column] / scale), -7, 7)
        error = (target[:, column] - want[:, column] * scale) / inverse[0, 0]
        target[:, rest] -= error[:, None] * inverse[0]
    np.testing.assert_array_equal(gptq(problem, quadratic, GPTQ)[0], want)


def test_gptq_aims_at_what_the_float_model_wants(rng):
    """With other inputs than the float model's, other weights than the float ones are best."""
    problem = make_problem(rng, rows=6, fan_in=20)
    quadratic = make_quadratic(rng, problem, samples=2000)
    shifted = Quadratic.around(
        quadratic.gram.astype(np.float64),
        problem.weight,
        1.2 * problem.weight.astype(np.float64) @ quadratic.gram,
        1.44 * quadratic.energy,
    )
    aimed, blind = gptq(problem, shifted, GPTQ), gptq(problem, quadratic, GPTQ)
    error = [shifted.error(problem.dequantized(codes)).sum() for codes in (aimed, blind)]
    assert error[0] < error[1]


def test_inputs_that_are_not_finite_are_refused_by_gptq(rng):
    problem = make_problem(rng)
    bad = Quadratic(np.full((1, 6, 6), np.nan, np.float32), np.zeros((1, 3, 6)), np.zeros((1, 3)))
    with pytest.raises(DivergedError, match="not finite"):
        gptq(problem, bad, GPTQ)


@given(seed=st.integers(0, 2**32 - 1))
def test_zero_points_shift_codes_and_change_nothing_else(seed):
    rng = np.random.default_rng(seed)
    plain = make_problem(rng, groups=2)
    zero = rng.integers(-3, 4, plain.scale.shape).astype(np.int32)
    shifted = RoundingProblem(plain.weight, plain.scale, zero, plain.low - 3, plain.high + 3)
    quadratic = make_quadratic(rng, plain)
    for method in (
        nearest,
        lambda problem: descent(problem, quadratic, SETTINGS, np.random.default_rng(0)),
        lambda problem: gptq(problem, quadratic, GptqSettings(1e-4)),
    ):
        want, got = method(plain), method(shifted)
        inside = np.abs(want) < 7
        np.testing.assert_array_equal(
            (got - zero[:, :, None])[inside.all(-1)], want[inside.all(-1)]
        )
