"""Arms that are asked about a part of the images, until that is enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from qdeploy.core.metrics import unseen_at_most
from qdeploy.data import Images, images_from_array
from qdeploy.data.triggers import Trigger
from qdeploy.inputs.opened import NO_EVIDENCE
from qdeploy.judging.checks import decided
from qdeploy.judging.rates import ArmRates, RuntimeAgreement, rates, with_answers
from qdeploy.runs.rundir import StoredPredictions
from qdeploy.runtime import answers
from qdeploy.runtime.answers import Sampling, predict
from qdeploy.settings.policy import GateSpec, load_policy
from qdeploy.values import UNASKED, Arm, Compared, Interface, Predictions

FLOAT, RESULT = Arm("fp32", "cpu"), Arm("result", "cpu")
NEAREST, OTHER = Arm("nearest", "cpu"), Arm("result", "other")
COUNT = 40


class Brightest:
    """Answers the brightest channel; of images in `wrong`, named by their first pixel, another."""

    def __init__(self, wrong: Iterable[int] = ()) -> None:
        self.wrong, self.asked = set(wrong), []

    def logits(self, batch: np.ndarray) -> np.ndarray:
        numbers = np.rint(batch[:, 0, 0, 0] * 255).astype(int)
        self.asked += numbers.tolist()
        found = batch[:, :, 1:].mean(axis=(2, 3))
        off = np.isin(numbers, list(self.wrong))
        found[off] = np.roll(found[off], 1, axis=1)
        return found.astype(np.float32)

    def interface(self, *, where: str) -> Interface:
        raise NotImplementedError(where)

    def seconds(self, batch: np.ndarray) -> float:
        raise NotImplementedError(batch)


@pytest.fixture
def images(preprocessing) -> Images:
    """Every image has its own number in its first pixel; its label is its brightest channel."""
    labels = np.arange(COUNT) % 3
    pixels = np.full((COUNT, 3, 4, 4), 20, np.uint8)
    for number, label in enumerate(labels):
        pixels[number, label, 1:] = 200
        pixels[number, 0, 0, 0] = number
    pre = replace(preprocessing, shape=(3, 4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
    return replace(images_from_array("numbers", pixels, pre), labels=labels)


@pytest.fixture(autouse=True)
def early_looks(monkeypatch) -> None:
    monkeypatch.setattr(answers, "LOOKS", (8, 16, 24))


def sampled(enough: Mapping[Arm, int], seed: int = 5) -> Sampling:
    """Each arm until it was asked about so many."""

    def says(arm: Arm, known: Predictions) -> bool:
        return int(known.asked(arm).sum()) >= enough[arm]

    return Sampling(seed, {}, frozenset(enough), says)


def sessions(**wrong: Iterable[int]) -> dict[Arm, Brightest]:
    return {
        arm: Brightest(wrong.get(name, ()))
        for name, arm in (
            ("fp32", FLOAT), ("nearest", NEAREST), ("result", RESULT), ("other", OTHER),
        )
    }  # fmt: skip


def test_an_arm_is_asked_until_it_is_enough_and_all_in_one_order(images):
    runners = sessions(other=range(40))
    found = predict(runners, images, [], sampling=sampled({NEAREST: 8, OTHER: 10}))
    drawn = np.random.default_rng(5).permutation(COUNT)
    assert sorted(runners[NEAREST].asked) == sorted(drawn[:8])
    assert sorted(runners[OTHER].asked) == sorted(drawn[:16])  # the look after 10
    assert len(runners[RESULT].asked) == len(runners[FLOAT].asked) == COUNT  # kept, not asked again
    np.testing.assert_array_equal(np.flatnonzero(found.asked(NEAREST)), np.sort(drawn[:8]))
    assert found.compared[OTHER].early
    assert found.compared[OTHER].same.shape == (16,)
    assert not found.compared[OTHER].same.any()


def test_what_is_never_enough_is_asked_about_everything(images):
    runners = sessions()
    found = predict(runners, images, [], sampling=sampled({OTHER: 1000}))
    assert sorted(runners[OTHER].asked) == list(range(COUNT))
    assert not found.compared[OTHER].early
    assert found.asked(OTHER).all()


def test_logits_that_are_too_many_to_keep_are_asked_again(images, monkeypatch):
    monkeypatch.setattr(answers, "LARGEST_KEPT", 0)
    runners = sessions(other=(1, 2))
    found = predict(runners, images, [], sampling=sampled({OTHER: 1000}))
    assert len(runners[RESULT].asked) == 2 * COUNT
    assert found.compared[OTHER].same.sum() == COUNT - 2


@pytest.mark.parametrize("stop_after", [3, 6, 8, 9])
def test_an_interrupted_sample_goes_on_where_it_stopped(images, monkeypatch, tmp_path, stop_after):
    monkeypatch.setattr("qdeploy.data.images.BATCH_VALUES", 48 * 7)
    monkeypatch.setattr(answers, "SAVE_EVERY_SECONDS", 0.0)
    kept = StoredPredictions(tmp_path / "partial" / "predictions.npz")

    class Interrupted:
        left = stop_after

        def load(self) -> None:
            return None

        def save(self, done: int, arrays: Mapping[str, np.ndarray]) -> None:
            kept.save(done, arrays)
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    sampling = sampled({NEAREST: 8, OTHER: 16})
    with pytest.raises(KeyboardInterrupt):
        predict(sessions(other=(3, 30)), images, [], sampling=sampling, store=Interrupted())
    again = sessions(other=(3, 30))
    found = predict(again, images, [], sampling=sampling, store=kept)
    whole = predict(sessions(other=(3, 30)), images, [], sampling=sampling)
    for arm in (FLOAT, NEAREST, RESULT, OTHER):
        np.testing.assert_array_equal(found.clean[arm], whole.clean[arm])
    np.testing.assert_array_equal(found.compared[OTHER].same, whole.compared[OTHER].same)
    assert len(again[FLOAT].asked) == max(COUNT - 7 * stop_after, 0)


def test_a_trigger_is_asked_about_with_the_images_it_belongs_to(images):
    pattern = np.zeros((3, 4, 4), np.float32)
    pattern[1] = 1
    mask = np.ones((1, 4, 4), np.float32)
    mask[0, 0, 0] = 0  # an image keeps its number
    green = Trigger("green", 1, mask, pattern)
    found = predict(sessions(), images, [green], sampling=sampled({OTHER: 8}))
    answered, asked = found.triggered["green"][OTHER], found.asked(OTHER)
    of_others = images.labels != 1
    assert np.all(answered[asked & of_others] == 1)
    assert np.all(answered[~(asked & of_others)] == UNASKED)


def test_nothing_found_among_so_many_leaves_what_clopper_and_pearson_say():
    share = 1 - 0.001 ** (1 / 600)  # the upper end at none of 600 has this closed form
    assert unseen_at_most(0, 600, 9400) == np.ceil(10_000 * share)
    assert unseen_at_most(600, 600, 9400) == 9400
    assert unseen_at_most(0, 0, 50) == 50
    assert unseen_at_most(7, 50, 0) == 0


@pytest.mark.parametrize("hits", [0, 3, 40, 400])
def test_what_is_unseen_is_hardly_ever_more_than_that(hits):
    rng = np.random.default_rng(hits)
    drawn = rng.hypergeometric(hits, 2000 - hits, 600, size=20_000)
    counts, times = np.unique(drawn, return_counts=True)
    bounds = np.array([unseen_at_most(int(n), 600, 1400) for n in counts])
    assert times[hits - counts > bounds].sum() <= 0.001 * 20_000 + 3 * (20 * 0.999) ** 0.5


def predictions(rng: np.random.Generator, differing: float, asked: int) -> tuple[Predictions, ...]:
    """What a runtime says that differs here and there: of all, and of those that were asked."""
    count = 3000
    labels = rng.integers(0, 4, count)

    def noisy(answers: np.ndarray, share: float) -> np.ndarray:
        changed = rng.random(count) < share
        return np.where(changed, rng.integers(0, 4, count), answers).astype(np.int32)

    expected = noisy(labels, 0.2)
    first = noisy(expected, 0.05)
    other = noisy(first, differing)
    hit = np.where(labels == 0, UNASKED, noisy(expected, 0.1)).astype(np.int32)
    hit_other = np.where(labels == 0, UNASKED, noisy(hit, differing)).astype(np.int32)
    kept = np.zeros(count, bool)
    kept[rng.permutation(count)[:asked]] = True
    everything = Predictions(
        labels=labels,
        clean={FLOAT: expected, RESULT: first, OTHER: other},
        triggered={"patch": {FLOAT: hit, RESULT: hit, OTHER: hit_other}},
        targets={"patch": 0},
        compared={OTHER: Compared(other == first, 1.0)},
    )
    part = replace(
        everything,
        clean={**everything.clean, OTHER: np.where(kept, other, UNASKED).astype(np.int32)},
        triggered={
            "patch": {
                **everything.triggered["patch"],
                OTHER: np.where(kept, hit_other, UNASKED).astype(np.int32),
            }
        },
        compared={OTHER: Compared((other == first)[kept], 1.0, early=True)},
    )
    return everything, part


def of_other(found: Predictions) -> ArmRates:
    return next(one for one in rates(found, 4) if one.arm == OTHER)


@pytest.mark.parametrize("differing", [0.0, 0.002, 0.05, 0.5])
def test_the_intervals_of_a_part_hold_those_of_all(differing):
    for seed in range(10):
        everything, part = predictions(np.random.default_rng(seed), differing, 600)
        whole, sample = of_other(everything), of_other(part)
        assert whole.against_float is not None
        assert sample.against_float is not None
        pairs = [
            (whole.accuracy, sample.accuracy),
            (whole.attack_success["patch"], sample.attack_success["patch"]),
            *(
                (getattr(whole.against_float, name), getattr(sample.against_float, name))
                for name in ("accuracy_drop", "accuracy_drop_relative", "class_drop", "agreement")
            ),
            (
                whole.against_float.attack_success_rise["patch"],
                sample.against_float.attack_success_rise["patch"],
            ),
        ]
        for of_all, of_part in pairs:
            assert of_part.low <= of_all.value <= of_part.high
            assert of_part.samples < of_all.samples
            assert of_part.high - of_part.low >= of_all.high - of_all.low


def test_a_part_tells_almost_nothing_of_a_file_that_answers_otherwise():
    _, part = predictions(np.random.default_rng(0), 0.5, 600)
    found = of_other(part).accuracy
    assert found.high - found.low > 40


def test_a_file_that_is_only_shown_is_counted_on_what_it_was_asked(images):
    found = predict(
        sessions(nearest=range(40)), images, [], sampling=sampled({NEAREST: 8, OTHER: 8})
    )
    nearest = next(one for one in rates(found, 3) if one.arm == NEAREST)
    assert (nearest.accuracy.value, nearest.accuracy.samples) == (0, 8)
    assert nearest.against_float is not None
    assert nearest.against_float.accuracy_drop.value == 100


GATE = GateSpec(max_accuracy_drop=6.0, min_agreement=80.0, max_attack_success=10.0)


def whether_decided(differing: float, asked: int, gate: GateSpec = GATE) -> bool:
    _, part = predictions(np.random.default_rng(1), differing, asked)
    (beside,) = with_answers([RuntimeAgreement("other")], part)
    return decided(of_other(part), beside, NO_EVIDENCE, gate)


def test_it_is_decided_where_every_limit_is_far():
    loose = GATE.model_copy(update={"max_attack_success": 40.0})
    assert whether_decided(0.0, 1200, loose)


def test_it_is_not_decided_near_a_limit():
    assert not whether_decided(0.0, 100)
    near = GATE.model_copy(update={"max_accuracy_drop": 3.0, "max_attack_success": 40.0})
    assert not whether_decided(0.0, 600, near)


def test_too_few_images_decide_nothing():
    loose = GATE.model_copy(update={"max_attack_success": 40.0, "min_images": 1500})
    assert not whether_decided(0.0, 1200, loose)


def test_what_is_decided_by_its_value_is_not_let_go_by_it():
    """The value of a part leans on the first runtime; only the interval says what is known."""
    limit = of_other(predictions(np.random.default_rng(1), 0.0, 300)[1]).attack_success["patch"]
    by_value = GATE.model_copy(
        update={
            "max_attack_success": limit.value + 0.5,
            "decided_by_value": frozenset({"attack_success"}),
        }
    )
    assert not whether_decided(0.0, 300, by_value)
    assert whether_decided(0.0, 3000, GATE.model_copy(update={"max_attack_success": 40.0}))


def test_the_value_of_a_part_is_the_first_runtimes_and_what_was_seen_of_the_difference():
    for seed in range(5):
        everything, part = predictions(np.random.default_rng(seed), 0.5, 1200)
        whole, sample = of_other(everything), of_other(part)
        assert sample.accuracy.value == pytest.approx(whole.accuracy.value, abs=4)
        assert sample.against_float is not None
        assert whole.against_float is not None
        drop, of_all = sample.against_float.accuracy_drop, whole.against_float.accuracy_drop
        assert drop.value == pytest.approx(of_all.value, abs=4)
        assert drop.low <= drop.value <= drop.high
        assert sample.against_float.class_drop.low >= -100
        assert sample.against_float.class_drop.high <= 100


def test_a_runtime_that_answers_otherwise_is_soon_seen_through():
    _, part = predictions(np.random.default_rng(1), 0.5, 600)
    (beside,) = with_answers([RuntimeAgreement("other")], part)
    assert beside.agreement is not None
    assert beside.agreement.samples == 600
    assert beside.agreement.high < 75


def test_the_bundled_policies_have_looks_that_suffice_for_them():
    needed = load_policy("default").gate.min_images
    assert needed <= 600
