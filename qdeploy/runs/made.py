"""What this user's own runs have made: files whose integers need no report to explain them.

A record lies in the user's state folder, under the digest of the file, and counts only if this
user's key has sealed it: nobody else can put one there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable

from qdeploy.disk.files import write_atomically
from qdeploy.disk.state import sealed, state_folder, unsealed
from qdeploy.errors import OutputError
from qdeploy.judging.checks import LayerDigest

MADE = "made"


def remember(sha256: str, layers: Iterable[LayerDigest]) -> None:
    """Keep the digests of the layers of a file; nothing, where no folder can be written."""
    data = json.dumps(sorted(layers)).encode()
    with contextlib.suppress(OSError, OutputError):
        place = state_folder() / MADE
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(place / sha256, sealed(data, MADE, sha256))


def recall(sha256: str) -> frozenset[LayerDigest]:
    """The digests of the layers of a file that a run of this user has made; none of others."""
    data = unsealed(state_folder() / MADE / sha256, MADE, sha256)
    if data is None:
        return frozenset()
    return frozenset((codes, scales) for codes, scales in json.loads(data))
