"""What came in is compared with what is judged, also where a model magnifies the last digit."""

from __future__ import annotations

import numpy as np
import pytest

from qdeploy.errors import InputError
from qdeploy.exporting.exporter import STRENGTHS, TOLERANCE, _compare, _Compared

SHAPE = (3, 8, 8)


def calm(batch: np.ndarray) -> np.ndarray:
    return batch.reshape(len(batch), -1)[:, :10] * 3


def restless(batch: np.ndarray, *, above: float = 2.0) -> np.ndarray:
    """A model that is chaotic where an image has much contrast, as untrained networks are."""
    flat = batch.reshape(len(batch), -1).astype(np.float32)
    chaos = np.sin(flat.astype(np.float64)[:, :10] * 1e9)
    loud = np.abs(flat).max(1, keepdims=True) > above
    return (calm(batch) + np.where(loud, chaos, 0)).astype(np.float32)


def nudged(answers, by: float):
    """The same after an export that changes the last digit of what goes in."""
    return lambda batch: answers((batch * np.float32(1 + by)).astype(np.float32))


def compared(got, want, **more: object) -> _Compared:
    return _Compared("m", SHAPE, got, want, None, TOLERANCE, **more)


def test_a_model_that_magnifies_the_last_digit_is_compared_on_fainter_images():
    _compare(compared(nudged(restless, 1e-7), restless))


def test_a_change_is_seen_there_too():
    def changed(batch: np.ndarray) -> np.ndarray:
        return restless(batch) * np.float32(1.01)

    with pytest.raises(InputError, match="logits change by"):
        _compare(compared(nudged(changed, 1e-7), restless))


def test_one_that_is_restless_everywhere_is_refused():
    def always(batch: np.ndarray) -> np.ndarray:
        return restless(batch, above=0.0)

    with pytest.raises(InputError, match="change in the last digit"):
        _compare(compared(nudged(always, 1e-7), always))


def test_one_that_draws_numbers_is_no_such_model():
    generator = np.random.default_rng(0)

    def drawn(batch: np.ndarray) -> np.ndarray:
        return calm(batch) + generator.normal(size=(len(batch), 10)).astype(np.float32)

    with pytest.raises(InputError, match="logits change by"):
        _compare(compared(calm, drawn))


def test_pixels_stay_whole_numbers_however_faint():
    seen = []

    def watched(batch: np.ndarray) -> np.ndarray:
        seen.append(batch)
        return restless(batch, above=150.0)

    _compare(compared(nudged(watched, 1e-7), watched, pixels=(0.0, 255.0)))
    whole = [b for b in seen if np.array_equal(b, np.rint(b))]
    assert {float(np.abs(b - 128).max() > 60) for b in whole} == {0.0, 1.0}
    assert len(STRENGTHS) == 3
