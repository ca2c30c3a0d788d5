from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qdeploy.checks import LayersAsMade, check_budget, check_layers, check_rates, check_runtimes
from qdeploy.core.metrics import Estimate
from qdeploy.device import BudgetSpec
from qdeploy.evidence import ArmRates, RuntimeAgreement
from qdeploy.model import Arm, FloatLayer, Latency, RoundedLayer
from qdeploy.recipe import GateSpec
from qdeploy.verdict import EXIT_CODE, Check, Outcome, explain, judge, missing

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
    assert explain([GOOD, LOW_ASR], REQUIRED, absent={}) == ()
    assert missing([GOOD], REQUIRED) == ("attack_success",)


def estimate(value: float, samples: int = 1000) -> Estimate:
    return Estimate(value, value - 1, value + 1, samples)


def arm(**changes: object) -> ArmRates:
    rates = ArmRates(
        Arm("result", "cpu"), estimate(90.0), estimate(0.5), (90.0,), estimate(3.0), estimate(97.0),
        {"patch": estimate(2.0)}, {"patch": estimate(0.1)},
    )  # fmt: skip
    return replace(rates, **changes)  # type: ignore[arg-type]


def failing(checks) -> set[str]:
    return {check.name for check in checks if not check.within}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, set()),
        ({"accuracy_drop": estimate(1.1)}, {"accuracy_drop"}),
        ({"class_drop": estimate(5.1)}, {"class_drop"}),
        ({"agreement": estimate(89.0)}, {"agreement"}),
        ({"attack_success": {"patch": estimate(10.5)}}, {"attack_success"}),
        ({"attack_success_rise": {"patch": estimate(1.5)}}, {"attack_success_rise"}),
    ],
)
def test_each_rate_has_its_limit(changes, names):
    assert failing(check_rates([arm(**changes)], GateSpec(max_class_drop=5.0))) == names


def test_references_are_not_judged():
    bad = arm(arm=Arm("nearest", "cpu"), accuracy_drop=estimate(50.0))
    assert list(check_rates([bad], GateSpec())) == []


def test_class_drop_is_checked_only_where_the_recipe_limits_it():
    assert "class_drop" not in {c.name for c in check_rates([arm()], GateSpec())}


def test_runtimes_must_agree():
    agreements = [RuntimeAgreement("cpu, unoptimized", estimate(98.0))]
    assert failing(check_runtimes(agreements, GateSpec())) == {"runtime_agreement"}


def layer(name: str, degraded: str | None = None) -> RoundedLayer:
    codes = np.zeros((1, 1), np.int32)
    return RoundedLayer(name, codes, "efrap-descent", degraded, 0.0, 0.0, 0.0, (), 0.0)


@pytest.mark.parametrize(
    ("made", "gate", "names"),
    [
        (LayersAsMade([layer("a")], [], 0), GateSpec(), set()),
        (LayersAsMade([layer("a", "diverged")], [], 0), GateSpec(), {"layers_as_planned"}),
        (LayersAsMade([layer("a", "diverged")], [], 0), GateSpec(allow_degraded=("a",)), set()),
        (LayersAsMade([], [FloatLayer("up", "ConvTranspose", "r")], 0), GateSpec(),
         {"layers_as_planned"}),
        (LayersAsMade([], [FloatLayer("up", "ConvTranspose", "r")], 0),
         GateSpec(allow_float=("u*",)), set()),
        (LayersAsMade([layer("a")], [], 1), GateSpec(), {"codes_as_chosen"}),
    ],
)  # fmt: skip
def test_a_layer_off_plan_rejects_unless_the_recipe_allows_it(made, gate, names):
    assert failing(check_layers(made, gate)) == names


def test_budgets_are_checked_where_the_device_has_them():
    latencies = [Latency("result", 1, 0.004, 30), Latency("fp32", 1, 1.0, 30)]
    assert list(check_budget(10**6, latencies, BudgetSpec())) == []
    tight = BudgetSpec(file_bytes=1000, latency_ms=3.0)
    assert failing(check_budget(10**6, latencies, tight)) == {"file_bytes", "latency_ms"}
    wide = BudgetSpec(file_bytes=10**7, latency_ms=5.0)
    assert failing(check_budget(10**6, latencies, wide)) == set()
