"""Attesting: from a judged file and its report to a signed envelope."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path

from qdeploy.attest.consistency import contradictions
from qdeploy.attest.envelope import seal
from qdeploy.attest.keys import load_signer
from qdeploy.attest.statement import Predicate, make_predicate, make_statement
from qdeploy.disk.files import file_sha256, require_writable, write_atomically
from qdeploy.disk.places import same_place
from qdeploy.errors import InputError, UsageError
from qdeploy.report.kept import read_report

SUFFIX = ".intoto.json"


@dataclass(frozen=True, slots=True)
class Attestation:
    """An envelope that was written."""

    path: Path
    sha256: str  # of the file it is about
    keyid: str
    predicate: Predicate


def beside(model: Path) -> Path:
    """Where the envelope of `model` lies unless somebody says otherwise."""
    return model.with_name(model.name + SUFFIX)


def attest(
    model: Path, report: Path, key: Path, out: Path | None, *, password: str | None, expires: date
) -> Attestation:
    """Sign what the report says of the file at `model`, which is read and hashed now.

    Any outcome can be attested; only ACCEPT will verify.

    Args:
        key: Private key in PEM.
        out: Where the envelope goes; else beside the model.
        expires: The last day on which the attestation is to be relied on.

    Raises:
        InputError: the report is about another file, or about several, or its outcome does not
            follow from its checks, or something cannot be read.
        OutputError: the envelope cannot be written.
        UsageError: the envelope would replace one of the files it is made from.
    """
    place = out or beside(model)
    if any(same_place(place, path) for path in (model, report, key)):
        raise UsageError(f"--out {place}: this file is read here and would be replaced")
    require_writable(place)
    kept = read_report(report)
    sha256 = file_sha256(model, what="model")
    judged = kept.content.judged_sha256
    if judged != sha256:
        raise InputError(
            f"report {report} is about another file: {model} has sha256 {sha256},"
            f" judged was {judged or 'none'}",
            hint="attest the file together with the report of the run that made or judged it",
        )
    predicate = make_predicate(kept, expires)
    for contradiction in contradictions(
        predicate.outcome, kept.content.checks, frozenset(predicate.required)
    ):
        raise InputError(f"report {report} contradicts itself: {contradiction}")
    signer = load_signer(key, password)
    write_atomically(place, seal(make_statement(model.name, sha256, predicate), signer))
    return Attestation(place, sha256, signer.public_key.keyid, predicate)
