"""Inputs between two classes, put to several runtimes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qdeploy.runtime import known
from qdeploy.runtime.boundary import boundary, one_of_two
from tests import gate_lab
from tests.gate_lab import run


def linear(x: np.ndarray) -> np.ndarray:
    """Three classes by the first three values."""
    return x.reshape(len(x), -1)[:, :3].astype(np.float64)


def forked(x: np.ndarray) -> np.ndarray:
    """The same, but that the fourth class wins where two others nearly tie."""
    found = np.concatenate([linear(x), np.full((len(x), 1), -9.0)], axis=1)
    best = np.sort(found, axis=1)
    found[best[:, -1] - best[:, -2] < 1e-4, 3] = 9.0
    return found


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(40, 3, 2, 2)).astype(np.float32)


def test_inputs_are_found_on_either_side_of_where_an_answer_changes(images):
    found = boundary(linear, images, 16)
    assert len(found.inputs) == 24  # of 32, three quarters
    answered = linear(found.inputs)
    assert (answered.argmax(1)[:, None] == found.classes).any(1).all()
    assert (found.classes[:, 0] != found.classes[:, 1]).all()
    margins = np.sort(answered, axis=1)
    assert (margins[:, -1] - margins[:, -2]).max() < 1e-5


def test_a_runtime_may_take_either_class_but_no_third(images):
    found = boundary(linear, images, 16)
    assert one_of_two(linear, found).all()
    other = lambda x: linear(x) + np.array([1e-6, 0, -1e-6])  # noqa: E731 - rounds otherwise
    assert one_of_two(other, found).all()
    assert not one_of_two(forked, found).any()
    assert (forked(images).argmax(1) == linear(images).argmax(1)).all()  # nothing else shows it


def test_inputs_where_three_classes_meet_are_left_out_but_no_more_than_a_quarter(images):
    """Honest arithmetic may take any of the three; a file cannot have more of them left out."""

    def meeting(x: np.ndarray, share: float) -> np.ndarray:
        """A fourth class just behind the best, where the first value is among the largest."""
        given = np.concatenate([linear(x), np.full((len(x), 1), -1e4)], axis=1)
        near = x[:, 2, 1, 1] > np.quantile(images[:, 2, 1, 1], 1 - share)
        given[near, 3] = given[near, :3].max(axis=1) - 1e-6
        return given

    def taken(x: np.ndarray, share: float) -> np.ndarray:
        given = meeting(x, share)
        given[:, 3] += 2e-6
        return given

    all_of_them = boundary(lambda x: meeting(x, 0.0), images, 16)
    assert len(all_of_them.inputs) == round(0.75 * 32)
    few = boundary(lambda x: meeting(x, 0.1), images, 16)
    assert one_of_two(lambda x: taken(x, 0.1), few).all()
    many = boundary(lambda x: meeting(x, 0.6), images, 16)
    assert one_of_two(lambda x: taken(x, 0.6), many).mean() < 0.9


def test_images_that_are_all_answered_alike_have_no_boundary(images):
    found = boundary(lambda x: np.tile([[1.0, 0.0]], (len(x), 1)), images, 16)
    assert found.inputs.shape == (0, 3, 2, 2)
    assert not len(one_of_two(linear, found))


def test_answers_that_are_no_numbers_are_not_walked_between(images):
    def broken(x: np.ndarray) -> np.ndarray:
        answers = linear(x)
        answers[x[:, 0, 0, 0] > 0] = np.nan
        return answers

    found = boundary(broken, images, 16)
    assert np.isfinite(broken(found.inputs)).all()


class _Forks:
    """A runtime that answers as another does, but where two classes nearly tie."""

    def __init__(self, runner: known.Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> object:
        return getattr(self._runner, name)

    def logits(self, batch: np.ndarray) -> np.ndarray:
        found = self._runner.logits(batch).copy()
        best = np.sort(found, axis=1)
        ties = best[:, -1] - best[:, -2] < 2e-3 * np.ptp(found)
        found[ties, found[ties].argmin(axis=1)] = 2 * np.abs(found).max()
        return found


@pytest.mark.parametrize("forks", [False, True])
def test_the_gate_sees_a_runtime_that_answers_a_third_class(
    lab_files, tmp_path, monkeypatch, forks
):
    original = known.RUNTIMES["reference"].open

    def opened(self: object, *given: object, **more: object) -> known.Runner:
        runner = original(*given, **more)
        return _Forks(runner) if forks else runner

    monkeypatch.setattr(type(known.RUNTIMES["reference"]), "open", opened)
    with gate_lab.copied(lab_files, tmp_path / "lab") as lab:
        (lab / "two.toml").write_text(
            'schema_version = 1\nname = "two"\ndescription = "x"\n'
            '[[runtimes]]\nprovider = "cpu"\n[[runtimes]]\nprovider = "reference"\n'
        )
        code = run("gate", lab / "good.onnx", "--reference", lab / "fp32.onnx", "--policy", "demo",
                   "--device", lab / "two.toml", "--made-by", lab / "good.json",
                   "--report", lab / "r.json")  # fmt: skip
        report = json.loads((lab / "r.json").read_text())
    (row,) = report["runtime_agreement"]
    failed = {check["name"] for check in report["checks"] if check["state"] != "within"}
    if forks:
        assert code == 3
        assert "boundary_agreement" in failed
        assert row["boundary"]["value"] < row["agreement"]["value"] - 10
    else:
        assert (code, failed) == (0, set())
        assert row["boundary"]["value"] == 100
