from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.graph.io import initializers
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.emit import emit
from qdeploy.quantization.inner_tensors import open_tap
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding import one_pass
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers, round_to_nearest
from qdeploy.runs.rundir import StoredLayers
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.device import load_device
from qdeploy.settings.methods import (
    METHODS,
    EfrapAdam,
    EfrapDescent,
    FromMoments,
    Nearest,
    Rounding,
    Stochastic,
    Trained,
    method,
)
from qdeploy.settings.recipe import ActivationSpec, load_recipe
from qdeploy.values import RoundedLayer
from tests.nets import Net, float_model

ADAM = EfrapAdam(solver="adam", steps=60, learning_rate=1e-2)


def quick(spec: Rounding) -> Rounding:
    """The same method with fewer steps."""
    changes = {"steps": 40, "learning_rate": 1e-2}
    return spec.model_copy(update=changes) if isinstance(spec, Trained) else spec


@pytest.fixture
def task(net, images) -> RoundingTask:
    return make_task(net, images)


def make_task(model, images, rounding: Rounding = EfrapDescent(), seed: int = 0) -> RoundingTask:  # noqa: B008
    recipe = load_recipe("int4").model_copy(update={"rounding": rounding})
    plan = plan_layers(model, recipe, load_device("x86-vnni"))
    return RoundingTask(
        model, plan, calibrate(model, plan, images, recipe.activations), images, seed
    )


def codes(layers: tuple[RoundedLayer, ...]) -> list[np.ndarray]:
    return [layer.codes for layer in layers]


def same(a: tuple[RoundedLayer, ...], b: tuple[RoundedLayer, ...]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(codes(a), codes(b), strict=True))


EVERY = {name: quick(method(name)) for name in METHODS}
ON_PREFIX = {
    f"{name} on the prefix": spec.model_copy(update={"inputs": "quantized"})
    for name, spec in EVERY.items()
    if isinstance(spec, FromMoments) and name != "brecq-descent"
}


@pytest.mark.parametrize("spec", [*EVERY.values(), *ON_PREFIX.values()], ids=[*EVERY, *ON_PREFIX])
def test_every_method_rounds_every_layer_the_same_way_each_time(net, images, spec):
    task = make_task(net, images, spec)
    layers = round_layers(task, spec)
    assert [layer.name for layer in layers] == [p.site.name for p in task.plan.layers]
    assert all(layer.degraded is None for layer in layers)
    assert all(
        layer.rounding_used == p.rounding for layer, p in zip(layers, task.plan.layers, strict=True)
    )
    assert same(layers, round_layers(task, spec))
    flipped = [layer.flipped for layer in layers]
    assert not any(flipped) if isinstance(spec, Nearest) else sum(map(bool, flipped)) > 3


@pytest.mark.parametrize("spec", [Stochastic(), EfrapDescent(start="stochastic")])
def test_another_seed_gives_another_choice(net, images, spec):
    first, second = (round_layers(make_task(net, images, spec, seed), spec) for seed in (0, 1))
    assert not same(first, second)


def test_the_reported_error_is_that_of_the_layer(net, images, task):
    """At every position: the output of the layer with rounded weights and corrected bias."""
    layers = round_layers(task, EfrapDescent(start="nearest", flip_weight=0.0, damping=0.0))
    for plan, layer in zip(task.plan.layers, layers, strict=True):
        (use,) = plan.site.uses
        tap = open_tap(net.onnx, net.input_name, [use.output])
        x = images.preprocessing.normalise(next(images.batches(len(images))).pixels)
        want = tap(x)[use.output]
        got = open_tap(with_codes(task, plan, layer), net.input_name, [use.output])(x)[use.output]
        axes = (0, *range(2, want.ndim))
        variance = want.var(axis=axes).sum()
        assert layer.output_error == pytest.approx(
            float(np.square(want - got).mean(axis=axes).sum() / variance), rel=0.02, abs=1e-5
        )
        assert layer.output_error <= layer.nearest_error
    assert sum(x.output_error for x in layers) < 0.7 * sum(x.nearest_error for x in layers)


def with_codes(task: RoundingTask, plan, layer: RoundedLayer) -> bytes:
    """The float model in which one layer has its rounded weights."""
    from qdeploy.graph.assemble import assemble
    from qdeploy.graph.io import serialize
    from qdeploy.values import Grids

    grids = Grids(task.grids.weights, {})
    return serialize(assemble(task.model, task.plan, grids, {layer.name: layer}))


def test_descent_comes_closer_to_the_float_model_than_nearest(net, images, task):
    x = images.preprocessing.normalise(next(images.batches(96)).pixels)
    want = open_session(net.onnx).logits(x)
    errors = []
    for layers in (round_to_nearest(task), round_layers(task, EfrapDescent())):
        got = open_session(emit(net, task.plan, task.grids, layers).onnx).logits(x)
        errors.append(np.square(got - want).mean())
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("positions", [1000, 4])
def test_solving_in_small_chunks_changes_nothing(monkeypatch, task, positions):
    whole = round_layers(task, EfrapDescent(positions=positions))
    monkeypatch.setattr(one_pass, "MOMENT_BYTES", 1)  # one layer, and one pass, at a time
    assert same(whole, round_layers(task, EfrapDescent(positions=positions)))


@pytest.mark.parametrize(
    "spec", [EfrapDescent(), EfrapDescent(positions=4), EfrapDescent(inputs="quantized"), ADAM]
)
def test_an_interrupted_run_goes_on_with_the_layers_it_has(net, images, tmp_path, spec):
    task, store = make_task(net, images, spec), StoredLayers(tmp_path / "layers")

    class Interrupted(StoredLayers):
        def save(self, layer, arrays):
            super().save(layer, arrays)
            if layer == "grouped":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        round_layers(task, spec, store=Interrupted(store.folder))
    kept = {path: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    assert len(kept) == 4
    resumed = round_layers(task, spec, store=store)
    assert same(resumed, round_layers(task, spec))
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    complete = round_layers(task, spec, store=store)
    for a, b in zip(resumed, complete, strict=True):
        assert a.bias_corrections == () or np.array_equal(a.bias_corrections, b.bias_corrections)
        assert (a.flipped, a.rounding_used, a.degraded) == (b.flipped, b.rounding_used, b.degraded)


def test_a_stored_layer_that_is_damaged_is_solved_again(tmp_path, task):
    store = StoredLayers(tmp_path / "layers")
    want = round_layers(task, EfrapDescent(), store=store)
    for path in store.folder.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert same(want, round_layers(task, EfrapDescent(), store=store))


def test_a_method_that_fails_leaves_a_mark_and_not_a_guess(net, images):
    """The learning rate makes Adam's loss infinite: the layer is nearest, and says so."""
    spec = EfrapAdam(solver="adam", steps=5, learning_rate=1e-3, flip_weight=1e38)
    layers = round_layers(make_task(net, images, spec), spec)
    broken = [layer for layer in layers if layer.degraded]
    assert broken
    for layer in broken:
        assert layer.rounding_used == "nearest"
        assert layer.flipped == 0
        assert "efrap-adam: loss is" in (layer.degraded or "")


def test_adam_does_not_guess_at_a_weight_of_several_nodes(images):
    net = Net()
    weight = net.weight(3, 3, 1, 1, name="shared.weight")
    x = net.relu(net.node("Conv", net.x, weight, net.weight(3)))
    x = net.relu(net.node("Conv", x, weight))
    task = make_task(float_model(net.model(net.head(x, 3))), images, ADAM)
    shared, head = round_layers(task, ADAM)
    assert "several nodes" in (shared.degraded or "")
    assert head.degraded is None


def test_token_models_are_rounded_too(images):
    """A product over tokens has no bias to correct."""
    net = Net()
    x = net.conv(net.x, 6, 3, 3, 3, pads=[1, 1, 1, 1], name="stem")
    x = net.node(
        "Transpose", net.node("Reshape", x, net.constant(np.array([0, 6, 64]))), perm=[0, 2, 1]
    )
    x = net.relu(net.node("MatMul", x, net.weight(6, 5, name="tokens.weight")))
    x = net.node("ReduceMean", x, net.constant(np.array([1])), keepdims=0)
    model = float_model(net.model(net.node("MatMul", x, net.weight(5, 10, name="head.weight"))))
    for spec in (EfrapDescent(), EfrapDescent(inputs="quantized"), ADAM):
        layers = {layer.name: layer for layer in round_layers(make_task(model, images, spec), spec)}
        assert layers["tokens"].degraded is None
        assert layers["tokens"].bias_corrections == ()


def test_methods_that_need_images_say_so(task):
    with pytest.raises(ValueError, match="needs calibration images"):
        round_layers(replace(task, images=None), EfrapDescent())


def test_bias_corrections_can_be_switched_off(task):
    layers = round_layers(task, EfrapDescent(bias_correction=False))
    assert all(layer.bias_corrections == () for layer in layers)


def test_codes_are_hashed_for_the_record(task):
    layers = round_layers(task, EfrapDescent())
    assert len({layer.sha256 for layer in layers}) == len(layers)
    assert layers[0].sha256 == replace(layers[0], seconds=9.0).sha256


def test_nearest_codes_are_the_rounded_weights(net, task):
    constants = initializers(net.onnx)
    for plan, layer in zip(task.plan.layers, round_to_nearest(task), strict=True):
        weight = constants[plan.site.weight]
        scale = task.grids.weights[layer.name].scale
        shape = [-1 if i == plan.site.axis else 1 for i in range(weight.ndim)]
        np.testing.assert_array_equal(layer.codes, np.rint(weight / scale.reshape(shape)))


def test_weights_only_models_are_rounded_on_float_inputs(net, images):
    recipe = load_recipe("int4").model_copy(update={"activations": ActivationSpec(bits="none")})
    plan = plan_layers(net, recipe, load_device("x86-vnni"))
    grids = calibrate(net, plan, images, recipe.activations)
    spec = EfrapDescent(inputs="quantized", flip_weight=0.0)
    layers = round_layers(RoundingTask(net, plan, grids, images, 0), spec)
    assert all(layer.output_error <= layer.nearest_error * 1.001 for layer in layers)
