"""Which class every file answers to every image, clean and with triggers in it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from qdeploy.data import Images
from qdeploy.data.triggers import Trigger
from qdeploy.progress import SILENT, Progress
from qdeploy.runtime.known import Runner
from qdeploy.values import NOT_FINITE, UNASKED, Arm, Compared, Predictions

SAVE_EVERY_SECONDS = 10.0
CLEAN, RANKS = "", "|rank"  # of answers to clean images, and of where their own class comes
SAME, DIFFERENCE, SPAN = "|same", "|difference", "|span"  # of logits, beside the first runtime's
LARGEST_KEPT = 64 << 20  # bytes of the first runtime's logits; beyond it is asked again
LOOKS = (600, 1200, 2400, 3600, 4800, 7200)  # images after which it may be enough

Enough = Callable[[Arm, Predictions], bool]


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


@dataclass(frozen=True, slots=True)
class Sampling:
    """Arms that are asked about a part of the images, in an order that nobody foresees."""

    seed: int = 0  # of the order
    few: Mapping[Arm, int] = field(default_factory=dict)  # so many, clean, beside the first alone
    until: frozenset[Arm] = frozenset()  # more and more of them, until it is enough
    enough: Enough = lambda _arm, _predictions: False


def predict(
    sessions: Mapping[Arm, Runner],
    images: Images,
    triggers: Sequence[Trigger],
    *,
    sampling: Sampling | None = None,
    store: PredictionStore = FORGETFUL,
    progress: Progress = SILENT,
) -> Predictions:
    """Every arm's answer to every image, clean and with each trigger in it.

    Each batch goes through all arms before the next one is decoded; arms that are sampled have
    their turn after that. Images of a trigger's own target class are not asked about.

    Args:
        images: Labelled.
        sampling: None asks every arm about everything.
    """
    if images.labels is None:
        raise ValueError("images without labels cannot be judged")
    asking = _Asking(sessions, images, triggers, images.labels, sampling or Sampling(), store)
    asking.ask_of_all(progress)
    asking.ask_of_parts(progress)
    store.save(asking.done, asking.answers)
    return asking.predictions()


class _Asking:
    """Who has been asked about what: `done` images of all, and after them of the order."""

    def __init__(
        self,
        sessions: Mapping[Arm, Runner],
        images: Images,
        triggers: Sequence[Trigger],
        labels: Int64[np.ndarray, " images"],
        sampling: Sampling,
        store: PredictionStore,
    ) -> None:
        self.sessions, self.images, self.triggers, self.labels = sessions, images, triggers, labels
        self.sampling, self.store, self.saved_at = sampling, store, time.monotonic()
        self.first, *others = [a for a in sessions if a.variant == "result"] or list(sessions)[:1]
        self.beside = frozenset(others)
        self.whole = [a for a in sessions if a not in sampling.few and a not in sampling.until]
        looks = {*LOOKS, *sampling.few.values()}
        self.edges = [0, *sorted(at for at in looks if at < len(images)), len(images)]
        self.order = self._order()
        self.logits: Float32[np.ndarray, "images classes"] | None = None
        self.done, self.answers = self._kept()

    def ask_of_all(self, progress: Progress) -> None:
        """Every image, of the arms that are not sampled."""
        left = self.images.skip(self.done)
        for batch in self._batches(left, "images", progress):
            rows = np.arange(self.done, self.done + len(batch))
            self._ask(rows, batch, self.whole)

    def ask_of_parts(self, progress: Progress) -> None:
        """Images in the drawn order, of the arms that have not been asked enough."""
        asked = self.done - len(self.images)
        for start, stop in pairwise([asked, *(edge for edge in self.edges if edge > asked)]):
            arms = [arm for arm in self.sessions if self._goes_on(arm, start)]
            if not arms:
                return
            part, at = self.images.only(self.order[start:stop]), start
            for batch in self._batches(part, "images of a part", progress):
                self._ask(self.order[at : at + len(batch)], batch, arms)
                at += len(batch)

    def predictions(self) -> Predictions:
        """What is known so far."""
        judged = [arm for arm in self.sessions if arm not in self.sampling.few]
        return Predictions(
            labels=self.labels,
            clean={arm: self.answers[_key(arm, CLEAN)] for arm in judged},
            triggered={
                t.name: {arm: self.answers[_key(arm, t.name)] for arm in judged}
                for t in self.triggers
            },
            targets={t.name: t.target for t in self.triggers},
            ranks={arm: self.answers[_key(arm, RANKS)] for arm in judged},
            compared={arm: self._compared(arm) for arm in self.sessions if arm in self.beside},
        )

    def _order(self) -> Int64[np.ndarray, " images"]:
        """Drawn; in the order of the images themselves between one look and the next."""
        drawn = np.random.default_rng(self.sampling.seed).permutation(len(self.images))
        return np.concatenate([np.sort(drawn[a:b]) for a, b in pairwise(self.edges)])

    def _goes_on(self, arm: Arm, asked: int) -> bool:
        """Whether an arm is asked about what comes after so many of the order."""
        if arm in self.sampling.few:
            return asked < self.sampling.few[arm]
        if arm not in self.sampling.until or asked == 0:
            return arm in self.sampling.until
        if self.answers[_key(arm, CLEAN)][self.order[asked - 1]] == UNASKED:
            return False
        return asked not in LOOKS or not self.sampling.enough(arm, self.predictions())

    def _batches(
        self, images: Images, label: str, progress: Progress
    ) -> Iterator[Float32[np.ndarray, "images channels height width"]]:
        """Pixels; after each batch has been asked about, it is done."""
        size = images.preprocessing.at_once
        for batch in progress.track(images.batches(size), label, -(-len(images) // size)):
            yield batch.pixels
            self.done += len(batch.pixels)
            if time.monotonic() - self.saved_at > SAVE_EVERY_SECONDS:
                self.store.save(self.done, self.answers)
                self.saved_at = time.monotonic()

    def _ask(
        self, rows: Int64[np.ndarray, " batch"], pixels: np.ndarray, arms: Iterable[Arm]
    ) -> None:
        labels = self.labels[rows]
        for name, asked, shown in _questions(pixels, labels, self.triggers):
            x = self.images.preprocessing.normalise(shown)
            wanted = [arm for arm in arms if name == CLEAN or arm not in self.sampling.few]
            logits = {arm: self.sessions[arm].logits(x) for arm in wanted}
            for arm, found in logits.items():
                if arm not in self.sampling.few:
                    self.answers[_key(arm, name)][rows[asked]] = argmax(found)
                    if name == CLEAN:
                        self.answers[_key(arm, RANKS)][rows] = ranks(found, labels)
            if name == CLEAN and self.beside:
                self._compare(rows, x, logits)

    def _compare(
        self, rows: Int64[np.ndarray, " batch"], x: np.ndarray, logits: Mapping[Arm, np.ndarray]
    ) -> None:
        """Note how far one batch of clean images is answered alike on other runtimes."""
        want = logits.get(self.first)
        if want is not None:
            self.answers[_key(self.first, SPAN)][rows] = np.ptp(want, axis=1)
            self._keep(rows, want)
        elif any(arm in self.beside for arm in logits):
            want = self._of_the_first(rows, x)
        for arm in self.beside & logits.keys():
            got = logits[arm]
            assert want is not None  # noqa: S101 - there is something to compare
            self.answers[_key(arm, SAME)][rows] = argmax(got) == argmax(want)
            self.answers[_key(arm, DIFFERENCE)][rows] = np.abs(got - want).max(axis=1)

    def _keep(self, rows: np.ndarray, logits: np.ndarray) -> None:
        """The first runtime's logits, if they are few enough, for those who are asked later."""
        size = math.prod((len(self.images), logits.shape[1], 4))
        if not self.beside.issubset(self.whole) and size <= LARGEST_KEPT:
            if self.logits is None:
                self.logits = np.full((len(self.images), logits.shape[1]), np.nan, np.float32)
            self.logits[rows] = logits

    def _of_the_first(self, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
        """What the first runtime says; asked again where it was not kept."""
        if self.logits is None or np.isnan(self.logits[rows]).all(axis=1).any():
            return self.sessions[self.first].logits(x)
        return self.logits[rows]

    def _compared(self, arm: Arm) -> Compared:
        same, span = self.answers[_key(arm, SAME)], self.answers[_key(self.first, SPAN)]
        asked = same != UNASKED
        widest = float(np.max(span, initial=0))
        largest = float(np.max(self.answers[_key(arm, DIFFERENCE)][asked], initial=0))
        known = np.isfinite([widest, largest]).all()
        difference = (100 * largest / widest if widest else 0.0) if known else None
        early = arm in self.sampling.until and not asked.all()
        return Compared(same[asked] == 1, difference, early)

    def _kept(self) -> tuple[int, dict[str, np.ndarray]]:
        """What an interrupted measurement has, if it is of the same; else nothing yet."""
        wanted = self._arrays()
        saved = self.store.load()
        done, answers = (0, {}) if saved is None else (saved[0], dict(saved[1]))
        complete = {answer.shape for answer in answers.values()} == {(len(self.images),)}
        if set(answers) == set(wanted) and complete:
            return done, answers
        empty = {key: np.full(len(self.images), UNASKED, kind) for key, kind in wanted.items()}
        return 0, empty

    def _arrays(self) -> dict[str, type[np.generic]]:
        """What is kept of each image, by key."""
        kinds: dict[str, type[np.generic]] = {}
        for arm in self.sessions:
            if arm not in self.sampling.few:
                named = (CLEAN, RANKS, *(t.name for t in self.triggers))
                kinds |= dict.fromkeys((_key(arm, name) for name in named), np.int32)
            if arm in self.beside:
                kinds |= {_key(arm, SAME): np.int32, _key(arm, DIFFERENCE): np.float32}
        return kinds | ({_key(self.first, SPAN): np.float32} if self.beside else {})


def _key(arm: Arm, what: str) -> str:
    """The name of an array."""
    return f"{arm.variant}|{arm.runtime}|{what}"


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
    """Predicted class of each row; where the logits are not finite none, which is never right."""
    finite = np.isfinite(logits).all(axis=1)
    return np.where(finite, logits.argmax(axis=1), NOT_FINITE).astype(np.int32)
