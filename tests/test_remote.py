"""A device over SSH: what it answers is what this machine would, and where it does not, why."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from qdeploy.errors import InputError, NoAnswerError, ProviderError, UsageError
from qdeploy.runs.rundir import StoredPredictions
from qdeploy.runtime import agent, answers, remote
from qdeploy.runtime.answers import predict
from qdeploy.runtime.known import Runner, runtime_of
from qdeploy.runtime.remote import RemoteRunner
from qdeploy.settings.device import RuntimeSpec
from qdeploy.values import Arm, Interface
from tests.gate_lab import copied, run
from tests.nets import residual_net
from tests.test_measure import RESULT, brightness_net, test_images  # noqa: F401 - a fixture
from tests.test_runtimes import opened

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
FAR = Arm("result", "far")

# Stands for ssh, without a network: drops the options, and runs the command where it is.
PRETENDED = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
case "$2" in
    gone) echo "ssh: connect to host gone port 22: Connection refused" >&2; exit 255;;
    stranger) echo "Host key verification failed." >&2; exit 255;;
    silent) exit 0;;
    chatty) echo "Welcome to this device, it has been upgraded to a newer version"; exec sleep 20;;
esac
eval "exec $3"
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def device(tmp_path, monkeypatch) -> RuntimeSpec:
    """What a profile says of a device that is this machine."""
    programs = tmp_path / "programs"
    programs.mkdir()
    executable(programs / "ssh", PRETENDED)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return spec(python=sys.executable, folder=str(tmp_path / "models"))


def spec(host: str = "device", **options: str) -> RuntimeSpec:
    return RuntimeSpec(provider="ssh", options={"host": host, **options})


def on(device: RuntimeSpec, model: bytes, **options: str) -> RemoteRunner:
    found = device.model_copy(update={"options": {**device.options, **options}})
    runner = runtime_of(found).open(model, found)
    assert isinstance(runner, RemoteRunner)
    return runner


def inputs(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)


def test_a_device_answers_what_this_machine_does(device):
    runner = on(device, residual_net())
    assert isinstance(runner, Runner)
    assert runner.interface(where="it") == Interface((3, 8, 8), 10)
    x = inputs(5)
    np.testing.assert_allclose(runner.logits(x), opened("cpu", residual_net()).logits(x), rtol=1e-5)
    assert 0 < runner.seconds(x) < 60


def test_a_model_is_sent_once(device, monkeypatch):
    sent: list[int] = []
    ask = remote.Connection.ask

    def counting(self, do, payload=b"", **more):
        if do == "open":
            sent.append(len(payload))
        return ask(self, do, payload, **more)

    monkeypatch.setattr(remote.Connection, "ask", counting)
    x = inputs(2)
    first, again = (on(device, residual_net()).logits(x) for _ in range(2))
    assert sent == [len(residual_net()), 0]
    np.testing.assert_array_equal(first, again)


def test_a_model_that_was_damaged_there_is_sent_again(device):
    on(device, residual_net())
    (kept,) = Path(device.options["folder"]).glob("*.onnx")
    kept.write_bytes(kept.read_bytes()[:-9] + b"elsewhere")
    x = inputs(2)
    want = opened("cpu", residual_net()).logits(x)
    np.testing.assert_allclose(on(device, residual_net()).logits(x), want, rtol=1e-5)


def test_a_device_without_room_for_models_is_sent_them_every_time(device, tmp_path):
    (tmp_path / "file").write_text("in the way")
    runner = on(device, residual_net(), folder=str(tmp_path / "file" / "models"))
    assert runner.logits(inputs(1)).shape == (1, 10)


def test_what_libraries_print_there_does_no_harm(device, tmp_path):
    (tmp_path / "onnxruntime.py").write_text(
        "print('loading', flush=True)\n__version__ = '1.20'\n"
        "def get_available_providers(): return []\n"
    )
    python = f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n'
    noisy = executable(tmp_path / "python", python)
    with pytest.raises(ProviderError, match="has no attribute 'SessionOptions'"):
        on(device, residual_net(), python=str(noisy))


@pytest.mark.parametrize(
    "wrong", [{"seconds": "soon"}, {"seconds": float("nan")}, {"outputs": None}]
)
def test_answers_that_lack_something_are_one_line(device, monkeypatch, wrong):
    ask = remote.Connection.ask

    def lacking(self, do, payload=b"", **more):
        said, data = ask(self, do, payload, **more)
        return {**said, **wrong}, data

    monkeypatch.setattr(remote.Connection, "ask", lacking)
    with pytest.raises((ProviderError, InputError), match="does not say"):
        on(device, residual_net()).logits(inputs(1))


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("gone", "does not answer: ssh: connect to host gone port 22: Connection refused"),
        ("stranger", "does not answer: Host key verification failed."),
        ("silent", "device silent does not answer"),
        ("chatty", "answers something else than the agent"),
    ],
)
def test_a_device_that_is_not_reached_gives_no_verdict_and_a_reason(device, host, reason):
    with pytest.raises(NoAnswerError) as failed:
        on(device, residual_net(), host=host)
    assert reason in str(failed.value)
    assert failed.value.exit_code == 4
    assert "host key" in failed.value.hint


def test_a_device_without_python_says_so(device):
    with pytest.raises(NoAnswerError, match=r"nowhere/python.*not found"):
        on(device, residual_net(), python="/nowhere/python")


@pytest.mark.parametrize("version", ["1.9.0", "nightly"])
def test_an_onnxruntime_that_is_too_old_is_named(device, tmp_path, version):
    (tmp_path / "onnxruntime.py").write_text(
        f"__version__ = {version!r}\ndef get_available_providers(): return []\n"
    )
    python = f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n'
    old = executable(tmp_path / "python", python)
    with pytest.raises(ProviderError, match=f"has onnxruntime {version}, at least 1.17"):
        on(device, residual_net(), python=str(old))


def test_a_device_without_onnxruntime_says_so(device, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('no onnxruntime here')\n")
    python = f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n'
    bare = executable(tmp_path / "python", python)
    with pytest.raises(ProviderError, match="no onnxruntime here"):
        on(device, residual_net(), python=str(bare))


def test_a_file_that_the_device_refuses_is_one_line(device):
    with pytest.raises(ProviderError, match="device device: ") as failed:
        on(device, b"no model")
    assert not isinstance(failed.value, NoAnswerError)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    "options", [{}, {"host": "-oProxyCommand=x"}, {"host": "a", "user": "b"}], ids=str
)
def test_options_that_name_no_device_are_errors(options):
    wrong = RuntimeSpec(provider="ssh", options=options)
    with pytest.raises(UsageError, match="runtime ssh") as failed:
        runtime_of(wrong).open(residual_net(), wrong)
    assert "host" in failed.value.hint


@pytest.mark.parametrize("wrong", ["model", "inputs", "shape"])
def test_answers_about_something_else_do_not_count(device, monkeypatch, wrong):
    runner = on(device, residual_net())
    ask = remote.Connection.ask

    def mixed_up(self, do, payload=b"", **more):
        said, data = ask(self, do, payload, **more)
        return {**said, wrong: [1, 2] if wrong == "shape" else "0" * 64}, data

    monkeypatch.setattr(remote.Connection, "ask", mixed_up)
    with pytest.raises(ProviderError, match=r"answers (about something else|no logits)"):
        runner.logits(inputs(3))


class Dying:
    """Hangs up at its third batch."""

    fixed_batch = None

    def __init__(self, runner: RemoteRunner) -> None:
        self.runner, self.batches = runner, 0

    def logits(self, batch: np.ndarray) -> np.ndarray:
        self.batches += 1
        if self.batches == 3:
            self.runner.connection._process.kill()
        return self.runner.logits(batch)


def test_a_measurement_that_a_device_broke_off_goes_on_where_it_was(
    device, tmp_path, monkeypatch, test_images  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr("qdeploy.data.images.BATCH_VALUES", 48 * 5)
    monkeypatch.setattr(answers, "SAVE_EVERY_SECONDS", 0.0)
    store = StoredPredictions(tmp_path / "predictions.npz")
    here = opened("cpu", brightness_net())
    sessions = {RESULT: here, FAR: Dying(on(device, brightness_net()))}
    with pytest.raises(NoAnswerError, match="device device does not answer"):
        predict(sessions, test_images, [], store=store)
    fresh = on(device, brightness_net())
    asked: list[int] = []
    monkeypatch.setattr(
        RemoteRunner, "logits", lambda self, x: asked.append(len(x)) or self._run(x)[0]
    )
    found = predict({RESULT: here, FAR: fresh}, test_images, [], store=store)
    assert sum(asked) == 20  # of 30: two batches of five were there
    assert found.compared[FAR].same.all()
    whole = predict({RESULT: here, FAR: fresh}, test_images, [])
    np.testing.assert_array_equal(found.clean[FAR], whole.clean[FAR])


def test_a_device_that_takes_too_long_is_given_up(device, monkeypatch):
    runner = on(device, residual_net())
    os.kill(runner.connection._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(remote, "LONGEST_ANSWER_SECONDS", 1.0)
    with pytest.raises(NoAnswerError, match="device device does not answer"):
        runner.logits(inputs(1))


def test_the_agent_is_small_and_needs_nothing_of_qdeploy():
    source = Path(agent.__file__).read_text("utf-8")
    assert len(source.splitlines()) <= 200
    assert "import qdeploy" not in source
    assert "from qdeploy" not in source
    isolated = "import sys; exec(sys.stdin.read()); main('/nowhere')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", isolated], input=source, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == ""


@pytest.mark.parametrize("sent", [b"\xff" * 9, b"\0" * 7 + b"\4none", b"\0" * 7 + b"\2{}"])
def test_the_agent_ends_at_what_is_no_request(sent):
    start = "import sys; from qdeploy.runtime.agent import main; main('/nowhere')"
    done = subprocess.run(
        [sys.executable, "-c", start], input=sent, capture_output=True, check=False
    )
    assert b"Traceback" in done.stderr or b"error" in done.stdout


@pytest.fixture
def lab(lab_files, tmp_path):
    with copied(lab_files, tmp_path / "lab") as lab:
        yield lab


def gated(lab, device: RuntimeSpec) -> int:
    options = ", ".join(f"{k} = {json.dumps(v)}" for k, v in device.options.items())
    (lab / "far.toml").write_text(
        'schema_version = 1\nname = "far"\ndescription = "x"\n[[runtimes]]\nprovider = "cpu"\n'
        f'[[runtimes]]\nprovider = "ssh"\noptions = {{ {options} }}\n[weights]\nmax_code = 64\n'
    )
    return run("gate", "good.onnx", "--reference", "fp32.onnx", "--policy", "demo", "--device",
               "far.toml", "--report", "r.json")  # fmt: skip


def test_the_gate_measures_on_a_device_elsewhere(lab, device):
    assert gated(lab, device) == 0
    report = json.loads((lab / "r.json").read_text("utf-8"))
    (row,) = report["runtime_agreement"]
    assert row["agreement"]["value"] == 100
    assert row["milliseconds"] > 0
    assert {r["runtime"] for r in report["measurements"]} == {"cpu", row["runtime"]}


@pytest.mark.parametrize("host", ["gone", "stranger"])
def test_a_gate_without_its_device_accepts_nothing(lab, device, capsys, host):
    gone = device.model_copy(update={"options": {**device.options, "host": host}})
    assert gated(lab, gone) == 4
    said = capsys.readouterr()
    assert f"device {host} does not answer" in said.err
    assert "ACCEPT" not in said.out
    assert not (lab / "r.json").exists()


def make_key(path: Path) -> None:
    keygen = shutil.which("ssh-keygen")
    assert keygen
    subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[RuntimeSpec]:
    """A real sshd on this machine, which knows one key, and an ssh that knows the server's."""
    for name in ("host", "user"):
        make_key(tmp_path / name)
    port = free_port()
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nStrictModes no\n"
        f"AuthorizedKeysFile {tmp_path}/user.pub\nPidFile none\nUsePAM no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\n"
    )
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}")
    (tmp_path / "config").write_text(
        f"Host *\n IdentityFile {tmp_path}/user\n UserKnownHostsFile {tmp_path}/known\n"
        "GlobalKnownHostsFile /dev/null\n"
    )
    programs = tmp_path / "programs"
    programs.mkdir()
    ssh = shutil.which("ssh")
    executable(programs / "ssh", f'#!/bin/sh\nexec {ssh} -F {tmp_path}/config "$@"\n')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    starts = [SSHD, "-f", tmp_path / "sshd_config"]
    tried = subprocess.run([*starts, "-t"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"sshd does not start here: {tried.stderr.strip()}")
    process = subprocess.Popen([*starts, "-D", "-e"])
    for _ in range(100):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.05)
    yield spec(f"{getpass.getuser()}@127.0.0.1", port=str(port), python=sys.executable,
               folder=str(tmp_path / "models"))  # fmt: skip
    process.kill()
    process.wait()


needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="needs ssh and sshd (openssh-server)"
)


@needs_sshd
def test_a_real_server_answers_what_this_machine_does(server):
    runner = on(server, residual_net())
    x = inputs(40)
    np.testing.assert_allclose(runner.logits(x), opened("cpu", residual_net()).logits(x), rtol=1e-5)


@needs_sshd
def test_a_server_whose_key_has_changed_is_not_asked_anything(server, tmp_path):
    known = tmp_path / "known"
    make_key(tmp_path / "other")
    other = (tmp_path / "other.pub").read_text().split()[1]
    parts = known.read_text().split()
    known.write_text(f"{parts[0]} {parts[1]} {other}\n")
    with pytest.raises(NoAnswerError, match="Host key verification failed"):
        on(server, residual_net())
    known.write_text("")
    with pytest.raises(NoAnswerError, match="Host key verification failed"):
        on(server, residual_net())


@needs_sshd
def test_a_server_that_knows_no_key_of_ours_asks_for_no_password(server, tmp_path):
    (tmp_path / "user.pub").write_text("")
    with pytest.raises(NoAnswerError, match="Permission denied"):
        on(server, residual_net())
