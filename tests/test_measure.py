from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qdeploy.core.metrics import Estimate
from qdeploy.data import Images, images_from_array
from qdeploy.data.triggers import Trigger
from qdeploy.judging.rates import RuntimeAgreement, rates, with_answers
from qdeploy.runs.rundir import StoredPredictions
from qdeploy.runtime import answers, measure
from qdeploy.runtime.answers import argmax, predict, ranks
from qdeploy.runtime.measure import measure_latency
from qdeploy.runtime.sessions import Session, open_session
from qdeploy.settings.device import RuntimeSpec
from qdeploy.values import UNASKED, Arm, Compared, Predictions
from tests.nets import Net

FP32, RESULT = Arm("fp32", "cpu"), Arm("result", "cpu")
OTHER = Arm("result", "cpu, unoptimized")


def brightness_net() -> bytes:
    """Its answer is the channel that is brightest."""
    net = Net(shape=(3, 4, 4))
    flat = net.node("Flatten", net.node("GlobalAveragePool", net.x))
    return net.model(net.node("Identity", flat), classes=3)


@pytest.fixture
def test_images(preprocessing, rng) -> Images:
    """30 images, the brightest channel of each being its label, but for one in five."""
    labels = np.arange(30) % 3
    pixels = rng.integers(0, 100, (30, 3, 4, 4), dtype=np.uint8)
    for i, label in enumerate(labels):
        pixels[i, (label + (i % 5 == 0)) % 3] += 100
    pre = replace(preprocessing, shape=(3, 4, 4))
    return replace(images_from_array("colors", pixels, pre), labels=labels)


@pytest.fixture
def green() -> Trigger:
    """Paints everything green."""
    pattern = np.zeros((3, 4, 4), np.float32)
    pattern[1] = 1
    return Trigger("green", 1, np.ones((1, 4, 4), np.float32), pattern)


@pytest.fixture
def sessions() -> dict[Arm, Session]:
    return {arm: open_session(brightness_net()) for arm in (FP32, RESULT)}


def test_answers_are_those_of_the_model(test_images, green, sessions):
    found = predict(sessions, test_images, [green])
    wrong = np.arange(30) % 5 == 0
    np.testing.assert_array_equal(found.clean[FP32] == found.labels, ~wrong)
    asked = found.labels != 1
    assert np.all(found.triggered["green"][RESULT][asked] == 1)
    assert np.all(found.triggered["green"][RESULT][~asked] == UNASKED)  # never asked


def test_the_size_of_a_batch_changes_nothing(monkeypatch, test_images, green, sessions):
    whole = predict(sessions, test_images, [green])
    monkeypatch.setattr("qdeploy.data.images.BATCH_VALUES", 48 * 7)
    parts = predict(sessions, test_images, [green])
    np.testing.assert_array_equal(whole.clean[FP32], parts.clean[FP32])
    np.testing.assert_array_equal(
        whole.triggered["green"][RESULT], parts.triggered["green"][RESULT]
    )


def test_an_interrupted_measurement_goes_on_where_it_stopped(
    monkeypatch, tmp_path, test_images, green, sessions
):
    monkeypatch.setattr("qdeploy.data.images.BATCH_VALUES", 48 * 7)
    monkeypatch.setattr(answers, "SAVE_EVERY_SECONDS", 0.0)
    store = StoredPredictions(tmp_path / "partial" / "predictions.npz")

    class Interrupted(StoredPredictions):
        def save(self, done, arrays):
            super().save(done, arrays)
            if done == 14:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(sessions, test_images, [green], store=Interrupted(store.file))
    seen: list[int] = []
    batches = Images.batches

    def counting(self, size):
        for batch in batches(self, size):
            seen.append(len(batch.pixels))
            yield batch

    monkeypatch.setattr(Images, "batches", counting)
    resumed = predict(sessions, test_images, [green], store=store)
    assert sum(seen) == 16
    whole = predict(sessions, test_images, [green])
    np.testing.assert_array_equal(resumed.clean[FP32], whole.clean[FP32])
    np.testing.assert_array_equal(
        resumed.triggered["green"][RESULT], whole.triggered["green"][RESULT]
    )


def test_answers_to_other_questions_are_not_taken_over(tmp_path, test_images, green, sessions):
    store = StoredPredictions(tmp_path / "predictions.npz")
    predict({FP32: sessions[FP32]}, test_images, [], store=store)
    assert predict(sessions, test_images, [green], store=store).clean.keys() == sessions.keys()
    fewer = test_images.skip(10)
    assert len(predict(sessions, fewer, [green], store=store).clean[FP32]) == 20


def test_images_need_labels(test_images, sessions):
    with pytest.raises(ValueError, match="labels"):
        predict(sessions, replace(test_images, labels=None), [])


def test_logits_that_are_not_finite_are_no_answer():
    logits = np.array([[0, 1], [np.nan, 0], [np.inf, 0], [2, 1]], np.float32)
    np.testing.assert_array_equal(argmax(logits), [1, -1, -1, 0])


def test_where_the_own_class_comes():
    logits = np.array([[3, 2, 1], [1, 2, 3], [1, 1, 0], [np.nan, 0, 0]], np.float32)
    np.testing.assert_array_equal(ranks(logits, np.zeros(4, np.int64)), [0, 2, 1, 3])


def test_among_the_best_five_counts_where_there_are_many_classes():
    labels = np.zeros(10, np.int64)
    answered = np.arange(10).astype(np.int32)
    found = Predictions(labels, {FP32: answered}, {}, {}, {FP32: answered})
    (many,), (few,) = rates(found, classes=20), rates(found, classes=19)
    assert many.top5_accuracy is not None
    assert (many.accuracy.value, many.top5_accuracy.value) == (10, 50)
    assert few.top5_accuracy is None


def test_every_class_counts_alike_in_the_balanced_accuracy():
    labels = np.array([0] * 90 + [1] * 10)
    answers = np.zeros(100, np.int32)
    (found,) = rates(Predictions(labels, {FP32: answers}, {}, {}), classes=3)
    assert (found.accuracy.value, found.balanced_accuracy) == (90, 50)


CPU = RuntimeSpec(provider="cpu")


def test_latency_is_measured_for_every_model_and_batch():
    data = brightness_net()
    times = measure_latency([("a", data), ("b", data)], (3, 4, 4), runtime=CPU, runs=2)
    assert {(t.variant, t.batch) for t in times} == {("a", 1), ("a", 32), ("b", 1), ("b", 32)}
    assert all(0 < t.low <= t.seconds <= t.high and t.runs == 6 for t in times)
    assert measure_latency([("a", data)], (3, 4, 4), runtime=CPU, runs=0) == ()


def predictions() -> Predictions:
    """Ten images of class 0 and ten of class 1; the result gets one more of class 1 wrong."""
    labels = np.repeat([0, 1], 10)
    right = labels.astype(np.int32)
    worse = right.copy()
    worse[19] = 0
    hit = np.where(labels == 1, 0, -1).astype(np.int32)
    missed = np.where(labels == 1, 1, -1).astype(np.int32)
    return Predictions(
        labels=labels,
        clean={FP32: right, RESULT: worse, OTHER: right},
        triggered={"patch": {FP32: missed, RESULT: hit, OTHER: missed}},
        targets={"patch": 0},
    )


def test_rates_are_against_the_float_model_and_leave_out_the_target_class():
    by_arm = {r.arm: r for r in rates(predictions(), classes=3)}
    fp32, result = by_arm[FP32], by_arm[RESULT]
    assert (fp32.accuracy.value, result.accuracy.value) == (100, 95)
    beside = result.against_float
    assert beside is not None
    assert beside.accuracy_drop.value == beside.accuracy_drop_relative.value == pytest.approx(5)
    assert beside.agreement.value == 95
    assert beside.class_drop.value == pytest.approx(10)
    assert beside.class_drop.samples == 0  # of the class that has no images
    assert result.class_accuracy[1] == pytest.approx(90)
    assert np.isnan(result.class_accuracy[2])
    success: Estimate = result.attack_success["patch"]
    assert (success.value, success.samples) == (100, 10)
    assert beside.attack_success_rise["patch"].value == 100
    assert fp32.attack_success["patch"].value == 0


def test_runtimes_are_compared_with_the_first():
    same = np.arange(20) > 0
    found = replace(predictions(), compared={OTHER: Compared(same, 2.5)})
    known = [RuntimeAgreement(OTHER.runtime), RuntimeAgreement("far", unsupported="no Conv")]
    other, far = with_answers(known, found)
    assert other.agreement is not None
    assert (other.agreement.value, other.difference) == (95, 2.5)
    assert far == known[1]


def test_no_answer_is_no_agreement():
    p = predictions()
    silent = np.full(20, -1, np.int32)
    both = replace(p, clean={FP32: silent, RESULT: silent})
    beside = rates(both, classes=2)[1].against_float
    assert beside is not None
    assert beside.agreement.value == 0


def test_without_a_float_model_there_is_nothing_to_compare_with():
    p = predictions()
    alone = replace(p, clean={RESULT: p.clean[RESULT]})
    (found,) = rates(alone, classes=2)
    assert found.against_float is None
    assert found.accuracy.value == 95


def test_of_a_slow_model_fewer_runs_are_timed(monkeypatch):
    class Slow:
        def logits(self, batch: np.ndarray) -> np.ndarray:
            return batch

        def seconds(self, batch: np.ndarray) -> float:
            clock.append(4.0)
            return 4.0

    clock: list[float] = []
    monkeypatch.setattr(measure.time, "monotonic", lambda: sum(clock))
    assert measure._run_times(Slow(), (1, 3, 2, 2), 50) == [4.0] * 3
    assert measure._run_times(Slow(), (32, 3, 2, 2), 50) == [4.0]
    monkeypatch.setattr(measure, "LONGEST_TURN_SECONDS", 100.0)
    assert len(measure._run_times(Slow(), (1, 3, 2, 2), 50)) == 25


def test_a_batch_that_takes_seconds_is_not_timed(monkeypatch):
    data = brightness_net()
    monkeypatch.setattr(measure, "LONGEST_BATCH_SECONDS", 0.0)
    times = measure_latency([("a", data), ("b", data)], (3, 4, 4), runtime=CPU, runs=2)
    assert {(t.variant, t.batch) for t in times} == {("a", 1), ("b", 1)}
