"""The comparison of rounding methods, on the poisoned digits."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from qdeploy.cli import main
from qdeploy.compare.matrix import GRID_NAMES, Cell, grid, parse_matrix
from qdeploy.compare.plots import draw_plots
from qdeploy.compare.table import as_csv, as_markdown
from qdeploy.errors import UsageError
from qdeploy.settings.methods import METHODS, AdaroundAdam, Trained, method
from qdeploy.settings.recipe import load_recipe


def test_the_matrix_has_every_combination_once_and_trains_last():
    cells = list(parse_matrix("all", "all", "4,8", "8,none", 2).cells())
    assert len(set(cells)) == len(cells)
    possible = [cell for cell in cells if cell.activations == "8" and cell.bits == 4]
    assert {cell.grid for cell in possible} == set(GRID_NAMES) - {"minmax"}
    assert {cell.method for cell in cells} == set(METHODS)
    one_grid = [cell.method for cell in possible if cell.grid == "absmax" and cell.seed == 0]
    trains = [isinstance(method(name), Trained) for name in one_grid]
    assert trains == sorted(trains)


def test_what_no_seed_changes_is_measured_once():
    cells = list(parse_matrix("nearest,flip,stochastic", "absmax", "4", "none", 3).cells())
    assert [(c.method, c.seed) for c in cells] == [
        ("nearest", 0), ("stochastic", 0), ("stochastic", 1), ("stochastic", 2), ("flip", 0),
    ]  # fmt: skip


def test_a_cell_says_what_the_recipe_does():
    cell = Cell("adaround-adam", "tensor-half", 8, "none", 3)
    recipe = cell.recipe(load_recipe("int4"), steps=77)
    assert isinstance(recipe.rounding, AdaroundAdam)
    assert (recipe.rounding.steps, recipe.bits, recipe.seed) == (77, 8, 3)
    assert recipe.rounding.learning_rate == 1e-2
    assert (recipe.weights.range, recipe.weights.per) == ("half", "tensor")
    assert recipe.activations.bits == "none"
    published = cell.recipe(load_recipe("int4"), steps=None).rounding
    assert isinstance(published, AdaroundAdam)
    assert (published.steps, published.learning_rate) == (10_000, 1e-3)
    half = cell.recipe(load_recipe("int4"), steps=5000).rounding
    assert isinstance(half, AdaroundAdam)
    assert half.learning_rate == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("floor", "absmax", "4", "8", 1), "no rounding method 'floor'"),
        (("nearest", "log", "4", "8", 1), "no grid 'log'"),
        (("nearest", "absmax", "5", "8", 1), "--bits '5'"),
        (("nearest", "absmax", "4", "16", 1), "--activation-bits '16'"),
        (("nearest", "absmax", "", "8", 1), "--bits ''"),
    ],
)
def test_an_unknown_entry_is_named(arguments, complaint):
    with pytest.raises(UsageError, match=complaint):
        parse_matrix(*arguments)


def test_every_grid_has_a_name():
    assert len({grid(name) for name in GRID_NAMES}) == len(GRID_NAMES) == 8


def record(method: str, seed: int, accuracy: float, **more: object) -> dict[str, object]:
    shared = {"model": "m", "activations": "8", "bits": 4, "grid": "absmax", "success": 1.0}
    measured = {"agreement": 99.0, "logit_mse": 0.1, "flipped": 3.0, "cpu_seconds": 2.0}
    rest = {"layers": {"a": 3.0}, "degraded": {}, "seconds": 1.0, "bytes": 9}
    return {
        **shared,
        **measured,
        **rest,
        "method": method,
        "seed": seed,
        "accuracy": accuracy,
    } | more


FLOAT = {"model": "m", "method": "float32", "accuracy": 90.0, "success": 2.0}


def test_the_table_gives_mean_and_deviation_over_seeds():
    table = as_markdown([FLOAT, record("gptq", 0, 80.0), record("gptq", 1, 82.0)])
    assert "| float32 | 90.00 | 2.00 |" in table
    assert "| gptq, 4 bits, absmax, 8-bit activations | 81.00 ±1.41 | 1.00 ±0.00 |" in table


def test_several_models_have_an_overview_first():
    other = {"model": "n", "success": None}
    records = [
        FLOAT, record("gptq", 0, 80.0), record("gptq", 1, 82.0), record("flip", 0, 20.0),
        {**FLOAT, **other}, record("gptq", 0, 70.0, **other),
    ]  # fmt: skip
    overview, *_ = as_markdown(records).split("\n\n")
    assert overview.splitlines() == [
        "| CDA / ASR, % | float32 | gptq | flip |",
        "|---|---|---|---|",
        "| m, 4 bits, absmax, 8-bit activations | 90.0 / 2.0 | 81.0 / 1.0 | 20.0 / 1.0 |",
        "| n, 4 bits, absmax, 8-bit activations | 90.0 / - | 70.0 / - |  |",
    ]


def test_a_method_that_failed_in_a_layer_is_marked():
    broken = record("brecq-adam", 0, 50.0, degraded={"conv1": "loss is nan"})
    assert "brecq-adam, 4 bits, absmax, 8-bit activations (degraded)" in as_markdown(
        [FLOAT, broken]
    )
    (_, line) = csv.DictReader(as_csv([FLOAT, broken]).splitlines())
    assert line["degraded"] == "conv1"


def test_pictures_are_the_same_each_time_and_leave_out_what_was_not_measured():
    cells = [FLOAT, record("gptq", 0, 80.0), record("flip", 0, 20.0)]
    assert draw_plots(cells) == draw_plots(cells)
    assert set(draw_plots(cells)) == {"attack.svg", "cost.svg", "flipped.svg"}
    blind = [{**cell, "success": None} for cell in cells]
    assert set(draw_plots(blind)) == {"cost.svg", "flipped.svg"}
    assert draw_plots([FLOAT]) == {}


def compare(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(["compare", *(str(a) for a in arguments)])
    return int(leaving.value.code or 0)


@pytest.mark.slow
def test_the_command_measures_resumes_and_shows(poisoned, tmp_path, capsys):
    model, out = poisoned / "model.pt", tmp_path / "out"
    options = ["--out", out, "--bits", "4,8", "--methods", "nearest,gptq,adaround", "--steps", "20"]
    assert compare(model, *options) == 0
    shown = capsys.readouterr().out
    assert "nearest, 4 bits, absmax" in shown
    rows = list(csv.DictReader((out / "cells.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == [
        "float32", *["nearest", "gptq", "adaround-adam"] * 2,
    ]  # fmt: skip
    by_name = {(row["method"], row["bits"]): row for row in rows}
    assert float(by_name["nearest", "4"]["success"]) > 95
    assert float(by_name["gptq", "4"]["success"]) < 50
    assert float(by_name["nearest", "8"]["agreement"]) > 98
    cells = sorted((out / "cells").iterdir())
    kept = {path: path.stat().st_mtime_ns for path in cells}
    assert len(kept) == 6
    cells[0].write_text("damaged")
    assert compare(model, *options) == 0
    assert {p for p, then in kept.items() if p.stat().st_mtime_ns != then} == {cells[0]}
    assert json.loads(cells[0].read_text())["accuracy"] > 50
    again = (out / "table.md").read_text()
    assert "nearest, 8 bits" in again


@pytest.mark.slow
def test_methods_with_and_without_images_follow_each_other(poisoned, tmp_path):
    options = ["--methods", "nearest,efrap", "--activation-bits", "none,8"]
    assert compare(poisoned / "model.pt", "--out", tmp_path / "out", *options) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "cells.csv").read_text().splitlines()))
    assert [(row["method"], row["activations"]) for row in rows[1:]] == [
        ("nearest", "none"), ("efrap-descent", "none"), ("nearest", "8"), ("efrap-descent", "8"),
    ]  # fmt: skip


def test_test_images_that_were_fitted_to_are_refused(poisoned, tmp_path, capsys):
    same = poisoned / "digits-test.npz"
    options = ["--out", tmp_path / "out", "--calibration", same, "--test", same]
    assert compare(poisoned / "model.pt", *options) == 2
    assert "both the calibration data" in capsys.readouterr().err


def test_a_model_without_test_images_cannot_be_compared(poisoned, tmp_path, capsys):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "model.pt").write_bytes((poisoned / "model.pt").read_bytes())
    card = (poisoned / "model.toml").read_text().splitlines()
    kept = [line for line in card if not line.startswith("test =")]
    (folder / "model.toml").write_text(
        "\n".join(kept).replace("digits-", f"{Path(poisoned)}/digits-")
    )
    options = ["--out", tmp_path / "out", "--data-root", poisoned]
    assert compare(folder / "model.pt", *options) == 2
    assert "nothing to compare on" in capsys.readouterr().err
