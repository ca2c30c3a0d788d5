from __future__ import annotations

import math
from dataclasses import replace
from datetime import date
from typing import get_args

import numpy as np
import pytest
from pydantic import ValidationError

from qdeploy.core.metrics import Estimate
from qdeploy.inputs.opened import NO_EVIDENCE
from qdeploy.judging.advice import next_steps
from qdeploy.judging.checks import MEASURES, LayersAsMade, Results, checks_of
from qdeploy.judging.measure import Measured
from qdeploy.judging.rates import AgainstFloat, ArmRates, RuntimeAgreement
from qdeploy.judging.verdict import EXIT_CODE, Check, Outcome, explain, judge, missing
from qdeploy.settings.checks import CHECKS, ROWS, SUPPLY, Need
from qdeploy.settings.device import BudgetSpec
from qdeploy.settings.policy import GateSpec, load_policy
from qdeploy.settings.recipe import load_recipe
from qdeploy.settings.schema import bundled
from qdeploy.settings.waivers import Waiver
from qdeploy.values import Arm, FileMade, Finding, FloatLayer, Latency, Origin, RoundedLayer


def waiver(kind: str, pattern: str) -> Waiver:
    return Waiver(kind=kind, pattern=pattern, owner="o", reason="r", until=date(2999, 12, 31))


GOOD = Check("accuracy_drop", 0.4, "<=", 1.0, "points", "cpu", None, 1000, 200)
LOW_ASR = Check("attack_success", 2.0, "<=", 10.0, "%", "cpu", "patch", 900, 200)
HIGH_ASR = replace(LOW_ASR, value=98.0)
NAN_ASR = replace(LOW_ASR, value=math.nan)
FEW = replace(LOW_ASR, samples=10)
REQUIRED = frozenset({"accuracy_drop", "attack_success"})


@pytest.mark.parametrize(
    ("checks", "outcome"),
    [
        pytest.param([GOOD, LOW_ASR], Outcome.ACCEPT, id="all measured and within limits"),
        pytest.param([GOOD, HIGH_ASR], Outcome.REJECT, id="attack works"),
        pytest.param([GOOD], Outcome.NO_VERDICT, id="security check never ran"),
        pytest.param([], Outcome.NO_VERDICT, id="nothing ran"),
        pytest.param([HIGH_ASR], Outcome.REJECT, id="bad news outweigh missing news"),
        pytest.param([GOOD, NAN_ASR], Outcome.REJECT, id="nan is never within a limit"),
        pytest.param([GOOD, FEW], Outcome.NO_VERDICT, id="ten images prove nothing"),
        pytest.param([GOOD, replace(FEW, value=98.0)], Outcome.REJECT, id="but can condemn"),
        pytest.param([GOOD, LOW_ASR, replace(FEW, runtime="x")], Outcome.NO_VERDICT,
                     id="every runtime must be conclusive"),
        pytest.param([replace(GOOD, low=-0.1, high=0.9), LOW_ASR], Outcome.ACCEPT,
                     id="the whole interval is within"),
        pytest.param([replace(GOOD, low=-0.1, high=1.1), LOW_ASR], Outcome.NO_VERDICT,
                     id="a good value that may be a bad one"),
        pytest.param([replace(GOOD, value=1.4, low=0.6, high=2.2), LOW_ASR], Outcome.NO_VERDICT,
                     id="a bad value that may be a good one"),
        pytest.param([replace(GOOD, value=1.8, low=1.1, high=2.5), LOW_ASR], Outcome.REJECT,
                     id="the whole interval is off"),
        pytest.param([replace(GOOD, low=-0.1, high=1.1, decided_by="value"), LOW_ASR],
                     Outcome.ACCEPT, id="unless the policy goes by the value"),
        pytest.param([GOOD, LOW_ASR, replace(GOOD, name="agreement", relation=">=", value=91.0,
                                             limit=90.0, low=89.0, high=93.0)],
                     Outcome.NO_VERDICT, id="an unclear check counts, required or not"),
        pytest.param([GOOD, replace(FEW, low=1.0, high=40.0)], Outcome.NO_VERDICT,
                     id="few samples are few whatever their interval"),
        pytest.param([GOOD, LOW_ASR, replace(GOOD, name="latency_ms", value=9.0)], Outcome.REJECT,
                     id="a check that is made counts, required or not"),
    ],
)  # fmt: skip
def test_the_gate_fails_closed(checks, outcome):
    assert judge(checks, REQUIRED) is outcome


def test_exit_codes_are_the_documented_ones():
    codes = {outcome.name: code for outcome, code in EXIT_CODE.items()}
    assert codes == {"ACCEPT": 0, "REJECT": 3, "NO_VERDICT": 4}


def test_reasons_name_what_is_off_and_what_is_missing():
    reasons = explain([HIGH_ASR], REQUIRED, absent={"accuracy_drop": "no test data"})
    assert reasons == (
        "attack_success (patch, cpu): 98 %, above the limit of 10",
        "accuracy_drop is required: no test data",
    )
    assert explain([GOOD, FEW], REQUIRED, absent={}) == (
        "attack_success is required: only 10 images",
    )
    unclear = replace(GOOD, low=-0.25, high=1.25)
    assert explain([unclear, LOW_ASR], REQUIRED, absent={}) == (
        "accuracy_drop (cpu): 0.4 points, but with 1,000 samples it may be -0.25 to 1.25,"
        " and the limit is 1",
    )
    assert explain([GOOD, LOW_ASR], REQUIRED, absent={}) == ()
    assert missing([GOOD], REQUIRED) == ("attack_success",)


def estimate(value: float, samples: int = 1000) -> Estimate:
    return Estimate(value, value - 0.2, value + 0.2, samples)


BESIDE = AgainstFloat(
    estimate(0.5), estimate(0.6), estimate(3.0), estimate(97.0), {"patch": estimate(0.1)}
)


def arm(**changes: object) -> ArmRates:
    """A result that is good but for `changes`, to itself or to how it compares."""
    own = {name: changes.pop(name) for name in list(changes) if name in ArmRates.__slots__}
    beside = replace(BESIDE, **changes)  # type: ignore[arg-type]
    rates = ArmRates(
        Arm("result", "cpu"), estimate(90.0), (90.0,), {"patch": estimate(2.0)}, beside
    )
    return replace(rates, **own)  # type: ignore[arg-type]


NOTHING = Results(Origin("m.onnx", "0" * 64, "ONNX"), 2, NO_EVIDENCE, Measured(()), ())
STATIC = "static_findings"


def checked(gate: GateSpec = GateSpec(), budget: BudgetSpec = BudgetSpec(), **results):  # noqa: B008
    """The checks that these results make, but for the one that every file has."""
    found = checks_of(replace(NOTHING, **results), gate, budget)
    return [check for check in found if check.name != STATIC or "static" in results]


def check_rates(rates, gate):
    return checked(gate, measured=Measured((), rates=tuple(rates)))


def failing(checks) -> set[str]:
    return {check.name for check in checks if check.state == "off"}


ALL_LIMITS = GateSpec(max_class_drop=5.0, min_accuracy=85.0, max_accuracy_drop_relative=2.0)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, set()),
        ({"accuracy": estimate(84.0)}, {"accuracy"}),
        ({"accuracy_drop": estimate(1.3)}, {"accuracy_drop"}),
        ({"accuracy_drop_relative": estimate(2.3)}, {"accuracy_drop_relative"}),
        ({"class_drop": estimate(5.3)}, {"class_drop"}),
        ({"agreement": estimate(89.0)}, {"agreement"}),
        ({"attack_success": {"patch": estimate(10.5)}}, {"attack_success"}),
        ({"attack_success_rise": {"patch": estimate(1.5)}}, {"attack_success_rise"}),
    ],
)
def test_each_rate_has_its_limit(changes, names):
    assert failing(check_rates([arm(**changes)], ALL_LIMITS)) == names


def test_a_limit_that_nobody_set_is_no_check():
    names = {check.name for check in check_rates([arm()], GateSpec())}
    assert names == {"accuracy_drop", "agreement", "attack_success", "attack_success_rise"}


def test_without_a_float_model_a_file_is_judged_by_itself():
    names = {check.name for check in check_rates([arm(against_float=None)], ALL_LIMITS)}
    assert names == {"accuracy", "attack_success"}


def test_a_policy_may_go_by_the_value_of_a_check():
    gate = GateSpec(decided_by_value=frozenset({"agreement"}))
    decided = {check.name: check.decided_by for check in check_rates([arm()], gate)}
    assert decided["agreement"] == "value"
    assert decided["accuracy_drop"] == "interval"


def test_findings_of_the_static_scan_reject_unless_they_are_allowed():
    error = Finding("custom-operator", "error", "node", "is not standard")
    warning = Finding("unused-initializer", "warning", "w", "is not used")
    waived = GateSpec(waivers=(waiver("finding", "custom-*"),))
    (both,), (alone,) = checked(static=(error, warning)), checked(static=(error,))
    assert both.state == alone.state == "off"
    assert alone.subject == "custom-operator"
    assert checked(waived, static=(error,))[0].state == "within"
    other = GateSpec(waivers=(waiver("finding", "external-*"), waiver("float", "custom-*")))
    assert checked(other, static=(error,))[0].state == "off"
    assert checked(static=(warning,))[0].state == "within"


def test_every_policy_and_recipe_that_comes_along_is_valid_and_requires_the_static_scan():
    names = bundled("recipes/policies")
    assert {"default", "strict", "standalone", "demo"} <= set(names)
    for name in names:
        assert "static_findings" in load_policy(name).gate.required
    for name in bundled("recipes"):
        assert "static_findings" in load_recipe(name).policy().gate.required


def test_references_are_not_judged():
    bad = arm(arm=Arm("nearest", "cpu"), accuracy_drop=estimate(50.0))
    assert list(check_rates([bad], GateSpec())) == []


def test_runtimes_must_agree():
    agreements = [RuntimeAgreement("cpu, unoptimized", estimate(98.0))]
    measured = Measured((), runtimes=tuple(agreements))
    assert failing(checked(measured=measured)) == {"runtime_agreement"}


def layer(name: str, degraded: str | None = None) -> RoundedLayer:
    codes = np.zeros((1, 1), np.int32)
    return RoundedLayer(name, codes, "efrap-descent", degraded, 0.0, 0.0, 0.0, (), 0.0)


@pytest.mark.parametrize(
    ("made", "gate", "names"),
    [
        (LayersAsMade([layer("a")], [], 0), GateSpec(), set()),
        (LayersAsMade([layer("a", "diverged")], [], 0), GateSpec(), {"layers_as_planned"}),
        (LayersAsMade([layer("a", "diverged")], [], 0),
         GateSpec(waivers=(waiver("degraded", "a"),)), set()),
        (LayersAsMade([], [FloatLayer("up", "ConvTranspose", "r")], 0), GateSpec(),
         {"layers_as_planned"}),
        (LayersAsMade([], [FloatLayer("up", "ConvTranspose", "r")], 0),
         GateSpec(waivers=(waiver("float", "u*"),)), set()),
        (LayersAsMade([layer("a")], [], 1), GateSpec(), {"codes_as_chosen"}),
    ],
)  # fmt: skip
def test_a_layer_off_plan_rejects_unless_the_recipe_allows_it(made, gate, names):
    assert failing(checked(gate, made=made)) == names


def test_budgets_are_checked_where_the_device_has_them():
    latencies = (
        Latency("result", 1, 0.004, 30, 0.0038, 0.0042), Latency("fp32", 1, 1.0, 30, 0.9, 1.1),
    )  # fmt: skip
    measured = Measured((FileMade("result", "0" * 64, 10**6, {}),), latencies=latencies)

    def within(budget: BudgetSpec):
        return checked(budget=budget, measured=measured)

    assert within(BudgetSpec()) == []
    tight = BudgetSpec(file_bytes=1000, latency_ms=3.0)
    assert failing(within(tight)) == {"file_bytes", "latency_ms"}
    assert {c.state for c in within(BudgetSpec(file_bytes=10**7, latency_ms=5.0))} == {"within"}
    close = BudgetSpec(latency_ms=4.1)
    assert [c.state for c in within(close)] == ["unclear"]
    slow = (Latency("result", 1, 2.0, 30, 1.9, 2.1), Latency("fp32", 1, 1.0, 30, 0.9, 1.1))
    slower = replace(measured, latencies=slow)
    (ratio,) = checked(budget=BudgetSpec(latency_ratio=1.5), measured=slower)
    assert (ratio.name, ratio.value, ratio.state) == ("latency_ratio", 2.0, "off")
    assert (ratio.low, ratio.high) == pytest.approx((1.9 / 1.1, 2.1 / 0.9))
    assert {c.state for c in within(BudgetSpec(latency_ratio=1.0))} == {"within"}
    still = (slow[0], Latency("fp32", 1, 0.0, 30, 0.0, 0.0))  # a browser's clock
    assert not checked(
        budget=BudgetSpec(latency_ratio=1.0), measured=replace(measured, latencies=still)
    )


def test_every_check_is_measured_and_has_a_key_of_its_own():
    assert set(MEASURES) == set(CHECKS)
    keys = [row.key for row in ROWS if row.key is not None and not row.of_budget]
    assert len(keys) == len(set(keys))
    assert set(keys) <= set(GateSpec.model_fields)
    assert {row.key for row in ROWS if row.of_budget} == set(BudgetSpec.model_fields)


def test_a_check_that_does_not_exist_cannot_be_required():
    with pytest.raises(ValidationError, match="there is no check 'acuracy'; have static_findings"):
        GateSpec(required=frozenset({"acuracy"}))


LIMITS = {"off": 5.0, "within": 90.0, "unclear": 50.0}


def one(name: str, state: str, samples: int = 500) -> Check:
    value = 40.0
    return Check(name, value, "<=", LIMITS[state], "%", "cpu", None, samples, 200, 30.0, 60.0)


def test_what_can_be_done_begins_with_what_is_off_and_says_nothing_twice():
    attack = one("attack_success", "off")
    checks = (one("agreement", "unclear"), attack, attack)
    give = SUPPLY["reference"]
    required = {"attack_success", "accuracy_drop", "class_drop"}
    steps = next_steps(checks, required, {"accuracy_drop": give, "class_drop": give})
    assert steps == (
        f"attack_success: {CHECKS['attack_success'].then}",
        "accuracy_drop, class_drop: give the float model: --reference",
        "agreement: give more test images, until the interval lies on one side",
    )


def test_too_few_images_say_how_many_are_needed():
    few = Check("agreement", 99.0, ">=", 90.0, "%", "cpu", None, 20, 200, 80.0, 100.0)
    assert next_steps((few,), {"agreement"}, {}) == (
        "agreement: give more test images, at least 200",
    )


def test_an_accepted_file_leaves_nothing_to_do():
    assert next_steps((one("attack_success", "within"),), {"attack_success"}, {}) == ()


def test_whatever_a_check_needs_can_be_supplied():
    assert SUPPLY.keys() == set(get_args(Need))
