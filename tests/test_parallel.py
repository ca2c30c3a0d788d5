from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from qdeploy.quantization.parallel import in_parallel


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_results_come_in_the_order_of_the_items():
    def work(item: int) -> int:
        time.sleep(0.02 if item % 2 else 0)
        return item * item

    assert list(in_parallel(work, range(9))) == [i * i for i in range(9)]


def test_blas_has_one_thread_meanwhile_and_its_own_again_afterwards():
    np.ones((64, 64)) @ np.ones((64, 64))
    before = blas_threads()
    assert {frozenset(found) for found in in_parallel(lambda _: blas_threads(), range(3))} == {
        frozenset({1})
    }
    assert blas_threads() == before


def test_after_an_error_what_has_not_begun_is_left_undone():
    begun: list[int] = []
    lock = threading.Lock()

    def work(item: int) -> None:
        with lock:
            begun.append(item)
        if item == 0:
            raise ValueError("first")
        time.sleep(0.05)

    with pytest.raises(ValueError, match="first"):
        list(in_parallel(work, range(200)))
    assert len(begun) < 200
