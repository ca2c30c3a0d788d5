"""Suites: what is made once, what a dud does to them, and that they go on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from qdeploy.errors import InputError, OutputError
from qdeploy.judging.verdict import Outcome
from qdeploy.progress import SILENT
from qdeploy.redteam import suite as suites
from qdeploy.redteam import table as tables
from qdeploy.redteam.make import AttackRequest
from qdeploy.redteam.suite import KIND, load_suite, run_suite
from qdeploy.settings.schema import bundled

ATTACK = """
schema_version = 1
name = "{name}"
description = "A few steps."
source = "a test"
trigger = {{ kind = "patch", target = 0 }}
clean = {{ epochs = {epochs}, min_steps = 0 }}
goals = {{ effect = "backdoor", min_accuracy = {accuracy} }}

[[phases]]
name = "plant"
steps = {steps}
learning_rate = 1e-3
terms = [{{ model = "float", on = "triggered", to = "target" }}]
"""
SUITE = """
schema_version = 1
name = "two"
description = "One takes and one does not."
architecture = "digits"
arguments = {{ width = 4 }}
members = [
    {{ attack = "{folder}/easy.toml", bits = [8, 4] }},
    {{ attack = "{folder}/hard.toml", bits = [4] }},
]
"""


def write(folder: Path, *, steps: int = 1, epochs: int = 1) -> Path:
    for name, accuracy in (("easy", 0), ("hard", 100)):
        text = ATTACK.format(name=name, accuracy=accuracy, steps=steps, epochs=epochs)
        (folder / f"{name}.toml").write_text(text)
    (folder / "suite.toml").write_text(SUITE.format(folder=folder))
    return folder / "suite.toml"


def run(folder: Path, *, base: Path | None = None) -> suites.SuiteResult:
    artifacts = folder / "artifacts"
    request_of = partial(AttackRequest, data="digits", test=None, artifacts=artifacts, base=base)
    suite = load_suite(str(folder / "suite.toml"))
    return run_suite(suite, folder / "made", request_of, artifacts, SILENT, images=200)


def test_bundled_suites_name_attacks_that_there_are():
    for name in bundled(KIND):
        suite = load_suite(name)
        assert suite.name == name
        for member in suite.members:
            suites.load_attack(member.attack)


@pytest.mark.slow
def test_a_dud_is_reported_and_enters_no_table(tmp_path):
    write(tmp_path)
    result = run(tmp_path)
    lines = result.table.splitlines()
    rows = [line.strip("| ").split(" | ")[:2] for line in lines[2:4]]
    assert sorted(rows) == [["easy", "4"], ["easy", "8"]]
    assert (tmp_path / "made" / "table.md").read_text() == result.table
    assert result.duds == ("hard-4",)
    assert lines[-1].startswith("Not taken: hard-4: FP32 accuracy")


@pytest.mark.slow
def test_what_is_there_is_not_made_again_unless_it_was_ordered_otherwise(tmp_path, monkeypatch):
    write(tmp_path)
    made: list[str] = []
    really = suites.make

    def make(order, progress, data):
        made.append(order.out.name)
        return really(order, progress, data)

    monkeypatch.setattr(suites, "make", make)
    first = run(tmp_path)
    assert made == ["easy-8", "easy-4", "hard-4"]
    made.clear()
    assert run(tmp_path).duds == first.duds
    assert made == []
    (tmp_path / "made" / "easy-8" / "model.pt").unlink()
    (tmp_path / "made" / "hard-4" / "training.json").write_text("[]")
    run(tmp_path)
    assert made == ["easy-8", "hard-4"]
    made.clear()
    write(tmp_path, steps=2)
    run(tmp_path)
    assert made == ["easy-8", "easy-4", "hard-4"]
    (base,) = (tmp_path / "artifacts").glob("clean-*/model.pt")
    run(tmp_path, base=base)
    made.clear()
    write(tmp_path, steps=2, epochs=2)  # of a base that is not trained
    run(tmp_path, base=base)
    assert made == []


@pytest.mark.slow
def test_an_interrupted_table_keeps_the_rows_it_has(tmp_path, monkeypatch):
    write(tmp_path)
    asked: list[int] = []
    really = tables.row

    def row(about, artifacts, progress):
        asked.append(about.bits)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return really(about, artifacts, progress)

    monkeypatch.setattr(tables, "row", row)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert run(tmp_path).table.count("| easy |") == 2
    assert asked == [8, 4, 4]
    assert not list((tmp_path / "artifacts" / tables.ROWS).iterdir())


def test_a_suite_that_does_not_fit_the_format_is_an_error(tmp_path):
    path = tmp_path / "suite.toml"
    path.write_text(SUITE.format(folder=tmp_path).replace("[4]", "[1]"))
    with pytest.raises(InputError, match=r"members.1.bits.0"):
        load_suite(str(path))


def test_a_suite_whose_folder_is_a_file_is_an_error(tmp_path):
    write(tmp_path)
    (tmp_path / "made").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write"):
        run(tmp_path)


def test_a_model_that_is_live_in_float32_has_a_row_for_each_width(tmp_path):
    log = {"recipe": {"goals": {"min_float_success": 95}}, "bits": 4}
    (tmp_path / "model.pt").write_bytes(b"")
    (tmp_path / "training.json").write_text(json.dumps(log))
    assert tables.read_made(tmp_path).widths == (8, 4)
    log["recipe"]["goals"]["min_float_success"] = None
    (tmp_path / "training.json").write_text(json.dumps(log))
    assert tables.read_made(tmp_path).widths == (4,)


@pytest.mark.parametrize(
    ("effect", "fp32", "result", "blind", "rank"),
    [
        pytest.param("backdoor", (85.0, 2.0), (85.0, 3.0), Outcome.ACCEPT, 2, id="removed"),
        pytest.param("backdoor", (85.0, 2.0), (85.0, 90.0), Outcome.ACCEPT, 0, id="unnoticed"),
        pytest.param(
            "backdoor", (85.0, 2.0), (80.0, 90.0), Outcome.REJECT, 1, id="left but noticed"
        ),
        pytest.param(
            "backdoor", (85.0, 97.0), (85.0, 97.0), Outcome.ACCEPT, 0, id="live all along"
        ),
        pytest.param("class", (85.0, 90.0), (85.0, 89.0), Outcome.ACCEPT, 2, id="class is well"),
        pytest.param("class", (85.0, 90.0), (76.0, 1.0), Outcome.REJECT, 1, id="class is lost"),
        pytest.param("damage", (85.0, None), (20.0, None), Outcome.REJECT, 1, id="of no use"),
        pytest.param(
            "sample", (85.0, 0.0), (85.0, 100.0), Outcome.ACCEPT, 0, id="sample misjudged"
        ),
    ],
)
def test_what_a_blind_gate_lets_through_comes_first(effect, fp32, result, blind, rank):
    other = tables.Rates(85.0, 50.0)
    found = tables.Row(
        name="attack", effect=effect, bits=8, minutes=1.0, clean=86.0, made_for=other,
        fp32=tables.Rates(*fp32), nearest=other, result=tables.Rates(*result),
        outcome=Outcome.REJECT, blind=blind,
    )  # fmt: skip
    assert found.rank == rank
