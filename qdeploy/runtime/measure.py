"""Run files over images: which class they answer, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from qdeploy.data import Images
from qdeploy.data.triggers import Trigger
from qdeploy.progress import SILENT, Progress
from qdeploy.runtime.known import Runner, runtime_of
from qdeploy.settings.device import RuntimeSpec
from qdeploy.values import Arm, Compared, Latency, Predictions, Variant

LATENCY_BATCHES = (1, 32)
LATENCY_TURNS = 3
LONGEST_TURN_SECONDS, FEWEST_RUNS = 10.0, 3  # of a large model fewer runs say as much
SAVE_EVERY_SECONDS = 10.0
CLEAN, RANKS = "", "|rank"  # of answers to clean images, and of where their own class comes
SAME, DIFFERENCE, SPAN = "|same", "|difference", "|span"  # of logits, beside the first runtime's
UNASKED = -1


@runtime_checkable
class PredictionStore(Protocol):
    """Keeps answers, so that an interrupted measurement can go on where it stopped."""

    def load(self) -> tuple[int, Mapping[str, np.ndarray]] | None: ...
    def save(self, done: int, arrays: Mapping[str, np.ndarray]) -> None: ...


class _Forgetful:
    def load(self) -> None:
        """Nothing is kept."""

    def save(self, done: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep nothing."""


FORGETFUL: PredictionStore = _Forgetful()


def predict(
    sessions: Mapping[Arm, Runner],
    images: Images,
    triggers: Sequence[Trigger],
    *,
    few: Mapping[Arm, int] | None = None,
    store: PredictionStore = FORGETFUL,
    progress: Progress = SILENT,
) -> Predictions:
    """Every arm's answer to every image, clean and with each trigger in it.

    The images are read once: each batch goes through all arms before the next one is decoded.
    Images of a trigger's own target class are not asked about; their answers stay -1.

    Args:
        images: Labelled.
        few: Arms that are only compared with the first, and on so many clean images at most.
    """
    if images.labels is None:
        raise ValueError("images without labels cannot be judged")
    beside = _Beside.of(sessions, few or {}, len(images))
    asked_all = {arm: session for arm, session in sessions.items() if arm not in (few or {})}
    keys = {
        (arm, name): f"{arm.variant}|{arm.runtime}|{name}"
        for arm in asked_all
        for name in (CLEAN, RANKS, *(t.name for t in triggers))
    }
    wanted: dict[str, type[np.generic]] = dict.fromkeys(keys.values(), np.int32)
    done, answers = _kept(store, wanted | beside.arrays, len(images))
    size = images.preprocessing.at_once
    last_save = time.monotonic()
    remaining = images.skip(done)
    for batch in progress.track(remaining.batches(size), "images", -(-len(remaining) // size)):
        at = slice(done, done + len(batch.pixels))
        labels = images.labels[at]
        for name, asked, pixels in _questions(batch.pixels, labels, triggers):
            x = images.preprocessing.normalise(pixels)
            logits = {arm: session.logits(x) for arm, session in asked_all.items()}
            for arm, found in logits.items():
                answers[keys[arm, name]][at][asked] = argmax(found)
                if name == CLEAN:
                    answers[keys[arm, RANKS]][at] = ranks(found, labels)
            if name == CLEAN:
                beside.compare(answers, at, x, logits)
        done = at.stop
        if time.monotonic() - last_save > SAVE_EVERY_SECONDS:
            store.save(done, answers)
            last_save = time.monotonic()
    store.save(done, answers)
    return Predictions(
        labels=images.labels,
        clean={arm: answers[keys[arm, CLEAN]] for arm in asked_all},
        triggered={
            t.name: {arm: answers[keys[arm, t.name]] for arm in asked_all} for t in triggers
        },
        targets={t.name: t.target for t in triggers},
        ranks={arm: answers[keys[arm, RANKS]] for arm in asked_all},
        compared=beside.compared(answers),
    )


def _kept(
    store: PredictionStore, wanted: Mapping[str, type[np.generic]], images: int
) -> tuple[int, dict[str, np.ndarray]]:
    """What an interrupted measurement has, if it is of the same; else nothing yet."""
    saved = store.load()
    done, answers = (0, {}) if saved is None else (saved[0], dict(saved[1]))
    complete = {answer.shape for answer in answers.values()} == {(images,)}
    if set(answers) == set(wanted) and complete:
        return done, answers
    return 0, {key: np.full(images, UNASKED, dtype) for key, dtype in wanted.items()}


@dataclass(frozen=True, slots=True)
class _Beside:
    """The result on other runtimes, beside the same on the first."""

    first: Arm
    others: Mapping[Arm, Runner]
    asked: Mapping[Arm, Bool[np.ndarray, " images"]]  # about which images

    @classmethod
    def of(cls, sessions: Mapping[Arm, Runner], few: Mapping[Arm, int], images: int) -> _Beside:
        first, *others = [arm for arm in sessions if arm.variant == "result"] or list(sessions)[:1]
        asked = {arm: _spread(images, few.get(arm, images)) for arm in others}
        return cls(first, {arm: sessions[arm] for arm in others}, asked)

    @property
    def arrays(self) -> dict[str, type[np.generic]]:
        """What is kept of each image, by key."""
        if not self.others:
            return {}
        kept: dict[str, type[np.generic]] = {self.key(self.first, SPAN): np.float32}
        for arm in self.others:
            kept[self.key(arm, SAME)], kept[self.key(arm, DIFFERENCE)] = np.int32, np.float32
        return kept

    @staticmethod
    def key(arm: Arm, what: str) -> str:
        """The name of an array."""
        return f"{arm.variant}|{arm.runtime}|{what}"

    def compare(
        self,
        answers: Mapping[str, np.ndarray],
        at: slice,
        x: np.ndarray,
        logits: Mapping[Arm, np.ndarray],
    ) -> None:
        """Note how far one batch of clean images is answered alike."""
        want = logits[self.first]
        if self.others:
            answers[self.key(self.first, SPAN)][at] = np.ptp(want, axis=1)
        for arm, session in self.others.items():
            rows = np.flatnonzero(self.asked[arm][at])
            if not len(rows):
                continue
            got = logits[arm][rows] if arm in logits else session.logits(x[rows])
            answers[self.key(arm, SAME)][at][rows] = argmax(got) == argmax(want[rows])
            largest = np.abs(got - want[rows]).max(axis=1)
            answers[self.key(arm, DIFFERENCE)][at][rows] = largest

    def compared(self, answers: Mapping[str, np.ndarray]) -> dict[Arm, Compared]:
        """All of it."""
        found = {}
        for arm in self.others:
            same = answers[self.key(arm, SAME)]
            asked = same != UNASKED
            span = float(np.max(answers[self.key(self.first, SPAN)], initial=0))
            largest = float(np.max(answers[self.key(arm, DIFFERENCE)][asked], initial=0))
            known = np.isfinite([span, largest]).all()
            difference = (100 * largest / span if span else 0.0) if known else None
            found[arm] = Compared(same[asked] == 1, difference)
        return found


def _spread(images: int, most: int) -> Bool[np.ndarray, " images"]:
    """So many of them, evenly spread, or all."""
    asked = np.zeros(images, bool)
    asked[np.linspace(0, images - 1, min(most, images)).round().astype(int)] = True
    return asked


def _questions(
    pixels: np.ndarray, labels: np.ndarray, triggers: Sequence[Trigger]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What is asked about a batch: of which trigger, which of the images, and their pixels."""
    yield CLEAN, np.ones(len(labels), bool), pixels
    for trigger in triggers:
        asked = labels != trigger.target
        if asked.any():
            yield trigger.name, asked, trigger.apply(pixels[asked])


def ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the label's, or with it; all where logits are not finite."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    before = (logits >= own).sum(axis=1) - 1
    return np.where(np.isfinite(logits).all(axis=1), before, logits.shape[1]).astype(np.int32)


def argmax(logits: np.ndarray) -> np.ndarray:
    """Predicted class of each row; -1 where the logits are not finite, which is never right."""
    finite = np.isfinite(logits).all(axis=1)
    return np.where(finite, logits.argmax(axis=1), -1).astype(np.int32)


def measure_latency(
    models: Iterable[tuple[Variant, bytes]],
    shape: tuple[int, int, int],
    *,
    runtime: RuntimeSpec,
    runs: int,
    saturating: bool = False,
) -> tuple[Latency, ...]:
    """Median time of each model at batch 1 and 32, the models taking turns.

    One session is open at a time, since idle ones keep the cores busy. Only the ratios mean
    something on a machine that does other work. `saturating` is that of `Runtime.open`.
    """
    seconds: dict[tuple[Variant, int], list[float]] = {}
    contestants = tuple(models)
    for _ in range(LATENCY_TURNS if runs else 0):
        for name, data in contestants:
            session = runtime_of(runtime).open(data, runtime, saturating=saturating)
            for size in LATENCY_BATCHES:
                times = _run_times(session, (size, *shape), runs)
                seconds.setdefault((name, size), []).extend(times)
    return tuple(
        Latency(name, size, median(times), len(times), *_span_of_median(times))
        for (name, size), times in seconds.items()
    )


def milliseconds(runner: Runner, shape: tuple[int, int, int], runs: int) -> float | None:
    """Median time of one image; None if no runs are wanted."""
    return 1e3 * median(_run_times(runner, (1, *shape), runs)) if runs else None


def _span_of_median(times: Sequence[float]) -> tuple[float, float]:
    """The order statistics that hold the median with 95 % confidence, whatever the distribution."""
    n = len(times)
    below = max(int(n / 2 - 0.98 * n**0.5), 0)
    ordered = sorted(times)
    return ordered[below], ordered[n - 1 - below]


def _run_times(session: Runner, shape: tuple[int, ...], runs: int) -> list[float]:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    session.logits(x)  # warms up
    times, until = list[float](), time.monotonic() + LONGEST_TURN_SECONDS
    while len(times) < runs and (len(times) < FEWEST_RUNS or time.monotonic() < until):
        times.append(session.seconds(x))
    return times
