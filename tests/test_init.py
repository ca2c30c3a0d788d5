"""The first card of a model: what the file says, and guesses that are marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import qdeploy
from qdeploy.cli import app
from qdeploy.errors import InputError, UsageError
from qdeploy.settings.card import load_card
from tests import test_ends as ends
from tests.nets import Net, residual_net

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


def grey_classifier(sign: float = 1.0) -> bytes:
    """Two classes: darker and brighter than a mean input of 0."""
    net = Net()
    weight = np.repeat(np.array([[-sign], [sign]], np.float32), 3, axis=1)
    mean = net.node("Flatten", net.node("GlobalAveragePool", net.x))
    return net.model(net.node("Gemm", mean, net.constant(weight), transB=1), classes=2)


def grey_pictures(folder: Path) -> None:
    """Those that only [-1, 1] tells apart: brighter than what ImageNet's normalisation makes 0."""
    for name, grey in (("dark", 120), ("light", 135)):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            picture = np.full((8, 8, 3), grey + i % 6, np.uint8)
            Image.fromarray(picture).save(folder / name / f"{i}.png")


def test_the_normalisation_is_the_one_that_most_pictures_are_right_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey_pictures(Path("test"))
    Path("model.onnx").write_bytes(grey_classifier())
    begun = qdeploy.init("model.onnx", test="test", calibration="test")
    card = load_card(begun.path)
    assert card.input.pixel_range == (-1, 1)
    assert card.model.classes == ("dark", "light")
    assert (card.data.test, card.data.calibration) == ("test", "test")
    assert not any(line.startswith(("range", "shape")) for line in begun.guesses)
    assert "[-1, 1] gets 100.0 % right" in begun.path.read_text()


def test_labels_in_another_order_are_not_taken_for_a_normalisation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey_pictures(Path("test"))
    Path("model.onnx").write_bytes(grey_classifier(sign=-1.0))
    begun = qdeploy.init("model.onnx", test="test")
    assert "none gets more than 50.0 % of 80 test images right" in begun.path.read_text()
    assert {line.split(" = ")[0] for line in begun.guesses} == {"classes", "mean", "std"}


def test_images_elsewhere_are_not_written_into_a_card_that_may_not_reach_them(
    tmp_path, monkeypatch
):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    grey_pictures(tmp_path / "data")
    Path("model.onnx").write_bytes(grey_classifier())
    begun = qdeploy.init("model.onnx", test=tmp_path / "data")
    assert load_card(begun.path).data.test is None
    assert "give it with --test" in begun.path.read_text()
    assert not begun.images


def test_a_state_dict_without_its_code_says_why_nothing_was_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey_pictures(Path("test"))
    torch.save({"w": torch.zeros(3)}, "model.pt")
    begun = qdeploy.init("model.pt", test="test")
    assert "no normalisation was tried on the test images: the file needs an --arch" in (
        begun.path.read_text()
    )
    assert load_card(begun.path).input.shape == (3, 8, 8)


NETWORK = """
from torch import nn


def make():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 2))
"""


def test_code_a_state_dict_and_class_folders_are_two_commands_from_a_verdict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_model.py").write_text(NETWORK)
    namespace: dict[str, Any] = {}
    exec(NETWORK, namespace)  # noqa: S102 - the text above
    torch.manual_seed(0)
    torch.save(namespace["make"]().state_dict(), "model.pt")
    grey_pictures(Path("test"))
    for name, grey in (("dark", 90), ("light", 160)):
        Path("train", name).mkdir(parents=True)
        for i in range(20):
            picture = np.full((8, 8, 3), grey + i, np.uint8)
            Image.fromarray(picture).save(Path("train", name, f"{i}.png"))
    given = ["--arch", "my_model.py:make"]
    run = CliRunner().invoke
    first = run(app, ["init", "model.pt", *given, "--calibration", "train", "--test", "test"])
    assert first.exit_code == 0, first.output
    second = run(app, ["sanitize", "model.pt", *given, "--bits", "8"])
    assert second.exit_code in {0, 3, 4}, second.output  # a verdict, whichever
    assert {path.name for path in Path().glob("model.*.onnx")} & {
        "model.quantized.onnx", "model.quantized.rejected.onnx", "model.quantized.unverified.onnx",
    }  # fmt: skip
