"""What a float model says to an input is computed once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qdeploy.runs import answered
from qdeploy.runs.answered import answers_to, keep_answers, note_on
from qdeploy.runtime import remembered
from qdeploy.runtime.remembered import KnownAnswers
from qdeploy.settings.device import RuntimeSpec
from qdeploy.values import Interface
from tests.gate_lab import Lab, copied, run

CPU = RuntimeSpec(provider="cpu")


class Counting:
    """Answers the sums of the channels, and counts what it was asked."""

    fixed_batch = None

    def __init__(self) -> None:
        self.asked = 0

    def logits(self, batch: np.ndarray) -> np.ndarray:
        self.asked += len(batch)
        return batch.sum(axis=(2, 3)).astype(np.float32)

    def seconds(self, batch: np.ndarray) -> float:
        return float(len(batch))

    def interface(self, *, where: str) -> Interface:
        assert where
        return Interface((3, 2, 2), 3)


@pytest.fixture
def images(rng) -> np.ndarray:
    return rng.normal(size=(12, 3, 2, 2)).astype(np.float32)


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QDEPLOY_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def test_an_input_is_asked_about_once_in_whatever_batch(images):
    inner, answers = Counting(), KnownAnswers()
    runner = answers.of(inner)
    want = inner.logits(images)
    inner.asked = 0
    np.testing.assert_array_equal(runner.logits(images[:8]), want[:8])
    np.testing.assert_array_equal(runner.logits(images[::-1]), want[::-1])
    np.testing.assert_array_equal(answers.of(inner).logits(images[3:5]), want[3:5])
    assert inner.asked == 12
    assert (runner.seconds(images), runner.interface(where="x").classes) == (12.0, 3)
    assert not answers.recalled  # no other run had asked


def test_beyond_a_limit_nothing_more_is_kept(images, monkeypatch):
    monkeypatch.setattr(remembered, "LARGEST_KEPT", 5 * 12)
    inner, answers = Counting(), KnownAnswers()
    runner = answers.of(inner)
    want = inner.logits(images)
    inner.asked = 0
    for part in (slice(0, 6), slice(6, 12), slice(0, 12)):
        np.testing.assert_array_equal(runner.logits(images[part]), want[part])
    assert len(answers.known) == 6
    assert inner.asked == 12 + 6


def test_what_another_run_has_kept_meanwhile_stays(images, state):
    early, late = answers_to(b"model", CPU), answers_to(b"model", CPU)
    early.of(Counting()).logits(images[:8])
    late.of(Counting()).logits(images[6:])
    keep_answers(early, b"model", CPU)
    keep_answers(late, b"model", CPU)
    assert len(answers_to(b"model", CPU).known) == 12


def test_inputs_that_differ_by_the_sign_of_a_zero_are_two_inputs(images):
    images[0, 0, 0, 0] = 0.0
    negative = images.copy()
    negative[0, 0, 0, 0] = -0.0
    inner = Counting()
    runner = KnownAnswers().of(inner)
    runner.logits(images[:1])
    runner.logits(negative[:1])
    assert inner.asked == 2


def test_a_later_run_finds_them(images, state):
    first = answers_to(b"model", CPU)
    first.of(Counting()).logits(images)
    keep_answers(first, b"model", CPU)
    inner, later = Counting(), answers_to(b"model", CPU)
    np.testing.assert_array_equal(later.of(inner).logits(images), inner.logits(images))
    assert inner.asked == 12  # by this test alone
    assert "12 inputs" in note_on(later)[0]
    assert note_on(first) == ()
    assert not answers_to(b"another model", CPU).known
    assert not answers_to(b"model", RuntimeSpec(provider="cpu", optimizations="off")).known


def test_other_versions_and_processors_compute_anew(images, state, monkeypatch):
    first = answers_to(b"model", CPU)
    first.of(Counting()).logits(images)
    keep_answers(first, b"model", CPU)
    with monkeypatch.context() as here:
        here.setattr(answered, "installed_versions", lambda: {"onnxruntime": "9.9"})
        assert not answers_to(b"model", CPU).known
    with monkeypatch.context() as here:
        here.setattr(answered, "processor_flags", lambda: frozenset({"avx1024"}))
        assert not answers_to(b"model", CPU).known
    assert len(answers_to(b"model", CPU).known) == 12


def test_of_devices_elsewhere_nothing_is_kept(images, state):
    far = RuntimeSpec(provider="ssh", options={"host": "h", "python": "p", "folder": "f"})
    answers = answers_to(b"model", far)
    answers.of(Counting()).logits(images)
    keep_answers(answers, b"model", far)
    assert not (state / "answered").exists()


def test_answers_that_somebody_else_wrote_count_for_nothing(images, state):
    answers = answers_to(b"model", CPU)
    answers.of(Counting()).logits(images)
    keep_answers(answers, b"model", CPU)
    (file,) = (state / "answered").iterdir()
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    assert not answers_to(b"model", CPU).known


def test_too_many_answers_and_too_many_models_are_not_kept(images, state, monkeypatch):
    monkeypatch.setattr(answered, "KEPT_FILES", 3)
    for number in range(5):
        answers = KnownAnswers()
        answers.of(Counting()).logits(images)
        keep_answers(answers, f"model {number}".encode(), CPU)
    assert len(list((state / "answered").iterdir())) == 3
    monkeypatch.setattr(answered, "LARGEST_BYTES", 10)
    keep_answers(answers, b"large", CPU)
    assert not answers_to(b"large", CPU).known


def test_a_state_that_cannot_be_written_stops_nothing(images, state):
    state.write_text("a file where a folder should be")
    answers = answers_to(b"model", CPU)
    answers.of(Counting()).logits(images)
    keep_answers(answers, b"model", CPU)


@pytest.fixture
def lab(lab_files, tmp_path) -> Iterator[Lab]:
    with copied(lab_files, tmp_path / "lab") as found:
        yield found


def test_a_second_gate_beside_the_same_model_says_the_same(lab, state):
    reports = []
    for number in range(2):
        path = lab.folder / f"{number}.json"
        code = run(
            "gate", "good.onnx", "--reference", "fp32.onnx", "--policy", "demo", "--report", path
        )
        reports.append((code, json.loads(path.read_text())))
    (code, first), (again, second) = reports
    assert (code, again) == (0, 0)
    assert first["measurements"] == second["measurements"]
    assert first["checks"] == second["checks"]
    kept = [note for note in second["notes"] if "kept by an earlier run" in note]
    assert len(kept) == 1
    assert not any("kept by" in note for note in first["notes"])
