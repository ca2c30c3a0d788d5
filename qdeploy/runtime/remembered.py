"""A file that is asked about each input once, whoever asks and in whatever batch."""

from __future__ import annotations

import hashlib
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from qdeploy.runtime.known import Runner
from qdeploy.values import Interface

LARGEST_KEPT = 128 << 20  # bytes; of what comes after them nothing is kept


@dataclass(slots=True, eq=False)
class KnownAnswers:
    """What a file has said, by the digest of the input."""

    known: dict[bytes, Float32[np.ndarray, " classes"]] = field(default_factory=dict)
    earlier: AbstractSet[bytes] = frozenset()  # what an earlier run has asked
    recalled: set[bytes] = field(default_factory=set)  # what of that was asked again

    def of(self, runner: Runner) -> Remembered:
        """The file, which looks here before it computes."""
        return Remembered(runner, self)


@dataclass(frozen=True, slots=True, eq=False)
class Remembered:
    """A `Runner` whose answers are kept. Its times are those of the file itself."""

    runner: Runner
    answers: KnownAnswers

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the file takes; None for any."""
        return self.runner.fixed_batch

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """The answers to a batch, of which only what is new is computed."""
        known = self.answers.known
        digests = [hashlib.sha256(image.tobytes()).digest() for image in batch]
        new = [at for at, digest in enumerate(digests) if digest not in known]
        self.answers.recalled |= self.answers.earlier & set(digests)
        if new:
            found = self.runner.logits(batch if len(new) == len(batch) else batch[new])
            fresh = dict(zip((digests[at] for at in new), found, strict=True))
            if len(known) * found[0].nbytes < LARGEST_KEPT:
                known.update(fresh)
            return np.stack([fresh[d] if d in fresh else known[d] for d in digests])
        return np.stack([known[digest] for digest in digests])

    def seconds(self, batch: np.ndarray) -> float:
        """How long the runtime takes to answer a batch."""
        return self.runner.seconds(batch)

    def interface(self, *, where: str) -> Interface:
        """What the file takes and gives."""
        return self.runner.interface(where=where)
