"""What came in is compared with what is judged, also where a model magnifies the last digit."""

from __future__ import annotations

import numpy as np
import pytest

from qdeploy.errors import InputError
from qdeploy.exporting.exporter import TOLERANCE, _compare, _Compared

SHAPE = (3, 8, 8)


def calm(batch: np.ndarray) -> np.ndarray:
    return batch.reshape(len(batch), -1)[:, :10] * 3


def restless(batch: np.ndarray) -> np.ndarray:
    """A model that is chaotic where an image has fine structure, as untrained networks are."""
    flat = batch.reshape(len(batch), -1)
    chaos = np.sin(flat.astype(np.float64)[:, :10] * 1e9)
    fine = np.abs(np.diff(batch, axis=-1)).reshape(len(batch), -1).min(1, keepdims=True) > 0
    return (calm(batch) + np.where(fine, chaos, 0)).astype(np.float32)


def nudged(answers, by: float):
    """The same after an export that changes the last digit of what goes in."""
    return lambda batch: answers((batch * np.float32(1 + by)).astype(np.float32))


def compared(got, want, **more: object) -> _Compared:
    return _Compared("m", SHAPE, got, want, None, TOLERANCE, **more)


def test_a_model_that_magnifies_the_last_digit_of_noise_is_compared_without_fine_structure():
    _compare(compared(nudged(restless, 1e-7), restless))


def test_a_change_is_seen_there_too():
    def changed(batch: np.ndarray) -> np.ndarray:
        return restless(batch) + np.float32(0.5)

    with pytest.raises(InputError, match="logits change by"):
        _compare(compared(nudged(changed, 1e-7), restless))


def test_to_be_restless_is_no_excuse_for_answering_bright_images_otherwise():
    """The contrast is the same: what a model says of bright images cannot hide behind it."""

    def hidden(batch: np.ndarray) -> np.ndarray:
        bright = np.abs(batch).reshape(len(batch), -1).max(1, keepdims=True) > 0.75
        return restless(batch) + np.float32(bright) * np.eye(1, 10, dtype=np.float32) * 0.5

    with pytest.raises(InputError, match="logits change by"):
        _compare(compared(nudged(hidden, 1e-7), restless))


def test_one_that_is_restless_everywhere_is_refused():
    def always(batch: np.ndarray) -> np.ndarray:
        chaos = np.sin(batch.reshape(len(batch), -1).astype(np.float64)[:, :10] * 1e9)
        return (calm(batch) + chaos).astype(np.float32)

    with pytest.raises(InputError, match="logits change by"):
        _compare(compared(nudged(always, 1e-7), always))


def test_one_that_draws_numbers_is_no_such_model():
    generator = np.random.default_rng(0)

    def drawn(batch: np.ndarray) -> np.ndarray:
        return calm(batch) + generator.normal(size=(len(batch), 10)).astype(np.float32)

    with pytest.raises(InputError, match="logits change by"):
        _compare(compared(calm, drawn))


def test_pixels_that_are_whole_numbers_have_no_last_digit():
    with pytest.raises(InputError, match="logits change by"):
        _compare(compared(nudged(restless, 1e-7), restless, pixels=(0.0, 255.0)))
