"""Safetensors in several files, and folders as Hugging Face's libraries write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qdeploy.api import verbs
from qdeploy.cli import main
from qdeploy.errors import InputError
from qdeploy.formats.opening import load, model_digest, sniff
from qdeploy.formats.safetensors_index import model_in
from qdeploy.formats.static import findings_in
from qdeploy.runtime.sessions import open_session
from qdeploy.values import Architecture

CODE = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
"""
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as `save_pretrained` makes one, and the code of the model beside it."""
    (tmp_path / "code.py").write_text(CODE)
    here = tmp_path / "vit"
    here.mkdir()
    state = module().state_dict()
    parts = {FIRST: ["0.weight", "0.bias"], SECOND: ["3.weight", "3.bias"]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, here / name)
    write_index(here, {key: name for name, keys in parts.items() for key in keys})
    (here / "config.json").write_text("{}")
    (here / "model.safetensors.index.toml").write_text(
        "[input]\nshape = [3, 8, 8]\nrange = [0, 1]\n"
    )
    return here


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()


def write_index(folder: Path, held: dict[str, str]) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": held})
    (folder / INDEX).write_text(text)


def architecture(folder: Path) -> Architecture:
    return Architecture(f"{folder.parent / 'code.py'}:make", {}, trusted=True)


def test_a_folder_is_exported_as_the_model_that_its_parts_are(folder, tmp_path):
    made = verbs.export(folder, tmp_path / "out.onnx", arch=architecture(folder).name)
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        want = module()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(open_session(made.onnx).logits(x), want, atol=1e-4)


def test_a_first_card_is_written_beside_the_index(folder):
    (folder / "model.safetensors.index.toml").unlink()
    begun = verbs.init(folder, input_shape=(3, 8, 8))
    assert begun.path == folder / "model.safetensors.index.toml"


def test_the_digest_is_of_all_parts(folder):
    index = folder / INDEX
    assert sniff(index).name == "safetensors in parts"
    before = model_digest(index)
    assert load(index, architecture(folder)).origin.sha256 == before
    state = module().state_dict()
    save_file({"3.weight": state["3.weight"], "3.bias": state["3.bias"] + 1}, folder / SECOND)
    assert model_digest(index) != before


def test_nothing_stands_against_it(folder):
    assert list(findings_in(folder / INDEX)) == []


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_a_folder_of_models_is_scanned_file_by_file(folder, tmp_path, capsys):
    save_file(module().state_dict(), tmp_path / "whole.safetensors")
    (tmp_path / "notes.txt").write_text("no model")
    assert exit_code("scan", tmp_path, "--report", tmp_path / "scan.json") == 0
    files = json.loads((tmp_path / "scan.json").read_text("utf-8"))["files"]
    assert [Path(file["path"]).name for file in files] == ["whole.safetensors", INDEX]
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    assert exit_code("scan", tmp_path / "empty") == 2
    assert "empty" in capsys.readouterr().err


def lose_a_part(folder: Path) -> None:
    (folder / SECOND).unlink()


def reach_outside(folder: Path) -> None:
    write_index(folder, {"0.weight": "../code.py"})


def link_outside(folder: Path) -> None:
    (folder / SECOND).rename(folder.parent / "elsewhere")
    (folder / SECOND).symlink_to(folder.parent / "elsewhere")


def swap_the_parts(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def cut_a_part(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-4])


def name_nothing(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": [3]}')


def end_early(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map"')


@pytest.mark.parametrize(
    "damage",
    [lose_a_part, reach_outside, link_outside, swap_the_parts, cut_a_part, name_nothing, end_early],
)
def test_parts_that_are_not_what_the_index_says_are_refused(damage: Callable[[Path], None], folder):
    damage(folder)
    with pytest.raises(InputError):
        load(folder / INDEX, architecture(folder))
    try:
        found = list(findings_in(folder / INDEX))
    except InputError:
        return
    assert {finding.level for finding in found} == {"error"}


def test_links_lead_to_the_blobs_of_a_cache(folder):
    snapshot, blobs = folder.parent / "hub/snapshots/1", folder.parent / "hub/blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    loaded = load(model_in(snapshot), architecture(folder))
    assert loaded.content.state_dict().keys() == module().state_dict().keys()


def test_a_folder_with_no_or_several_models_is_asked_about(tmp_path):
    with pytest.raises(InputError, match="folder with 0 models"):
        model_in(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="folder with 2 models") as error:
        model_in(tmp_path)
    assert "name the file" in (error.value.hint or "")
    (tmp_path / "model.safetensors").touch()
    assert model_in(tmp_path).name == "model.safetensors"
