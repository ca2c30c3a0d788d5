"""The in-toto statement of a verdict: built from a report, and read back. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from qdeploy.attest.consistency import RULES_VERSION
from qdeploy.errors import InputError
from qdeploy.report.document import Written
from qdeploy.report.kept import KeptReport, parse_object
from qdeploy.settings.schema import validate
from qdeploy.settings.waivers import Waiver

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:qdeploy:verdict:v1"  # a name; nothing is to be found there


class Settings(Written):
    """A recipe, policy or device profile: its name, and the digest of its canonical JSON."""

    name: str | None
    sha256: str


class AttestedCheck(Written):
    name: str
    value: float | None
    relation: Literal["<=", ">="]
    limit: float
    unit: str
    runtime: str | None
    subject: str | None
    samples: int | None = None
    needed_samples: int = 0
    low: float | None = None
    high: float | None = None
    decided_by: Literal["interval", "value"] = "interval"
    within: bool

    @property
    def holds(self) -> bool:
        """The value was found to be within its limit."""
        return self.within


class AttestedData(Written):
    role: str
    name: str
    images: int | None
    sha256: str | None


class AttestedLayer(Written):
    name: str
    codes_sha256: str


class Predicate(Written):
    """The predicate. Unknown keys are ignored, as in-toto asks; names are those of report.json."""

    outcome: Literal["ACCEPT", "REJECT", "NO VERDICT"]
    reasons: tuple[str, ...]
    run_id: str
    started: str  # of the run, UTC, ISO 8601
    qdeploy_version: str | None
    rules_version: int | None = None  # None: of a time when there was none
    expires: date | None = None  # the last day on which it is to be relied on
    report_sha256: str
    source_sha256: str | None  # of the float model as it came
    recipe: Settings | None
    policy: Settings | None
    device: Settings | None
    required: tuple[str, ...]
    checks: tuple[AttestedCheck, ...]
    data: tuple[AttestedData, ...]
    layers: tuple[AttestedLayer, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """Which file is spoken of, and what is said of it."""

    name: str
    sha256: str
    predicate_type: str
    predicate: Predicate | None  # None: a predicate of another type


def canonical_sha256(value: Mapping[str, Any]) -> str:
    """The digest of `value` as JSON with sorted keys, no spaces, in UTF-8."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def make_predicate(kept: KeptReport, expires: date) -> Predicate:
    """What the report says, without the measurements that its digest stands for."""
    report = kept.content
    return Predicate(
        outcome=report.outcome.value,
        reasons=report.reasons,
        run_id=report.run_id,
        started=report.started,
        qdeploy_version=report.versions.get("qdeploy"),
        rules_version=RULES_VERSION,
        expires=min([expires, *_waived_until(report.policy)]),
        report_sha256=kept.sha256,
        source_sha256=report.origin.sha256 if report.origin else None,
        recipe=_settings(report.recipe),
        policy=_settings(report.policy),
        device=_settings(report.device),
        required=report.required,
        checks=tuple(
            AttestedCheck(
                **check.model_dump(exclude={"state", "within", "required"}), within=check.holds
            )
            for check in report.checks
        ),
        data=tuple(map(AttestedData.model_validate, report.data)),
        layers=tuple(
            AttestedLayer(name=layer.name, codes_sha256=layer.codes_sha256)
            for layer in report.layers
            if layer.codes_sha256 is not None
        ),
    )


def _waived_until(policy: Mapping[str, Any] | None) -> Iterator[date]:
    """The days on which the waivers of the policy end: no verdict outlives what it rests on."""
    gate = policy.get("gate") if policy is not None else None
    waivers = gate.get("waivers", ()) if isinstance(gate, dict) else ()
    for waiver in waivers:
        yield validate(waiver, Waiver, where="report: policy.gate.waivers").until


def make_statement(
    name: str, sha256: str, predicate_type: str, predicate: Mapping[str, Any]
) -> bytes:
    """The statement that `predicate` holds of the file with this digest, as UTF-8 JSON."""
    document = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha256}}],
        "predicateType": predicate_type,
        "predicate": predicate,
    }
    try:
        return json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"model {name!r}: a name that is not UTF-8 cannot be attested") from error


def read_statement(payload: bytes) -> Statement:
    """The statement in `payload`; whom to believe is not decided here.

    Raises:
        InputError: it is not an in-toto statement v1 about one file, or the verdict has no sense.
    """
    table = parse_object(payload, what="attestation")
    if table.get("_type") != STATEMENT_TYPE:
        raise InputError(f"attestation: not an in-toto statement of type {STATEMENT_TYPE}")
    name, sha256 = _subject(table.get("subject"))
    predicate_type = table.get("predicateType")
    if not isinstance(predicate_type, str):
        raise InputError("attestation: predicateType is not a string")
    predicate = None
    if predicate_type == PREDICATE_TYPE:
        predicate = validate(table.get("predicate"), Predicate, where="attestation: predicate")
    return Statement(name, sha256, predicate_type, predicate)


def _subject(subjects: object) -> tuple[str, str]:
    match subjects:
        case [{"digest": {"sha256": str(sha256)}, **rest}]:
            name = rest.get("name", "_")
            return (name if isinstance(name, str) else "_"), sha256
    raise InputError("attestation: subject is not one file with its sha256")


def _settings(table: Mapping[str, Any] | None) -> Settings | None:
    if table is None:
        return None
    name = table.get("name")
    return Settings(name=name if isinstance(name, str) else None, sha256=canonical_sha256(table))
