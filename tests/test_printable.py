"""Nothing from a file makes a line, a colour, a link or a command in what we print."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.cli import console
from qdeploy.compare.table import as_csv
from qdeploy.disk.printable import LONGEST_TEXT, printable, visible
from qdeploy.errors import InputError
from qdeploy.report.scans import FORMATS, FileScan
from qdeploy.values import Finding

HOSTILE = (
    "a\n\nACCEPT  model.onnx", "a\r::warning file=b::c", "\x1b[2J", "\x1b]8;;http://x\x07link",
    "[link=http://x]a[/link]", "[/]", "a[/red]", ":skull:", "\u202egnp.exe", "\u2066a", "\u200b",
    "a\u2028b", "\ud800", "\x00", "\x9b31m", "=HYPERLINK(1)", "@SUM(1)", "x" * 100_000,
    "<script>alert(1)</script>", "| a | b |", "](http://x)",
)  # fmt: skip
texts = st.text(st.characters(), max_size=40) | st.sampled_from(HOSTILE)


@given(texts)
def test_a_text_is_one_printable_line_and_stays_as_it_is(text):
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= LONGEST_TEXT
    assert printable(shown) == shown
    assert visible(text).isprintable()


def printed(show, *values: object) -> str:
    """What a function of the console writes, to either stream."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        show(*values)
    return stream.getvalue()


def look(text: str) -> FileScan:
    finding = Finding("unused-initializer", "warning", text, f"tensor {text!r} {text}")
    return FileScan(Path("m.onnx"), "0" * 64, (finding,), None, text)


SHOWN = {
    "error": lambda text: printed(console.show_error, InputError(f"model: {text}")),
    "hint": lambda text: printed(console.show_error, InputError("m", hint=text.replace("\n", ""))),
    "pairs": lambda text: printed(console.show_pairs, [(text, text)]),
    "look": lambda text: printed(console.show_scan, look(text)),
    "note": lambda text: printed(console.TerminalProgress().note, text),
}


@pytest.mark.parametrize("show", SHOWN)
@given(text=texts)
def test_a_name_on_the_terminal_is_a_name(show, text):
    said = SHOWN[show](text)
    assert all(c.isprintable() or c == "\n" for c in said)
    assert not any(line.startswith(("::", "ACCEPT")) for line in said.splitlines())
    if len(text) < 30:
        assert said.count("\n") <= SHOWN[show]("n" * 140).count("\n") + 1


@pytest.mark.parametrize("suffix", FORMATS)
@given(text=texts)
def test_a_name_in_a_file_of_findings_is_a_name(suffix, text):
    said = FORMATS[suffix]([look(text)]).decode("utf-8")
    assert all(c.isprintable() or c == "\n" for c in said)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@A1", "\t=1", " =1", "\r=1"])
def test_no_cell_of_a_table_is_a_formula(text):
    row = as_csv([{"model": text, "accuracy": -0.5}]).splitlines()[1]
    assert row.lstrip('"')[0] not in "=+-@\t\r " or row.startswith("'")
    assert ",-0.5," in row  # numbers stay numbers
