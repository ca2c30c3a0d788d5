"""What a model file is, in a few lines; nothing of it is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qdeploy.errors import InputError
from qdeploy.formats.known import Format
from qdeploy.formats.onnx.reading import holds_integers, read_untrusted
from qdeploy.formats.onnx.saturation import saturable
from qdeploy.formats.onnx.summary import Fact, summary
from qdeploy.formats.opening import sha256, sniff
from qdeploy.formats.safetensors_header import tensor_names
from qdeploy.formats.static import refuse_hostile
from qdeploy.messages.encoded import encode
from qdeploy.settings.card import find_card


def facts(path: Path) -> Iterator[Fact]:
    """Names and what there is to say: format, size, digest; of ONNX what it computes with.

    Raises:
        InputError: it cannot be read, or is one that nobody should open.
    """
    row = sniff(path)
    yield "format", row.name
    yield "size", f"{path.stat().st_size:,} bytes"
    yield "sha256", sha256(path)
    card = find_card(path)
    yield "model card", str(card) if card is not None else "none: qdeploy init begins one"
    refuse_hostile(path, run_code_from_model=row.program is not None)  # it is not opened here
    if row.content == "onnx":
        proto = read_untrusted(path)
        yield from summary(proto)
        if not holds_integers(proto):
            return
        with suppress(InputError):  # then it is not one of integers that can be told
            found = saturable(encode(proto), str(path))
            if found.of:
                yield "x86 without VNNI saturates", found.text
    else:
        yield from _of_tensors(path, row)


def _of_tensors(path: Path, row: Format) -> Iterator[Fact]:
    if row.name == "safetensors":
        yield "tensors", f"{len(tensor_names(path)):,}"
    if row.program is not None:
        yield "holds", f"{row.program}, which runs code of the file when it is opened"
    elif row.tensors_alone:
        yield "holds", "tensors alone: an architecture goes with it, --arch or in the card"
