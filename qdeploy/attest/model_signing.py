"""OpenSSF Model Signing (OMS 1.0): a signature that `model_signing verify` knows."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qdeploy.attest import libraries_of
from qdeploy.attest.keys import Key, secret_of
from qdeploy.errors import InputError, QdeployError, UsageError, first_line


def sign_file(model: Path, sha256: str, key: Key) -> bytes:
    """The bundle over the file at `model`.

    Without a key it is signed by whom the surroundings or a browser show to sigstore, which
    enters it in a public log.

    Args:
        sha256: Of what the file must hold.

    Raises:
        InputError: the key is of another kind than elliptic curves, or the file has changed.
        UsageError: the library is not installed, or sigstore cannot be reached.
    """
    config = _config()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "signature"
        try:
            if key.path is None:
                config.use_sigstore_signer(use_ambient_credentials=True)
            else:
                secret = secret_of(key.path.read_bytes(), key)
                config.use_elliptic_key_signer(private_key=key.path, password=secret)
            config.sign(model.resolve(), place)  # it takes no links
        except QdeployError:
            raise
        except Exception as error:
            raise _told(error, key) from error
        bundle = place.read_bytes()
    if _signed_digest(bundle) != sha256:
        raise InputError(f"model {model}: changed while it was being signed")
    return bundle


def _config() -> Any:
    with libraries_of("model-signing"):
        from model_signing.signing import Config
    make: Callable[[], Any] = Config
    return make()


def _told(error: Exception, key: Key) -> QdeployError:
    if key.path is None:
        return UsageError(
            f"sigstore has not signed: {first_line(error)}",
            hint="keyless signing needs the network and an identity; with --key it needs neither",
        )
    return InputError(
        f"key {key.path}: {first_line(error)}",
        hint="it takes elliptic curves: openssl genpkey -algorithm EC -pkeyopt"
        " ec_paramgen_curve:P-256 -out private.pem",
    )


def _signed_digest(bundle: bytes) -> str:
    """Of the one file in the bundle's manifest (section 5.2.1)."""
    payload = base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"])
    (resource,) = json.loads(payload)["predicate"]["resources"]
    digest: str = resource["digest"]
    return digest
