from __future__ import annotations

import contextlib
import io
import os
import pickle  # noqa: TID251 - to make what must not be opened
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from qdeploy.architectures import DigitsNet
from qdeploy.errors import InputError, UsageError
from qdeploy.formats.opening import load, sniff
from qdeploy.values import Architecture
from tests.nets import residual_net

DIGITS = Architecture("qdeploy:digits", {"width": 4}, trusted=False)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return DigitsNet(width=4).state_dict()


def saved(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)  # type: ignore[arg-type]
    return path


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.onnx", "model"])
def test_the_content_decides_and_not_the_name(tmp_path, state, name):
    loaded = load(saved(tmp_path / name, state), DIGITS)
    assert loaded.origin.format == "torch checkpoint"
    onnx = tmp_path / f"other-{name}"
    onnx.write_bytes(residual_net())
    assert load(onnx).kind == "onnx"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
    ],
    ids=["plain", "state_dict", "model", "data parallel"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_state_dict_is_found_in_what_training_scripts_save(tmp_path, state, wrap, zipped):
    path = saved(tmp_path / "m.pt", wrap(state), _use_new_zipfile_serialization=zipped)
    module = load(path, DIGITS).content
    assert not module.training
    for key, value in weights_of(module).items():
        torch.testing.assert_close(value, state[key])


def test_safetensors_hold_a_state_dict(tmp_path, state):
    save_file(state, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt", DIGITS)
    assert loaded.origin.format == "safetensors"
    torch.testing.assert_close(weights_of(loaded.content), state)


def test_an_architecture_can_come_from_a_file_or_a_module(tmp_path, state):
    source = tmp_path / "arch.py"
    source.write_text(
        "from qdeploy.architectures import DigitsNet\n"
        "def make(width, name='x'):\n    return DigitsNet(width)\n"
    )
    path = saved(tmp_path / "m.pt", state)
    for name in (f"{source}:make", "qdeploy.architectures:DigitsNet"):
        loaded = load(path, Architecture(name, {"width": 4}, trusted=True))
        assert loaded.origin.architecture == name
        torch.testing.assert_close(weights_of(loaded.content), state)


@pytest.mark.parametrize(
    ("architecture", "arguments", "complaint"),
    [
        ("qdeploy:lenet", {}, "qdeploy has no 'lenet'"),
        ("qdeploy:digits", {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("qdeploy:digits", {"width": 5}, "of another shape"),
        ("qdeploy:digits", {"pretrained": True}, "would fetch weights"),
        ("qdeploy:resnet18", {"width": 1}, "missing"),
        ("torchvision:resnet18", {}, "torchvision"),
        ("timm:resnet18", {}, "timm"),
    ],
)
def test_a_card_cannot_talk_us_into_another_architecture(
    tmp_path, state, architecture, arguments, complaint
):
    path = saved(tmp_path / "m.pt", state)
    with pytest.raises(InputError, match=architecture) as error:
        load(path, Architecture(architecture, arguments, trusted=False))
    assert complaint in str(error.value)


def test_names_outside_of_the_allow_list_are_not_imported_for_a_card(tmp_path, state):
    path = saved(tmp_path / "m.pt", state)
    with pytest.raises(InputError):
        load(path, Architecture("os:system", {}, trusted=False))


def of_torchvision(monkeypatch) -> None:
    """As much of it as is asked for: a classifier, and a detector that fetches its backbone."""

    def list_models(module: object = None) -> list[str]:
        return ["net"] if module is models else ["net", "detector"]

    def get_model(name: str, weights: object, **arguments: int) -> nn.Module:
        assert (name, weights) == ("net", None)
        return DigitsNet(**arguments)

    models = types.ModuleType("torchvision.models")
    models.list_models, models.get_model = list_models, get_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("torchvision:detector", {}, "torchvision has no 'detector'"),
        ("torchvision:net", {"weights_backbone": True}, "would fetch weights"),
        ("torchvision:net", {"pretrained": 1}, "would fetch weights"),
    ],
)
def test_no_name_and_no_argument_fetches_weights(
    tmp_path, state, monkeypatch, name, arguments, says
):
    of_torchvision(monkeypatch)
    path = saved(tmp_path / "model.pt", state)
    assert load(path, Architecture("torchvision:net", {"width": 4}, trusted=False))
    with pytest.raises(InputError, match=says):
        load(path, Architecture(name, arguments, trusted=False))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("arch.py", "not package.module:factory"),
        ("nowhere.py:make", "no such file"),
        ("{folder}/broken.py:make", "ZeroDivisionError"),
        ("{folder}/empty.py:make", "no function 'make'"),
        ("no_such_package:make", "cannot import"),
    ],
)
def test_an_arch_option_that_leads_nowhere_is_a_usage_error(tmp_path, state, name, complaint):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "empty.py").write_text("make = 3")
    path = saved(tmp_path / "m.pt", state)
    with pytest.raises(UsageError) as error:
        load(path, Architecture(name.format(folder=tmp_path), {}, trusted=True))
    assert complaint in str(error.value)


def test_a_factory_must_give_a_module(tmp_path, state):
    path = saved(tmp_path / "m.pt", state)
    with pytest.raises(InputError, match="gives a dict"):
        load(path, Architecture("builtins:dict", {}, trusted=True))


def test_a_state_dict_needs_an_architecture(tmp_path, state):
    with pytest.raises(InputError, match="needs an architecture") as error:
        load(saved(tmp_path / "m.pt", state))
    assert "--arch" in (error.value.hint or "")


class Evil:
    """Unpickling runs a command that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize(
    "where", ["whole file", "inside a state dict", "old format", "bare pickle"]
)
def test_a_pickle_bomb_is_refused_and_not_run(tmp_path, state, where):
    trace, path = tmp_path / "trace", tmp_path / "model.pt"
    evil = Evil(trace)
    if where == "bare pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        content = {**state, "extra": evil} if where == "inside a state dict" else evil
        saved(path, content, _use_new_zipfile_serialization=where != "old format")
    with pytest.raises(InputError) as error:
        load(path, DIGITS)
    assert not trace.exists()
    assert "\n" not in str(error.value)


def test_a_whole_pickled_module_needs_a_flag_that_names_the_danger(tmp_path):
    path = saved(tmp_path / "m.pt", DigitsNet(width=4))
    with pytest.raises(InputError, match="pickled Python objects") as error:
        load(path)
    assert "DigitsNet" in str(error.value)
    assert "state_dict" in (error.value.hint or "")
    assert "--run-code-from-model" in (error.value.hint or "")
    assert isinstance(load(path, run_code_from_model=True).content, DigitsNet)


def test_torchscript_is_loaded_by_its_content(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(DigitsNet(width=4)), path)
    with pytest.raises(InputError, match="is TorchScript; loading one runs code from the file"):
        load(path)
    loaded = load(path, run_code_from_model=True)
    assert loaded.kind == "script"
    assert not loaded.content.training


class WritesFiles(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "stolen.pt")
        return x


class ReadsFiles(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file("/etc/passwd", size=1)


class WritesWhenLoaded(nn.Module):
    """`__setstate__` of TorchScript runs in `torch.jit.load`."""

    @torch.jit.export
    def __getstate__(self) -> tuple[int, bool]:
        return 1, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]) -> None:
        self.training = state[1]
        torch.save(torch.zeros(1), "stolen.pt")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("module", [WritesFiles, ReadsFiles, WritesWhenLoaded])
def test_torchscript_is_code_and_not_run(tmp_path, module, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(module()), path)
    with pytest.raises(InputError, match="loading one runs code from the file"):
        load(path)
    assert not (tmp_path / "stolen.pt").exists()


def test_an_exported_program_needs_a_flag_that_names_the_danger(tmp_path):
    path = tmp_path / "model.pt2"
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        DigitsNet(width=4).eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=(batch,)
    )
    torch.export.save(program, path)
    assert sniff(path).content == "program"
    with pytest.raises(InputError, match="runs code from the file") as error:
        load(path)
    assert "--run-code-from-model" in (error.value.hint or "")
    loaded = load(path, run_code_from_model=True)
    x = torch.zeros(3, 1, 8, 8)
    assert loaded.content.module()(x).shape == (3, 10)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["zip", "old format", "safetensors"])
def test_truncated_checkpoints_are_called_that(tmp_path, state, kind, share):
    path = tmp_path / "m.pt"
    if kind == "safetensors":
        save_file(state, path)
    else:
        saved(path, state, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError) as error:
        load(path, DIGITS)
    assert "\n" not in str(error.value)


def test_a_tensor_cannot_claim_more_than_its_storage(tmp_path):
    path = saved(tmp_path / "m.pt", {"weight": torch.zeros(1).expand(2**40)})
    with pytest.raises(InputError, match=f"claims {2**42} bytes but its storage has 4"):
        load(path, DIGITS)


@pytest.mark.filterwarnings("ignore")  # torch advises against some of these itself
@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (lambda w: w.to("meta"), "has a shape and no values"),
        (lambda w: w.to_sparse(), "is sparse"),
        (lambda w: w.flatten(1).to_sparse_csr(), "is sparse"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "is quantized"),
        (lambda w: torch.complex(w, w), "is of complex numbers"),
    ],
    ids=["meta", "coordinates", "compressed rows", "quantized", "complex"],
)
@pytest.mark.parametrize("run_code", [False, True])
def test_a_tensor_that_would_lose_something_is_named(tmp_path, state, odd, says, run_code):
    key = "features.0.weight"
    path = saved(tmp_path / "model.pt", state | {key: odd(state[key])})
    with pytest.raises(InputError, match=f"tensor '{key}' {says}|holds pickled"):
        load(path, DIGITS, run_code_from_model=run_code)


def test_an_odd_tensor_in_a_whole_module_is_named_too(tmp_path):
    path = saved(tmp_path / "model.pt", nn.Linear(3, 3, device="meta"))
    with pytest.raises(InputError, match="tensor 'weight' has a shape and no values"):
        load(path, run_code_from_model=True)


def test_a_storage_cannot_claim_more_than_its_record(tmp_path):
    path = saved(tmp_path / "m.pt", {"weight": torch.zeros(16)})
    huge = tmp_path / "huge.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(huge, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = data.replace(b"K\x10", b"J" + (2**30).to_bytes(4, "little"))
            new.writestr(entry.filename, data)
    with pytest.raises(InputError, match="does not match expected size"):
        load(huge, DIGITS)


def test_a_zip_bomb_is_refused_unopened(tmp_path):
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(InputError, match="claim to unpack to 10000000"):
        load(path, DIGITS)


def test_a_safetensors_header_cannot_claim_more_than_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    header = b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    with pytest.raises(InputError, match="damaged or truncated"):
        load(path, DIGITS)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1, 2, 3], "holds a list, not a state dict"),
        ({}, "not a state dict"),
        ({"weight": 3}, "entry 'weight' is a int"),
        ({"weight": torch.zeros(2)}, "does not fit architecture"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, complaint):
    with pytest.raises(InputError) as error:
        load(saved(tmp_path / "m.pt", content), DIGITS)
    assert complaint in str(error.value)


def test_a_zip_that_torch_did_not_write_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    path.write_bytes((tmp_path / "x.npz").read_bytes())
    with pytest.raises(InputError, match="not one that torch wrote"):
        load(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_bytes_never_end_in_a_traceback(tmp_path_factory, data):
    """Damage anywhere either goes unnoticed or is an error of ours."""
    path = tmp_path_factory.mktemp("fuzz") / "model.pt"
    zipped = data.draw(st.sampled_from([True, False, None]))
    state = DigitsNet(width=4).state_dict()
    if zipped is None:
        save_file(state, path)
    else:
        saved(path, state, _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with contextlib.suppress(InputError):
        load(path, DIGITS)


@pytest.mark.parametrize("content", [b"\x80", b"P", b"\x08"])
def test_a_file_of_one_byte_is_no_model(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(InputError):
        load(tmp_path / "model.pt", DIGITS)


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "gone.pt", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            load(path)


def test_the_origin_says_what_was_loaded(tmp_path, state):
    path = saved(tmp_path / "m.pt", state)
    origin = load(path, DIGITS).origin
    assert origin.path == str(path)
    assert len(origin.sha256) == 64
    buffer = io.BytesIO(path.read_bytes() + b" ")
    path.write_bytes(buffer.getvalue())
    assert load(path, DIGITS).origin.sha256 != origin.sha256
