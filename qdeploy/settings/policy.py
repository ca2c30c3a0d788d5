"""Policies: what a file must show to be accepted, whoever made it."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model, field_serializer, model_validator

from qdeploy.settings.checks import CHECKS, ROWS, CheckRow
from qdeploy.settings.device import AUTO, BudgetSpec
from qdeploy.settings.schema import Spec, find_bundled, load_toml
from qdeploy.settings.waivers import Waiver, WaiverKind, patterns, split

KIND = "recipes/policies"
OLD_KEYS = frozenset({"allow_findings", "allow_float", "allow_degraded"})


def _known(name: str) -> str:
    if name not in CHECKS:
        raise ValueError(f"there is no check {name!r}; have {', '.join(CHECKS)}")
    return name


CheckName = Annotated[str, AfterValidator(_known)]


class ValidationSpec(Spec):
    images: int | None = Field(None, gt=0, description="At most; none for all.")
    labels: Literal["data", "float model"] = Field(
        "data",
        description="Whose: the data's, or, for pictures that have none, the answers of the"
        " float model; nothing is then said of accuracy.",
    )
    detection: Literal["differential", "off"] = Field(
        "differential",
        description="Search for a trigger that only the file answers to; off: not measured.",
    )
    latency_runs: int = Field(10, ge=0, description="Timed runs per turn; 0 for none.")


def _limits() -> dict[str, Any]:
    """The keys that the checks give a policy, for `create_model`."""
    keys: dict[str, Any] = {}
    for row in ROWS:
        if row.key is not None and not row.of_budget:
            number: Any = int if row.counted else float
            kind = number if row.default is not None else number | None
            default = row.default if row.default is None else number(row.default)
            least = 0 if row.counted else None
            keys[row.key] = (kind, Field(default, ge=least, description=row.meaning or None))
    return keys


if TYPE_CHECKING:
    Limits = Spec
else:
    Limits = create_model("Limits", __base__=Spec, **_limits())


class GateSpec(Limits):
    """Limits, and the checks without which there is no verdict. Percent and percentage points.

    A rate is held against its limit with its 95 % confidence interval: within if the whole interval
    is, off if none of it is, and no verdict in between.
    """

    required: frozenset[CheckName] = frozenset({
        "accuracy_drop", "agreement", "runtime_agreement", "batch_invariance",
        "static_findings", "layers_as_planned", "codes_as_chosen",
    })  # fmt: skip
    required_with_trigger: frozenset[CheckName] = frozenset(
        {"attack_success", "attack_success_rise"}
    )
    decided_by_value: frozenset[CheckName] = Field(
        frozenset(), description="Checks whose confidence interval is shown and not counted."
    )
    min_images: int = Field(200, gt=0, description="A rate over fewer images is no evidence.")
    min_class_images: int = Field(50, gt=0, description="The same for the rate of one class.")
    refuse_findings: tuple[str, ...] = Field(
        (), description="Rules of the static scan whose warnings count as errors (patterns)."
    )
    waivers: tuple[Waiver, ...] = Field((), description="What somebody has answered for.")

    independent_evidence: bool = Field(
        False, description="Test data and triggers that the model's own card names do not count."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_nameless_permission(cls, table: Any) -> Any:
        """Name what to write in place of a key that waived for ever and for nobody."""
        old = OLD_KEYS.intersection(table) if isinstance(table, dict) else None
        if old:
            raise ValueError(
                f"{min(old)} has nobody who answers for it; write [[gate.waivers]] with kind,"
                " pattern, owner, reason and until"
            )
        return table

    def limit(self, row: CheckRow, budget: BudgetSpec) -> float | None:
        """What a check is held against; None where nobody has set it."""
        if row.key is None:
            return row.limit
        limit: float | None = getattr(budget if row.of_budget else self, row.key)
        return limit if limit is None else float(limit)

    def waived(self, kind: WaiverKind) -> tuple[str, ...]:
        """Patterns of what is waived of a kind."""
        return patterns(self.waivers, kind)

    @field_serializer("required", "required_with_trigger", "decided_by_value")
    def _sorted(self, names: frozenset[str]) -> list[str]:
        """In an order that does not change from run to run."""
        return sorted(names)


class Policy(Spec):
    """What is measured, on which runtimes, and what it must show."""

    schema_version: Literal[1]
    name: str
    description: str
    device: str = AUTO
    seed: int = Field(0, ge=0, description="Of the sample of test images.")
    validation: ValidationSpec = ValidationSpec()
    gate: GateSpec = GateSpec()
    budget: BudgetSpec = BudgetSpec()


def load_policy(name_or_path: str) -> Policy:
    """The policy of that name, or in that file.

    Raises:
        UsageError: there is no such policy.
        InputError: the file does not fit the format.
    """
    return load_toml(find_bundled(KIND, name_or_path), Policy, what="policy")


def in_force(policy: Policy, today: date) -> tuple[Policy, tuple[Waiver, ...]]:
    """The policy with the waivers that hold today, and those that have ended."""
    held, ended = split(policy.gate.waivers, today)
    gate = policy.gate.model_copy(update={"waivers": held})
    return policy.model_copy(update={"gate": gate}), ended
