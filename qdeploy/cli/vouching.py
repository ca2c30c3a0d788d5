"""What is said to others of a judged file: attestations, and entries in MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qdeploy.cli.groups import option
from qdeploy.cli.leaving import leave_by
from qdeploy.cli.options import File
from qdeploy.errors import UsageError


def attest(
    file: File,
    report: Annotated[
        Path, option("--report", "The report.json of the run that judged it.", "Attestation")
    ],
    key: Annotated[
        Path | None,
        option(
            "--key",
            "Private key (PEM); its password, if any, in QDEPLOY_KEY_PASSWORD.",
            "Attestation",
        ),
    ] = None,
    keyless: Annotated[
        bool,
        option("--keyless", "By an identity shown to sigstore: --as model-signing.", "Attestation"),
    ] = False,
    forms: Annotated[
        list[str] | None,
        option("--as", "verdict, test-result, svr or model-signing; repeatable.", "Attestation"),
    ] = None,
    out: Annotated[
        Path | None,
        option("--out", "Where it goes; else FILE.intoto.json beside the file.", "Attestation"),
    ] = None,
    days: Annotated[
        int,
        option(
            "--days",
            "How long it is to be relied on, from today.",
            "Attestation",
            at_least=1,
            at_most=3650,
        ),
    ] = 90,
) -> None:
    """Sign what the report says of a file: an in-toto statement in a DSSE envelope."""
    from datetime import UTC, datetime, timedelta

    from qdeploy.attest.forms import OWN
    from qdeploy.attest.keys import PASSWORD_VARIABLE, Key
    from qdeploy.attest.sign import attest as attest_file
    from qdeploy.cli.vouched import show_attestations

    if (key is None) is not keyless:
        raise UsageError(
            "--keyless goes without --key" if keyless else "nothing to sign by", hint="give --key"
        )
    made = attest_file(
        file,
        report,
        Key(key, os.environ.get(PASSWORD_VARIABLE)),
        out,
        forms=forms or [OWN],
        expires=datetime.now(UTC).date() + timedelta(days=days),
    )
    show_attestations(made)


def verify(
    file: File,
    keys: Annotated[
        list[Path],
        option("--key", "Public key (PEM) that is trusted; repeatable.", "Attestation"),
    ],
    attestation: Annotated[
        Path | None,
        option("--attestation", "The envelope; else FILE.intoto.json.", "Attestation"),
    ] = None,
    report: Annotated[
        Path | None,
        option("--report", "A report.json that must be the attested one.", "Attestation"),
    ] = None,
) -> None:
    """Accept a file by its attestation; exit 3 unless a trusted key signed that it is accepted."""
    from datetime import UTC, datetime

    from qdeploy.attest.verify import verify as verify_file
    from qdeploy.cli.vouched import show_verification
    from qdeploy.judging.verdict import Outcome

    today = datetime.now(UTC).date()
    verification = verify_file(file, attestation, keys, report, today=today)
    show_verification(verification)
    leave_by(Outcome.ACCEPT if verification.verified else Outcome.REJECT)


def track(
    run: Annotated[Path, typer.Argument(help="Run directory, or the report.json of one.")],
    tracking_uri: Annotated[
        str, option("--tracking-uri", "Of the MLflow server, as http://host:5000.", "MLflow")
    ],
    experiment: Annotated[str, option("--experiment", "Made if it is not there.", "MLflow")],
    registered_model: Annotated[
        str | None,
        option("--registered-model", "Also tag a version of this model with it.", "MLflow"),
    ] = None,
    model_version: Annotated[
        int | None,
        option(
            "--model-version",
            "This version, if it holds the judged file; else a new one is made.",
            "MLflow",
            at_least=1,
        ),
    ] = None,
) -> None:
    """Log a run in MLflow: settings, measurements, verdict and files."""
    from qdeploy.cli import console
    from qdeploy.tracking.track import Place
    from qdeploy.tracking.track import track as track_run

    place = Place(tracking_uri, experiment, registered_model, model_version)
    console.show_pairs(track_run(run, place).lines())
