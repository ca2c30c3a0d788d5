"""The measured cells as a table for people, mean and standard deviation over seeds, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import mean, stdev
from typing import Any

from qdeploy.disk.printable import printable

COLUMNS = (
    "model", "activations", "bits", "grid", "method", "seed", "accuracy", "success", "agreement",
    "logit_mse", "flipped", "seconds", "cpu_seconds", "bytes", "degraded",
)  # fmt: skip
GROUP = ("model", "activations", "bits", "grid", "method")
SHOWN = (  # key, heading, digits
    ("accuracy", "CDA %", 2),
    ("success", "ASR %", 2),
    ("agreement", "agree %", 2),
    ("logit_mse", "logit MSE", 4),
    ("flipped", "flipped %", 1),
    ("cpu_seconds", "CPU s", 1),
)
WORDS = {"8": "8-bit activations", "none": "weights only"}


def as_csv(records: Iterable[Mapping[str, Any]]) -> str:
    """A line for each cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        degraded = "; ".join(record.get("degraded", {}))
        row = {**record, "degraded": degraded}
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula: texts come from strangers."""
    if not isinstance(value, str):
        return value
    shown = printable(value)
    return f"'{shown}" if shown.lstrip().startswith(("=", "+", "-", "@")) else shown


def as_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """CDA / ASR of every model by every method, then all figures in a table for each model."""
    parts = [_overview(records)] if len({record["model"] for record in records}) > 1 else []
    for model, of_model in groupby(records, key=lambda record: record["model"]):
        lines = [f"### {printable(model)}", "", _row(["", *(heading for _, heading, _ in SHOWN)])]
        lines.append("|---" + "|---:" * len(SHOWN) + "|")
        lines.extend(_lines(list(of_model)))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _overview(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for each model and setting, a column for each method: CDA / ASR, means over seeds."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    lines = [_row(["CDA / ASR, %", *methods]), "|---" * (len(methods) + 1) + "|"]
    floats = {record["model"]: record for record in records if "grid" not in record}
    cells = [record for record in records if "grid" in record]
    for key, group in groupby(cells, key=lambda record: tuple(record[k] for k in GROUP[:-1])):
        model, activations, bits, grid = key
        same = [floats[model], *group]
        found = (_pair([r for r in same if r["method"] == method]) for method in methods)
        lines.append(_row([f"{model}, {bits} bits, {grid}, {WORDS[activations]}", *found]))
    return "\n".join(lines)


def _pair(records: Sequence[Mapping[str, Any]]) -> str:
    """Mean accuracy and attack success; nothing for no records."""
    if not records:
        return ""
    known = [record["success"] for record in records if record["success"] is not None]
    success = f"{mean(known):.1f}" if known else "-"
    return f"{mean(record['accuracy'] for record in records):.1f} / {success}"


def _lines(records: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    first = records[0]
    yield _row([first["method"], *(_figure([first.get(key)], digits) for key, _, digits in SHOWN)])
    cells = records[1:]
    for key, group in groupby(cells, key=lambda record: tuple(record[k] for k in GROUP[1:])):
        activations, bits, grid, method = key
        same = list(group)
        name = f"{method}, {bits} bits, {grid}, {WORDS[activations]}"
        if any(record["degraded"] for record in same):
            name += " (degraded)"
        figures = (_figure([r.get(key) for r in same], digits) for key, _, digits in SHOWN)
        yield _row([name, *figures])


def _figure(values: Sequence[float | None], digits: int) -> str:
    """The mean, and the standard deviation of several."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ±{stdev(known):.{digits}f}"


def _row(fields: Iterable[str]) -> str:
    return f"| {' | '.join(fields)} |"
