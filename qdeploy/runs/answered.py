"""What a float model has said to images: for all that ask it within a run, and for later runs.

A gate that judges one file after the other beside the same reference asks it once. Answers lie in
the user's state folder under all that decides about them, and count only if this user's key has
sealed them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io

import numpy as np

from qdeploy.disk.files import write_atomically
from qdeploy.disk.state import sealed, state_folder, unsealed
from qdeploy.errors import OutputError
from qdeploy.machine import installed_versions, processor_flags
from qdeploy.runs.run_id import facts_digest
from qdeploy.runtime.remembered import KnownAnswers
from qdeploy.settings.device import RuntimeSpec

ANSWERED, KEPT_FILES, LARGEST_BYTES = "answered", 32, 160 << 20
HERE = "cpu"  # the provider of which the same versions and processor give the same answers
DIGEST_BYTES = 32


def answers_to(model: bytes, runtime: RuntimeSpec) -> KnownAnswers:
    """What a model has said in earlier runs; nothing, where something else may have changed."""
    name = _name(model, runtime)
    data = unsealed(state_folder() / ANSWERED / name, ANSWERED, name) if name else None
    if data is None:
        return KnownAnswers()
    with np.load(io.BytesIO(data), allow_pickle=False) as kept:
        digests, logits = kept["digests"], kept["logits"]
    known = {bytes(digest): row for digest, row in zip(digests, logits, strict=True)}
    return KnownAnswers(known, frozenset(known))


def note_on(answers: KnownAnswers) -> tuple[str, ...]:
    """A line for people, where an earlier run has spared work."""
    count = len(answers.recalled)
    what = "what the float model says to {:,} inputs was kept by an earlier run of this user"
    return (what.format(count),) if count else ()


def keep_answers(answers: KnownAnswers, model: bytes, runtime: RuntimeSpec) -> None:
    """Put them where a later run finds them, if they are not too large and a folder can be written.

    Of older models only the last few are kept.
    """
    name, known = _name(model, runtime), answers.known
    if name is not None and known.keys() != answers.earlier:  # another run may have kept some too
        known = {**answers_to(model, runtime).known, **known}
    size = sum(row.nbytes + DIGEST_BYTES for row in known.values())
    if name is None or not known or size > LARGEST_BYTES or known.keys() == answers.earlier:
        return
    buffer = io.BytesIO()
    digests = np.frombuffer(b"".join(known), np.uint8).reshape(len(known), DIGEST_BYTES)
    np.savez(buffer, digests=digests, logits=np.stack(list(known.values())))
    with contextlib.suppress(OSError, OutputError):
        folder = state_folder() / ANSWERED
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(folder / name, sealed(buffer.getvalue(), ANSWERED, name))
        oldest = sorted(folder.iterdir(), key=lambda path: path.lstat().st_mtime)
        for path in oldest[:-KEPT_FILES]:
            path.unlink(missing_ok=True)


def _name(model: bytes, runtime: RuntimeSpec) -> str | None:
    """The digest of all that decides about an answer; None where that is not known."""
    if runtime.provider != HERE:
        return None
    return facts_digest(
        {
            "model": hashlib.sha256(model).hexdigest(),
            "runtime": runtime.model_dump(mode="json"),
            "versions": installed_versions(),
            "processor": sorted(processor_flags()),
        }
    )
