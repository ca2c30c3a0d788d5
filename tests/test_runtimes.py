"""The same file on several runtimes: what each answers, what it says, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import onnx
import onnx.parser
import pytest
from pydantic import ValidationError

from qdeploy.errors import InputError, ProviderError, UsageError
from qdeploy.graph.io import identity
from qdeploy.runtime import known, openvino_cpu
from qdeploy.runtime.answers import Sampling, predict
from qdeploy.runtime.known import RUNTIMES, Runner, Runtime, runtime_of
from qdeploy.settings.device import DeviceProfile, RuntimeSpec, load_device
from qdeploy.values import Arm, Interface
from tests.gate_lab import copied, fixed_batch, run
from tests.nets import float_model, residual_net
from tests.test_measure import RESULT, brightness_net, test_images  # noqa: F401 - a fixture
from tests.test_quantized_file import quantized

LOCAL = (
    "cpu",
    "openvino",
    "reference",
    "avx2-emulated",
)  # the others need a device: see test_remote.py
HERE = [name for name in LOCAL if name != "openvino" or find_spec(name)]
OTHERS = [name for name in HERE if name != "cpu"]
RELU_OF_NOBODY = """
<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
net (float[N,3,8,8] x) => (float[N,10] y)
<float[10,192] w> {
    f = Flatten(x)
    y = com.microsoft.FusedMatMul<transB=1>(f, w)
}
"""


def opened(name: str, model: bytes) -> Runner:
    spec = RuntimeSpec(provider=name)
    return runtime_of(spec).open(model, spec)


def contrib_net() -> bytes:
    proto = onnx.parser.parse_model(RELU_OF_NOBODY)
    weights = np.random.default_rng(0).normal(size=(10, 192)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    return proto.SerializeToString()


@pytest.fixture(scope="module")
def int8_file(images) -> bytes:
    made, _, _ = quantized(float_model(residual_net()), images, bits=8, device="x86-avx2")
    return made.onnx


@pytest.fixture
def lab(lab_files, tmp_path):
    with copied(lab_files, tmp_path) as lab:
        yield lab


def inputs(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("name", HERE)
def test_every_runtime_is_one_by_protocol(name, int8_file):
    assert isinstance(RUNTIMES[name], Runtime)
    assert isinstance(opened(name, int8_file), Runner)


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_without_saturation_answers_alike_everywhere(name, int8_file):
    x = inputs(20)
    want, got = opened("cpu", int8_file).logits(x), opened(name, int8_file).logits(x)
    steps = np.abs(want - got) / np.ptp(want)
    assert steps.max() < 0.05  # a code or two of an inner tensor
    assert (want.argmax(1) == got.argmax(1)).mean() >= 0.9


@pytest.mark.parametrize("name", HERE)
def test_every_runtime_says_what_the_file_takes_and_gives(name, int8_file):
    assert opened(name, int8_file).interface(where="it") == Interface((3, 8, 8), 10)


@pytest.mark.parametrize("name", HERE)
def test_a_fixed_batch_is_fed_piece_by_piece_everywhere(name):
    proto = onnx.load_from_string(residual_net())
    fixed_batch(proto)
    runner, free = opened(name, proto.SerializeToString()), opened(name, residual_net())
    assert runner.fixed_batch
    x = inputs(runner.fixed_batch + 3)
    np.testing.assert_allclose(runner.logits(x), free.logits(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HERE)
def test_what_is_no_model_is_one_line_everywhere(name):
    with pytest.raises((InputError, ProviderError)) as failed:
        opened(name, b"\x08\x01nothing of the kind")
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("name", OTHERS)
def test_runtimes_that_only_optimize_or_never_do_take_no_options(name):
    spec = RuntimeSpec(provider=name, optimizations="off")
    with pytest.raises(UsageError, match=f"runtime {name}"):
        runtime_of(spec).open(identity(), spec)


@pytest.mark.skipif("openvino" not in HERE, reason="openvino is not installed")
def test_openvino_tells_which_of_its_kernels_compute_on_integers(int8_file):
    kernels = RUNTIMES["openvino"].kernels(int8_file, RuntimeSpec(provider="openvino"))
    on_integers = [name for name in kernels if name.endswith((" u8", " i8"))]
    assert any(name.startswith("Convolution") for name in on_integers)
    floats = RUNTIMES["openvino"].kernels(residual_net(), RuntimeSpec(provider="openvino"))
    assert not any(name.endswith((" u8", " i8")) for name in floats)


INTERRUPTED_AFTER_OPENVINO = """
import signal, threading
from qdeploy.graph.io import identity
from qdeploy.runtime.known import RUNTIMES
from qdeploy.settings.device import RuntimeSpec

kept = [RUNTIMES["openvino"].open(identity(), RuntimeSpec(provider="openvino"))]
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
last = threading.Thread(target=kept.clear)
last.start()
last.join()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif("openvino" not in HERE, reason="openvino is not installed")
def test_who_interrupts_after_openvino_ran_is_heard():
    """The plugin's signal stack outlives the runner, whichever thread lets that go."""
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AFTER_OPENVINO],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n")


def test_openvino_that_is_not_installed_is_an_error_with_a_hint(monkeypatch):
    monkeypatch.setattr(openvino_cpu, "find_spec", lambda name: None)
    with pytest.raises(ProviderError, match="openvino is not installed") as failed:
        opened("openvino", identity())
    assert "qdeploy[openvino]" in failed.value.hint


def test_the_reference_evaluator_refuses_what_the_standard_does_not_know():
    with pytest.raises((InputError, ProviderError)):
        opened("reference", contrib_net()).logits(inputs(1))
    assert opened("cpu", contrib_net()).logits(inputs(1)).shape == (1, 10)


class Turned:
    """Another runtime's answers, the classes in another order."""

    fixed_batch = None

    def __init__(self, runner: Runner) -> None:
        self.runner, self.asked = runner, 0

    def logits(self, batch: np.ndarray) -> np.ndarray:
        self.asked += len(batch)
        return self.runner.logits(batch)[:, ::-1]

    def seconds(self, batch: np.ndarray) -> float:
        return self.runner.seconds(batch)

    def interface(self, *, where: str) -> Interface:
        return self.runner.interface(where=where)


@dataclass
class TurnedRuntime:
    """A runtime whose answers are wrong."""

    runners: list[Turned]

    def open(self, model: bytes, spec: RuntimeSpec, **_: bool) -> Turned:
        self.runners.append(Turned(opened("cpu", model)))
        return self.runners[-1]

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:
        return {"Conv": len(model[:2])}


def test_a_slow_runtime_is_asked_about_few_images_drawn_by_chance(test_images):  # noqa: F811
    slow = Arm("result", "slow")
    turned = Turned(opened("cpu", brightness_net()))
    sessions = {RESULT: opened("cpu", brightness_net()), slow: turned}
    found = predict(sessions, test_images, [], sampling=Sampling(seed=3, few={slow: 7}))
    assert turned.asked == len(found.compared[slow].same) == 7
    assert set(found.clean) == {RESULT}  # of a few images no rate is made
    drawn = np.sort(np.random.default_rng(3).permutation(30)[:7])
    middle = found.clean[RESULT][drawn] == 1
    np.testing.assert_array_equal(found.compared[slow].same, middle)
    assert 20 < found.compared[slow].difference <= 100


def test_the_same_runtime_does_not_differ(test_images):  # noqa: F811
    other = Arm("result", "again")
    sessions = {arm: opened("cpu", brightness_net()) for arm in (RESULT, other)}
    found = predict(sessions, test_images, []).compared[other]
    assert found.same.all()
    assert found.same.shape == (30,)
    assert found.difference == 0


def profile(*runtimes: dict[str, object]) -> dict[str, object]:
    return {"schema_version": 1, "name": "x", "description": "x", "runtimes": list(runtimes)}


@pytest.mark.parametrize(
    ("runtimes", "said"),
    [
        ([{"provider": "cpu"}, {"provider": "cpu"}], "two runtimes are the same"),
        ([{"provider": "cpu", "images": 5}], "the first runtime is asked about all images"),
    ],
)
def test_a_profile_that_cannot_be_measured_is_an_error(runtimes, said):
    with pytest.raises(ValidationError, match=said):
        DeviceProfile.model_validate(profile(*runtimes))


def test_a_profile_of_several_runtimes_comes_along():
    device = load_device("crosscheck")
    assert [spec.provider for spec in device.runtimes] == [
        "cpu",
        "cpu",
        "openvino",
        "reference",
        "avx2-emulated",
    ]
    assert device.saturates


GATE = ("gate", "good.onnx", "--reference", "fp32.onnx", "--policy", "demo", "--report", "r.json")
TWO = """
schema_version = 1
name = "two"
description = "two runtimes"
[[runtimes]]
provider = "cpu"
[[runtimes]]
provider = "{other}"
{images}
[weights]
max_code = 64
"""


def gated(lab, other: str, *options: str, images: str = "") -> tuple[int, dict]:
    (lab / "two.toml").write_text(TWO.format(other=other, images=images))
    code = run(*GATE, "--device", "two.toml", *options)
    return code, json.loads((lab / "r.json").read_text("utf-8"))


@pytest.mark.parametrize("other", OTHERS)
def test_the_gate_measures_a_good_file_on_other_runtimes(lab, other):
    code, report = gated(lab, other)
    (row,) = report["runtime_agreement"]
    assert code == 0
    assert row["runtime"] == other
    assert row["agreement"]["value"] >= 99
    assert row["difference"] < 10
    assert row["milliseconds"] > 0
    assert row["unsupported"] is None
    measured = {(r["variant"], r["runtime"]) for r in report["measurements"]}
    assert ("result", other) in measured


def test_the_gate_says_which_runtime_does_not_run_the_file_and_rejects(lab, monkeypatch, capsys):
    monkeypatch.setitem(known.RUNTIMES, "picky", Picky())  # type: ignore[arg-type]
    code, report = gated(lab, "picky")
    assert code == 3
    assert report["runtime_agreement"][0]["unsupported"] == "no DequantizeLinear here"
    assert any("no DequantizeLinear here" in reason for reason in report["reasons"])
    assert "does not run the file: no DequantizeLinear here" in capsys.readouterr().out


class Picky:
    """A runtime that works, but not on quantized files."""

    def open(self, model: bytes, spec: RuntimeSpec, **_: bool) -> Runner:
        if any(
            node.op_type == "DequantizeLinear" for node in onnx.load_from_string(model).graph.node
        ):
            raise InputError("no DequantizeLinear here")
        return opened("cpu", model)

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:
        return {}


def test_a_policy_may_allow_that_a_runtime_does_not_run_the_file(lab, monkeypatch):
    monkeypatch.setitem(known.RUNTIMES, "picky", Picky())  # type: ignore[arg-type]
    (lab / "lenient.toml").write_text(
        'schema_version = 1\nname = "lenient"\ndescription = "x"\n[gate]\n'
        'required = ["static_findings"]\nmax_unsupported_runtimes = 1\n'
    )
    code, report = gated(lab, "picky", "--policy", "lenient.toml")
    assert code == 0
    assert report["runtime_agreement"][0]["agreement"] is None


def test_a_runtime_that_answers_something_else_is_seen_on_few_images_too(lab, monkeypatch):
    monkeypatch.setitem(known.RUNTIMES, "turned", TurnedRuntime([]))  # type: ignore[arg-type]
    code, report = gated(lab, "turned", images="images = 250")
    (row,) = report["runtime_agreement"]
    assert code == 3
    assert row["agreement"]["value"] < 50
    assert 200 <= row["agreement"]["samples"] <= 250
    assert {r["runtime"] for r in report["measurements"]} == {"cpu"}


def test_an_openvino_that_is_missing_stops_the_gate_before_any_work(lab, monkeypatch, capsys):
    monkeypatch.setattr(openvino_cpu, "find_spec", lambda name: None)
    (lab / "two.toml").write_text(TWO.format(other="openvino", images=""))
    assert run(*GATE, "--device", "two.toml") == 2
    said = capsys.readouterr().err
    assert "openvino is not installed" in said
    assert "qdeploy[openvino]" in said


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_no_numbers_have_no_difference(test_images, wrong):  # noqa: F811
    other = Arm("result", "broken")
    broken = Turned(opened("cpu", brightness_net()))
    broken.logits = lambda batch: np.full((len(batch), 3), wrong, np.float32)  # type: ignore[method-assign]
    sessions = {RESULT: opened("cpu", brightness_net()), other: broken}
    found = predict(sessions, test_images, []).compared[other]
    assert found.difference is None
    assert not found.same.any()
