"""Runs in MLflow, asked at a real server."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.errors import InputError
from qdeploy.fleet.models import Fetched, list_models
from qdeploy.progress import SILENT
from qdeploy.report.kept import read_report
from qdeploy.tracking.entries import entries_of, metric_name
from qdeploy.tracking.registry import fetch
from qdeploy.tracking.server import ENVIRONMENT, Server
from tests.test_attest import MODEL, report_about, run
from tests.test_fleet import KEY, spec_of

START_SECONDS = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """The address of a server of our own."""
    try:
        version("mlflow")
    except PackageNotFoundError:
        pytest.skip("needs the whole mlflow package: mlflow-skinny comes without the server")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'm.db'}", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    quiet["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=quiet, start_new_session=True
        ) as process,
    ):
        try:
            _await(port, process, folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _await(port: int, process: subprocess.Popen, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"no server: {log.read_text()[-2000:]}")


@pytest.fixture
def client(server):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server, registry_uri=server)


def estimate(value: float | None) -> dict:
    return {"value": value, "low": None, "high": None, "samples": 600}


def report_of(run_id: str, outcome: str = "ACCEPT") -> dict:
    rates = {
        "accuracy": estimate(98.0), "accuracy_drop": estimate(None), "agreement": None,
        "attack_success": {"patch: 2x2 \u00e9": estimate(0.5)}, "attack_success_rise": {},
    }  # fmt: skip
    return report_about(MODEL, outcome) | {
        "run_id": run_id,
        "measurements": [
            {"variant": "result", "runtime": runtime, **rates}
            for runtime in ("cpu", "cpu, unoptimized")
        ],
        "latency": [
            {
                "variant": "result",
                "batch": 1,
                "seconds": 0.002,
                "runs": 30,
                "low": 0.002,
                "high": 0.002,
            }
        ],
        "policy": {"name": "edge"},
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run directory, of a run that no other test has."""
    report = report_of(f"run-{time.monotonic_ns()}")
    (tmp_path / "report.json").write_text(json.dumps(report))
    for name in ("report.html", "recipe.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "result.onnx").write_bytes(MODEL)
    return tmp_path


def track(folder: Path, uri: str, *options: object):
    return run("track", folder, "--tracking-uri", uri, "--experiment", "tests", *options)


def tracked(client, folder: Path) -> list:
    experiment = client.get_experiment_by_name("tests")
    run_id = json.loads((folder / "report.json").read_bytes())["run_id"]
    return client.search_runs([experiment.experiment_id], f"tags.`qdeploy.run_id` = '{run_id}'")


def test_a_run_is_logged_with_all_there_is(server, client, folder):
    done = track(folder, server)
    assert done.code == 0, done.err
    assert "new run" in done.out
    (entry,) = tracked(client, folder)
    assert entry.info.status == "FINISHED"
    report = (folder / "report.json").read_bytes()
    assert entry.data.tags["qdeploy.outcome"] == "ACCEPT"
    assert entry.data.tags["qdeploy.model_sha256"] == hashlib.sha256(MODEL).hexdigest()
    assert entry.data.tags["qdeploy.report_sha256"] == hashlib.sha256(report).hexdigest()
    known = {"recipe": "int4", "bits": "4", "policy": "edge", "device": "x86"}
    assert entry.data.params.items() >= (known | {"version/qdeploy": "0.1"}).items()
    assert entry.data.metrics == {
        "result/cpu/accuracy": 98.0,
        "result/cpu/attack_success/patch_2x2": 0.5,
        "result/cpu_unoptimized/accuracy": 98.0,
        "result/cpu_unoptimized/attack_success/patch_2x2": 0.5,
        "result/batch_1/latency_ms": 2.0,
        "fp32/size_bytes": 9.0,
        "result/size_bytes": 256.0,
    }
    files = {item.path for item in client.list_artifacts(entry.info.run_id)}
    assert files == {"report.json", "report.html", "recipe.json", "model"}
    kept = client.download_artifacts(entry.info.run_id, "model/result.onnx", str(folder))
    assert Path(kept).read_bytes() == MODEL


@pytest.mark.filterwarnings("ignore:.*noload.*")  # SQLAlchemy, of MLflow
@pytest.mark.parametrize("store", ["{}/mlruns", "file://{}/mlruns", "sqlite:///{}/mlflow.db"])
def test_a_store_on_this_machine_needs_no_server(folder, tmp_path, store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = store.format(tmp_path)
    for word in ("new run", "run"):  # found again by the second
        done = run("track", folder, "--tracking-uri", uri, "--experiment", "edge")
        assert done.code == 0, done.err
        assert word in done.out
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("edge")
    (entry,) = client.search_runs([experiment.experiment_id])
    assert entry.data.tags["qdeploy.outcome"] == "ACCEPT"


def test_logging_again_updates_the_same_run(server, client, folder):
    assert track(folder, server).code == 0
    (before,) = tracked(client, folder)
    report = json.loads((folder / "report.json").read_bytes())
    worse = report_about(MODEL, "REJECT")["reasons"]
    (folder / "report.json").write_text(
        json.dumps(report | {"outcome": "REJECT", "reasons": worse})
    )
    done = track(folder, server)
    assert (done.code, "updated run" in done.out) == (0, True)
    (after,) = tracked(client, folder)
    assert after.info.run_id == before.info.run_id
    assert after.data.tags["qdeploy.outcome"] == "REJECT"
    assert after.data.tags["qdeploy.reasons"] == worse[0]


def test_a_run_with_other_settings_under_the_same_id_changes_nothing(server, client, folder):
    assert track(folder, server).code == 0
    report = json.loads((folder / "report.json").read_bytes())
    (folder / "report.json").write_text(json.dumps(report | {"recipe": {"name": "int8"}}))
    done = track(folder, server)
    assert (done.code, "has recipe int4, the report int8" in done.error) == (2, True)
    (entry,) = tracked(client, folder)
    assert entry.info.status == "FINISHED"
    assert entry.data.tags["qdeploy.outcome"] == "ACCEPT"


def test_what_is_half_logged_is_not_accepted(server, client, folder, monkeypatch):
    assert track(folder, server).code == 0

    def fail(self, run, path, place):
        raise InputError("the disk is full")

    monkeypatch.setattr(Server, "log_file", fail)
    done = track(folder, server)
    assert (done.code, done.error) == (2, "error: the disk is full")
    (entry,) = tracked(client, folder)
    assert entry.info.status == "FAILED"
    assert entry.data.tags["qdeploy.outcome"] == "being logged"


def test_a_model_version_is_made_once_and_marked(server, client, folder):
    for _ in range(2):
        done = track(folder, server, "--registered-model", "once")
        assert (done.code, "once/1" in done.out) == (0, True)
    (made,) = client.search_model_versions("name = 'once'")
    assert made.tags["qdeploy.outcome"] == "ACCEPT"
    assert made.tags["qdeploy.model_sha256"] == hashlib.sha256(MODEL).hexdigest()
    (entry,) = tracked(client, folder)
    assert made.run_id == entry.info.run_id
    assert made.tags["qdeploy.run_id"] == entry.data.tags["qdeploy.run_id"]


def test_a_version_that_is_there_is_marked_only_if_it_holds_the_judged_file(server, client, folder):
    experiment = client.create_experiment(f"models-{time.monotonic_ns()}")
    client.create_registered_model("given")
    for name, content in (("right.onnx", MODEL), ("wrong.onnx", b"another")):
        source = client.create_run(experiment).info.run_id
        (folder / name).write_bytes(content)
        client.log_artifact(source, str(folder / name), "model")
        client.create_model_version("given", f"runs:/{source}/model", source)
    report = folder / "report.json"
    mark = ("--registered-model", "given", "--model-version")
    right = track(report, server, *mark, 1)
    assert (right.code, "given/1" in right.out) == (0, True)
    assert client.get_model_version("given", "1").tags["qdeploy.outcome"] == "ACCEPT"
    wrong = track(report, server, *mark, 2)
    assert (wrong.code, "version 2 of given holds no file" in wrong.error) == (2, True)
    assert client.get_model_version("given", "2").tags == {}
    unknown = track(report, server, *mark, 3)
    assert (unknown.code, "not found" in unknown.error) == (2, True)


def test_an_experiment_that_was_deleted_is_named(server, client, folder):
    client.delete_experiment(client.create_experiment("gone"))
    done = run("track", folder, "--tracking-uri", server, "--experiment", "gone")
    assert (done.code, "experiment gone is deleted" in done.error) == (2, True)


@pytest.fixture
def mlflow():
    return pytest.importorskip("mlflow", reason="needs mlflow or mlflow-skinny")


def test_a_server_that_is_not_there_is_given_up_soon(folder, mlflow):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = track(folder, f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert done.code == 2
    assert "error: MLflow at http://127.0.0.1" in done.error


def test_a_server_that_never_answers_is_given_up(folder, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # 20 unless somebody says otherwise
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        done = track(folder, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert done.code == 2
    assert "error: MLflow at http://127.0.0.1" in done.error
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"
    assert not (set(ENVIRONMENT) - {"MLFLOW_HTTP_REQUEST_TIMEOUT"}) & set(os.environ)


SERVER = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model-version", "1"], "needs --registered-model"),
        (["--registered-model", "a'b"], "quotes"),
        (["--tracking-uri", "http://me:secret@host:5000"], "user name in the address"),
        (["--tracking-uri", "http://[::1"], "Invalid"),
    ],
)
def test_usage_is_checked_before_anything_is_sent(folder, options, reason):
    done = track(folder, SERVER, *options)
    assert done.code == 2
    assert reason in done.error
    assert "secret" not in done.err


def test_a_file_that_was_changed_since_is_not_logged(folder):
    (folder / "result.onnx").write_bytes(b"changed")
    done = track(folder, SERVER)
    assert (done.code, "judged was" in done.error) == (2, True)


def test_without_the_file_there_is_nothing_to_register(folder):
    (folder / "result.onnx").unlink()
    done = track(folder, SERVER, "--registered-model", "m")
    assert (done.code, "nothing to register" in done.error) == (2, True)


def test_a_run_id_cannot_be_a_query(folder):
    (folder / "report.json").write_text(json.dumps(report_of("a' OR '1'='1")))
    done = track(folder, SERVER)
    assert (done.code, "run_id is not a name" in done.error) == (2, True)


def test_without_mlflow_one_line_says_what_to_install(folder):
    arguments = ["track", str(folder), "--tracking-uri", SERVER, "--experiment", "e"]
    code = (
        "import sys\nsys.modules['mlflow'] = None\nfrom qdeploy.cli import main\n"
        f"main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "hint: pip install 'qdeploy[mlflow]'" in done.stderr
    assert "Traceback" not in done.stderr


@given(parts=st.lists(st.text(max_size=300), min_size=1, max_size=4))
def test_every_metric_has_a_name_that_mlflow_takes(parts):
    validation = pytest.importorskip("mlflow.utils.validation", reason="needs mlflow")
    validation._validate_metric_name(metric_name(*parts))


def test_triggers_with_names_alike_are_kept_apart(tmp_path):
    report = report_of("r")
    success = {"a b": estimate(1.0), "a  b": estimate(2.0), "a_b": estimate(3.0)}
    report["measurements"] = [report["measurements"][0] | {"attack_success": success}]
    (tmp_path / "report.json").write_text(json.dumps(report))
    metrics = entries_of(read_report(tmp_path / "report.json")).metrics
    found = {name: x for name, x in metrics.items() if "attack_success" in name}
    head = "result/cpu/attack_success/a_b"
    assert found == {head: 1.0, f"{head}_2": 2.0, f"{head}_3": 3.0}


def test_registered_models_are_brought_here_by_version_alias_newest_and_pattern(
    server, client, tmp_path
):
    (tmp_path / "net.onnx").write_bytes(MODEL)
    run_id = client.create_run("0").info.run_id
    client.log_artifact(run_id, str(tmp_path / "net.onnx"), "model")
    for name, count in (("cat", 2), ("cow", 1), ("dog", 1)):
        client.create_registered_model(f"fetch-{name}")
        for _ in range(count):
            client.create_model_version(f"fetch-{name}", f"runs:/{run_id}/model", run_id)
    client.set_registered_model_alias("fetch-cat", "champion", "1")

    def names(uri: str) -> list[str]:
        found = fetch(f"models:/fetch-{uri}", server, tmp_path / "here", KEY, SILENT)
        held = [[file.read_bytes() for file in one.path.rglob("*.onnx")] for one in found]
        assert held == [[MODEL]] * len(found)
        return sorted(one.name.removeprefix("fetch-") for one in found)

    assert names("cat/1") == ["cat/1"]
    (planted,) = (tmp_path / "here").rglob("net.onnx")
    planted.write_bytes(b"another")  # it is brought anew
    assert names("cat/1") == ["cat/1"]
    assert names("cat@champion") == ["cat/1"]
    assert names("cat") == ["cat/2"]
    assert names("c*") == ["cat/2", "cow/1"]
    for uri, complaint in (("bird", "no such model"), ("cat/7", "not found"), ("cat@x", "alias")):
        with pytest.raises(InputError, match=complaint):
            fetch(f"models:/fetch-{uri}", server, tmp_path / "here", KEY, SILENT)
    (spec,) = spec_of(models=[{"uri": "models:/fetch-c*", "tracking_uri": server}]).models
    listed = list_models((spec,), tmp_path, Fetched(tmp_path / "here", KEY), SILENT)
    assert sorted(one.name for one in listed) == ["fetch-cat/2", "fetch-cow/1"]
