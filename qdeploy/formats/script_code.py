"""What the code inside of a TorchScript file calls that no classifier needs."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator

FILE_OPERATIONS = re.compile(r"\b(torch\.(save|load|from_file)\b|ops\.(?!prim\.|aten\.)\w+\.\w+)")


def file_operations(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """Each member whose code reads or writes files or calls foreign operators, and the call."""
    for entry in archive.infolist():
        if entry.filename.endswith(".py"):
            code = archive.read(entry).decode("utf-8", "replace")
            found = FILE_OPERATIONS.search(code)
            if found:
                yield entry.filename, found[0]
