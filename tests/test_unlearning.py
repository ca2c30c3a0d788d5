"""A backdoor that is live in float32: found without its trigger, and unlearnt."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.cleaning.distil import distill
from qdeploy.core.reach import Reach, suspects
from qdeploy.progress import SILENT
from qdeploy.runs.clean import make_student
from qdeploy.settings.policy import GateSpec
from qdeploy.settings.sanitizers import Unlearn
from qdeploy.training.compute import ALONE
from qdeploy.values import Cleaning, DataUsed, Origin
from tests.test_distillation import (
    CARD,
    GRAY,
    SEED,
    TARGET,
    Interrupting,
    Normalised,
    digits,
    images_from_array,
    loaded,
    make_work,
    order,
    random_images,
    rates,
    run,
    trained,
)
from tests.test_report import SCHEMA
from tests.test_verdict import checked

QUICK = Unlearn(survey_steps=100, mirrors=False, batch=64, least_steps=60, learning_rate=0.01)


@pytest.fixture(scope="module")
def backdoored() -> nn.Module:
    return trained(poisoned=True)


@pytest.fixture(scope="module")
def unlabelled():
    return images_from_array("digits", digits()[0][:1000], GRAY)


@pytest.mark.parametrize(
    ("radii", "expected"),
    [((1.0, 5.0, 4.0, 6.0), (0,)), ((4.0, 5.0, 4.0, 6.0), ()), ((1.0, 9.0, 2.0, 9.0, 9.0), (0, 2))],
)
def test_a_class_is_suspicious_beside_the_median(radii, expected):
    inconspicuous = Reach("masked", "pixels", (1.0,) * len(radii))
    assert suspects((inconspicuous, Reach("additive", "L2", radii)), 0.5) == expected


@pytest.mark.slow
def test_the_target_is_found_and_the_backdoor_unlearnt_at_little_cost(backdoored, unlabelled):
    before = rates(backdoored)
    assert before[1] > 90
    student = distill(loaded(backdoored), unlabelled, QUICK, SEED)
    assert student.surveyed is not None
    assert student.surveyed.suspects == (TARGET,)
    assert student.surveyed.remaining == ()
    after = rates(student.module)
    assert after[1] < 15
    assert after[0] > before[0] - 4
    assert student.history[-1].led is not None


@pytest.mark.slow
def test_where_nothing_is_suspicious_the_student_is_the_teacher(unlabelled):
    model = trained(poisoned=False)
    spec = QUICK.model_copy(update={"suspicious": 1e-3})
    student = distill(loaded(model), unlabelled, spec, SEED)
    assert (student.history, student.agreement) == ((), 100.0)
    for name, value in student.module.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0)


def test_normalisation_keeps_the_statistics_of_the_teacher():
    model = Normalised(width=8).eval()
    spec = QUICK.model_copy(update={"suspicious": 1e3, "survey_steps": 2, "least_steps": 2})
    student = distill(loaded(model), random_images(64), spec, SEED).module
    own, theirs = student.state_dict(), model.state_dict()
    kept = [name for name in own if "running" in name]
    assert kept
    assert all(torch.equal(own[name], theirs[name]) for name in kept)
    assert any(not torch.equal(own[name], theirs[name]) for name in own if name not in kept)


def test_the_student_goes_on_beyond_the_end_of_its_training():
    torch.manual_seed(0)
    model = Normalised(width=8).eval()
    brief = QUICK.model_copy(update={"suspicious": 1e3, "survey_steps": 2, "least_steps": 2})
    once, twice = (
        distill(loaded(model), random_images(64), brief.model_copy(update={"further": f}), SEED)
        for f in (1.0, 2.0)
    )
    own, further = dict(once.module.named_parameters()), dict(twice.module.named_parameters())
    moved = {name: own[name] - value for name, value in model.named_parameters()}
    assert max(float(change.detach().abs().max()) for change in moved.values()) > 4e-5
    for name, value in model.named_parameters():
        torch.testing.assert_close(further[name], value + 2 * moved[name], rtol=0, atol=1e-6)


@pytest.fixture
def work(tmp_path, monkeypatch, backdoored):
    """The backdoored classifier as a TorchScript file, with its card and data."""
    script = torch.jit.script(backdoored)
    torch.jit.save(script, tmp_path / "model.pt")
    card = CARD.replace(
        'architecture = "qdeploy:resnet18"\narguments = { width = 4, channels = 1 }\n', ""
    )
    (tmp_path / "model.toml").write_text(card, "utf-8")
    pixels, labels = digits()
    np.savez(tmp_path / "images.npz", x=pixels[:1000], y=labels[:1000].numpy())
    np.savez(tmp_path / "test.npz", x=pixels[1000:], y=labels[1000:].numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_one_command_cleans_quantizes_and_judges_and_reports_every_stage(work, capsys):
    command = ("sanitize", "model.pt", "--sanitizer", "unlearn", "--out", "model.onnx",
               "--policy", "demo", "--seed", "1", "--report", "report.json", "--report",
               "report.html", "--run-code-from-model")  # fmt: skip
    run(*command)
    said = capsys.readouterr().out
    report = json.loads((work / "report.json").read_text("utf-8"))
    jsonschema.validate(report, SCHEMA)
    assert report["cleaning"]["suspicious"] == [TARGET]
    assert report["cleaning"]["origin"]["path"] == "model.pt"
    assert report["cleaning"]["student"] == report["origin"]["path"] == "model.student.pt"
    (check,) = [check for check in report["checks"] if check["name"] == "remaining_shortcuts"]
    assert (check["value"], check["limit"], check["state"]) == (0, 0, "within")
    success = {m["variant"]: m["attack_success"] for m in report["measurements"]}
    (trigger,) = success["source"]
    assert success["source"][trigger]["value"] > 90
    assert success["fp32"][trigger]["value"] < 30
    assert success["result"][trigger]["value"] < 30
    assert "before cleaning" in said
    assert "before cleaning" in (work / "report.html").read_text("utf-8")
    assert "reached too easily: class 0; after cleaning: none" in " ".join(said.split())
    assert (work / "model.student.pt").exists()


@pytest.mark.parametrize(
    ("remaining", "limit", "state"),
    [((), 0, "within"), ((2,), 0, "off"), ((2,), 1, "within"), ((0, 2), 1, "off")],
)
def test_a_class_that_is_still_reached_too_easily_stands_against_the_file(remaining, limit, state):
    origin = Origin("model.pt", "0" * 64, "torch")
    images = DataUsed("distillation", "images.npz", 64, None, "command line")
    made = Cleaning(
        origin, {"kind": "unlearn"}, images, "student.pt", 3, (2,), remaining, 99.0, 1.0
    )
    gate = GateSpec(max_remaining_shortcuts=limit)
    (check,) = checked(gate, cleaning=made, class_names=("cat", "dog", "ship"))
    assert check.state == state
    assert check.subject in {None, "ship", "cat, ship"}
    assert not checked(gate, cleaning=replace(made, remaining=None))
    assert not checked(gate, cleaning=None)


def test_an_interrupted_unlearning_goes_on_and_ends_at_the_same_bytes(tmp_path, monkeypatch):
    place = make_work(tmp_path, monkeypatch)
    spec = Unlearn(
        survey_steps=3, suspicious=1e3, epochs=3, least_steps=3, batch=32, slots=4, slot_images=4
    )

    def ordered(name: str):
        return replace(order(place, name), spec=spec)

    make_student(ordered("whole"), ALONE, SILENT)
    stop = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        make_student(ordered("halved"), ALONE, stop)
    assert not (place / "halved.pt").exists()
    rest = Interrupting()
    rest.notes = ["", ""]
    student = make_student(ordered("halved"), ALONE, rest)
    assert len(student.result.history) == 3
    assert len(rest.notes) == 2 + 1 + 2  # what the survey found, and the two epochs left
    assert (place / "halved.pt").read_bytes() == (place / "whole.pt").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--images", "images.npz"), "for a --sanitizer"),
        (("--schedule", "paper"), "for a --sanitizer"),
        (("--sanitizer", "kd", "--epochs", "0"), "--epochs"),
        (("--sanitizer", "kd", "--epochs", "1", "--images", "test.npz"), "and the test data"),
        (("--sanitizer", "kd", "--images", "none.zip"), "none.zip"),
        (("--sanitizer", "asd"), "asd needs the inner layers"),
    ],
)
def test_what_cannot_be_cleaned_is_one_line(work, capsys, arguments, error):
    model = ("model.pt", "--run-code-from-model")
    assert run("sanitize", *model, "--out", "model.onnx", *arguments) == 2
    assert error in capsys.readouterr().err
    assert not list(work.glob("model*.onnx"))
