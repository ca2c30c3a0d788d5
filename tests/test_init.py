"""The first card of a model: what the file says, and guesses that are marked."""

from __future__ import annotations

from pathlib import Path

import pytest

import qdeploy
from qdeploy.errors import InputError, UsageError
from qdeploy.settings.card import load_card
from tests import test_ends as ends
from tests.nets import residual_net

KINDS = {
    "plain": (residual_net, (3, 8, 8), {"mean", "std"}),
    "channels last": (ends.channels_last, (3, 8, 8), {"range"}),
    "open size": (ends.open_size, (3, 224, 224), {"shape", "mean", "std", "resize"}),
    "flat": (ends.flat, (3, 224, 224), {"shape", "mean", "std", "resize"}),
    "bytes": (ends.takes_bytes, (3, 8, 8), set()),
    "several outputs": (ends.several_outputs, (3, 8, 8), {"output", "mean", "std"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_says_what_the_file_says_and_marks_the_rest(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, shape, guessed = KINDS[kind]
    Path("model.onnx").write_bytes(make())
    begun = qdeploy.init("model.onnx")
    card = load_card(begun.path)
    assert card.input.shape == shape
    assert {line.split(" = ")[0] for line in begun.guesses} == guessed
    assert (card.input.layout == "channels-last") == (kind == "channels last")
    assert (card.input.pixel_range == (0, 255)) == (kind == "bytes")
    if not guessed & {"shape", "output"}:
        assert qdeploy.export("model.onnx", "float.onnx").input_shape == shape


def test_a_shape_that_is_given_is_no_guess(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(ends.flat())
    begun = qdeploy.init("model.onnx", "other.toml", input_shape=(3, 8, 8))
    assert load_card(Path("other.toml")).input.shape == (3, 8, 8)
    assert not any(line.startswith("shape") for line in begun.guesses)


def test_a_card_that_is_there_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(residual_net())
    Path("model.toml").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        qdeploy.init("model.onnx")
    assert Path("model.toml").read_text() == "mine"


def test_a_file_that_is_no_model_gets_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(b"something else")
    with pytest.raises(InputError):
        qdeploy.init("model.onnx")
    assert not Path("model.toml").exists()
