"""Values of inner tensors of a model, for one batch of inputs after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from qdeploy.data import Images
from qdeploy.graph.io import cut_to
from qdeploy.progress import Progress
from qdeploy.runtime.sessions import Session, open_session

BATCH_BYTES = 96 << 20  # of tapped values
LARGEST_BATCH = 128


@dataclass(frozen=True, slots=True)
class Tap:
    """Runs the part of a model that computes `names`."""

    names: tuple[str, ...]
    input_name: str
    session: Session | None  # None if only the input itself is wanted

    def __call__(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        values = dict(self.session.run(batch)) if self.session else {}
        if self.input_name in self.names:
            values[self.input_name] = batch
        return values

    def at_once(self, shape: tuple[int, int, int]) -> int:
        """How many images keep the tapped values within bounds."""
        probe = self(np.zeros((1, *shape), np.float32))
        per_image = sum(value.nbytes for value in probe.values())
        return int(np.clip(BATCH_BYTES // max(per_image, 1), 1, LARGEST_BATCH))

    def stream(
        self, images: Images, progress: Progress, label: str, size: int | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The tapped values of all `images`, in batches whose size keeps them within bounds.

        Memory depends on the model and not on the number of images.

        Args:
            size: Of a batch, if it is known to.
        """
        size = self.at_once(images.preprocessing.shape) if size is None else size
        total = -(-len(images) // size)
        for batch in progress.track(images.batches(size), label, total):
            yield self(images.preprocessing.normalise(batch.pixels))


def open_tap(model: bytes, input_name: str, names: Iterable[str]) -> Tap:
    """A tap at the tensors `names` of `model`, on the CPU."""
    wanted = tuple(dict.fromkeys(names))
    inner = [name for name in wanted if name != input_name]
    session = open_session(cut_to(model, inner), spinning=False) if inner else None
    return Tap(wanted, input_name, session)
