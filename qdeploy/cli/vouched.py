"""Attestations and their verification, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from qdeploy.cli.console import OUTCOME_STYLES, out, show_pairs
from qdeploy.disk.printable import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qdeploy.attest.sign import Attestation
    from qdeploy.attest.verify import Verification


def show_attestations(made: Sequence[Attestation]) -> None:
    """Where they lie, and of what and by whom they are."""
    for one in made:
        outcome = one.predicate.outcome
        line = Text.assemble((outcome, OUTCOME_STYLES[outcome]), f"  {printable(one.path)}")
        out().print(line, soft_wrap=True)
    keys = ", ".join(dict.fromkeys(one.keyid for one in made))
    show_pairs([("file sha256", made[0].sha256), ("signed by key", keys)])


def show_verification(verification: Verification) -> None:
    """What was signed, then whether to rely on it, one line for each reason not to."""
    statement = verification.statement
    if statement is not None:
        verdict = statement.predicate
        rows = [("attested file", f"{statement.name}, sha256 {statement.sha256}")]
        if verdict is not None:
            if verdict.expires is not None:
                rows.append(("until", str(verdict.expires)))
            settings = {"recipe": verdict.recipe, "policy": verdict.policy}
            rows += [("outcome", verdict.outcome), ("run", f"{verdict.run_id}, {verdict.started}")]
            rows += [(kind, s.name or s.sha256) for kind, s in settings.items() if s is not None]
            rows.append(("checks", ", ".join(dict.fromkeys(c.name for c in verdict.checks))))
            rows += [(d.role, f"{d.name}, sha256 {d.sha256 or 'none'}") for d in verdict.data]
        show_pairs([*rows, ("signed by key", verification.keyid or "")])
    word, style = ("VERIFIED", "ACCEPT") if verification.verified else ("NOT VERIFIED", "REJECT")
    line = Text.assemble((word, OUTCOME_STYLES[style]), f"  {printable(verification.model)}")
    out().print(line, soft_wrap=True)
    for refusal in verification.refusals:
        out().print(Text(f"  - {printable(refusal)}"), soft_wrap=True)
