"""Which files the gate takes for this user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeploy.disk import state
from qdeploy.runs.made import recall, remember

LAYERS = frozenset({("a" * 64, "b" * 64), ("c" * 64, "d" * 64)})
FILE, OTHER = "1" * 64, "2" * 64


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(state.FOLDER_VARIABLE, str(tmp_path / "state"))
    return tmp_path / "state"


def test_what_was_made_is_known_again(home):
    remember(FILE, LAYERS)
    assert recall(FILE) == LAYERS
    assert recall(OTHER) == frozenset()


def test_a_record_of_another_file_or_of_nobodys_key_is_none(home, monkeypatch, tmp_path):
    remember(FILE, LAYERS)
    record = (home / "made" / FILE).read_bytes()
    (home / "made" / OTHER).write_bytes(record)
    assert recall(OTHER) == frozenset()
    (home / "made" / FILE).write_bytes(record[:-1] + b"}")
    assert recall(FILE) == frozenset()
    monkeypatch.setenv(state.FOLDER_VARIABLE, str(tmp_path / "thief"))
    (tmp_path / "thief" / "made").mkdir(parents=True)
    (tmp_path / "thief" / "made" / FILE).write_bytes(record)
    assert recall(FILE) == frozenset()


def test_without_a_place_for_it_nothing_is_lost_but_the_record(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(state.FOLDER_VARIABLE, str(tmp_path / "file"))
    remember(FILE, LAYERS)
    assert recall(FILE) == frozenset()
