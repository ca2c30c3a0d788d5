from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qdeploy.formats.onnx.nodes import operators
from qdeploy.graph.parts import next_part
from qdeploy.quantization import prefix_runner as walk_module
from qdeploy.quantization.inner_tensors import open_tap
from qdeploy.quantization.prefix_runner import Walk, empty
from qdeploy.quantization.rounding.layers import round_layers
from qdeploy.settings.methods import EfrapDescent, Nearest
from tests.test_rounding_stage import make_task

STOPS = ("Relu_1:out", "Relu_2:out", "Relu_4:out")


def inputs(net, images) -> np.ndarray:
    return images.preprocessing.normalise(next(images.batches(len(images))).pixels)


def test_a_walk_sees_what_a_run_from_the_start_sees(net, images):
    walk = Walk.start(net.input_name, images)
    x = inputs(net, images)
    for name in (*STOPS, net.output_name):
        walk.advance(net.onnx, [name])
        want = open_tap(net.onnx, net.input_name, [name])(x)[name]
        np.testing.assert_allclose(walk.values[name], want, rtol=1e-4, atol=1e-5)


def test_every_node_runs_once(net, images):
    whole, parts = Counter(operators(net.onnx)), Counter[str]()
    known, done = {net.input_name}, {net.input_name}
    for name in (*STOPS, net.output_name):
        part = next_part(net.onnx, known, done, [name])
        assert part.model is not None
        parts.update(operators(part.model))
        known, done = set(part.live), done | part.names
    assert parts == whole


def test_what_nobody_reads_any_more_is_let_go(net, images):
    walk = Walk.start(net.input_name, images)
    walk.advance(net.onnx, [STOPS[0]])
    assert set(walk.values) == {STOPS[0]}
    walk.advance(net.onnx, [net.output_name])
    assert set(walk.values) == {net.output_name}


def test_to_be_where_one_is_costs_nothing(net, images):
    walk = Walk.start(net.input_name, images)
    walk.advance(net.onnx, [STOPS[0]])
    before = walk.values[STOPS[0]]
    walk.advance(net.onnx, [STOPS[0]])
    assert walk.values[STOPS[0]] is before


def test_large_tensors_lie_in_files(monkeypatch):
    monkeypatch.setattr(walk_module, "LARGEST_IN_MEMORY", 100)
    small, large = empty((5, 5)), empty((6, 5))
    assert not isinstance(small, np.memmap)
    assert isinstance(large, np.memmap)
    large[:] = 3
    assert large.sum() == 90


def test_rounding_on_the_prefix_is_the_same_with_tensors_in_files(net, images, monkeypatch):
    spec = EfrapDescent(inputs="quantized")
    want = round_layers(make_task(net, images, spec), spec)
    monkeypatch.setattr(walk_module, "LARGEST_IN_MEMORY", 1)
    got = round_layers(make_task(net, images, spec), spec)
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_changed_model_goes_on_from_what_was_walked(net, images, layers):
    """As the layer-by-layer methods do: the prefix is in integers, the rest is not yet."""
    from qdeploy.graph.assemble import assemble
    from qdeploy.graph.io import serialize

    task = make_task(net, images)
    rounded = {layer.name: layer for layer in round_layers(task, Nearest())[:layers]}
    data = serialize(assemble(net, task.plan, task.grids, rounded))
    passed = [task.plan.layers[i].site.uses[0] for i in range(layers)]
    ends = [f"{use.activation or use.output}.dequantized" for use in passed]
    walk = Walk.start(net.input_name, images)
    for end in ends:
        walk.advance(data, [end])
    want = open_tap(data, net.input_name, [ends[-1]])(inputs(net, images))[ends[-1]]
    step = task.grids.activations[ends[-1].removesuffix(".dequantized")].scale[0]
    assert np.abs(walk.values[ends[-1]] - want).max() <= 1.01 * step
