"""A model run over all images part by part, so that every node runs once however often it stops.

Methods that fit a layer to what the rounded layers before it feed it need the model again for each
layer, with one more layer rounded each time. Run from the start, L layers cost O(L^2); a `Walk`
keeps the tensors that are still to be read and goes on from there. Large ones lie in temporary
files, so that memory does not grow with the number of images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from qdeploy.data import Images
from qdeploy.formats.onnx.codes import products_fit
from qdeploy.graph.parts import next_part
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.device import LARGEST_CODE_WITHOUT_SATURATION

BATCH = 64
LARGEST_IN_MEMORY = 64 << 20  # bytes of one tensor, all images


@dataclass(slots=True)
class Walk:
    """The values of a model's tensors for all images, as far as it has been walked."""

    values: dict[str, np.ndarray]  # of the tensors that are still to be read; first axis images
    done: set[str] = field(default_factory=set)

    @classmethod
    def start(cls, input_name: str, images: Images) -> Walk:
        """At the model's input, which holds the normalised images."""
        inputs = empty((len(images), *images.preprocessing.shape))
        at = 0
        for batch in images.batches(BATCH):
            x = images.preprocessing.normalise(batch.pixels)
            inputs[at : at + len(x)] = x
            at += len(x)
        return cls({input_name: inputs}, {input_name})

    def advance(self, model: bytes, wanted: Iterable[str]) -> None:
        """Run `model` up to the tensors `wanted`, from where the walk stands.

        What was walked through before may not have changed.
        """
        part = next_part(model, self.values, self.done, wanted)
        if part.model is not None:
            fits = products_fit(part.model, LARGEST_CODE_WITHOUT_SATURATION)
            session = open_session(part.model, spinning=False, saturating=fits)
            images = len(next(iter(self.values.values())))
            for first in range(0, images, BATCH):
                at = slice(first, first + BATCH)
                results = session.run_with({name: self.values[name][at] for name in part.inputs})
                for name, result in results.items():
                    if name not in self.values:
                        self.values[name] = empty((images, *result.shape[1:]))
                    self.values[name][at] = result
        self.done |= part.names
        for name in set(self.values) - part.live:
            del self.values[name]


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """Room for float32 values, in a temporary file where they would not fit well into memory."""
    if 4 * int(np.prod(shape)) <= LARGEST_IN_MEMORY:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(prefix="qdeploy-") as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
