"""Damaged files of every kind that qdeploy reads: one line each, never a traceback.

`python -m tests.test_fuzz_readers --seconds 600` goes on for so long and prints what it found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from qdeploy.data import Preprocessing, open_labelled_images
from qdeploy.data.triggers import parse_trigger
from qdeploy.errors import QdeployError
from qdeploy.exporting.exporter import export
from qdeploy.formats.onnx.reading import read_single_file
from qdeploy.formats.opening import load
from qdeploy.formats.static import findings_in
from qdeploy.provenance.trace import trace
from qdeploy.report.from_json import layers_of
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.card import load_card
from qdeploy.settings.device import load_device
from qdeploy.settings.policy import load_policy
from qdeploy.settings.recipe import load_recipe
from qdeploy.values import Architecture, FloatModel, Stated
from tests import gate_lab
from tests.gate_lab import Lab

SLOWEST_SECONDS = 60
DIGITS = Preprocessing((1, 8, 8), (0.5,), (0.25,))
ROOT = Path(__file__).parents[1]


def read_images(path: Path) -> None:
    for _ in open_labelled_images(path, DIGITS, None).batches(64):
        pass


def read_model(path: Path) -> None:
    findings_in(path)
    digits = Architecture("qdeploy:digits", {}, trusted=False)
    export(load(path, digits), stated=Stated((1, 8, 8)))


def read_file_to_be_judged(path: Path) -> None:
    """What the gate does with a file before it measures."""
    findings_in(path)
    data = read_single_file(path, allow=["custom-operator"])
    open_session(data).interface(where=str(path))
    trace(data, _reference(path.parent / "fp32.onnx"))


@cache
def _reference(path: Path) -> FloatModel:
    return export(load(path))


def read_attestation(path: Path) -> None:
    from qdeploy.attest.envelope import read_envelope

    read_envelope(path)


READERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "float model": (
        read_model,
        ("fp32.onnx", "model.pt", "legacy.pt", "script.pt", "model.safetensors", "program.pt2"),
    ),
    "file to be judged": (
        read_file_to_be_judged,
        ("good.onnx", "ort-channel.onnx", "ort-tensor.onnx", "ort-qoperator.onnx", "fp32.onnx"),
    ),
    "model card": (load_card, ("model.toml",)),
    "policy": (lambda path: load_policy(str(path)), ("policy.toml",)),
    "recipe": (lambda path: load_recipe(str(path)), ("recipe.toml",)),
    "device": (lambda path: load_device(str(path)), ("device.toml",)),
    "trigger": (lambda path: parse_trigger(str(path)), ("trigger.toml",)),
    "images": (read_images, ("digits-test.npz", "images.zip")),
    "report": (layers_of, ("good.json",)),
    "attestation": (read_attestation, ("envelope.json",)),
}
SEEDS = tuple((kind, name) for kind, (_, names) in READERS.items() for name in names)


@dataclass(frozen=True, slots=True)
class Shelf:
    """A file of every kind, whole."""

    folder: Path

    def damaged(self, name: str, seed: int) -> Path:
        """One of them with something wrong in it, by a seed."""
        rng = np.random.default_rng(seed)
        data = (self.folder / name).read_bytes()
        if name.endswith(".onnx") and rng.random() < 0.5:
            data = _other_message(data, rng)
        elif name.endswith((".toml", ".json")) and rng.random() < 0.5:
            data = _other_words(data, rng)
        else:
            data = _other_bytes(data, rng)
        path = self.folder / f"damaged{Path(name).suffix}"
        path.write_bytes(data)
        return path


def _other_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, pieces cut, doubled or replaced; mostly near the ends, where headers are."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        size = max(len(changed), 1)
        near = min(size, 400)
        start = [rng.integers(size), rng.integers(near), size - 1 - rng.integers(near)]
        at = int(start[int(rng.integers(3))])
        length = int(2 ** rng.integers(0, 9))
        kind = rng.integers(5)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[at : at + length] = rng.bytes(length)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        else:
            changed[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(changed)


def _other_message(data: bytes, rng: np.random.Generator) -> bytes:
    """A well-formed ONNX message that says something else."""
    proto = onnx.ModelProto.FromString(data)
    for _ in range(int(rng.integers(1, 4))):
        _change_field(proto, rng)
    return proto.SerializeToString()


def _change_field(message: object, rng: np.random.Generator) -> None:
    """Walk down at random, and change the field where the walk ends."""
    fields = message.ListFields()  # type: ignore[attr-defined]
    if not fields:
        return
    field, value = fields[int(rng.integers(len(fields)))]
    many = not isinstance(value, str | bytes | int | float) and not hasattr(value, "ListFields")
    if field.message_type is not None:
        item = value[int(rng.integers(len(value)))] if many else value
        kind = rng.integers(8)
        if many and kind == 0:
            del value[int(rng.integers(len(value)))]
        elif many and kind == 1:
            value.add().CopyFrom(item)
        else:
            _change_field(item, rng)
        return
    new = _other_value(value[0] if many else value, rng)
    with contextlib.suppress(ValueError):  # protobuf itself refuses some
        if many:
            value[int(rng.integers(len(value)))] = new
        else:
            setattr(message, field.name, new)


def _other_value(value: object, rng: np.random.Generator) -> object:
    if isinstance(value, bytes):
        return _other_bytes(value, rng)
    if isinstance(value, str):
        return str(rng.choice(["", "x", "Conv", "Relu", "Loop", "\x1b[2J", "../x", value + "1"]))
    if isinstance(value, float):
        return float(rng.choice([0.0, -1.0, np.inf, np.nan, 1e38]))
    return int(rng.choice([0, 1, -1, 2, 3, 7, 255, 2**31 - 1]))


def _other_words(data: bytes, rng: np.random.Generator) -> bytes:
    """Words of a text swapped for each other, or for ones that are of another kind."""
    words = data.decode("utf-8").split(" ")
    strange = ["-1", "1e999", "nan", '"x"', "[]", "{}", "[[[", "true", "null", "9" * 400, "\x00"]
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(words)))
        other = words[int(rng.integers(len(words)))]
        words[at] = other if rng.random() < 0.5 else str(rng.choice(strange))
    return " ".join(words).encode()


def fill(lab: Lab) -> Shelf:
    """Put a whole file of every other kind beside those of the lab."""
    folder = lab.folder
    state = torch.load(folder / "model.pt", weights_only=True)  # noqa: TID251
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "model.safetensors")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    example = torch.zeros(1, 1, 8, 8)
    torch.jit.trace(net, example).save(str(folder / "script.pt"))
    torch.export.save(torch.export.export(net, (example,)), folder / "program.pt2")
    for name, source in {
        "policy": "recipes/policies/strict", "recipe": "recipes/int4-strict",
        "device": "devices/x86-vnni",
    }.items():  # fmt: skip
        shutil.copy(ROOT / f"{source}.toml", folder / f"{name}.toml")
    trigger = lab.card.split("[[trigger]]")[1].split("\n[")[0]
    (folder / "trigger.toml").write_text(f"[[trigger]]{trigger}\n", "utf-8")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(4):
            picture = io.BytesIO()
            Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(picture, "PNG")
            archive.writestr(f"{i % 2}/{i}.png", picture.getvalue())
    signature = {"keyid": "0" * 64, "sig": "AAAA"}
    envelope = {
        "payloadType": "application/vnd.in-toto+json", "payload": "e30=", "signatures": [signature],
    }  # fmt: skip
    (folder / "envelope.json").write_text(json.dumps(envelope), "utf-8")
    return Shelf(folder)


def read_damaged(shelf: Shelf, kind: str, name: str, seed: int) -> bool:
    """Whether the file was refused; it may have stayed a good one."""
    path = shelf.damaged(name, seed)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            READERS[kind][0](path)
    except QdeployError as error:
        assert str(error).strip()  # noqa: PT017 - what is said is what is tested
        return True
    return False


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, lab_files) -> Iterator[Shelf]:
    folder = tmp_path_factory.mktemp("shelf")
    with gate_lab.copied(lab_files, folder) as lab:
        yield fill(lab)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "name"), SEEDS, ids=lambda value: value)
def test_a_damaged_file_is_refused_in_one_line_or_read(shelf, kind, name):
    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        read_damaged(shelf, kind, name, seed)

    check()


@pytest.mark.parametrize(("kind", "name"), SEEDS, ids=lambda value: value)
def test_the_whole_file_is_read(shelf, kind, name):
    if name in {"program.pt2", "script.pt"}:
        pytest.skip("refused as it is: it holds code")
    READERS[kind][0](shelf.folder / name)


class StuckError(Exception):
    """A reader that does not come back."""


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(_number: int, _frame: object) -> None:
        raise StuckError(f"no answer after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def main() -> int:
    """Damage files for a while; 1 if one of them was more than one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with gate_lab.made_anew() as lab:
        found = _fuzz(fill(lab), time.monotonic() + given.seconds, given.seed)
    return int(found > 0)


def _fuzz(shelf: Shelf, end: float, seed: int) -> int:
    said: Counter[str] = Counter()
    tried, refused = Counter[str](), Counter[str]()
    while time.monotonic() < end:
        kind, name = SEEDS[seed % len(SEEDS)]
        tried[name] += 1
        try:
            with _at_most(SLOWEST_SECONDS):
                refused[name] += read_damaged(shelf, kind, name, seed)
        except Exception:  # noqa: BLE001 - the very thing that is looked for
            last = traceback.format_exc().strip().splitlines()
            said[f"{kind}, {name}: {last[-1]}"] += 1
            sys.stdout.write(f"seed {seed}\n" + "\n".join(last[-8:]) + "\n")
            sys.stdout.flush()
        seed += 1
    for name in tried:
        sys.stdout.write(f"{name:20} {tried[name]:6} damaged, {refused[name]:6} refused\n")
    sys.stdout.write(f"{sum(tried.values())} files, {sum(said.values())} tracebacks\n")
    return sum(said.values())


if __name__ == "__main__":
    sys.exit(main())
