"""Attesting a judged file, and relying on it by the word of a trusted key alone."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner

from qdeploy.attest.envelope import PAYLOAD_TYPE
from qdeploy.attest.statement import PREDICATE_TYPE, canonical_sha256
from qdeploy.cli import main
from qdeploy.report.kept import read_report
from qdeploy.report.to_json import to_json
from tests.test_report import report  # noqa: F401  (a report as the program writes it)

MODEL = bytes(range(256))
PASSWORD = "correct horse"  # noqa: S105


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        (line,) = (line for line in self.err.splitlines() if line.startswith("error: "))
        assert "Traceback" not in self.err
        return line


def run(*arguments: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as leaving,
    ):
        main([str(a) for a in arguments])
    assert isinstance(leaving.value.code, int | None)
    return Done(leaving.value.code or 0, out.getvalue(), err.getvalue())


def report_about(model: bytes, outcome: str = "ACCEPT") -> dict:
    """As much of a report as is looked at."""
    sha256 = hashlib.sha256(model).hexdigest()
    check = {"name": "agreement", "value": 99.5, "relation": ">=", "limit": 90.0, "unit": "%",
             "runtime": "cpu", "subject": None, "state": "within", "within": True}  # fmt: skip
    if outcome == "REJECT":
        check |= {"value": 80.0, "state": "off", "within": False}
    required = ["accuracy_drop", "agreement"] if outcome == "NO VERDICT" else ["agreement"]
    return {
        "schema_version": 1, "outcome": outcome,
        "reasons": [] if outcome == "ACCEPT" else ["agreement: 80 %, below the limit of 90"],
        "run_id": "abc123", "started": "2026-01-01T00:00:00+00:00", "versions": {"qdeploy": "0.1"},
        "origin": {"path": "m.pt", "sha256": "1" * 64, "format": "ONNX", "architecture": None},
        "checks": [check], "required": required, "measurements": [], "runtime_agreement": [],
        "latency": [], "layers": [{"name": "conv", "codes_sha256": "2" * 64}],
        "files": [
            {"variant": "fp32", "sha256": "0" * 64, "size_bytes": 9, "kernels": {}},
            {"variant": "result", "sha256": sha256, "size_bytes": len(model), "kernels": {}},
        ],
        "data": [{"role": "test", "name": "t.zip", "images": 600, "sha256": "3" * 64,
                  "given_by": "command line"}],
        "recipe": {"name": "int4", "bits": 4}, "policy": None, "device": {"name": "x86", "z": 1.5},
    }  # fmt: skip


def write_key(folder: Path, name: str, key: object, password: str | None = None) -> None:
    secret = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret)
    (folder / f"{name}.pem").write_bytes(pem)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub.pem").write_bytes(public)


def fill(folder: Path, outcome: str = "ACCEPT") -> Path:
    """A model, its report, and two keys."""
    (folder / "model.onnx").write_bytes(MODEL)
    (folder / "report.json").write_text(json.dumps(report_about(MODEL, outcome)))
    for name in ("key", "other"):
        write_key(folder, name, ed25519.Ed25519PrivateKey.generate())
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path)


@pytest.fixture(scope="module")
def attested(tmp_path_factory) -> Path:
    """A model with its attestation; tests on it leave it as it is."""
    folder = fill(tmp_path_factory.mktemp("attested"))
    paths = (folder / "model.onnx", "--report", folder / "report.json", "--key", folder / "key.pem")
    assert run("attest", *paths).code == 0
    return folder


ATTEST = ("attest", "model.onnx", "--report", "report.json", "--key")
VERIFY = ("verify", "model.onnx", "--key")


def envelope_of(path: Path) -> dict:
    return json.loads(path.read_bytes())


def sign(folder: Path, payload: bytes, payload_type: str = PAYLOAD_TYPE) -> None:
    """Another program's envelope, by the trusted key."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    envelope = Envelope(payload, payload_type, {})
    private = load_pem_private_key((folder / "key.pem").read_bytes(), None)
    envelope.sign(CryptoSigner(private))
    (folder / "model.onnx.intoto.json").write_text(json.dumps(envelope.to_dict()))


KEYS = {
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ECDSA P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ECDSA P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "RSA 2048": lambda: rsa.generate_private_key(65537, 2048),
}


@pytest.mark.parametrize("password", [None, PASSWORD], ids=["plain", "encrypted"])
@pytest.mark.parametrize("kind", KEYS)
def test_a_key_of_every_kind_signs_what_its_public_half_verifies(work, monkeypatch, kind, password):
    monkeypatch.setenv("QDEPLOY_KEY_PASSWORD", PASSWORD)  # in vain for a key that is not encrypted
    write_key(work, "mine", KEYS[kind](), password)
    made = run(*ATTEST, "mine.pem")
    assert made.code == 0, made.err
    done = run(*VERIFY, "other.pub.pem", "--key", "mine.pub.pem", "--report", "report.json")
    assert done.code == 0, done.err
    assert "VERIFIED  model.onnx" in done.out
    assert "NOT VERIFIED" not in done.out
    assert run(*VERIFY, "other.pub.pem").code == 3


def test_keys_as_openssl_makes_them_work(work):
    for options in (["ed25519"], ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"], ["RSA"]):
        subprocess.run(
            ["openssl", "genpkey", "-algorithm", *options, "-out", "o.pem"],  # noqa: S607
            check=True, capture_output=True,
        )  # fmt: skip
        public = ["openssl", "pkey", "-in", "o.pem", "-pubout", "-out", "o.pub.pem"]
        subprocess.run(public, check=True, capture_output=True)
        assert run(*ATTEST, "o.pem").code == 0
        assert run(*VERIFY, "o.pub.pem").code == 0


def test_the_statement_is_an_in_toto_statement_about_this_very_file(attested):
    envelope = envelope_of(attested / "model.onnx.intoto.json")
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    payload = base64.b64decode(envelope["payload"])
    Statement.copy_from_pb(json_format.Parse(payload, StatementMessage())).validate()
    statement = json.loads(payload)
    digest = {"sha256": hashlib.sha256(MODEL).hexdigest()}
    assert statement["subject"] == [{"name": "model.onnx", "digest": digest}]
    assert statement["predicateType"] == PREDICATE_TYPE
    said = statement["predicate"]
    known = report_about(MODEL)
    written = (attested / "report.json").read_bytes()
    assert said["report_sha256"] == hashlib.sha256(written).hexdigest()
    assert said["outcome"] == "ACCEPT"
    assert said["recipe"] == {"name": "int4", "sha256": canonical_sha256(known["recipe"])}
    assert said["policy"] is None
    assert said["checks"][0]["within"] is True
    assert said["data"] == [
        {key: value for key, value in data.items() if key != "given_by"} for data in known["data"]
    ]
    assert said["layers"] == [{"name": "conv", "codes_sha256": "2" * 64}]
    assert said["source_sha256"] == "1" * 64


def test_a_signature_can_be_checked_without_this_program(work):
    """By the DSSE specification, with nothing but the primitives."""

    def pae(kind: bytes, body: bytes) -> bytes:
        return b" ".join([b"DSSEv1", b"%d" % len(kind), kind, b"%d" % len(body), body])

    schemes = {
        "ed25519": (),
        "ECDSA P-256": (ec.ECDSA(hashes.SHA256()),),
        "RSA 2048": (
            padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH),
            hashes.SHA256(),
        ),
    }
    for kind, scheme in schemes.items():
        write_key(work, "mine", KEYS[kind]())
        assert run(*ATTEST, "mine.pem").code == 0
        envelope = envelope_of(work / "model.onnx.intoto.json")
        message = pae(envelope["payloadType"].encode(), base64.b64decode(envelope["payload"]))
        (signature,) = envelope["signatures"]
        public = load_pem_public_key((work / "mine.pub.pem").read_bytes())
        public.verify(base64.b64decode(signature["sig"]), message, *scheme)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_byte_of_the_envelope_can_be_changed(attested, data):
    good = (attested / "model.onnx.intoto.json").read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([data.draw(st.integers(0, 255).filter(lambda b: b != good[at]))])
    changed = attested / "changed.json"
    changed.write_bytes(bad + good[at + 1 :])
    options = ("--attestation", changed, "--key", attested / "key.pub.pem")
    assert run("verify", attested / "model.onnx", *options).code in {2, 3}


@settings(max_examples=50, deadline=None)
@given(at=st.integers(0, len(MODEL) - 1), flip=st.integers(1, 255))
def test_no_byte_of_the_model_can_be_changed(attested, at, flip):
    bad = attested / "bad.onnx"
    bad.write_bytes(MODEL[:at] + bytes([MODEL[at] ^ flip]) + MODEL[at + 1 :])
    options = ("--attestation", attested / "model.onnx.intoto.json")
    done = run("verify", bad, *options, "--key", attested / "key.pub.pem")
    assert done.code == 3
    found, signed = (hashlib.sha256(b).hexdigest() for b in (bad.read_bytes(), MODEL))
    assert f"the file's sha256 is {found}, attested was {signed}" in done.out


@settings(max_examples=50, deadline=None)
@given(junk=st.binary(max_size=200) | st.text(max_size=50).map(lambda s: json.dumps(s).encode()))
def test_junk_is_no_envelope(attested, junk):
    path = attested / "junk.json"
    path.write_bytes(junk)
    options = ("--attestation", path, "--key", attested / "key.pub.pem")
    done = run("verify", attested / "model.onnx", *options)
    assert done.code == 2
    assert done.error


@pytest.mark.parametrize("outcome", ["REJECT", "NO VERDICT"])
def test_what_was_not_accepted_can_be_attested_and_is_not_verified(work, outcome):
    fill(work, outcome)
    assert outcome in run(*ATTEST, "key.pem").out
    done = run(*VERIFY, "key.pub.pem")
    assert done.code == 3
    assert f"the attested outcome is {outcome}" in done.out
    assert "below the limit of 90" in done.out


def off(table: dict) -> None:
    table["checks"][0] |= {"value": 80.0, "state": "off", "within": False}


def off_but_said_to_hold(table: dict) -> None:
    table["checks"][0]["value"] = 80.0


def on_too_few_images(table: dict) -> None:
    table["checks"][0] |= {"samples": 10, "needed_samples": 200}


def undecided(table: dict) -> None:
    table["checks"][0] |= {"samples": 300, "low": 89.0, "high": 99.9}


def no_checks(table: dict) -> None:
    table |= {"checks": [], "required": []}


def never_made(table: dict) -> None:
    table["checks"] = []


def of_another_kind(table: dict) -> None:
    table["checks"][0]["name"] = "trust_me"


LIES = (off, off_but_said_to_hold, on_too_few_images, undecided, no_checks, never_made,
        of_another_kind)  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_an_accept_that_its_checks_contradict_is_not_signed(work, lie):
    table = report_about(MODEL)
    lie(table)
    (work / "report.json").write_text(json.dumps(table))
    done = run(*ATTEST, "key.pem")
    assert (done.code, "contradicts itself" in done.error) == (2, True)
    assert not (work / "model.onnx.intoto.json").exists()


@pytest.mark.parametrize("lie", LIES)
def test_nor_is_it_believed_when_a_trusted_key_has_signed_it(work, lie):
    assert run(*ATTEST, "key.pem").code == 0
    payload = json.loads(base64.b64decode(envelope_of(work / "model.onnx.intoto.json")["payload"]))
    lie(payload["predicate"])
    sign(work, json.dumps(payload).encode())
    assert run(*VERIFY, "key.pub.pem").code == 3


@pytest.mark.parametrize("first", [True, False])
def test_a_report_on_two_files_attests_neither(work, first):
    table = report_about(MODEL)
    other = {"variant": "result", "sha256": "7" * 64, "size_bytes": 1}
    table["files"].insert(0 if first else len(table["files"]), other)
    (work / "report.json").write_text(json.dumps(table))
    assert run(*ATTEST, "key.pem").code == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"expires": "2026-01-01"}, "it ended on 2026-01-01"),
        ({"rules_version": 0}, "version 0 of the rules"),
        ({"expires": None}, "attest anew"),
        ({"rules_version": None}, "attest anew"),
    ],
)
def test_a_verdict_holds_for_a_time_and_by_its_rules(work, change, reason):
    assert run(*ATTEST, "key.pem", "--days", 1).code == 0
    assert run(*VERIFY, "key.pub.pem").code == 0
    payload = json.loads(base64.b64decode(envelope_of(work / "model.onnx.intoto.json")["payload"]))
    payload["predicate"] |= change
    sign(work, json.dumps(payload).encode())
    done = run(*VERIFY, "key.pub.pem")
    assert (done.code, reason in done.out) == (3, True), done.out


def test_the_report_of_another_file_attests_nothing(work):
    (work / "report.json").write_text(json.dumps(report_about(b"another")))
    done = run(*ATTEST, "key.pem")
    assert (done.code, "is about another file" in done.error) == (2, True)
    assert not (work / "model.onnx.intoto.json").exists()


def test_a_report_that_was_swapped_is_noticed(work):
    assert run(*ATTEST, "key.pem").code == 0
    (work / "report.json").write_text(json.dumps(report_about(MODEL), indent=1))
    done = run(*VERIFY, "key.pub.pem", "--report", "report.json")
    assert done.code == 3
    assert "the report's sha256 is" in done.out
    assert run(*VERIFY, "key.pub.pem").code == 0


def test_an_envelope_may_be_signed_by_several(work):
    assert run(*ATTEST, "other.pem", "--out", "b.json").code == 0
    assert run(*ATTEST, "key.pem").code == 0
    both = envelope_of(work / "b.json")
    both["signatures"] += envelope_of(work / "model.onnx.intoto.json")["signatures"]
    (work / "b.json").write_text(json.dumps(both, indent=2))
    for key in ("key", "other"):
        assert run(*VERIFY, f"{key}.pub.pem", "--attestation", "b.json").code == 0
    write_key(work, "third", ed25519.Ed25519PrivateKey.generate())
    assert run(*VERIFY, "third.pub.pem", "--attestation", "b.json").code == 3


def without_signatures(envelope: dict) -> None:
    envelope["signatures"] = []


def signed_by_another_payload(envelope: dict) -> None:
    payload = base64.b64decode(envelope["payload"]).replace(b"ACCEPT", b"REJECT")
    envelope["payload"] = base64.b64encode(payload).decode()


def of_another_type(envelope: dict) -> None:
    envelope["payloadType"] = "text/plain"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_signatures, "the envelope has no signature"),
        (signed_by_another_payload, "the envelope is not what was signed"),
        (of_another_type, "the envelope is not what was signed"),
    ],
)
def test_a_tampered_envelope_is_rejected_and_not_shown(work, change, reason):
    assert run(*ATTEST, "key.pem").code == 0
    path = work / "model.onnx.intoto.json"
    envelope = envelope_of(path)
    change(envelope)
    path.write_text(json.dumps(envelope))
    done = run(*VERIFY, "key.pub.pem")
    assert done.code == 3
    assert reason in done.out
    assert "abc123" not in done.out


def statement(**changes: object) -> bytes:
    subject = [{"name": "model.onnx", "digest": {"sha256": hashlib.sha256(MODEL).hexdigest()}}]
    document = {"_type": "https://in-toto.io/Statement/v1", "subject": subject,
                "predicateType": PREDICATE_TYPE, "predicate": {}}  # fmt: skip
    return json.dumps(document | changes).encode()


@pytest.mark.parametrize(
    ("payload", "code", "reason"),
    [
        pytest.param(
            statement(predicateType="https://slsa.dev/provenance/v1"), 3,
            "the predicate is of type https://slsa.dev", id="another predicate",
        ),
        pytest.param(statement(), 2, "outcome: is missing", id="an empty verdict"),
        pytest.param(statement(_type="v0"), 2, "not an in-toto statement", id="another statement"),
        pytest.param(statement(subject=[]), 2, "subject is not one file", id="about nothing"),
        pytest.param(statement(predicateType=7), 2, "is not a string", id="no type"),
        pytest.param(b"[" * 100_000, 2, "nested too deeply", id="deep"),
        pytest.param(b"[1]", 2, "not a JSON object", id="no object"),
        pytest.param(b'{"a":1,"a":2}', 2, "twice", id="a key twice"),
        pytest.param(b'{"a":NaN}', 2, "not a JSON number", id="not a number"),
        pytest.param(b"\xff", 2, "not valid JSON", id="not text"),
    ],
)  # fmt: skip
def test_even_a_trusted_key_can_sign_what_is_no_verdict(work, payload, code, reason):
    sign(work, payload)
    done = run(*VERIFY, "key.pub.pem")
    assert done.code == code
    assert reason in (done.error if code == 2 else done.out)


def test_a_signed_payload_of_another_type_is_not_read(work):
    sign(work, statement(), "text/plain")
    done = run(*VERIFY, "key.pub.pem")
    assert done.code == 3
    assert "the payload is of type text/plain" in done.out


GOOD = {"payload": "YQ==", "payloadType": PAYLOAD_TYPE, "signatures": []}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "not valid JSON", id="empty"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="deep"),
        pytest.param(b" " * ((16 << 20) + 1), "larger than", id="huge"),
        pytest.param(b"{}", "not a DSSE envelope", id="no envelope"),
        pytest.param(GOOD | {"payload": "YR=="}, "usual spelling", id="loose base64"),
        pytest.param(GOOD | {"payload": "-_-_"}, "not base64", id="other base64"),
        pytest.param(GOOD | {"payload": "\u00e9"}, "not base64", id="no base64"),
        pytest.param(GOOD | {"signatures": [{"sig": "YQ=="}]}, "no keyid", id="no keyid"),
        pytest.param(
            GOOD | {"signatures": 65 * [{"keyid": "a", "sig": "YQ=="}]}, "more than 64", id="many"
        ),
        pytest.param(
            GOOD | {"signatures": 2 * [{"keyid": "a", "sig": "YQ=="}]}, "Multiple", id="twice"
        ),
    ],
)
def test_a_damaged_envelope_is_one_line(work, content, reason):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (work / "model.onnx.intoto.json").write_bytes(data)
    done = run(*VERIFY, "key.pub.pem")
    assert done.code == 2
    assert reason in done.error


def certificate(work: Path) -> None:
    (work / "key.pem").write_text("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n")
    (work / "key.pub.pem").write_bytes((work / "key.pem").read_bytes())


def swapped(work: Path) -> None:
    private, public = ((work / name).read_bytes() for name in ("key.pem", "key.pub.pem"))
    (work / "key.pem").write_bytes(public)
    (work / "key.pub.pem").write_bytes(private)


def damaged(work: Path) -> None:
    for name in ("key.pem", "key.pub.pem"):
        lines = (work / name).read_text().splitlines()
        (work / name).write_text("\n".join([lines[0], "AAAA", lines[-1], ""]))


def short(work: Path) -> None:
    write_key(work, "key", rsa.generate_private_key(65537, 1024))  # noqa: S505


def of_a_strange_curve(work: Path) -> None:
    write_key(work, "key", ec.generate_private_key(ec.SECP256K1()))


def gone(work: Path) -> None:
    (work / "key.pem").unlink()
    (work / "key.pub.pem").unlink()


def large(work: Path) -> None:
    for name in ("key.pem", "key.pub.pem"):
        (work / name).write_bytes(b" " * 100_000)


@pytest.mark.filterwarnings("ignore:.*key size.*")
@pytest.mark.parametrize(
    ("spoil", "private", "public"),
    [
        (certificate, "holds no key in PEM format", "holds no public key"),
        (swapped, "holds a public key", "holds a private key"),
        (damaged, "key key.pem:", "key key.pub.pem:"),
        (short, "RSA with 1024 bits", "RSA with 1024 bits"),
        (of_a_strange_curve, "unsupported curve", "unsupported curve"),
        (gone, "No such file", "No such file"),
        (large, "larger than", "larger than"),
    ],
)
def test_a_key_that_will_not_do_is_named(work, spoil, private, public):
    spoil(work)
    signing, checking = run(*ATTEST, "key.pem"), run(*VERIFY, "key.pub.pem")
    assert (signing.code, checking.code) == (2, 2)
    assert private in signing.error
    assert public in checking.error
    assert not (work / "model.onnx.intoto.json").exists()


def test_an_encrypted_key_needs_its_password(work, monkeypatch):
    write_key(work, "key", KEYS["ed25519"](), PASSWORD)
    monkeypatch.delenv("QDEPLOY_KEY_PASSWORD", raising=False)
    without = run(*ATTEST, "key.pem")
    assert (without.code, "protected by a password" in without.error) == (2, True)
    assert "QDEPLOY_KEY_PASSWORD" in without.err
    monkeypatch.setenv("QDEPLOY_KEY_PASSWORD", "wrong-password")
    wrong = run(*ATTEST, "key.pem")
    assert wrong.code == 2
    assert "wrong-password" not in wrong.err
    assert wrong.error


@pytest.mark.parametrize("name", ["model.onnx", "report.json", "key.pem"])
def test_an_attestation_replaces_none_of_its_sources(work, name):
    before = (work / name).read_bytes()
    done = run(*ATTEST, "key.pem", "--out", f"./{name}")
    assert (done.code, "would be replaced" in done.error) == (2, True)
    assert (work / name).read_bytes() == before


def test_files_that_are_not_there_are_named(work):
    assert "No such file" in run(*VERIFY, "key.pub.pem").error
    assert run(*ATTEST, "key.pem").code == 0
    assert "No such file" in run(*VERIFY, "key.pub.pem", "--report", "gone.json").error
    (work / "model.onnx").unlink()
    assert "model model.onnx: No such file" in run(*VERIFY, "key.pub.pem").error
    assert "model model.onnx: No such file" in run(*ATTEST, "key.pem").error


def test_what_a_stranger_signs_cannot_command_the_terminal(work):
    known = report_about(MODEL)
    known["data"][0]["name"] = "\x1b[2J"
    (work / "report.json").write_text(json.dumps(known))
    assert run(*ATTEST, "key.pem").code == 0
    assert "\x1b" not in run(*VERIFY, "key.pub.pem").out


def test_a_report_as_the_program_writes_it_can_be_read(tmp_path, report):  # noqa: F811
    (tmp_path / "report.json").write_bytes(to_json(report))
    kept = read_report(tmp_path / "report.json")
    assert kept.content.outcome is report.outcome
    assert kept.content.checks[0].holds is (report.checks[0].state == "within")
    assert kept.content.judged_sha256 == "2" * 64


@pytest.mark.parametrize("library", ["securesystemslib", "cryptography"])
def test_without_the_libraries_one_line_says_what_to_install(work, library):
    code = (
        f"import sys\nsys.modules[{library!r}] = None\nfrom qdeploy.cli import main\n"
        f"main({[*ATTEST, 'key.pem']!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "hint: pip install 'qdeploy[attest]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_verifying_needs_none_of_the_heavy_libraries(attested):
    arguments = ["verify", str(attested / "model.onnx"), "--key", str(attested / "key.pub.pem")]
    code = (
        "import sys\nfrom qdeploy.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as leaving:\n    print(leaving.code)\n"
        "print(sorted({'torch', 'onnxruntime', 'onnx', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["0", "[]"]


def test_no_attestation_outlives_a_waiver_that_its_verdict_rests_on(work):
    waiver = {"kind": "finding", "pattern": "a*", "owner": "o", "reason": "r"}
    known = report_about(MODEL)
    known["policy"] = {"name": "own", "gate": {"waivers": [{**waiver, "until": "2026-02-01"}]}}
    (work / "report.json").write_text(json.dumps(known))
    assert run(*ATTEST, "key.pem").code == 0
    assert "it ended on 2026-02-01" in run(*VERIFY, "key.pub.pem").out
