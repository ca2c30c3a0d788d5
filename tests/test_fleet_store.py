"""What a fleet keeps: for whoever has its key, and as it was kept."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from qdeploy.disk.state import KEY_VARIABLE, private_number
from qdeploy.errors import InputError, QdeployError
from qdeploy.fleet.document import Record, WrittenFile
from qdeploy.fleet.store import Folder, Store, open_store
from tests.fleet_lab import (
    KEY,
    place,
)


def store_of(place: Path, key: bytes = KEY) -> Store:
    return Store(Folder(place / "kept"), key)


def kept(place: Path, store: Store) -> Record:
    (place / "left").mkdir(exist_ok=True)
    (place / "left" / "r.txt").write_text("said")
    sha256 = hashlib.sha256(b"said").hexdigest()
    file = WrittenFile(name="r.txt", sha256=sha256, size_bytes=4)
    record = Record(id="c1", title="t", model="m", verb="scan", outcome="ACCEPT", files=(file,))
    store.keep(record, place / "left")
    return record


def test_what_is_kept_is_read_back_by_whoever_has_the_key(tmp_path):
    record = kept(tmp_path, store_of(tmp_path))
    assert store_of(tmp_path).record("c1") == record
    assert store_of(tmp_path, bytes(32)).record("c1") is None
    assert store_of(tmp_path).fetch(record, tmp_path / "out")
    assert (tmp_path / "out" / "r.txt").read_text() == "said"


@pytest.mark.parametrize("damage", ["cut", "changed", "renamed", "folder", "pipe"])
def test_what_is_not_as_it_was_kept_is_not_done(tmp_path, damage):
    kept(tmp_path, store_of(tmp_path))
    store = store_of(tmp_path)
    cell = tmp_path / "kept" / "cells" / "c1"
    if damage == "cut":
        cell.write_bytes(cell.read_bytes()[:-9])
    elif damage == "changed":
        cell.write_bytes(cell.read_bytes().replace(b"ACCEPT", b"REJECT"))
    elif damage == "renamed":
        cell.rename(cell.with_name("c2"))
    else:
        cell.unlink()
        cell.mkdir() if damage == "folder" else os.mkfifo(cell)
    assert store.record("c1") is None
    assert store.record("c2") is None


def test_a_file_of_another_content_is_not_handed_out(tmp_path):
    record, store = kept(tmp_path, store_of(tmp_path)), store_of(tmp_path)
    (tmp_path / "kept" / "files" / record.files[0].sha256).write_text("lied")
    assert not store.whole(record)
    assert not store.fetch(record, tmp_path / "out")
    store.keep(record, tmp_path / "left")  # which mends it
    assert store.fetch(record, tmp_path / "out")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", ".x", "a//b", ""])
def test_a_record_names_no_file_outside_of_its_cell(name):
    with pytest.raises(ValueError, match="name"):
        WrittenFile(name=name, sha256="0" * 64, size_bytes=1)


def test_a_cell_is_claimed_by_one_at_a_time(tmp_path):
    blobs = Folder(tmp_path)
    with blobs.claim("c1") as first, Folder(tmp_path).claim("c1") as second:
        assert (first, second) == (True, False)
    with blobs.claim("c1") as again:
        assert again


def test_a_store_at_a_url_keeps_the_same(tmp_path):
    pytest.importorskip("fsspec")
    url = f"file://{tmp_path}/remote"
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    store = open_store(url, tmp_path / "key")
    assert store.record("c1") is None
    record = kept(tmp_path, store)
    assert open_store(url, tmp_path / "key").record("c1") == record
    assert store.fetch(record, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "remote" / "cells").iterdir()) == ["c1"]
    with store.blobs.claim("c1") as first, store.blobs.claim("c1") as second:
        assert first
        assert second  # nobody can be kept out
    for nowhere in ("nothing://x", "local://", "://x", "ftp://127.0.0.1:1/x", "zip://a"):
        with pytest.raises(QdeployError, match="store"):
            open_store(nowhere, tmp_path / "key")


def test_seeds_come_of_the_key_that_machines_share(tmp_path, monkeypatch):
    numbers = []
    for content in (KEY, KEY, bytes(32)):
        path = tmp_path / f"key{len(numbers)}"
        path.write_bytes(content)
        path.chmod(0o600)
        monkeypatch.setenv(KEY_VARIABLE, str(path))
        numbers.append(private_number("model"))
    assert numbers[0] == numbers[1] != numbers[2]


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [(KEY, 0o644, "others can read"), (KEY[:-1], 0o600, "is not of 32 bytes"),
     (KEY + b"\n", 0o600, "is not of 32 bytes"), (None, 0, "No such file")],
)  # fmt: skip
def test_a_key_that_is_none_is_one_line(tmp_path, content, mode, complaint):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(InputError, match=complaint):
        open_store(str(tmp_path), path)


# Processes
