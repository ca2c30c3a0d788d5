"""Runs of a stranger's model end."""

from __future__ import annotations

import threading
import time

import numpy as np
import onnx.parser
import pytest

from qdeploy.errors import InputError
from qdeploy.runtime import sessions, watchdog
from qdeploy.runtime.sessions import open_session
from qdeploy.runtime.watchdog import Watchdog

CHAIN = "".join(f" m{i} = MatMul (t{i}, t{i}) t{i + 1} = Tanh (m{i})" for i in range(600))


def endless(start: str) -> bytes:
    """Thousands of products of large matrices that `start` makes the first, `t0`, of."""
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N,2] x) => (float[N,2] y) <int64[2] s = {{900, 900}}>
    {{ {start} {CHAIN} z = ReduceMean <keepdims=0> (t600) y = Add (x, z) }}"""
    proto = onnx.parser.parse_model(text)
    return proto.SerializeToString()


def test_a_run_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(sessions, "LONGEST_RUN_SECONDS", 1.0)
    model = endless("c = ConstantOfShape (s) m = ReduceMean <keepdims=0> (x) t0 = Add (c, m)")
    session = open_session(model, threads=1)
    with pytest.raises(InputError, match="takes more than 1 s for one batch"):
        session.logits(np.ones((1, 2), np.float32))


def test_a_load_that_does_not_end_is_ended(monkeypatch):
    """Constants are folded while a model is loaded, one rewriting after the other."""
    monkeypatch.setattr(sessions, "LONGEST_LOAD_SECONDS", 0.0)
    monkeypatch.setattr(watchdog, "LOOKS_EVERY_SECONDS", 0.01)
    body = " ".join(f"c{i + 1} = Relu (c{i})" for i in range(300))
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N,2] x) => (float[N,2] y) <int64[2] s = {{1000, 300}}>
    {{ c0 = ConstantOfShape (s) {body} z = ReduceMean <keepdims=0> (c300) y = Add (x, z) }}"""
    with pytest.raises(InputError, match="takes more than 0 s to load"):
        open_session(onnx.parser.parse_model(text).SerializeToString(), threads=1)


def test_what_ends_in_time_is_left_alone():
    dog, ended = Watchdog(), []
    with dog.watching(60.0, lambda: ended.append(1)):
        pass
    assert ended == []


def test_each_is_ended_when_it_is_due_and_once():
    dog, ended, both = Watchdog(), [], threading.Event()

    def end(name: str) -> None:
        ended.append(name)
        if len(ended) == 2:
            both.set()

    with (
        dog.watching(0.0, lambda: end("a")),
        dog.watching(0.0, lambda: end("b")),
        dog.watching(3600.0, lambda: end("c")),
    ):
        assert both.wait(60)
        time.sleep(1)
    assert sorted(ended) == ["a", "b"]


@pytest.mark.parametrize(("factor", "ends"), [(10_000, False), (1, True)])
def test_who_waits_for_a_processor_is_given_more_time(monkeypatch, factor, ends):
    monkeypatch.setattr(watchdog.time, "process_time", lambda: 1.0)  # which does not go on
    monkeypatch.setattr(watchdog, "WALL_FACTOR", factor)
    monkeypatch.setattr(watchdog, "LOOKS_EVERY_SECONDS", 0.01)
    dog, ended = Watchdog(), threading.Event()
    with dog.watching(0.2, ended.set, computes=True):
        assert ended.wait(60.0 if ends else 1.0) == ends


def test_who_waits_for_another_machine_is_given_no_more(monkeypatch):
    monkeypatch.setattr(watchdog.time, "process_time", lambda: 1.0)
    monkeypatch.setattr(watchdog, "LOOKS_EVERY_SECONDS", 0.01)
    dog, ended = Watchdog(), threading.Event()
    with dog.watching(0.1, ended.set):
        assert ended.wait(60)
