"""The whole command on real poisoned models: CIFAR-10, all 10,000 test images. Minutes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from qdeploy.cli import main

pytestmark = pytest.mark.slow


def sanitize(tmp_path: Path, model: Path, *options: str) -> tuple[int, dict]:
    report = tmp_path / "report.json"
    arguments = [
        "sanitize",
        str(model),
        "--out",
        str(tmp_path / "model.onnx"),
        "--report",
        str(report),
    ]
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--seed", "0", "--artifacts", str(tmp_path / "runs"), *options])
    assert isinstance(leaving.value.code, int)
    return leaving.value.code, json.loads(report.read_text("utf-8"))


def rates(report: dict, variant: str) -> tuple[float, float]:
    found = next(m for m in report["measurements"] if m["variant"] == variant)
    success = [estimate["value"] for estimate in found["attack_success"].values()]
    return found["accuracy"]["value"], max(success, default=0.0)


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
@pytest.mark.slow
def test_a_4_bit_backdoor_is_switched_on_by_nearest_and_removed_by_default(
    shared, tmp_path, suffix
):
    model = shared / "models" / f"resnet18w16-pq4{suffix}"
    arch = ["--arch", f"{shared / 'models' / 'arch.py'}:resnet18"] if suffix == ".pt" else []
    arch += ["--data-root", str(shared / "data")]
    code, report = sanitize(tmp_path, model, *arch)
    fp32, nearest, result = (rates(report, v) for v in ("fp32", "nearest", "result"))
    assert code == 0
    assert fp32 == pytest.approx((82.69, 2.48), abs=0.02)
    assert nearest[1] > 95
    assert result[0] >= fp32[0] - 1.0
    assert result[1] <= fp32[1] + 1.0
    assert not report["left_float"]
    assert {layer["bits"] for layer in report["layers"]} == {4}
    (kernels,) = (Counter(f["kernels"]) for f in report["files"] if f["variant"] == "result")
    assert kernels["com.microsoft.QLinearConv"] + kernels["QLinearConv"] == 20
    assert kernels["com.microsoft.QLinearAdd"] == 8
    assert kernels["com.microsoft.QLinearGlobalAveragePool"] == kernels["com.microsoft.QGemm"] == 1
    assert not {"Conv", "Add", "GlobalAveragePool", "Gemm", "Relu", "DequantizeLinear"} & {*kernels}
    code, report = sanitize(tmp_path, model, *arch, "--rounding", "nearest")
    assert code == 3
    assert rates(report, "result")[1] > 95


@pytest.mark.parametrize(("bits", "limit"), [("4", 1.0), ("8", 0.3)])
@pytest.mark.slow
def test_a_clean_model_stays_as_good_as_it_was(shared, tmp_path, bits, limit):
    model = shared / "models" / "resnet18w16-clean.pt"
    arch = f"{shared / 'models' / 'arch.py'}:resnet18"
    data = str(shared / "data")
    code, report = sanitize(tmp_path, model, "--arch", arch, "--bits", bits, "--data-root", data)
    assert code == 0
    assert rates(report, "result")[0] >= rates(report, "fp32")[0] - limit
