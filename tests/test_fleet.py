"""Fleets: what a manifest comes to, and what becomes of all of its cells."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import typer

from qdeploy.cli import app
from qdeploy.errors import InputError, UsageError
from qdeploy.fleet.forms import place_of
from qdeploy.fleet.models import Fetched, list_models
from qdeploy.fleet.options import SETTINGS, arguments, checked
from qdeploy.fleet.run import read_status
from qdeploy.fleet.seen import CellOutcome
from qdeploy.fleet.verbs import members
from qdeploy.fleet.whole import read_fleet
from qdeploy.progress import SILENT
from tests.fleet_lab import (
    BAD,
    CARD,
    KEY,
    MANIFEST,
    Keeping,
    Scripted,
    fleet,
    one_process,
    place,
    planned,
    run_with,
    spec_of,
)
from tests.nets import residual_net


def test_every_cell_is_computed_once_and_one_report_tells_of_all(place, capsys):
    assert fleet("--report", "r.csv", "--report", "r.xml", "--report", "r.sarif") == 3
    document = read_fleet(place / "out" / "fleet.json")
    seen = {record.title: record.outcome.value for record in document.cells}
    assert seen == {"a.onnx, scan": "ACCEPT", "bad.pkl, scan": "REJECT"}
    assert (document.outcome, document.computed) == ("REJECT", 2)
    assert not (place / "owned").exists()
    for record in document.cells:
        files = {file.name for file in record.files}
        assert {"report.json", "report.sarif", "log.txt"} == files
        assert all((place / "out" / place_of(record) / name).is_file() for name in files)
    rows = list(csv.DictReader(io.StringIO((place / "r.csv").read_text())))
    assert [row["outcome"] for row in rows] == ["ACCEPT", "REJECT"]
    suite = ET.fromstring((place / "r.xml").read_text())
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    results = json.loads((place / "r.sarif").read_text())["runs"][0]["results"]
    assert {result["ruleId"] for result in results} >= {"pickle-import"}
    assert [path.name for path in (place / "out" / "work").iterdir()] == ["claims"]

    # again: nothing is to be done, but what somebody has changed in the store
    (first,) = (one for one in document.cells if one.model == "a.onnx")
    file = next(file for file in first.files if file.name == "report.json")
    kept, out = place / "store" / "files" / file.sha256, place / "out" / place_of(first)
    (out / file.name).unlink()
    assert fleet() == 3
    assert read_fleet(place / "out" / "fleet.json").computed == 0
    kept.write_bytes(kept.read_bytes().replace(b"1", b"2"))
    (out / file.name).unlink()
    (place / "models" / "bad.pkl").unlink()
    (place / "fleet.toml").write_text(MANIFEST.replace(BAD, ""))
    assert fleet("--since", "out/fleet.json") == 0
    again = read_fleet(place / "out" / "fleet.json")
    assert again.computed == 1
    assert [(one.title, one.now) for one in again.changes] == [("bad.pkl, scan", None)]
    capsys.readouterr()
    assert fleet("--watch") == 0
    assert "1/1 cells" in capsys.readouterr().out


def test_a_share_leaves_its_cells_in_the_store_for_the_whole(
    place, capsys, monkeypatch, one_process
):
    (place / "fleet.toml").write_text(MANIFEST.replace(BAD, "").replace("/a.", "/*."))
    monkeypatch.setattr("qdeploy.fleet.run.open_executor", lambda *_: Keeping(place))
    assert fleet("--share", "1/2") == 0
    assert not (place / "out" / "fleet.json").exists()
    assert read_status(place / "out" / "status-1-of-2.json").done == 1
    assert fleet("--dry-run") == 0
    said = capsys.readouterr().out
    assert "2 cells: 1 are done, 0 are refused; the others take a worker" in said
    assert fleet("--share", "0/2") == 0
    assert fleet() == 0
    assert read_fleet(place / "out" / "fleet.json").computed == 0
    assert fleet("--share", "2/2") == 2


# Manifests


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"jobs": []}, "jobs"),
        ({"modls": []}, "is models meant?"),
        ({"models": [{"path": "a", "uri": "models:/a"}]}, "either path or uri"),
        ({"models": [{"uri": "runs:/a", "tracking_uri": "x"}]}, "must begin with models:/"),
        ({"models": [{"uri": "models:/a"}]}, "uri and tracking_uri belong together"),
        ({"jobs": [{"verb": "scan", "suite": "detection"}]}, "a suite is what redteam needs"),
        ({"limits": {"minutes": 0}}, "greater than 0"),
        ({"executor": {"kind": "threads"}}, "executor"),
        ({"name": "Two Words"}, "name"),
    ],
)
def test_a_manifest_that_does_not_fit_is_one_line(said, complaint):
    with pytest.raises(InputError, match=complaint):
        spec_of(**said)


@pytest.mark.parametrize(
    ("job", "complaint"),
    [
        (
            {"verb": "scan", "recipes": ["int4"]},
            r"jobs\[1\] \(scan\): recipes mean nothing to scan",
        ),
        ({"verb": "gate", "options": {"tests": "x"}}, "gate has no such option; is test meant"),
        ({"verb": "gate", "options": {"device": "any"}}, "options.device is not for options"),
        ({"verb": "sanitize", "options": {"bits": 5}}, r"options.bits: must be 4, 8 or 'auto'"),
        ({"verb": "sanitize", "options": {"seed": "x"}}, "options.seed: must be a valid integer"),
        ({"verb": "scan", "models": "c*"}, r"models 'c\*': no model of the fleet is called so"),
        ({"verb": "redteam", "suite": "detection"}, "options.data: is missing"),
    ],
)
def test_a_job_that_cannot_be_meant_is_one_line_before_any_work(place, job, complaint, one_process):
    with pytest.raises(InputError, match=complaint):
        planned(place, jobs=[job])


@pytest.mark.parametrize("axis", ["recipes", "policies", "devices"])
def test_what_is_called_by_a_name_that_nothing_has_is_said_once(place, axis, one_process):
    with pytest.raises(UsageError, match="is called 'none-such'"):
        planned(place, jobs=[{"verb": "sanitize", axis: ["none-such"]}])


def test_models_are_found_by_pattern_in_folders_and_by_name(place, one_process):
    def names(**said) -> list[str]:
        specs = spec_of(models=[said]).models
        return [one.name for one in list_models(specs, place, Fetched(place, KEY), SILENT)]

    (place / "other").mkdir()
    (place / "other" / "a.onnx").write_bytes(residual_net())
    assert names(path="models/*") == ["a.onnx", "b.onnx", "bad.pkl"]  # cards are no models
    assert names(path="models") == ["a.onnx", "b.onnx", "bad.pkl"]
    assert names(path=str(place / "models" / "a.onnx")) == ["a.onnx"]
    assert names(path="**/a.onnx") == ["models/a.onnx", "other/a.onnx"]
    with pytest.raises(InputError, match=r"models 'c\*': no file is called so"):
        names(path="c*")


def test_cells_are_the_product_of_models_recipes_policies_and_devices(place, one_process):
    job = {
        "verb": "sanitize", "recipes": ["int4", "int8"], "policies": ["demo"],
        "devices": ["x86-avx2", "x86-vnni", "mobile"], "options": {"calibration": "models"},
    }  # fmt: skip
    titles = list(planned(place, jobs=[job, {"verb": "scan", "models": "a*"}]))
    assert len(titles) == 2 * 2 * 3 + 1
    assert titles[0] == "a.onnx, sanitize, int4, demo, x86-avx2"
    assert titles[-1] == "a.onnx, scan"


def test_a_cell_is_called_by_all_that_decides_what_comes_of_it(place, one_process):
    jobs = [{"verb": "sanitize", "recipes": ["int4"], "options": {"test": "data"}}]
    (place / "data").mkdir()
    (place / "data" / "1.txt").write_text("x")

    def id_of(**said) -> str:
        return planned(place, models=[{"path": "models/a.onnx"}], **{"jobs": jobs, **said})[
            "a.onnx, sanitize, int4"
        ].id

    first = id_of()
    assert id_of(limits={"cores": 2}, name="other") == first
    seeded = [{**jobs[0], "options": {"test": "data", "seed": 1}}]
    assert id_of(jobs=seeded) != first
    for path, content in (
        ("models/a.toml", CARD.replace("0.5]", "0.4]", 1)), ("data/1.txt", "y"), ("data/2.txt", ""),
    ):  # fmt: skip
        before = id_of()
        (place / path).write_text(content)
        assert id_of() != before, path
    before = id_of()
    (place / "models" / "a.onnx").write_bytes(residual_net(3))
    assert id_of() != before


def test_what_a_factory_is_made_of_is_part_of_its_cell(place, one_process):
    (place / "net.py").write_text("def make(): ...\n")
    models = [{"path": "models/a.onnx", "options": {"arch": "net.py:make"}}]
    first = planned(place, models=models)["a.onnx, scan"].id
    (place / "layers.py").write_text("x = 1\n")
    assert planned(place, models=models)["a.onnx, scan"].id != first


def test_a_model_that_something_is_wrong_with_ends_no_other(place, one_process):
    (place / "models" / "a.toml").write_text("[input]\nshape = 3\n")
    cells = planned(place)
    assert "input.shape" in cells["a.onnx, scan"].refused
    assert cells["b.onnx, scan"].refused is None
    records = run_with(Scripted(), tuple(cells.values())).records
    assert records[cells["a.onnx, scan"].id].outcome is CellOutcome.BAD_INPUT
    assert records[cells["b.onnx, scan"].id].outcome is CellOutcome.ACCEPT


def test_options_mean_each_model_by_its_name(place, one_process):
    (place / "float").mkdir()
    for name in ("a", "b"):
        (place / "float" / f"{name}.onnx").write_bytes(residual_net())
    job = {"verb": "gate", "options": {"reference": "float/{stem}.onnx", "triggers": ["patch x=0"]}}
    cells = planned(place, jobs=[job])
    asked = cells["b.onnx, gate"].asked.options
    assert asked == {"reference": str(place / "float" / "b.onnx"), "triggers": ("patch x=0",)}


@pytest.mark.parametrize("verb", SETTINGS)
def test_every_option_of_a_manifest_is_one_of_its_command(verb):
    node = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    node = node.commands["make"] if verb == "redteam" else node
    flags = {flag for option in node.params for flag in option.opts}
    for key, hint in SETTINGS[verb].__annotations__.items():
        if key not in {"recipe", "policy", "device", "reports", "artifacts", "command"}:
            value = {"input_shape": (1, 2, 2), "arch_args": {"width": 1}}.get(key, "x")
            (flag, *_) = arguments({key: True if "bool" in str(hint) else value})
            assert flag in flags, key


def test_options_are_written_as_a_command_line():
    said = {
        "arch_args": {"width": 16, "deep": True}, "input_shape": (3, 8, 8), "triggers": ("a", "b"),
        "run_code_from_model": True, "synthetic_calibration": False, "bits": "auto",
    }  # fmt: skip
    assert list(arguments(checked("sanitize", said, where="job"))) == [
        "--arch-args", "width=16", "--arch-args", "deep=true", "--bits", "auto",
        "--input-shape", "3,8,8", "--run-code-from-model", "--trigger", "a", "--trigger", "b",
    ]  # fmt: skip


def test_a_suite_of_the_red_team_is_a_cell_for_each_model():
    cells = list(members("detection", {"data": "digits"}, "job"))
    assert len(cells) == 40
    assert cells[0].options == {
        "attack": "pqbackdoor", "arch": "resnet18", "arch_args": {"width": 16}, "bits": 8,
        "seed": 1, "data": "digits",
    }  # fmt: skip


def test_a_factory_in_a_folder_with_too_much_code_is_refused(place, one_process, monkeypatch):
    monkeypatch.setattr("qdeploy.fleet.facts.MOST_CODE_FILES", 1)
    for name in ("net.py", "a/one.py"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("")
    models = [{"path": "models/a.onnx", "options": {"arch": "net.py:make"}}]
    assert "more than 1 Python files" in planned(place, models=models)["a.onnx, scan"].refused
    monkeypatch.setattr("qdeploy.fleet.facts.MOST_CODE_FILES", 2)
    first = planned(place, models=models)["a.onnx, scan"].id
    (place / "a" / "one.py").write_text("x = 1")
    assert planned(place, models=models)["a.onnx, scan"].id != first


def test_what_a_card_calls_its_classes_decides_too(place, one_process):
    ids = set()
    for classes in ("", '[model]\nclasses = ["a", "b"]\n', '[model]\nclasses = ["b", "a"]\n'):
        (place / "models" / "a.toml").write_text(classes + CARD)
        ids.add(planned(place)["a.onnx, scan"].id)
    assert len(ids) == 3


@pytest.mark.parametrize(
    "line",
    [
        f'test = "{"a" * 300}"', f'test = "{"a/" * 3000}"', 'test = "\\u0000"', 'test = "odd"',
        'test = "pipe"', 'test = "../.."',
    ],
)  # fmt: skip
def test_a_card_ends_no_fleet_whatever_data_it_names(place, one_process, line):
    odd = place / "models" / "odd"
    odd.mkdir()
    Path(os.fsdecode(os.fsencode(odd) + b"/\xff.png")).write_bytes(b"x")
    os.mkfifo(place / "models" / "pipe")
    (place / "models" / "a.toml").write_text(f"{CARD}[data]\n{line}\n")
    cells = planned(place, models=[{"path": "models/[ab].onnx"}])
    assert (cells["a.onnx, scan"].refused is None) == ("odd" in line)
    assert cells["b.onnx, scan"].refused is None


def test_cells_that_would_be_called_alike_are_told_apart(place, one_process):
    jobs = [{"verb": "gate", "options": {"test_images": count}} for count in (5, 6)]
    assert list(planned(place, models=[{"path": "models/a.onnx"}], jobs=jobs)) == [
        "a.onnx, gate", "a.onnx, gate (2)",
    ]  # fmt: skip


def test_one_model_under_two_names_is_computed_once_and_told_twice(place, one_process, monkeypatch):
    (place / "models" / "b.onnx").write_bytes(residual_net(0))
    (place / "fleet.toml").write_text(MANIFEST.replace(BAD, "").replace("/a.", "/*."))
    monkeypatch.setattr("qdeploy.fleet.run.open_executor", lambda *_: Keeping(place))
    assert fleet() == 0
    document = read_fleet(place / "out" / "fleet.json")
    assert [record.title for record in document.cells] == ["a.onnx, scan", "b.onnx, scan"]
    assert document.computed == 1


# What is kept
