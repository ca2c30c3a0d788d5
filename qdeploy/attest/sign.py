"""Attesting: from a judged file and its report to a signed envelope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from qdeploy.attest.consistency import contradictions
from qdeploy.attest.forms import FORMS, OWN, Form, Judged
from qdeploy.attest.keys import Key
from qdeploy.attest.statement import Predicate, make_predicate
from qdeploy.disk.files import file_sha256, require_writable, write_atomically
from qdeploy.disk.places import same_place
from qdeploy.errors import InputError, UsageError
from qdeploy.report.kept import read_report


@dataclass(frozen=True, slots=True)
class Attestation:
    """A signature that was written."""

    path: Path
    sha256: str  # of the file it is about
    keyid: str
    predicate: Predicate


def beside(model: Path, form: Form = FORMS[OWN]) -> Path:
    """Where the signature of `model` lies unless somebody says otherwise."""
    return model.with_name(model.name + form.suffix)


def attest(
    model: Path, report: Path, key: Key, out: Path | None, *, forms: Sequence[str], expires: date
) -> tuple[Attestation, ...]:
    """Sign what the report says of the file at `model`, which is read and hashed now.

    Any outcome can be attested; only ACCEPT will verify. Nothing is written unless all forms are
    signed.

    Args:
        out: Where the signature goes if there is one form; else beside the model.
        forms: Of `qdeploy.attest.forms.FORMS`.
        expires: The last day on which the attestation is to be relied on.

    Raises:
        InputError: the report is about another file, or about several, or its outcome does not
            follow from its checks, or something cannot be read.
        OutputError: the signature cannot be written.
        UsageError: the signature would replace one of the files it is made from, there is no such
            form, or it cannot say what the outcome is.
    """
    if model.is_dir():
        raise InputError(f"model {model}: is a folder, and one file is attested")
    wanted = _wanted(forms, out)
    places = {name: out or beside(model, form) for name, form in wanted.items()}
    for place in places.values():
        if any(same_place(place, path) for path in (model, report, key.path) if path is not None):
            raise UsageError(f"--out {place}: this file is read here and would be replaced")
        require_writable(place)
    kept = read_report(report)
    sha256 = file_sha256(model, what="model")
    judged = kept.content.judged_digests
    if sha256 not in judged:
        raise InputError(
            f"report {report} is about another file: {model} has sha256 {sha256},"
            f" judged was {', '.join(sorted(judged)) or 'none'}",
            hint="attest the file together with the report of the run that made or judged it",
        )
    predicate = make_predicate(kept, expires)
    for contradiction in contradictions(
        predicate.outcome, kept.content.checks, frozenset(predicate.required)
    ):
        raise InputError(f"report {report} contradicts itself: {contradiction}")
    _refuse_unspoken(wanted, predicate, expires)
    file = Judged(model, sha256, predicate)
    signed = {name: form.sign(file, key) for name, form in wanted.items()}
    for name, one in signed.items():
        write_atomically(places[name], one.content)
    return tuple(
        Attestation(places[name], sha256, one.keyid, predicate) for name, one in signed.items()
    )


def _wanted(names: Sequence[str], out: Path | None) -> Mapping[str, Form]:
    unknown = [name for name in names if name not in FORMS]
    if unknown:
        raise UsageError(f"--as {unknown[0]}: no such form", hint=f"use one of {', '.join(FORMS)}")
    wanted = {name: FORMS[name] for name in names}
    if out is not None and len(wanted) > 1:
        raise UsageError(f"--out {out}: one place for {len(wanted)} forms", hint="leave --out away")
    return wanted


def _refuse_unspoken(wanted: Mapping[str, Form], predicate: Predicate, expires: date) -> None:
    for name, form in wanted.items():
        if form.accepted_only and predicate.expires is not None and predicate.expires < expires:
            raise UsageError(
                f"--as {name}: its readers know no end, and a waiver that this verdict rests on"
                f" ends on {predicate.expires}",
                hint=f"--as {OWN} has an end",
            )
        if form.accepted_only and predicate.outcome != "ACCEPT":
            raise UsageError(
                f"--as {name}: it says that a file was verified, and this one is"
                f" {predicate.outcome}",
                hint=f"--as {OWN} and --as test-result say any outcome",
            )
