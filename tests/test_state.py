"""What was kept is used only by the user whose run kept it, and only as what it was kept."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from qdeploy.disk import state
from qdeploy.disk.files import write_atomically
from qdeploy.errors import OutputError
from qdeploy.formats.opening import model_digest
from qdeploy.runs.rundir import LOCK, PARTIAL, StoredLayers, StoredPredictions, open_run
from tests import gate_lab
from tests.gate_lab import run

JUDGE = ("gate", "clean.onnx", "--card", "model.toml", "--policy", "standalone", "--report",
         "report.json")  # fmt: skip


@pytest.fixture
def lab(tmp_path, lab_files):
    with gate_lab.copied(lab_files, tmp_path / "lab") as lab:
        yield lab


@given(at=st.integers(0, 200), flip=st.integers(1, 255))
def test_no_byte_of_what_was_sealed_can_be_changed(tmp_path_factory, at, flip):
    path = tmp_path_factory.mktemp("sealed") / "item"
    whole = bytearray(state.sealed(b"answers" * 20, "run", "item"))
    path.write_bytes(whole)
    assert state.unsealed(path, "run", "item") == b"answers" * 20
    whole[at % len(whole)] ^= flip
    path.write_bytes(whole)
    assert state.unsealed(path, "run", "item") is None


def test_what_was_kept_is_of_one_run_and_one_name(tmp_path):
    mine = StoredPredictions(tmp_path / "predictions.npz", "mine")
    mine.save(3, {"a": np.arange(3)})
    assert mine.load() is not None
    assert StoredPredictions(tmp_path / "predictions.npz", "other").load() is None
    layers = StoredLayers(tmp_path, "mine")
    layers.save("one", {"codes": np.arange(3)})
    (file,) = [path for path in tmp_path.iterdir() if "one" in path.name]
    layers.save("two", {"codes": np.arange(3)})
    (other,) = [path for path in tmp_path.iterdir() if "two" in path.name]
    shutil.copy(file, other)
    assert layers.load("one") is not None
    assert layers.load("two") is None


def test_another_user_s_state_is_not_believed(tmp_path, monkeypatch):
    store = StoredPredictions(tmp_path / "predictions.npz", "run")
    store.save(3, {"a": np.arange(3)})
    monkeypatch.setenv("QDEPLOY_STATE", str(tmp_path / "another"))
    assert store.load() is None


def test_without_a_place_for_the_key_everything_works_but_going_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("QDEPLOY_STATE", str(tmp_path / "file" / "state"))
    store = StoredPredictions(tmp_path / "predictions.npz", "run")
    store.save(3, {"a": np.arange(3)})
    assert store.load() is not None  # in this process
    state._key.cache_clear()
    assert store.load() is None


def test_a_key_that_others_can_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("QDEPLOY_STATE", str(tmp_path))
    (tmp_path / "key").write_bytes(bytes(32))
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(OutputError, match="not of this user alone"):
        state.sealed(b"")


def test_answers_that_came_with_the_folder_are_not_believed(lab):
    """The model is wrong nearly always; what lies in the run's folder says that it never is."""
    proto = onnx.load(lab / "clean.onnx")
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            noise = np.random.default_rng(0).normal(size=values.shape).astype(np.float32)
            gate_lab.replace_values(tensor, noise)
    onnx.save(proto, lab / "clean.onnx")
    assert run(*JUDGE) == 3
    (folder,) = Path("artifacts").iterdir()
    labels = lab.images("test")[1].astype(np.int32)
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()
    (folder / PARTIAL).mkdir(exist_ok=True)
    runtimes = ("cpu", "cpu, unoptimized")
    keys = [f"result|{r}|{t}" for r in runtimes for t in ("", "patch to class 0")]
    wished = dict.fromkeys(keys, labels)
    np.savez(folder / PARTIAL / "predictions.npz", **wished, done=np.array(len(labels)))
    assert run(*JUDGE) == 3
    assert json.loads(Path("report.json").read_text())["outcome"] == "REJECT"


@pytest.mark.parametrize("place", ["run", PARTIAL, LOCK, "report.json", f"{PARTIAL}/layers"])
def test_a_link_in_the_folder_of_runs_is_refused_and_leads_nowhere(tmp_path, place):
    victim = tmp_path / "home"
    victim.mkdir()
    (victim / ".bashrc").write_text("precious")
    folder = tmp_path / "artifacts" / "run"
    link = folder if place == "run" else folder / place
    link.parent.mkdir(parents=True)
    link.symlink_to(victim / ".bashrc" if "." in place else victim)
    with pytest.raises(OutputError, match="is a link"), open_run(tmp_path / "artifacts", "run"):
        pass
    assert [path.name for path in victim.iterdir()] == [".bashrc"]
    assert (victim / ".bashrc").read_text() == "precious"


def test_a_lock_that_is_another_file_s_second_name_does_not_empty_it(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "artifacts" / "run"
    victim.write_text("precious")
    folder.mkdir(parents=True)
    os.link(victim, folder / LOCK)
    with open_run(tmp_path / "artifacts", "run"):
        pass
    assert victim.read_text() == "precious"


def test_only_our_own_half_written_files_are_removed(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".env").write_text("somebody's")

    def fail(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(folder / "report.json", b"half")
    monkeypatch.undo()
    os.environ["QDEPLOY_STATE"] = str(tmp_path / "state")
    assert len(list(folder.iterdir())) == 2
    with open_run(tmp_path, "run"):
        names = {path.name for path in folder.iterdir()}
    assert names == {".env", LOCK, PARTIAL}


def test_the_digest_of_a_model_covers_its_external_data(tmp_path, lab_files):
    for tag, value in (("a", 0.0), ("b", 1.0)):
        proto = onnx.load(lab_files / "fp32.onnx")
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                values = numpy_helper.to_array(tensor)
                gate_lab.replace_values(tensor, np.full_like(values, value))
        (tmp_path / tag).mkdir()
        onnx.save(proto, tmp_path / tag / "m.onnx", save_as_external_data=True, location="m.data",
                  size_threshold=0)  # fmt: skip
    a, b = tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"
    assert a.read_bytes() == b.read_bytes()
    assert model_digest(a) != model_digest(b)
