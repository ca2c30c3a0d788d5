"""A verdict in the forms that other tools' policies know, read back by their own libraries."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import model_signing.verifying
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import json_format
from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import (
    TestResult as ResultMessage,
)
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from model_signing.signing import Config

from qdeploy.attest.forms import FORMS, SVR_TYPE, TEST_RESULT_TYPE
from tests.test_attest import ATTEST, MODEL, PASSWORD, VERIFY, fill, report_about, run, write_key

DIGEST = {"sha256": hashlib.sha256(MODEL).hexdigest()}


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    write_key(tmp_path, "ec", ec.generate_private_key(ec.SECP256R1()))
    return tmp_path


def judged_as(folder: Path, outcome: str, **more: object) -> None:
    (folder / "report.json").write_text(json.dumps(report_about(MODEL, outcome) | more))


def statement(folder: Path, form: str) -> dict:
    """What was signed, after in-toto's own library has read it."""
    envelope = json.loads((folder / f"model.onnx{FORMS[form].suffix}").read_bytes())
    payload = base64.b64decode(envelope["payload"])
    Statement.copy_from_pb(json_format.Parse(payload, StatementMessage())).validate()
    found: dict = json.loads(payload)
    assert found["subject"] == [{"name": "model.onnx", "digest": DIGEST}]
    return found


def test_an_accepted_file_is_signed_in_all_forms_at_once(work):
    asked = [word for form in FORMS for word in ("--as", form)]
    made = run(*ATTEST, "ec.pem", *asked)
    assert made.code == 0, made.err
    for form in FORMS.values():
        assert (work / f"model.onnx{form.suffix}").is_file()
        assert f"model.onnx{form.suffix}" in made.out
    assert run(*VERIFY, "ec.pub.pem").code == 0


@pytest.mark.parametrize(
    ("outcome", "result", "passed", "failed"),
    [
        ("ACCEPT", "PASSED", ["agreement (cpu)"], []),
        ("REJECT", "FAILED", [], ["agreement (cpu)"]),
        ("NO VERDICT", "FAILED", ["agreement (cpu)"], ["accuracy_drop"]),
    ],
)
def test_the_test_result_says_which_checks_passed(work, outcome, result, passed, failed):
    judged_as(work, outcome)
    assert run(*ATTEST, "key.pem", "--as", "test-result").code == 0
    said = statement(work, "test-result")
    assert said["predicateType"] == TEST_RESULT_TYPE
    predicate = json_format.ParseDict(said["predicate"], ResultMessage())
    assert (predicate.result, list(predicate.passed_tests)) == (result, passed)
    assert (list(predicate.failed_tests), list(predicate.warned_tests)) == (failed, [])
    used = {one.name: one.digest["sha256"] for one in predicate.configuration}
    assert used["test: t.zip"] == "3" * 64
    written = (work / "report.json").read_bytes()
    assert used["report"] == hashlib.sha256(written).hexdigest()
    assert {"recipe: int4", "device: x86"} <= used.keys()


def test_a_check_on_too_few_images_that_nothing_requires_is_a_warning(work):
    few = report_about(MODEL)["checks"][0] | {
        "name": "class_drop", "relation": "<=", "value": 1.0, "unit": "points",
        "samples": 5, "needed_samples": 50, "state": "few", "within": False,
    }  # fmt: skip
    judged_as(work, "ACCEPT", checks=[*report_about(MODEL)["checks"], few])
    assert run(*ATTEST, "key.pem", "--as", "test-result").code == 0
    said = statement(work, "test-result")["predicate"]
    assert (said["result"], said["warnedTests"]) == ("WARNED", ["class_drop (cpu)"])


def test_the_simple_verification_result_names_what_holds_and_by_which_policy(work):
    judged_as(work, "ACCEPT", policy={"name": "own"})
    assert run(*ATTEST, "key.pem", "--as", "svr", "--days", "3").code == 0
    said = statement(work, "svr")
    assert said["predicateType"] == SVR_TYPE
    predicate = said["predicate"]
    assert predicate["properties"] == ["QDEPLOY_ACCEPT", "QDEPLOY_AGREEMENT"]
    assert predicate["timeCreated"] == "2026-01-01T00:00:00Z"
    assert predicate["verifier"]["id"].startswith("urn:qdeploy:gate:v")
    assert predicate["verifier"]["policy"]["name"] == "own"


@pytest.mark.parametrize("password", [None, PASSWORD], ids=["plain", "encrypted"])
def test_model_signing_verifies_what_was_signed_and_nothing_else(work, monkeypatch, password):
    monkeypatch.setenv("QDEPLOY_KEY_PASSWORD", PASSWORD)
    write_key(work, "mine", ec.generate_private_key(ec.SECP384R1()), password)
    made = run(*ATTEST, "mine.pem", "--as", "model-signing", "--out", "model.onnx.sig")
    assert made.code == 0, made.err
    by = model_signing.verifying.Config().use_elliptic_key_verifier(public_key="mine.pub.pem")
    by.verify("model.onnx", "model.onnx.sig")
    other = model_signing.verifying.Config().use_elliptic_key_verifier(public_key="ec.pub.pem")
    with pytest.raises(Exception, match=r"[Ss]ignature"):
        other.verify("model.onnx", "model.onnx.sig")
    (work / "model.onnx").write_bytes(MODEL[::-1])
    with pytest.raises(ValueError, match="mismatch"):
        by.verify("model.onnx", "model.onnx.sig")


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.accepted_only])
@pytest.mark.parametrize("outcome", ["REJECT", "NO VERDICT"])
def test_a_form_without_a_verdict_is_made_of_nothing_but_accept(work, form, outcome):
    """With one that could say it, neither is written."""
    judged_as(work, outcome)
    done = run(*ATTEST, "ec.pem", "--as", "verdict", "--as", form)
    assert done.code == 2
    assert f"--as {form}" in done.error
    assert outcome in done.error
    assert not list(work.glob("model.onnx.*"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--key", "key.pem", "--as", "slsa"), "--as slsa: no such form"),
        (("--key", "key.pem", "--as", "svr", "--as", "verdict", "--out", "o"), "one place for 2"),
        (("--key", "key.pem", "--as", "model-signing"), "key key.pem: "),
        (("--key", "key.pem", "--keyless"), "--keyless goes without --key"),
        ((), "nothing to sign by"),
        (("--keyless",), "without a key only --as model-signing"),
    ],
)
def test_what_cannot_be_signed_is_one_line(work, options, complaint):
    done = run("attest", "model.onnx", "--report", "report.json", *options)
    assert (done.code, complaint in done.error) == (2, True), done.err
    assert not list(work.glob("model.onnx.*"))


def test_without_the_network_keyless_signing_is_one_line(work, monkeypatch):
    def unreached(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Config, "use_sigstore_signer", unreached)
    asked = ("--keyless", "--as", "model-signing")
    done = run("attest", "model.onnx", "--report", "report.json", *asked)
    assert done.code == 2
    assert "sigstore has not signed: no route to host" in done.error
    assert "--key" in done.err


def test_a_file_that_changes_while_it_is_signed_is_not_signed(work, monkeypatch):
    honest = Config.sign

    def exchanged(config: Config, model: Path, place: Path) -> None:
        model.write_bytes(b"another")
        honest(config, model, place)

    monkeypatch.setattr(Config, "sign", exchanged)
    done = run(*ATTEST, "ec.pem", "--as", "model-signing")
    assert "changed while it was being signed" in done.error
    assert not (work / "model.onnx.sig").exists()


def test_our_own_verify_takes_our_own_form_alone(work):
    assert run(*ATTEST, "key.pem", "--as", "svr").code == 0
    done = run(*VERIFY, "key.pub.pem", "--attestation", "model.onnx.svr.intoto.json")
    assert done.code == 3
    assert f"the predicate is of type {SVR_TYPE}" in done.out


def test_without_model_signing_one_line_says_what_to_install(work):
    code = (
        "import sys\nsys.modules['model_signing'] = None\nfrom qdeploy.cli import main\n"
        f"main({[*ATTEST, 'ec.pem', '--as', 'model-signing']!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "hint: pip install 'qdeploy[model-signing]'" in done.stderr


def waived_until(day: str) -> dict:
    waiver = {"kind": "finding", "pattern": "a*", "owner": "o", "reason": "r", "until": day}
    return {"name": "own", "gate": {"waivers": [waiver]}}


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.accepted_only])
def test_what_ends_is_not_said_where_readers_know_no_end(work, form):
    judged_as(work, "ACCEPT", policy=waived_until("2026-02-01"))
    done = run(*ATTEST, "ec.pem", "--as", form)
    assert (done.code, "ends on 2026-02-01" in done.error) == (2, True)
    assert not list(work.glob("model.onnx.*"))
    judged_as(work, "ACCEPT", policy=waived_until("2999-01-01"))
    assert run(*ATTEST, "ec.pem", "--as", form).code == 0


@pytest.mark.parametrize(
    "lie", [{"relation": "<=", "value": 1.0}, {"unit": "points"}], ids=["relation", "unit"]
)
def test_a_check_is_held_as_this_program_holds_it(work, lie):
    judged_as(work, "ACCEPT", checks=[report_about(MODEL)["checks"][0] | lie])
    done = run(*ATTEST, "key.pem")
    assert (done.code, "agreement is said to be held" in done.error) == (2, True)


def test_a_time_that_is_none_is_refused(work):
    judged_as(work, "ACCEPT", started="yesterday, maybe")
    assert "is no time" in run(*ATTEST, "key.pem", "--as", "svr").error


def test_odd_names_and_terms_are_one_line(work):
    assert "--days" in run(*ATTEST, "key.pem", "--days", "99999999999").err
    rest = ("--report", "report.json", "--key", "key.pem")
    assert "is a folder" in run("attest", ".", *rest).error
    long = work / ("m" * 250)
    long.write_bytes(MODEL)
    assert "cannot write" in run("attest", long, *rest).error
    odd = Path("m\udcff.onnx")
    odd.write_bytes(MODEL)
    assert "not UTF-8" in run("attest", odd, *rest).error


def test_a_link_is_signed_as_what_it_leads_to(work):
    (work / "link.onnx").symlink_to("model.onnx")
    done = run("attest", "link.onnx", "--report", "report.json", "--key", "ec.pem", "--as",
               "model-signing")  # fmt: skip
    assert done.code == 0, done.err
