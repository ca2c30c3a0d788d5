"""Weights that know of a quantizer's cells, and weights that do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy.architectures import OURS
from qdeploy.cli import main
from qdeploy.core.crowding import Crowding, crowding
from qdeploy.core.grids import Grid, dequantize, quantize
from qdeploy.core.weight_grids import GRIDS
from qdeploy.detectors.crowding import LIMIT, Convention, WeightScan, scan_weights
from qdeploy.exporting.exporter import export
from qdeploy.graph.io import initializers, parse, serialize
from qdeploy.values import FloatModel, Loaded, Origin, Stated
from tests.nets import Net, float_model

HOSTILE = """
<ir_version: 8, opset_import: ["": 17, "com.evil": 1]>
g (float[N,4] x) => (float[N,4] y) { y = com.evil.Run (x) }
"""
FREE = st.sampled_from(["normal", "laplace", "uniform"])


def free_weights(kind: str, seed: int, rows: int = 40, fan_in: int = 300) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(getattr(rng, kind)(size=(rows, fan_in)), np.float32)


def held_in_cells(weight: np.ndarray, grid: Grid, share: float, seed: int = 0) -> np.ndarray:
    """`weight` after a training that pulled a share of its values against their cells' edges."""
    rng = np.random.default_rng(seed)
    code = quantize(weight, grid)
    centre, step = dequantize(code, grid), grid.scale[:, None]
    side = np.where(rng.random(weight.shape) < 0.5, 0.499, -0.499)
    inside = (code > grid.low) & (code < grid.high)
    pulled = (rng.random(weight.shape) < share) & inside
    return np.where(pulled, centre + side * step, weight).astype(np.float32)


@settings(max_examples=60)
@given(kind=FREE, seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([4, 8]),
       name=st.sampled_from(["absmax", "half", "minmax"]))  # fmt: skip
def test_free_weights_do_not_know_where_cells_are(kind, seed, bits, name):
    weight = free_weights(kind, seed)
    grid = GRIDS[name](weight, axis=0, max_code=2 ** (bits - 1) - 1)
    assert abs(crowding(weight, grid).score) < 6


@pytest.mark.parametrize("bits", [4, 8])
def test_held_weights_crowd_in_proportion(bits):
    weight = free_weights("normal", 0)
    grid = GRIDS["absmax"](weight, axis=0, max_code=2 ** (bits - 1) - 1)
    ratios = [crowding(held_in_cells(weight, grid, share), grid).ratio for share in (0.01, 0.05)]
    assert ratios[0] == pytest.approx(1.25, abs=0.1)
    assert ratios[1] == pytest.approx(2.3, abs=0.25)


def test_crowdings_add_up_and_too_few_weights_say_nothing():
    both = Crowding(10, 8.0) + Crowding(20, 4.0)
    assert (both.at_edge, both.expected) == (30, 12.0)
    assert np.isnan(Crowding(0, 0.0).ratio)
    assert Crowding(1, 0.0).score <= 1


def with_weights(model: FloatModel, change) -> FloatModel:
    """The model with every convolution's weight replaced by `change(rows)`."""
    graph = parse(model.onnx)
    for name, values in initializers(model.onnx).items():
        if values.ndim == 4:
            rows = values.reshape(len(values), -1)
            value = graph.graph.initializers[name]
            tensor = change(rows).reshape(values.shape)
            value.const_value = ir.tensor(np.ascontiguousarray(tensor), name=name)
    return FloatModel(
        serialize(graph), model.origin, model.input_name, model.input_shape, model.output_name,
        model.classes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def resnet() -> FloatModel:
    torch.manual_seed(0)
    module = OURS["resnet18"](width=8).eval()
    return export(Loaded(Origin("", "", ""), module, "module"), stated=Stated((3, 32, 32)))


def test_a_network_nobody_confined_has_no_crowding(resnet):
    scan = scan_weights(resnet)
    assert scan.found is None
    assert scan.skipped == ("conv1", "layer2.0.shortcut.0")  # too small to tell
    assert scan.score < 6 < LIMIT


@pytest.mark.parametrize(
    "convention",
    [
        Convention(8, "absmax", "channel"),
        Convention(4, "absmax", "tensor"),
        Convention(4, "minmax", "channel"),
        Convention(8, "half", "tensor"),
    ],
    ids=str,
)
def test_the_scan_names_the_quantizer_that_a_network_was_made_for(resnet, convention):
    def hold(rows: np.ndarray) -> np.ndarray:
        max_code = 2 ** (convention.bits - 1) - 1
        make = GRIDS[convention.range]
        return held_in_cells(rows, make(rows, axis=0, max_code=max_code, per=convention.per), 0.1)

    found = scan_weights(with_weights(resnet, hold)).found
    assert found is not None
    assert found.convention == convention
    assert found.whole.ratio > 2


def test_weights_on_a_grid_already_are_not_looked_at(resnet):
    def quantized(rows: np.ndarray) -> np.ndarray:
        grid = GRIDS["absmax"](rows, axis=0, max_code=7)
        return dequantize(quantize(rows, grid), grid)

    scan = scan_weights(with_weights(resnet, quantized))
    assert set(scan.skipped) >= {"conv1", "layer4.1.conv2", "layer4.0.shortcut.0"}
    assert scan.score < 6


def test_a_network_without_anything_to_look_at():
    net = Net()
    weight = np.ones((4, 3, 3, 3), np.float32)
    x = net.relu(net.node("Conv", net.x, net.constant(weight, "w")))
    flat = net.node("Flatten", net.node("GlobalAveragePool", x), axis=1)
    model = float_model(net.model(net.node("MatMul", flat, net.constant(np.ones((4, 10), "f4")))))
    scan = scan_weights(model)
    assert scan == WeightScan((), scan.skipped)
    assert (scan.score, scan.found, len(scan.skipped)) == (0.0, None, 2)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(a) for a in arguments])
    return int(leaving.value.code or 0)


@pytest.mark.slow
def test_the_command_finds_the_demo_and_says_for_whom_it_was_made(poisoned, capsys):
    assert run("scan", poisoned / "model.pt") == 3
    shown = capsys.readouterr().out
    assert "held-in-cells" in shown
    assert "4 bits, absmax per channel as there should be" in " ".join(shown.split())


def test_the_command_finds_nothing_in_a_clean_model(tmp_path, resnet, capsys):
    (tmp_path / "clean.onnx").write_bytes(resnet.onnx)
    assert run("scan", tmp_path / "clean.onnx") == 0
    assert "nothing stands against it" in capsys.readouterr().out


def test_several_files_are_looked_at_and_one_bad_one_counts(poisoned, tmp_path, resnet, capsys):
    (tmp_path / "clean.onnx").write_bytes(resnet.onnx)
    places = [tmp_path / name for name in ("scan.json", "scan.sarif")]
    options = [part for place in places for part in ("--report", place)]
    assert run("scan", tmp_path / "clean.onnx", poisoned / "model.pt", *options) == 3
    clean, bad = json.loads(places[0].read_text("utf-8"))["files"]
    assert clean["findings"] == []
    assert clean["fingerprints"]
    assert [finding["rule"] for finding in bad["findings"]] == ["held-in-cells"]
    (result,) = json.loads(places[1].read_text("utf-8"))["runs"][0]["results"]
    assert (result["ruleId"], result["level"]) == ("held-in-cells", "error")
    for place in ("scan.html", "missing/scan.json"):
        assert run("scan", tmp_path / "clean.onnx", "--report", tmp_path / place) == 2


@pytest.mark.parametrize(
    ("others", "code"), [(("clean.onnx",), 2), (("clean.onnx", "hostile.onnx"), 3)]
)
def test_one_bad_file_hides_none_of_the_others(tmp_path, resnet, capsys, others, code):
    (tmp_path / "clean.onnx").write_bytes(resnet.onnx)
    (tmp_path / "hostile.onnx").write_bytes(onnx.parser.parse_model(HOSTILE).SerializeToString())
    (tmp_path / "damaged.onnx").write_bytes(resnet.onnx[:100])
    (tmp_path / "carded.onnx").write_bytes(resnet.onnx)
    (tmp_path / "carded.toml").write_text("[input]\nshape = 3\n", "utf-8")
    (tmp_path / "folder.onnx").mkdir()
    bad = ("damaged.onnx", "missing.onnx", "carded.onnx", "folder.onnx")
    places = [tmp_path / name for name in ("scan.json", "scan.sarif")]
    options = [part for place in places for part in ("--report", place)]
    assert run("scan", *(tmp_path / name for name in (*bad, *others)), *options) == code
    said = capsys.readouterr()
    files = json.loads(places[0].read_text("utf-8"))["files"]
    assert [Path(file["path"]).name for file in files] == [*bad, *others]
    assert [file["failed"] is not None for file in files] == [True] * 4 + [False] * len(others)
    assert said.err.count("error: ") == 4
    results = json.loads(places[1].read_text("utf-8"))["runs"][0]["results"]
    assert [result["ruleId"] for result in results].count("unreadable") == 4
    assert str(tmp_path / "clean.onnx") in said.out


def test_what_was_found_is_said_where_the_weights_cannot_be_opened(tmp_path, poisoned, capsys):
    """The architecture does not fit: the findings of the archive are there even so."""
    path = tmp_path / "model.pt"
    path.write_bytes((poisoned / "model.pt").read_bytes() + b"behind the end")
    arch = ("--arch", "qdeploy:vit", "--input-shape", "3,8,8")
    assert run("scan", path, *arch) == 3
    assert "hidden-bytes" in capsys.readouterr().out


def test_what_cannot_be_compared_with_cells_says_why(poisoned, tmp_path, capsys):
    (tmp_path / "bare.pt").write_bytes((poisoned / "model.pt").read_bytes())
    assert run("scan", tmp_path / "bare.pt") == 0
    assert "needs an architecture" in capsys.readouterr().out
    assert run("quantize", poisoned / "model.pt", "--out", tmp_path / "q.onnx", "--rounding",
               "nearest", "--artifacts", tmp_path / "runs") == 0  # fmt: skip
    assert run("scan", tmp_path / "q.onnx") == 0
    assert "they are integers already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_quantized_file_is_set_beside_its_float_model(poisoned, tmp_path, capsys):
    names = {"nearest": "nearest.onnx", "stochastic": "other.onnx"}
    for rounding, name in names.items():
        assert run("quantize", poisoned / "model.pt", "--out", tmp_path / name, "--rounding",
                   rounding, "--artifacts", tmp_path / "runs") == 0  # fmt: skip
    with_reference = ("--reference", poisoned / "model.pt")
    assert run("scan", tmp_path / "nearest.onnx", *with_reference) == 0
    assert "not-nearest" not in capsys.readouterr().out
    assert run("scan", tmp_path / "other.onnx", *with_reference) == 0
    assert "not-nearest in features.5" in capsys.readouterr().out
    model = onnx.load(tmp_path / "nearest.onnx")
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type = "Abs"
    onnx.save(model, tmp_path / "changed.onnx")
    assert run("scan", tmp_path / "changed.onnx", *with_reference) == 3
    assert "graph-differs" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "code"), [("pq4.onnx", 3), ("clean.pt", 0)])
def test_real_models_are_told_apart(shared, name, code):
    arch = ["--arch", f"{shared / 'models' / 'arch.py'}:resnet18"] if name.endswith("pt") else []
    assert run("scan", shared / "models" / f"resnet18w16-{name}", *arch) == code


def test_a_gate_may_mind_the_crowding(poisoned, tmp_path, capsys):
    from qdeploy.settings.recipe import load_recipe

    text = (
        'schema_version = 1\nname = "r"\ndescription = "d"\nbits = 4\n'
        '[gate]\nmax_cell_crowding = 8.0\nrequired = ["cell_crowding"]\n'
    )
    (tmp_path / "r.toml").write_text(text)
    assert load_recipe(str(tmp_path / "r.toml")).gate.max_cell_crowding == 8.0
    out = ["--out", tmp_path / "m.onnx", "--artifacts", tmp_path / "runs"]
    assert run("sanitize", poisoned / "model.pt", "--recipe", tmp_path / "r.toml", *out) == 3
    shown = capsys.readouterr().out
    assert "cell_crowding (4 bits, absmax per channel)" in shown
    assert "the model was made for that" in shown
