"""Every verb scans what it was given before it opens it, and scan runs nothing."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from qdeploy.api.requests import quantize_request
from qdeploy.architectures.digits import DigitsNet
from qdeploy.formats import static
from qdeploy.runs import gate
from qdeploy.runs.scan import ScanRequest, scan_one
from qdeploy.values import Finding
from tests import gate_lab
from tests.gate_lab import Lab, run


@pytest.fixture
def lab(tmp_path, lab_files):
    with gate_lab.copied(lab_files, tmp_path / "lab") as lab:
        yield lab


def test_scan_hands_no_file_to_a_runtime(lab, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a session was opened")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    alone = scan_one(ScanRequest(Path("clean.onnx"), quantize_request))
    beside = scan_one(ScanRequest(Path("ort-channel.onnx"), quantize_request, Path("fp32.onnx")))
    assert (alone.failed, beside.failed) == (None, None)
    assert alone.crowding is not None
    assert beside.not_scanned == "they are integers already"


class Loud(torch.nn.Module):
    """Writes when it is loaded: `__setstate__` of TorchScript runs in `torch.jit.load`."""

    @torch.jit.export
    def __getstate__(self) -> tuple[int, bool]:
        return 1, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]) -> None:
        self.training = state[1]
        torch.save(torch.zeros(1), "MARKER")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def quietly(member: str, data: bytes) -> bytes:
    """The same call in a spelling that no list of names holds."""
    if member.endswith(".py"):
        return data.replace(b"torch.save(", b"ops.aten.save(")
    return data


@pytest.mark.parametrize("spelling", [lambda _, data: data, quietly], ids=["plain", "ops"])
@pytest.mark.parametrize("verb", ["scan", "export", "quantize", "sanitize"])
def test_torchscript_runs_under_no_verb(lab, verb, spelling):
    torch.jit.save(torch.jit.script(torch.nn.Sequential(Loud(), DigitsNet())), "plain.pt")
    with zipfile.ZipFile("plain.pt") as old, zipfile.ZipFile("script.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry, spelling(entry.filename, old.read(entry)))
    shutil.copy("model.toml", "script.toml")
    out = () if verb == "scan" else ("--out", "out.onnx")
    assert run(verb, "script.pt", *out) != 0 or verb == "scan"
    assert not Path("MARKER").exists()
    assert not Path("out.onnx").exists()


def hidden_behind(lab: Lab) -> None:
    with (lab / "bad.pt").open("ab") as file:
        file.write(b"hidden payload " * 10)


def hidden_program(lab: Lab) -> None:
    with zipfile.ZipFile(lab / "bad.pt", "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/run.sh", "echo hi")


def second_pickle(lab: Lab) -> None:
    with zipfile.ZipFile(lab / "bad.pt", "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/extra.pkl", b"cposix\nsystem\n(S'true'\ntR.")


def same_name_again(lab: Lab) -> None:
    with zipfile.ZipFile(lab / "bad.pt", "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/DATA.PKL", archive.read(f"{root}/data.pkl"))


@pytest.mark.parametrize("verb", ["quantize", "sanitize"])
def test_what_scan_says_of_weights_is_no_reason_not_to_open_them(lab, verb):
    """So that what is refused below is refused for what was done to the file."""
    assert run("scan", "model.pt") == 3
    soon = ["--dry-run"] if verb == "sanitize" else ["--rounding", "nearest"]
    assert run(verb, "model.pt", "--out", "out.onnx", *soon) == 0


@pytest.mark.parametrize("spoil", [hidden_behind, hidden_program, second_pickle, same_name_again])
@pytest.mark.parametrize("verb", ["quantize", "sanitize"])
def test_what_scan_rejects_no_other_verb_opens(lab, verb, spoil: Callable[[Lab], None], capsys):
    pytest.importorskip("fickling")
    shutil.copy("model.pt", "bad.pt")
    shutil.copy("model.toml", "bad.toml")
    spoil(lab)
    assert run("scan", "bad.pt") == 3
    assert run(verb, "bad.pt", "--out", "again.onnx") == 2
    assert "qdeploy scan shows all" in capsys.readouterr().err
    assert not Path("again.onnx").exists()


@pytest.mark.parametrize("verb", ["export", "quantize", "gate"])
@pytest.mark.parametrize("kind", ["fp32.onnx", "model.pt"])
def test_a_file_that_is_exchanged_after_the_scan_is_not_used(lab, verb, kind, monkeypatch, capsys):
    """The scan sees the honest file, the loader another one that holds together as well."""
    if verb == "gate" and kind == "model.pt":
        pytest.skip("the gate takes ONNX")
    subject = Path("subject").with_suffix(Path(kind).suffix)
    shutil.copy(kind, subject)
    shutil.copy("model.toml", "subject.toml")
    honest = static.findings_in

    def look_and_lose(path: Path) -> tuple[Finding, ...]:
        found = honest(path)
        if path == subject:
            with subject.open("ab") as file:
                file.write(b"\x32\x00" if kind == "fp32.onnx" else b"")
            if kind == "model.pt":
                state = torch.load(kind, weights_only=True)  # noqa: TID251
                torch.save({name: value + 1 for name, value in state.items()}, subject)
        return found

    for module in (static, gate):
        monkeypatch.setattr(module, "findings_in", look_and_lose)
    told = (
        ["--reference", "fp32.onnx", "--policy", "demo"] if verb == "gate" else ["--out", "o.onnx"]
    )
    assert run(verb, subject, *told) == 2
    assert "was exchanged or written to while it was read" in capsys.readouterr().err
    assert not Path("o.onnx").exists()
