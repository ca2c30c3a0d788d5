"""Keys in PEM files, as `openssl genpkey` makes them: ed25519, ECDSA and RSA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qdeploy.attest import libraries_of
from qdeploy.disk.files import read_bounded
from qdeploy.errors import InputError, UsageError, foreign_reader

with libraries_of("attest"):
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
    from cryptography.hazmat.primitives.serialization import (
        load_pem_private_key,
        load_pem_public_key,
    )
    from securesystemslib.signer import CryptoSigner, SSlibKey

LARGEST_KEY_BYTES = 64 << 10
SMALLEST_RSA_BITS = 2048
PASSWORD_VARIABLE = "QDEPLOY_KEY_PASSWORD"  # noqa: S105


@dataclass(frozen=True, slots=True)
class Key:
    """What to sign by."""

    path: Path | None  # PEM; None: by an identity that is shown to sigstore, without a key
    password: str | None = None  # opens the key if it is encrypted; not looked at otherwise


def load_signer(key: Key) -> CryptoSigner:
    """What signs by a private key.

    Raises:
        InputError: it is not a private key of a known kind, or the password is missing or wrong.
        UsageError: there is none.
    """
    path = key.path
    if path is None:
        raise UsageError("without a key only --as model-signing is signed", hint="give --key")
    pem = _read(path)
    if b"PRIVATE KEY-----" not in pem:
        holds = "a public key" if b"PUBLIC KEY-----" in pem else "no key in PEM format"
        raise InputError(f"key {path}: holds {holds}; to attest, the private one is needed")
    with foreign_reader(f"key {path}"):
        private = load_pem_private_key(pem, secret_of(pem, key))
        public = private.public_key()
    _require_strength(path, public)
    with foreign_reader(f"key {path}"):
        return CryptoSigner(private)


def secret_of(pem: bytes, key: Key) -> bytes | None:
    """What opens the private key in `pem`; None if it needs nothing.

    Raises:
        InputError: it is encrypted, and there is no password.
    """
    if b"ENCRYPTED" not in pem:
        return None
    if not key.password:
        raise InputError(
            f"key {key.path}: protected by a password",
            hint=f"give it in the environment variable {PASSWORD_VARIABLE}",
        )
    return key.password.encode()


def load_public_key(path: Path) -> SSlibKey:
    """The public key at `path`.

    Raises:
        InputError: it is not a public key of a known kind.
    """
    pem = _read(path)
    if b"PRIVATE KEY-----" in pem:
        raise InputError(
            f"key {path}: holds a private key; to verify, the public one is needed",
            hint=f"openssl pkey -in {path} -pubout -out public.pem",
        )
    if b"PUBLIC KEY-----" not in pem:
        raise InputError(
            f"key {path}: holds no public key in PEM format",
            hint="of a certificate: openssl x509 -in FILE -noout -pubkey",
        )
    with foreign_reader(f"key {path}"):
        public = load_pem_public_key(pem)
    _require_strength(path, public)
    with foreign_reader(f"key {path}"):
        return SSlibKey.from_crypto(public)


def _read(path: Path) -> bytes:
    return read_bounded(path, LARGEST_KEY_BYTES, what="key")


def _require_strength(path: Path, public: PublicKeyTypes) -> None:
    if isinstance(public, RSAPublicKey) and public.key_size < SMALLEST_RSA_BITS:
        raise InputError(
            f"key {path}: RSA with {public.key_size} bits, at least {SMALLEST_RSA_BITS} are needed"
        )
