"""Verifying: may this file be used, by the word of somebody trusted?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from qdeploy.attest.consistency import RULES_VERSION, contradictions
from qdeploy.attest.envelope import PAYLOAD_TYPE, explain_distrust, read_envelope, signing_key
from qdeploy.attest.keys import load_public_key
from qdeploy.attest.sign import beside
from qdeploy.attest.statement import PREDICATE_TYPE, Predicate, Statement, read_statement
from qdeploy.disk.files import file_sha256


@dataclass(frozen=True, slots=True)
class Verification:
    """What a trusted key has signed, and what stands against relying on it."""

    model: Path
    keyid: str | None  # None: no trusted key has signed
    statement: Statement | None  # None: nothing that was signed can be shown
    refusals: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """The file is the one that was accepted, by the word of a trusted key."""
        return self.keyid is not None and self.statement is not None and not self.refusals


def verify(
    model: Path,
    attestation: Path | None,
    keys: Sequence[Path],
    report: Path | None,
    *,
    today: date,
) -> Verification:
    """Hold the file at `model` against its attestation.

    Nothing of the payload is read before a trusted key is known to have signed it.

    Args:
        attestation: The envelope; else beside the model.
        keys: Public keys in PEM; a signature by any of them is enough.
        report: A report.json to hold against the attested digest as well.

    Raises:
        InputError: a file cannot be read, or is not what it is taken for.
    """
    trusted = [load_public_key(key) for key in keys]
    envelope = read_envelope(attestation or beside(model))
    sha256 = file_sha256(model, what="model")
    keyid = signing_key(envelope, trusted)
    if keyid is None:
        return Verification(model, None, None, (explain_distrust(envelope, trusted),))
    if envelope.payload_type != PAYLOAD_TYPE:
        wrong = f"the payload is of type {envelope.payload_type[:100]}, not {PAYLOAD_TYPE}"
        return Verification(model, keyid, None, (wrong,))
    statement = read_statement(envelope.payload)
    refusals = (*_refuse_file(sha256, statement), *_refuse_predicate(statement, report, today))
    return Verification(model, keyid, statement, refusals)


def _refuse_file(sha256: str, statement: Statement) -> Iterator[str]:
    if statement.sha256 != sha256:
        yield f"the file's sha256 is {sha256}, attested was {statement.sha256[:64]}"


def _refuse_predicate(statement: Statement, report: Path | None, today: date) -> Iterator[str]:
    predicate = statement.predicate
    if predicate is None:
        yield f"the predicate is of type {statement.predicate_type[:100]}, not {PREDICATE_TYPE}"
        return
    if predicate.outcome != "ACCEPT":
        yield f"the attested outcome is {predicate.outcome}"
        yield from predicate.reasons
    yield from contradictions(predicate.outcome, predicate.checks, frozenset(predicate.required))
    yield from _refuse_age(predicate, today)
    if report is not None:
        yield from _refuse_report(predicate, report)


def _refuse_age(predicate: Predicate, today: date) -> Iterator[str]:
    """A verdict is passed by rules, and for a time."""
    if predicate.rules_version is None or predicate.expires is None:
        yield "it does not say by which rules it was made, or until when it holds: attest anew"
        return
    if predicate.rules_version != RULES_VERSION:
        made, now = predicate.rules_version, RULES_VERSION
        yield f"it was made by version {made} of the rules, and these are version {now}: judge anew"
    if today > predicate.expires:
        yield f"it ended on {predicate.expires}: judge the file anew"


def _refuse_report(predicate: Predicate, report: Path) -> Iterator[str]:
    sha256 = file_sha256(report, what="report")
    if sha256 != predicate.report_sha256:
        yield f"the report's sha256 is {sha256}, attested was {predicate.report_sha256[:64]}"
