"""The forms in which a verdict is signed: our own, and those that other tools' policies know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from qdeploy.attest.consistency import RULES_VERSION, again
from qdeploy.attest.envelope import seal
from qdeploy.attest.keys import Key, load_signer
from qdeploy.attest.model_signing import sign_file
from qdeploy.attest.statement import PREDICATE_TYPE, Predicate, make_statement
from qdeploy.errors import InputError
from qdeploy.judging.verdict import missing

TEST_RESULT_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
SVR_TYPE = "https://in-toto.io/attestation/svr/v0.1"
KEYLESS = "an identity that was shown to sigstore"
VERIFIER = f"urn:qdeploy:gate:v{RULES_VERSION}"  # a name, of these rules


@dataclass(frozen=True, slots=True)
class Judged:
    """A file, and what a report that was found to be about it says."""

    model: Path
    sha256: str
    predicate: Predicate


@dataclass(frozen=True, slots=True)
class Signed:
    """What is to be written, and by which key."""

    content: bytes
    keyid: str


class Form(Protocol):
    """One way to sign a verdict; a row of `FORMS`."""

    @property
    def suffix(self) -> str:
        """Of the file beside the model's, with its dot."""
        ...

    @property
    def accepted_only(self) -> bool:
        """Its readers see a signature and no verdict, so that it is made of nothing but ACCEPT."""
        ...

    def sign(self, judged: Judged, key: Key) -> Signed:
        """Sign what was judged.

        Raises:
            InputError: the key cannot be used for it, or the file is no longer the judged one.
            UsageError: what signs in this form is not installed.
        """
        ...


@dataclass(frozen=True, slots=True)
class InToto:
    """An in-toto Statement v1 in a DSSE envelope."""

    type: str
    suffix: str
    make: Callable[[Predicate], Mapping[str, Any]]
    accepted_only: bool = False

    def sign(self, judged: Judged, key: Key) -> Signed:
        """See `Form`."""
        signer = load_signer(key)
        predicate = self.make(judged.predicate)
        statement = make_statement(judged.model.name, judged.sha256, self.type, predicate)
        return Signed(seal(statement, signer), signer.public_key.keyid)


@dataclass(frozen=True, slots=True)
class ModelSigning:
    """An OpenSSF Model Signing bundle: that the holder of a key has signed these bytes."""

    suffix: str = ".sig"
    accepted_only: bool = True

    def sign(self, judged: Judged, key: Key) -> Signed:
        """See `Form`."""
        keyid = KEYLESS
        if key.path is not None:
            public = load_signer(key).public_key
            if public.keytype != "ecdsa":
                raise InputError(
                    f"key {key.path}: {public.keytype}; --as model-signing takes elliptic curves",
                    hint="openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256",
                )
            keyid = public.keyid
        return Signed(sign_file(judged.model, judged.sha256, key), keyid)


def test_result(verdict: Predicate) -> dict[str, Any]:
    """In-toto test-result v0.1: every check a test.

    Failed is what is off its limit, what is not known to be within it, and what was required and
    is not there; a check on too few images that nothing requires is a warning.
    """
    passed, warned, failed = [], [], []
    required = frozenset(verdict.required)
    checks = [again(said) for said in verdict.checks]
    for check in checks:
        if check.state == "within":
            passed.append(check.label)
        elif check.state == "few" and check.name not in required:
            warned.append(check.label)
        else:
            failed.append(check.label)
    made = {check.name for check in checks}
    failed += [name for name in missing(checks, required) if name not in made]
    accepted = "WARNED" if warned else "PASSED"
    return {
        "result": accepted if verdict.outcome == "ACCEPT" else "FAILED",
        "configuration": list(_configuration(verdict)),
        "passedTests": passed,
        "warnedTests": warned,
        "failedTests": failed,
    }


def simple_verification_result(verdict: Predicate) -> dict[str, Any]:
    """In-toto svr v0.1: the verdict and each check that holds, as properties of the file."""
    names = dict.fromkeys(check.name for check in verdict.checks)
    held = [n for n in names if all(c.holds for c in verdict.checks if c.name == n)]
    verifier: dict[str, Any] = {"id": VERIFIER}
    if verdict.policy is not None:
        verifier["policy"] = _descriptor(verdict.policy.name or "policy", verdict.policy.sha256)
    return {
        "verifier": verifier,
        "timeCreated": _timestamp(verdict.started),
        "properties": ["QDEPLOY_ACCEPT", *(f"QDEPLOY_{name.upper()}" for name in held)],
        "expires": str(verdict.expires),  # ours: the form has no end
    }


def _timestamp(started: str) -> str:
    """As RFC 3339 has it, in UTC."""
    try:
        moment = datetime.fromisoformat(started).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InputError(f"report: started {started[:50]!r} is no time") from error
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _configuration(verdict: Predicate) -> Iterator[dict[str, Any]]:
    """What the checks were made with, as in-toto resource descriptors."""
    for kind in ("policy", "recipe", "device"):
        used = getattr(verdict, kind)
        if used is not None:
            yield _descriptor(f"{kind}: {used.name}" if used.name else kind, used.sha256)
    for data in verdict.data:
        if data.sha256 is not None:
            yield _descriptor(f"{data.role}: {data.name}", data.sha256)
    yield _descriptor("report", verdict.report_sha256)


def _descriptor(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}


def _verdict(verdict: Predicate) -> Mapping[str, Any]:
    dumped: Mapping[str, Any] = verdict.model_dump(mode="json")
    return dumped


OWN = "verdict"
FORMS: Mapping[str, Form] = {
    OWN: InToto(PREDICATE_TYPE, ".intoto.json", _verdict),
    "test-result": InToto(TEST_RESULT_TYPE, ".test-result.intoto.json", test_result),
    "svr": InToto(SVR_TYPE, ".svr.intoto.json", simple_verification_result, accepted_only=True),
    "model-signing": ModelSigning(),
}
