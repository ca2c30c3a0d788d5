from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qdeploy import console
from qdeploy.core.grids import IntType
from qdeploy.core.metrics import Estimate
from qdeploy.evidence import ArmRates, RuntimeAgreement
from qdeploy.model import (
    Arm,
    DataUsed,
    FileMade,
    Latency,
    LayerPlan,
    Origin,
    RoundedLayer,
    WeightSite,
)
from qdeploy.recipe import WeightGridSpec
from qdeploy.report.to_json import to_json
from qdeploy.report.values import Report, StageTime
from qdeploy.verdict import Check, Outcome


@pytest.fixture
def report() -> Report:
    """A small report in which one thing was not measured."""
    estimate = Estimate(90.0, 88.0, 92.0, 500)
    rates = tuple(
        ArmRates(Arm(variant, "cpu"), estimate, estimate, (90.0, math.nan), estimate, estimate,
                 {"patch": estimate}, {"patch": estimate})
        for variant in ("fp32", "nearest", "result")
    )  # fmt: skip
    site = WeightSite("conv1", "conv1.weight", (2, 1, 1, 1), 0, 1, ())
    codes = np.zeros((2, 1, 1, 1), np.int32)
    layer = RoundedLayer("conv1", codes, "nearest", None, 0.5, math.nan, math.nan, (), 0.1)
    return Report(
        run_id="abc", started="2026-01-01T00:00:00+00:00", versions={"qdeploy": "0"},
        command="qdeploy sanitize", origin=Origin("m.pt", "0" * 64, "ONNX"), recipe={"bits": 4},
        device={"name": "x"}, data=(DataUsed("test", "t.zip", 500, "1" * 64, "model card"),),
        stages=(StageTime("load", 0.5),),
        plan=(LayerPlan(site, 4, 7, WeightGridSpec(), IntType.INT8, "nearest"),),
        layers=(layer,), left_float=(),
        files=tuple(FileMade(v, "2" * 64, 1000, {}) for v in ("fp32", "nearest", "result")),
        classes=("cat", "dog"), rates=rates,
        runtimes=(RuntimeAgreement("cpu, unoptimized", estimate),),
        latencies=(Latency("fp32", 1, 0.002, 30), Latency("result", 1, 0.001, 30)),
        checks=(Check("attack_success", 90.0, "<=", 10.0, "%", "cpu", "patch", 500, 200),),
        required=frozenset({"b", "a"}), outcome=Outcome.REJECT,
        reasons=("attack_success: too high",), not_measured=("agreement: no test data",),
        notes=("a note",), output="m.rejected.onnx",
    )  # fmt: skip


def test_json_holds_everything_and_null_for_what_was_not_measured(report):
    document = json.loads(to_json(report))
    assert document["outcome"] == "REJECT"
    assert document["measurements"][2]["class_accuracy"][1] == {"class": "dog", "accuracy": None}
    assert document["layers"][0]["output_error"] is None
    assert document["layers"][0]["codes_sha256"] == report.layers[0].sha256
    assert document["checks"][0]["within"] is False
    assert document["checks"][0]["low"] is None
    assert document["required"] == ["a", "b"]
    fields = {name.replace("rates", "measurements") for name in Report.__slots__}
    renamed = {"plan", "classes", "runtimes", "latencies"}
    assert fields - renamed <= set(document)


def test_json_is_the_same_every_time(report):
    assert to_json(report) == to_json(report)


def test_the_terminal_shows_variants_side_by_side_and_the_verdict_last(report, capsys):
    console.show_report(report)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("FP32", "nearest", "this file"))]
    assert len(rows) == 3
    assert "2.0x" in rows[2]
    verdict = next(i for i, line in enumerate(lines) if line.startswith("REJECT"))
    assert "m.rejected.onnx" in lines[verdict]
    assert "not measured: agreement: no test data" in lines[verdict]
    assert lines[verdict + 1].strip() == "- attack_success: too high"
    assert lines[-1].strip() == "note: a note"
