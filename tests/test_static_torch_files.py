"""Torch and safetensors files looked at without opening them: hostile ones by rule, clean ones."""

from __future__ import annotations

import contextlib
import io
import json
import stat
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qdeploy.architectures import DigitsNet
from qdeploy.errors import InputError
from qdeploy.formats import pickles
from qdeploy.formats.static import RULES, findings_in
from qdeploy.values import Finding

DICT = b"\x80\x02}."
SYSTEM = b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R."
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
BEHIND = 24  # bytes of the end record, and two more


def zipped(members: dict[str, bytes], **options: int) -> bytes:
    """An archive as torch would write it, but for `members`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in ({"m/data.pkl": DICT} | members).items():
            entry = zipfile.ZipInfo(name)
            for key, value in options.items():
                setattr(entry, key, value)
            archive.writestr(entry, data)
    return file.getvalue()


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


PLAIN = zipped({"m/data/0": b"\x00" * 64})
DIRECTORY = PLAIN.index(b"PK\x01\x02")
SECOND = PLAIN.index(b"PK\x01\x02", DIRECTORY + 1)
PADDED = zipped({"m/version": b"3"}, extra=struct.pack("<2H", 0x4246, 80) + b"Z" * 80)


def between() -> bytes:
    """Bytes between the last member and the directory, which is moved."""
    hidden = b"#!/bin/sh and more"
    start = struct.pack("<L", DIRECTORY + len(hidden))
    moved = PLAIN[:DIRECTORY] + hidden + PLAIN[DIRECTORY:]
    return patched(moved, moved.rindex(b"PK\x05\x06") + 16, start)


def nested(data: bytes, times: int) -> bytes:
    for _ in range(times):
        data = zipped({"m/data/sample_inputs/model.pt": data})
    return data


ARCHIVES = [
    ("duplicate-member", zipped({"m/Data.pkl": DICT})),
    ("path-traversal", zipped({"../m/x": b""})),
    ("path-traversal", zipped({"/etc/x": b""})),
    ("path-traversal", zipped({"m\\..\\x": b""})),
    ("path-traversal", zipped({"C:/x": b""})),
    ("encrypted-member", patched(patched(PLAIN, 6, b"\x01"), DIRECTORY + 8, b"\x01")),
    ("symlink-member", zipped({}, external_attr=(stat.S_IFLNK | 0o777) << 16)),
    ("inflation", zipped({"m/data/0": bytes(10_000_000)}, compress_type=zipfile.ZIP_DEFLATED)),
    ("unknown-compression", zipped({}, compress_type=zipfile.ZIP_BZIP2)),
    ("header-mismatch", patched(PLAIN, 30, b"n")),
    ("header-mismatch", patched(PLAIN, 18, b"\x02")),
    ("header-mismatch", patched(PLAIN, 8, b"\x08")),
    ("header-mismatch", patched(PLAIN, 6, b"\x01")),
    ("header-mismatch", patched(PLAIN, DIRECTORY + 24, b"\x05")),
    ("header-mismatch", patched(PLAIN, SECOND + 42, b"\x03")),
    ("header-mismatch", patched(PLAIN, SECOND + 46 + 6, b"\x00")),
    ("header-mismatch", patched(patched(PLAIN, DIRECTORY + 24, b"\x05"), 22, b"\x05")),
    ("header-mismatch", PLAIN.replace(b"m/data/0", b"m/data\x00a")),
    ("overlapping-members", patched(PLAIN, SECOND + 42, b"\x00\x00\x00\x00")),
    ("hidden-bytes", b"PK\x03\x04 and more" + PLAIN),
    ("hidden-bytes", PLAIN + b"more"),
    ("hidden-bytes", patched(PLAIN, len(PLAIN) - 2, b"\x04") + b"more"),
    ("hidden-bytes", between()),
    ("hidden-bytes", PADDED.replace(b"Z", b"#")),
    ("unexpected-member", zipped({"m/evil.so": b""})),
    ("unexpected-member", zipped({"m/data/evil.py": b""})),
    ("unexpected-member", zipped({"m/code/evil.EXE": b"", "m/constants.pkl": DICT})),
    ("deep-archive", nested(PLAIN, 3)),
    ("path-traversal", nested(zipped({"../x": b""}), 2)),
    ("file-operation", zipped({
        "m/constants.pkl": DICT, "m/code/__torch__/a.py": b"return torch.from_file(name)"})),
    ("damaged-code", zipped({
        "m/constants.pkl": DICT, "m/code/__torch__/a.py": b"return x"}).replace(b"n x", b"n y")),
    ("pickle-damaged", zipped({"m/data.pkl": b""})),
    ("pickle-damaged", nested(PLAIN.replace(b"PK\x05\x06", b"PK__"), 1)),
]  # fmt: skip

CALL = b"X\x02\x00\x00\x00id\x85R."
IMPORTS = [
    ("os.system", SYSTEM),
    ("os.system", b"cos\nsystem\n(S'id'\ntR."),
    ("os.system", b"(S'id'\nios\nsystem\n."),
    ("os.system", b"\x80\x04\x8c\x02os\x8c\x06system\x93" + CALL),
    ("os.system", b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93" + CALL),
    ("os.system", SYSTEM[:-1] + b"\xff"),
    ("os.system", SYSTEM[:-1]),
    ("os.system", b"\x80\x02e" + SYSTEM[2:]),
    ("copyreg", b"\x80\x02\x82\x01)R."),
    ("__builtin__.eval", b"\x80\x02c__builtin__\neval\n" + CALL),
    ("builtins.getattr", b"\x80\x02cbuiltins\ngetattr\n" + CALL),
    ("torch.load", b"\x80\x02ctorch\nload\n" + CALL),
    ("torch._utils._rebuild_tensor_v2.x", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.x\n" + CALL),
    ("__torch__.Net", b"\x80\x02c__torch__\nNet\n)\x81."),
    ("torch.jit._pickle.build_intlist", b"\x80\x02ctorch.jit._pickle\nbuild_intlist\n" + CALL),
]  # fmt: skip

ODD = [
    ("pickle-odd", "warning", DICT + b"more"),
    ("pickle-odd", "warning", b"\x80\x02\x80\x02}."),
    ("pickle-odd", "error", b"\x80\x02}q\x00" + b"h\x00" * 400 + b"."),
    ("pickle-damaged", "warning", b"\x80\x02}"),
    ("pickle-damaged", "warning", b"\x80\x02a."),
    ("pickle-damaged", "error", b"\x80\x04]\x93."),
    ("pickle-damaged", "warning", b"\x80\x02" + b"N0" * 500_001 + b"N."),
]


def header(tensors: dict[str, object] | str) -> bytes:
    text = (tensors if isinstance(tensors, str) else json.dumps(tensors)).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(start: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (4,)) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFETENSORS = [
    ("tensor-range", "error", header({"a": tensor(0, 16), "b": tensor(8, 24)}) + bytes(24)),
    ("tensor-range", "error", header({"a": tensor(0, 16)}) + bytes(8)),
    ("tensor-range", "error", header({"a": tensor(0, 12)}) + bytes(12)),
    ("tensor-range", "error", header({"a": tensor(0, 16, shape=(-2, -2))}) + bytes(16)),
    ("tensor-range", "error", header({"a": tensor(0, 16, dtype="PICKLE")}) + bytes(16)),
    ("tensor-range", "error", header({"a": 3})),
    ("unclaimed-bytes", "error", header({"a": tensor(0, 16)}) + bytes(20)),
    ("unclaimed-bytes", "error", header({"a": tensor(0, 16), "b": tensor(20, 36)}) + bytes(36)),
    ("duplicate-tensor", "error", header('{"a": {}, "a": {}}')),
    ("large-metadata", "warning", header({"__metadata__": {"k": "x" * 70_000}})),
    ("unprintable-name", "warning", header({"a\x1b[2J": tensor(0, 16)}) + bytes(16)),
]


def save(data: bytes, folder: Path) -> Path:
    path = folder / "model.pt"
    path.write_bytes(data)
    return path


def of_rule(rule: str, findings: tuple[Finding, ...]) -> list[Finding]:
    assert rule in RULES
    return [finding for finding in findings if finding.rule == rule]


@pytest.mark.parametrize(("rule", "data"), ARCHIVES, ids=[case[0] for case in ARCHIVES])
def test_an_archive_that_readers_could_take_differently_is_an_error(tmp_path, rule, data):
    if rule.startswith("pickle"):
        pytest.importorskip("fickling")
    found = of_rule(rule, findings_in(save(data, tmp_path)))
    assert found
    assert {finding.level for finding in found} == {"error"}


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    path = save(dict(ARCHIVES)["inflation"], tmp_path)
    opened: list[object] = []
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda _, entry: opened.append(entry))
    assert of_rule("inflation", findings_in(path))
    assert opened == []


def test_pickles_beside_the_code_are_examined_too(tmp_path):
    pytest.importorskip("fickling")
    path = save(zipped({"m/code/a.py.debug_pkl": SYSTEM}), tmp_path)
    (found,) = of_rule("pickle-import", findings_in(path))
    assert found.where == "m/code/a.py.debug_pkl"


@pytest.mark.parametrize(("name", "data"), IMPORTS)
@pytest.mark.parametrize("place", ["archive", "bare", "older format", "inside of another file"])
def test_a_pickle_that_imports_code_is_named_with_what_it_imports(tmp_path, name, data, place):
    pytest.importorskip("fickling")
    file = {
        "archive": zipped({"m/data.pkl": data}),
        "bare": data,
        "older format": MAGIC + DICT + DICT + data + DICT + bytes(100),
        "inside of another file": nested(zipped({"m/data.pkl": data}), 1),
    }[place]
    path = save(file, tmp_path)
    if file[:1] not in b"\x80P":  # of a protocol so old that the file is not taken for a pickle
        with pytest.raises(InputError, match="not an ONNX file"):
            findings_in(path)
        return
    found = of_rule("pickle-import", findings_in(path))
    assert any(f"imports {name}, which" in finding.message for finding in found)
    assert {finding.level for finding in found} == {"error"}


@pytest.mark.parametrize(("rule", "level", "data"), ODD)
def test_a_pickle_that_no_pickler_wrote_is_odd(tmp_path, rule, level, data, capsys):
    pytest.importorskip("fickling")
    found = of_rule(rule, findings_in(save(data, tmp_path)))
    assert level in {finding.level for finding in found}
    assert capsys.readouterr() == ("", "")


def test_shared_arguments_do_not_make_the_scan_run_for_ever(tmp_path):
    """Forty doublings: 2^40 values if they were written out."""
    pytest.importorskip("fickling")
    doublings = b"ccollections\nOrderedDict\n(Nt" + b"2\x86" * 40 + b"\x85R."
    findings_in(save(b"\x80\x02" + doublings, tmp_path))  # comes back


def test_a_pickle_too_large_to_examine_is_said_to_be(tmp_path, monkeypatch):
    pytest.importorskip("fickling")
    monkeypatch.setattr(pickles, "LARGEST_PICKLE_BYTES", 20)
    found = of_rule(
        "pickle-not-examined", findings_in(save(zipped({"m/data.pkl": SYSTEM * 2}), tmp_path))
    )
    assert [finding.where for finding in found] == ["m/data.pkl"]


def test_without_the_engine_one_warning_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fickling", None)
    (found,) = findings_in(save(nested(zipped({"m/data.pkl": SYSTEM}), 1), tmp_path))
    assert (found.rule, found.level) == ("pickle-not-examined", "warning")
    assert "pip install 'qdeploy[scan]'" in found.message


@pytest.mark.parametrize(("rule", "level", "data"), SAFETENSORS)
def test_a_header_that_does_not_fit_its_tensors_is_found(tmp_path, rule, level, data):
    assert [f.level for f in of_rule(rule, findings_in(save(data, tmp_path)))] == [level]


@pytest.mark.parametrize(
    "data",
    [
        header({})[:-1],
        header('{"a": '),
        header('{"a": ' * 50_000),
        b"\x80",
        b"PK\x03\x04",
        PLAIN[: len(PLAIN) - BEHIND],
        zipped({}).replace(b"data.pkl", b"data.txt"),
    ],
)
def test_what_is_no_model_is_an_error_and_no_finding(tmp_path, data):
    pytest.importorskip("fickling")
    path = save(data, tmp_path)
    if data == b"\x80":
        assert of_rule("pickle-damaged", findings_in(path))
        return
    with pytest.raises(InputError):
        findings_in(path)


def test_a_pickle_with_an_archive_behind_it_is_both(tmp_path):
    assert of_rule("hidden-bytes", findings_in(save(DICT + PLAIN, tmp_path)))


def everything_torch_saves() -> dict[str, object]:
    return {
        "w": torch.zeros(3), "p": torch.nn.Parameter(torch.ones(2)), "size": torch.Size([1]),
        "half": torch.ones(2).half(), "int": torch.ones(2, dtype=torch.int64), "n": np.float32(3),
        "array": np.zeros(3), "device": torch.device("cpu"), "type": torch.float32, "set": {1},
        "complex": torch.ones(2, dtype=torch.complex64), "epoch": 3, "rate": 0.1, "name": "x",
    }  # fmt: skip


def script(path: Path, module: torch.nn.Module) -> None:
    torch.jit.save(torch.jit.script(module), path)


def trace(path: Path, module: torch.nn.Module) -> None:
    torch.jit.save(torch.jit.trace(module, torch.zeros(2, 1, 8, 8)), path)


def exported(path: Path, module: torch.nn.Module) -> None:
    batch = {0: torch.export.Dim("batch")}
    example = (torch.zeros(2, 1, 8, 8),)
    torch.export.save(torch.export.export(module, example, dynamic_shapes=(batch,)), path)


WRITERS: dict[str, Callable[[Path, torch.nn.Module], object]] = {
    "checkpoint": lambda path, module: torch.save(module.state_dict(), path),
    "all kinds of values": lambda path, _: torch.save(everything_torch_saves(), path),
    "older format": lambda path, module: torch.save(
        module.state_dict(), path, _use_new_zipfile_serialization=False
    ),
    "optimizer": lambda path, module: torch.save(
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9).state_dict(), path
    ),
    "safetensors": lambda path, module: save_file(module.state_dict(), path, {"format": "pt"}),
    "script": script,
    "trace": trace,
    "exported program": exported,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_nothing_stands_against_what_torch_writes(tmp_path, write):
    pytest.importorskip("fickling")
    path = tmp_path / ("model.pt2" if write is exported else "model.pt")
    write(path, DigitsNet(width=4).eval())
    warned = ["holds-code"] if write in {script, trace, exported} else []
    assert [finding.rule for finding in findings_in(path) if finding.level != "note"] == warned


def test_the_classes_of_a_script_are_noted(tmp_path):
    pytest.importorskip("fickling")
    script(tmp_path / "model.pt", DigitsNet(width=4))
    (warning, note) = findings_in(tmp_path / "model.pt")
    assert warning.rule == "holds-code"
    assert (note.rule, note.level) == ("script-classes", "note")


def test_torchs_padding_is_nothing_hidden(tmp_path):
    assert of_rule("hidden-bytes", findings_in(save(PADDED, tmp_path))) == []


@pytest.mark.parametrize(
    "name", ["resnet18w16-clean.pt", "resnet18w16-pq4.pt", "resnet18w16-pq4.onnx"]
)
def test_nothing_stands_against_the_containers_of_real_models(shared, name):
    pytest.importorskip("fickling")
    assert findings_in(shared / "models" / name) == ()


@cache
def written(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[kind](Path(folder) / "model.pt", DigitsNet(width=1))
        return (Path(folder) / "model.pt").read_bytes()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_flipped_bytes_never_end_in_a_traceback(tmp_path, data):
    """Damage anywhere is a finding, an error of ours, or goes unnoticed."""
    path = tmp_path / "model.pt"
    kind = data.draw(st.sampled_from(["checkpoint", "older format", "safetensors", "script"]))
    content = bytearray(written(kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    kept = data.draw(st.just(len(content)) | st.integers(1, len(content)))
    path.write_bytes(content[:kept])
    with contextlib.suppress(InputError):
        findings_in(path)
