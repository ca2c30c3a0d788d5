"""--bits auto: which layers get 8 bits, and which inputs stay float."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

import qdeploy
from qdeploy.data import Images
from qdeploy.errors import UsageError
from qdeploy.progress import SILENT
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask
from qdeploy.quantization.search import Searched, search
from qdeploy.settings.device import load_device
from qdeploy.settings.methods import Nearest
from qdeploy.settings.recipe import Override, Recipe, SearchSpec, WeightGridSpec, load_recipe
from qdeploy.values import FloatModel

DEVICE = load_device("x86-vnni")


def searched(model: FloatModel, images: Images, **changes: object) -> Searched:
    recipe: Recipe = load_recipe("auto").model_copy(update=changes)
    plan = plan_layers(model, recipe, DEVICE)
    grids = calibrate(model, plan, images, recipe.activations)
    return search(RoundingTask(model, plan, grids, images, 0), recipe, DEVICE, SILENT)


def with_outliers(net: FloatModel) -> FloatModel:
    """Its second layer on a grid so wide that most of its weights share a few codes."""
    proto = onnx.load_from_string(net.onnx)
    weight = next(x for x in proto.graph.initializer if x.name == "block.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:, 0, 0, 0] *= 60
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "block.weight"))
    return replace(net, onnx=proto.SerializeToString())


def undecided(net: FloatModel, images: Images) -> FloatModel:
    """Its logits shifted so that the images have many answers."""
    (batch,) = images.batches(len(images))
    run = onnx.reference.ReferenceEvaluator(net.onnx).run
    (logits,) = run(None, {net.input_name: images.preprocessing.normalise(batch.pixels)})
    proto = onnx.load_from_string(net.onnx)
    bias = next(x for x in proto.graph.initializer if x.name == "fc.bias")
    values = onnx.numpy_helper.to_array(bias) - logits.mean(0)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, "fc.bias"))
    return replace(net, onnx=proto.SerializeToString())


def test_nothing_is_given_back_where_nothing_is_asked(net, images):
    found = searched(net, images, search=SearchSpec(min_agreement=0))
    assert (found.at_8, found.float_inputs, found.found.average_bits) == (set(), set(), 4)
    assert found.recipe.bits == 4
    assert found.recipe.overrides == ()


def test_layers_are_given_back_until_the_limit_is_kept(net, images):
    model, nearest = (
        undecided(with_outliers(net), images),
        {"rounding": Nearest(), "weights": WeightGridSpec()},
    )
    least = searched(model, images, search=SearchSpec(min_agreement=0), **nearest)
    found = searched(model, images, search=SearchSpec(min_agreement=100.0), **nearest)
    assert least.found.agreement < found.found.agreement
    assert "block" in found.at_8
    assert 4 < found.found.average_bits <= 8
    short = "nothing smaller than that kept it" in found.summary
    assert short is (found.found.agreement < 100)
    assert not short or found.at_8 == {x.layer for x in found.found.layers}


def test_the_choice_is_an_ordinary_recipe(net, images):
    found = searched(net, images, search=SearchSpec(min_agreement=99.0))
    layers = plan_layers(net, found.recipe, DEVICE).layers
    assert {x.site.name for x in layers if x.bits == 8} == found.at_8
    assert Recipe.model_validate(found.recipe.model_dump(mode="json")) == found.recipe


def test_what_the_recipe_says_itself_still_holds(net, images):
    own = (Override(layers="stem", bits=8), Override(layers="fc", bits=4))
    found = searched(net, images, overrides=own, search=SearchSpec(min_agreement=0))
    assert found.at_8 == {"stem"}
    found = searched(net, images, overrides=own, search=SearchSpec(min_agreement=100.0))
    bits = {x.site.name: x.bits for x in plan_layers(net, found.recipe, DEVICE).layers}
    assert (bits["stem"], bits["fc"]) == (8, 4)
    assert {name for name, width in bits.items() if width == 8} == found.at_8


def test_the_layer_that_bears_no_rounding_is_the_most_sensitive(net, images):
    before = {x.layer: x.four_bits for x in searched(net, images).found.layers}
    after = {x.layer: x.four_bits for x in searched(with_outliers(net), images).found.layers}
    assert after["block"] > 3 * before["block"]


def test_the_command_looks_for_bits_and_shows_what_each_layer_costs(tmp_path, net):
    model, out, runs = (tmp_path / name for name in ("model.onnx", "out.onnx", "runs"))
    model.write_bytes(net.onnx)
    (tmp_path / "model.toml").write_text("[input]\nshape = [3, 8, 8]\nrange = [0, 1]\n")
    np.savez(
        tmp_path / "x.npz",
        images=np.random.default_rng(1).integers(0, 256, (64, 8, 8, 3), np.uint8),
    )
    qdeploy.quantize(
        model, out, bits="auto", calibration=tmp_path / "x.npz", seed=0,
        keep_at_8=["st*"], keep_float=["fc"], artifacts=runs,
    )  # fmt: skip
    (run,) = [place for place in runs.iterdir() if place.is_dir()]
    rows = list(csv.DictReader(io.StringIO((run / "sensitivity.csv").read_text())))
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["bits"] == 4
    assert [row["input"] for row in rows if row["layer"] == "fc"] == ["float"]
    assert {row["layer"]: row["bits"] for row in rows if row["layer"] in {"stem", "fc"}} == {
        "stem": "8", "fc": "8"
    }  # fmt: skip
    assert all(np.isfinite(float(row["error of 4 bits"])) for row in rows)
    names = {value.name for value in onnx.load(out).graph.initializer}
    read = onnx.load(out).graph.node[-1].input[0]
    assert f"{read.removesuffix('.dequantized')}.scale" not in names


def test_bits_cannot_be_looked_for_without_images(tmp_path, net):
    model = tmp_path / "model.onnx"
    model.write_bytes(net.onnx)
    with pytest.raises(UsageError, match="calibration"):
        qdeploy.quantize(
            model, tmp_path / "out.onnx", bits="auto", input_shape=(3, 8, 8), rounding="nearest",
            activation_bits="none", artifacts=tmp_path / "runs",
        )  # fmt: skip
