"""onnxruntime-web in node: the same answers from WASM, and one line where it is not there."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import NoAnswerError, ProviderError, UsageError
from qdeploy.runtime import web
from qdeploy.runtime.known import Runner, runtime_of
from qdeploy.settings.device import RuntimeSpec
from qdeploy.values import Interface
from tests.nets import residual_net
from tests.test_runtimes import inputs, int8_file, opened  # noqa: F401 - a fixture

PACKAGE = Path(os.environ.get("ONNXRUNTIME_WEB", web.PACKAGE))
needs_web = pytest.mark.skipif(
    not (PACKAGE / "package.json").is_file() or shutil.which("node") is None,
    reason="needs node and ONNXRUNTIME_WEB=FOLDER with the npm package onnxruntime-web",
)
BROWSER = os.environ.get("QDEPLOY_BROWSER", "chromium")
needs_browser = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which(BROWSER) is None,
    reason="needs node and QDEPLOY_BROWSER=COMMAND, or Chromium",
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


def in_web(model: bytes, **options: str) -> Runner:
    spec = RuntimeSpec(provider="web", options={"package": str(PACKAGE), **options})
    return runtime_of(spec).open(model, spec)


@needs_web
@pytest.mark.usefixtures("int8_file")
def test_it_answers_what_this_machine_does(int8_file):  # noqa: F811
    runner, x = in_web(int8_file), inputs(20)
    assert runner.interface(where="it") == Interface((3, 8, 8), 10)
    want = opened("cpu", int8_file).logits(x)
    got = runner.logits(x)
    assert (want.argmax(1) == got.argmax(1)).mean() >= 0.95
    assert np.abs(want - got).max() < 0.05 * np.ptp(want)
    assert 0 < runner.seconds(x) < 60


@needs_web
def test_a_file_that_it_refuses_is_one_line():
    with pytest.raises(ProviderError, match="device web: ") as failed:
        in_web(b"no model")
    assert not isinstance(failed.value, NoAnswerError)
    assert "\n" not in str(failed.value)


def test_a_package_that_is_not_there_is_an_error_with_a_hint(tmp_path):
    with pytest.raises(ProviderError, match="onnxruntime-web is not in") as failed:
        in_web(residual_net(), package=str(tmp_path))
    assert "npm install onnxruntime-web" in failed.value.hint


def test_an_option_that_it_does_not_have_is_an_error():
    with pytest.raises(UsageError, match="runtime web has no option screen"):
        in_web(residual_net(), screen="x")


IMITATION = """
export const env = { wasm: {} };
export class Tensor {
  constructor(type, data, dims) { Object.assign(this, { data, dims }); }
}
console.log("loading");
export class InferenceSession {
  static async create() { return new InferenceSession(); }
  inputNames = ["x"];
  outputNames = ["y"];
  inputMetadata = [{ name: "x", shape: ["n", 3, 8, 8], type: "float32" }];
  async run({ x }) {
    const n = x.dims[0], data = new Float32Array(2 * n);
    for (let i = 0; i < n; i++) data.set([2 * x.data[192 * i], 1], 2 * i);
    return { y: { data, dims: [n, 2] } };
  }
}
"""


@pytest.fixture
def imitation(tmp_path) -> Path:
    """A package whose sessions double what they are given."""
    (tmp_path / "dist").mkdir()
    (tmp_path / "package.json").write_text('{"version": "1.30.0"}')
    (tmp_path / "dist" / "ort.wasm.min.mjs").write_text(IMITATION)
    return tmp_path


@needs_node
def test_the_agent_speaks_the_messages_of_the_other(imitation):
    runner = in_web(residual_net(), package=str(imitation))
    assert runner.interface(where="it") == Interface((3, 8, 8), 2)
    x = inputs(300)  # its reply and its request come in several chunks
    np.testing.assert_allclose(runner.logits(x)[:, 0], 2 * x[:, 0, 0, 0], rtol=1e-6)


@needs_node
def test_a_node_that_dies_gives_no_verdict(imitation):
    (imitation / "dist" / "ort.wasm.min.mjs").write_text("process.exit(7)\n")
    with pytest.raises(NoAnswerError, match="device web does not answer"):
        in_web(residual_net(), package=str(imitation))


@needs_node
def test_a_version_that_is_too_old_is_named(imitation):
    (imitation / "package.json").write_text(json.dumps({"version": "1.9.0"}))
    with pytest.raises(ProviderError, match=r"has onnxruntime 1\.9\.0, at least 1\.17"):
        in_web(residual_net(), package=str(imitation))


def test_a_node_that_is_not_there_is_one_line(imitation):
    with pytest.raises(ProviderError, match="device web: /nowhere/node: No such file") as failed:
        in_web(residual_net(), package=str(imitation), node="/nowhere/node")
    assert "node 18" in failed.value.hint


@needs_node
def test_the_agent_ends_when_nothing_more_is_asked(imitation):
    agent = Path(web.__file__).with_name("agent.mjs")
    node = shutil.which("node")
    assert node
    done = subprocess.run([node, agent, imitation], input=b"", capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"")


@needs_browser
def test_a_page_in_a_browser_speaks_the_same_messages(imitation):
    runner = in_web(residual_net(), package=str(imitation), browser=BROWSER)
    assert runner.interface(where="it") == Interface((3, 8, 8), 2)
    x = inputs(300)
    np.testing.assert_allclose(runner.logits(x)[:, 0], 2 * x[:, 0, 0, 0], rtol=1e-6)
    assert 0 <= runner.seconds(x) < 60  # a browser's clock goes by tenths of milliseconds


@needs_browser
@pytest.mark.parametrize("end", ["of the agent", "of what it runs for"])
def test_a_browser_ends_with_whoever_asks(imitation, end):
    runner = in_web(residual_net(), package=str(imitation), browser=BROWSER)
    agent = runner.connection._process
    mine = browsers_of(agent.pid)
    assert mine
    if end == "of the agent":  # as it may: killed, with no time to clear up
        agent.kill()
        with pytest.raises(NoAnswerError, match="device web does not answer"):
            runner.logits(inputs(1))
    del runner
    gc.collect()
    for _ in range(600):
        if not any(Path(f"/proc/{pid}/cmdline").exists() for pid in mine):
            return
        time.sleep(0.1)
    raise AssertionError(f"{mine} still run")


@needs_browser
def test_a_package_that_does_not_load_in_a_browser_is_one_line(imitation):
    (imitation / "dist" / "ort.wasm.min.mjs").write_text("throw new Error('no WASM here')")
    with pytest.raises(ProviderError, match="device web: no WASM here"):
        in_web(residual_net(), package=str(imitation), browser=BROWSER)


@needs_node
def test_a_browser_that_ends_at_once_gives_no_verdict(imitation):
    with pytest.raises(NoAnswerError, match=r"does not answer: the browser ended \(1\)"):
        in_web(residual_net(), package=str(imitation), browser="false")


def test_a_browser_that_is_not_there_is_one_line(imitation):
    with pytest.raises(ProviderError, match="browser netscape is not installed") as failed:
        in_web(residual_net(), package=str(imitation), browser="netscape")
    assert "chromium" in failed.value.hint


def browsers_of(agent: int) -> set[int]:
    """The browsers that an agent has started, and no others'."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(place.read_text().rpartition(")")[2].split()[1])
            if parent == agent:
                found.add(int(place.parent.name))
    return found
