"""DSSE envelopes: sealing a payload, and finding out whose signature is on one."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdeploy.attest import libraries_of
from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError, foreign_reader
from qdeploy.report.kept import parse_object

with libraries_of("attest"):
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import CryptoSigner, SSlibKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
LARGEST_ENVELOPE_BYTES = 16 << 20
MOST_SIGNATURES = 64


def seal(payload: bytes, signer: CryptoSigner) -> bytes:
    """The envelope around `payload`, signed, as JSON without a byte that means nothing."""
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return json.dumps(envelope.to_dict(), separators=(",", ":")).encode()


def read_envelope(path: Path) -> Envelope:
    """The envelope at `path`; its signatures are not looked at yet.

    Base64 must be the standard one in its only spelling (RFC 4648, sections 3.5 and 4), so that no
    two files hold the same envelope by accident.

    Raises:
        InputError: it cannot be read, or is not an envelope.
    """
    what = f"attestation {path}"
    table = parse_object(read_bounded(path, LARGEST_ENVELOPE_BYTES, what="attestation"), what=what)
    _check_shape(table, what)
    with foreign_reader(what):
        return Envelope.from_dict(table)


def signing_key(envelope: Envelope, trusted: Sequence[SSlibKey]) -> str | None:
    """The id of a trusted key whose signature on the envelope is valid; None if there is none."""
    try:
        return next(iter(envelope.verify(list(trusted), 1)))
    except VerificationError:
        return None


def explain_distrust(envelope: Envelope, trusted: Sequence[SSlibKey]) -> str:
    """Why `signing_key` found none."""
    known = {key.keyid for key in trusted} & set(envelope.signatures)
    if known:
        return (
            f"the signature by key {', '.join(sorted(known))} is not valid:"
            " the envelope is not what was signed"
        )
    if envelope.signatures:
        return f"signed by key {', '.join(envelope.signatures)[:200]}, which is not a trusted one"
    return "the envelope has no signature"


def _check_shape(table: dict[str, Any], what: str) -> None:
    match table:
        case {"payload": str(payload), "payloadType": str(), "signatures": list(signatures)}:
            _check_base64(payload, f"{what}: payload")
        case _:
            raise InputError(f"{what}: not a DSSE envelope (payload, payloadType, signatures)")
    if len(signatures) > MOST_SIGNATURES:
        raise InputError(f"{what}: {len(signatures)} signatures, more than {MOST_SIGNATURES}")
    for signature in signatures:
        match signature:
            case {"keyid": str(), "sig": str(sig)}:
                _check_base64(sig, f"{what}: signature")
            case _:
                raise InputError(f"{what}: a signature has no keyid or no sig")


def _check_base64(text: str, where: str) -> None:
    try:
        decoded = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise InputError(f"{where} is not base64") from error
    if base64.b64encode(decoded).decode() != text:
        raise InputError(f"{where} is not base64 in its usual spelling")
