"""What this user's own runs have left for each other: a key, and files that it has sealed.

The key lies in the user's state folder (`QDEPLOY_STATE`, else the platform's usual place), never in
a folder that may have come with a model. What it has not sealed was not written here. Machines that
work together are given one key, as a file that `QDEPLOY_KEY` names.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from functools import cache
from pathlib import Path

import platformdirs

from qdeploy.disk.files import open_regular, read_bounded
from qdeploy.errors import InputError, OutputError

FOLDER_VARIABLE, KEY_VARIABLE = "QDEPLOY_STATE", "QDEPLOY_KEY"
KEY = "key"
KEY_BYTES = 32
MAC_BYTES = hashlib.sha256().digest_size
LARGEST_SEALED_BYTES = 8 << 30


def sealed(data: bytes, *context: str, key: bytes | None = None) -> bytes:
    """`data` behind the proof that it was written here, as `context` and nothing else."""
    return _mac(data, context, key) + data


def unsealed(path: Path, *context: str) -> bytes | None:
    """What was sealed into the file at `path` as `context`.

    None if there is no such file, or if it was not written here: nobody is told what is in it.
    """
    try:
        return opened(read_bounded(path, LARGEST_SEALED_BYTES, what="kept state"), *context)
    except InputError:
        return None


def opened(whole: bytes, *context: str, key: bytes | None = None) -> bytes | None:
    """What was sealed as `context`; None if it was not."""
    data = whole[MAC_BYTES:]
    return data if hmac.compare_digest(whole[:MAC_BYTES], _mac(data, context, key)) else None


def private_number(*context: str) -> int:
    """A number of 31 bits that stays the same here, and that nobody foresees without the key."""
    return int.from_bytes(_mac(b"", ("seed", *context), None)[:4], "big") >> 1


def own_key() -> bytes:
    """The key that is used unless another is given.

    Raises:
        InputError, OutputError: it is none, or can be read by others.
    """
    given = os.environ.get(KEY_VARIABLE)
    return read_key(Path(given)) if given else _key(state_folder())


@cache
def read_key(path: Path) -> bytes:
    """The key in a file that several machines share.

    Raises:
        InputError: it cannot be read, is not of 32 bytes, or others can read it.
    """
    with open_regular(path, what="key") as file:
        mode, key = stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise InputError(
            f"key {path}: is not of {KEY_BYTES} bytes",
            hint=f"(umask 077; head -c {KEY_BYTES} /dev/urandom > {path})",
        )
    if mode & (stat.S_IWGRP | stat.S_IRWXO):
        raise InputError(f"key {path}: others can read or write it", hint=f"chmod 600 {path}")
    return key


def _mac(data: bytes, context: tuple[str, ...], key: bytes | None) -> bytes:
    parts = (*(part.encode() for part in context), data)
    framed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return hmac.digest(own_key() if key is None else key, framed, "sha256")


def state_folder() -> Path:
    """Where this user's key lies, and what it has sealed outside of runs."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else platformdirs.user_state_path("qdeploy")


@cache
def _key(folder: Path) -> bytes:
    """The key in `folder`, drawn when it is first needed.

    Where no folder can be written, as in a container without a home, it lasts as long as this
    process: everything works but going on where another process stopped.

    Raises:
        OutputError: somebody else can read or write it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _draw(folder)
    except OSError:
        return secrets.token_bytes(KEY_BYTES)
    path = folder / KEY
    with open_regular(path, what="state key", follow=False) as file:
        found, key = os.fstat(file.fileno()), file.read(KEY_BYTES + 1)
    foreign = found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077
    if foreign or len(key) != KEY_BYTES:
        raise OutputError(
            f"state key {path}: is not of this user alone, or no key",
            hint="remove it; a new one is drawn",
        )
    return key


def _draw(folder: Path) -> None:
    """Put a key into `folder`, unless there is one: as a whole, for its owner alone."""
    if (folder / KEY).is_symlink() or (folder / KEY).exists():
        return
    temporary = folder / f".{KEY}.{secrets.token_hex(8)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(temporary, folder / KEY)
    finally:
        temporary.unlink()
