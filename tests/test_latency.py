"""Layers that integers make slower are left in float."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import pytest

from qdeploy.data import Images, images_from_array
from qdeploy.errors import PlanError
from qdeploy.exporting.exporter import export
from qdeploy.formats.opening import load
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.latency import Faster, fastest
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask
from qdeploy.runtime.measure import milliseconds_by_turn
from qdeploy.settings.device import RuntimeSpec, load_device
from qdeploy.settings.recipe import Override, Recipe, load_recipe
from qdeploy.values import FloatModel, Stated
from tests.gate_lab import Lab, copied, run
from tests.nets import residual_net

DEVICE = load_device("x86-avx2")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> FloatModel:
    path = tmp_path_factory.mktemp("latency") / "net.onnx"
    path.write_bytes(residual_net())
    return export(load(path), stated=Stated())


@pytest.fixture
def images(model, preprocessing, rng) -> Images:
    pixels = rng.integers(0, 256, (4, *model.input_shape), dtype=np.uint8)
    return images_from_array("noise", pixels, preprocessing)


def recipe(**changes: object) -> Recipe:
    return load_recipe("int8").model_copy(update=changes)


def integers_in(file: bytes) -> set[str]:
    """Weights that the file holds as integers."""
    graph = onnx.load_from_string(file).graph
    return {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}


class Pretended:
    """Times by what a file holds: each layer has a time in integers and one in float."""

    def __init__(self, cost: Mapping[str, tuple[float, float]], turns: int = 5) -> None:
        self.cost, self.turns, self.asked = cost, turns, 0

    def __call__(self, files: Mapping[str, bytes]) -> Mapping[str, Sequence[float]]:
        self.asked += 1
        return {name: [self._of(file)] * self.turns for name, file in files.items()}

    def _of(self, file: bytes) -> float:
        held = integers_in(file)
        return sum(
            integer if any(layer in name for name in held) else floating
            for layer, (integer, floating) in self.cost.items()
        )


def found_by(
    cost: Mapping[str, tuple[float, float]], model: FloatModel, images: Images, wanted: Recipe
) -> Faster:
    from qdeploy.progress import SILENT

    plan = plan_layers(model, wanted, DEVICE)
    grids = calibrate(model, plan, images, wanted.activations)
    task = RoundingTask(model, plan, grids, images, 0)
    return fastest(task, wanted, DEVICE, SILENT, Pretended(cost))


def layers_of(model: FloatModel) -> list[str]:
    return [layer.site.weight for layer in plan_layers(model, recipe(), DEVICE).layers]


def test_what_is_slower_in_integers_is_left_in_float(model, images):
    weights = layers_of(model)
    slow = weights[1]
    cost = {weight: ((3.0, 1.0) if weight == slow else (1.0, 2.0)) for weight in weights}
    found = found_by(cost, model, images, recipe())
    plan = plan_layers(model, found.recipe, DEVICE)
    assert slow not in [layer.site.weight for layer in plan.layers]
    assert len(plan.layers) == len(weights) - 1
    (left,) = plan.left_float
    assert left.chosen
    assert found.in_float[left.name]
    assert sum(found.in_float.values()) == 1
    took = found.milliseconds
    assert took["integers"] - took["chosen"] == 2.0
    assert "1 of" in found.summary
    assert "nothing in integers" not in found.summary
    rows = list(csv.reader(io.StringIO(found.as_csv().decode())))
    assert [left.name, "float"] in rows


def test_where_integers_pay_everywhere_nothing_is_left(model, images):
    cost = dict.fromkeys(layers_of(model), (1.0, 2.0))
    found = found_by(cost, model, images, recipe())
    assert not any(found.in_float.values())
    assert found.recipe == recipe()


def test_where_integers_pay_nowhere_one_part_stays_and_it_is_said(model, images):
    cost = dict.fromkeys(layers_of(model), (2.0, 1.0))
    found = found_by(cost, model, images, recipe())
    plan = plan_layers(model, found.recipe, DEVICE)
    assert plan.layers
    assert len(plan.layers) < len(found.in_float)
    assert "nothing in integers is as fast here as float32" in found.summary


def test_what_saves_next_to_nothing_is_not_done(model, images):
    cost = dict.fromkeys(layers_of(model), (1.0, 0.99))
    assert not any(found_by(cost, model, images, recipe()).in_float.values())


def test_the_recipe_itself_has_the_last_word(model, images):
    weights, plan = layers_of(model), plan_layers(model, recipe(), DEVICE)
    first = plan.layers[0].site.name
    wanted = recipe(overrides=(Override(layers=first, bits=8),))
    found = found_by(dict.fromkeys(weights, (2.0, 1.0)), model, images, wanted)
    kept = plan_layers(model, found.recipe, DEVICE).layers
    assert first in [layer.site.name for layer in kept]


def test_the_report_names_what_is_in_float_and_not_what_was_to_be(model, images):
    """The recipe pins all layers: nothing is left in float, whatever is faster."""
    weights = layers_of(model)
    pinned = recipe(overrides=(Override(layers="*", bits=8),))
    found = found_by(dict.fromkeys(weights, (2.0, 1.0)), model, images, pinned)
    assert not any(found.in_float.values())
    assert "0 of" in found.summary


def test_float_layers_keep_their_weights_and_what_lies_between_stays_float(model):
    plan = plan_layers(model, recipe(), DEVICE)
    names = [layer.site.name for layer in plan.layers]
    some = plan_layers(model, recipe(overrides=(Override(layers=names[0], bits="float"),)), DEVICE)
    assert len(some.activations) < len(plan.activations)
    assert [layer.name for layer in some.left_float] == names[:1]
    most = tuple(Override(layers=name, bits="float") for name in names[:-1])
    last = plan_layers(model, recipe(overrides=most), DEVICE)
    read = {use.input for use in last.layers[0].site.uses}
    assert set(last.activations.values()) <= read


def test_a_recipe_that_leaves_everything_in_float_is_refused(model):
    with pytest.raises(PlanError, match="all layers are left in float"):
        plan_layers(model, recipe(overrides=(Override(layers="*", bits="float"),)), DEVICE)


def test_files_are_timed_in_turns(model):
    runtime = RuntimeSpec(provider="cpu")
    files = {"a": model.onnx, "b": model.onnx}
    times = milliseconds_by_turn(files, model.input_shape, runtime=runtime, turns=2)
    assert {name: len(turns) for name, turns in times.items()} == {"a": 2, "b": 2}
    assert all(t > 0 for turns in times.values() for t in turns)


@pytest.fixture
def lab(lab_files, tmp_path) -> Iterator[Lab]:
    with copied(lab_files, tmp_path / "lab") as found:
        yield found


def test_the_command_says_what_it_left_in_float_and_the_gate_takes_the_file(lab, monkeypatch):
    from qdeploy.quantization import latency

    first = plan_layers(export(load(lab / "fp32.onnx"), stated=Stated()), recipe(), DEVICE)
    slow = first.layers[1].site.weight
    cost = {
        layer.site.weight: ((3.0, 1.0) if layer.site.weight == slow else (1.0, 2.0))
        for layer in first.layers
    }
    monkeypatch.setattr(latency, "_on", lambda device, shape: Pretended(cost))
    code = run("sanitize", "fp32.onnx", "--bits", 8, "--optimize", "latency", "--policy", "demo",
               "--seed", 1, "--out", "fast.onnx", "--report", "fast.json")  # fmt: skip
    report = json.loads((lab / "fast.json").read_text())
    assert code == 0
    assert any("of" in note and "run in float" in note for note in report["notes"])
    assert [layer["chosen"] for layer in report["left_float"]] == [True]
    (table,) = (lab.folder / "artifacts").glob("*/latency.csv")
    assert "float" in table.read_text()
    assert not any(slow in name for name in integers_in((lab / "fast.onnx").read_bytes()))
    gate = ("gate", "fast.onnx", "--reference", "fp32.onnx", "--policy", "demo")
    assert run(*gate, "--report", "gate.json") == 0
