"""What a check or a rule of the scan is called in the taxonomies that security teams sort by.

Identifiers are those of MITRE ATLAS (its techniques) and of NIST AI 100-2e2025 (its attacks). What
says that a file is merely bad, as too slow or too large for a device, has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """Somebody else's list of names for attacks."""

    name: str
    organization: str
    version: str
    uri: str
    taxa: Mapping[str, str]  # identifier to name


TAXONOMIES = (
    Taxonomy(
        "MITRE ATLAS", "MITRE", "5", "https://atlas.mitre.org/",
        {
            "AML.T0010.003": "AI Supply Chain Compromise: Model",
            "AML.T0011.000": "User Execution: Unsafe AI Artifacts",
            "AML.T0018": "Manipulate AI Model",
            "AML.T0018.000": "Manipulate AI Model: Poison AI Model",
            "AML.T0018.001": "Manipulate AI Model: Modify AI Model Architecture",
            "AML.T0018.002": "Manipulate AI Model: Embed Malware",
            "AML.T0029": "Denial of AI Service",
            "AML.T0043.004": "Craft Adversarial Data: Insert Backdoor Trigger",
        },
    ),
    Taxonomy(
        "NIST AI 100-2", "NIST", "e2025", "https://doi.org/10.6028/NIST.AI.100-2e2025",
        {
            "NISTAML.014": "Energy-latency",
            "NISTAML.023": "Backdoor Poisoning",
            "NISTAML.026": "Model Poisoning (integrity)",
            "NISTAML.051": "Model Poisoning (supply chain)",
        },
    ),
)  # fmt: skip
BACKDOOR = ("AML.T0018.000", "AML.T0043.004", "NISTAML.023")
POISONED = ("AML.T0018.000", "NISTAML.026", "NISTAML.051")
EXCHANGED = ("AML.T0010.003", "AML.T0018", "NISTAML.051")
ARCHITECTURE = ("AML.T0018.001", "NISTAML.026")
CODE = ("AML.T0011.000", "AML.T0018.002")  # NIST leaves platforms out
HIDDEN = ("AML.T0018.002",)
EXHAUSTING = ("AML.T0029", "NISTAML.014")
RULES_OF: Mapping[tuple[str, ...], tuple[str, ...]] = {
    BACKDOOR: ("attack_success", "attack_success_rise", "differential_trigger", "class_reach",
               "remaining_shortcuts"),
    POISONED: ("cell_crowding", "held-in-cells", "hardening_rounds", "code-off-grid",
               "mixed-zero-points", "scale-outlier", "saturable_pairs", "runtime_agreement"),
    EXCHANGED: ("source_differences", "weight_steps", "bias_shift", "unexplained_rounding",
                "graph-differs", "weights-changed", "not-nearest", "codes_as_chosen"),
    ARCHITECTURE: ("data-dependent-choice", "batch_invariance", "across-batch", "control-flow",
                   "batch-size-in-values", "dynamic-quantization", "randomness",
                   "shadowed-operator", "custom-operator"),
    CODE: ("holds-code", "damaged-code", "file-operation", "pickle-import", "pickle-odd",
           "pickle-damaged", "path-traversal", "unexpected-member", "symlink-member",
           "external-path"),
    HIDDEN: ("hidden-bytes", "unclaimed-bytes", "unused-initializer", "string-tensor",
             "large-metadata", "external-overlap", "overlapping-members"),
    EXHAUSTING: ("inflation", "too-much-work", "too-large", "recursive-function", "huge-tensor"),
}  # fmt: skip
TAXA_OF: Mapping[str, tuple[str, ...]] = {
    rule: taxa for taxa, rules in RULES_OF.items() for rule in rules
}


def taxonomies() -> list[dict[str, Any]]:
    """The taxonomies as SARIF 2.1.0 has them (section 3.19.3), with the names used here."""
    return [
        {
            "name": one.name,
            "organization": one.organization,
            "version": one.version,
            "informationUri": one.uri,
            "isComprehensive": False,
            "taxa": [{"id": key, "name": name} for key, name in one.taxa.items()],
        }
        for one in TAXONOMIES
    ]


def references(rule: str) -> list[dict[str, Any]]:
    """What `rule` is called there, as references to `taxonomies()`; empty if by no name."""
    return [
        {
            "id": key,
            "index": list(one.taxa).index(key),
            "toolComponent": {"name": one.name, "index": place},
        }
        for place, one in enumerate(TAXONOMIES)
        for key in TAXA_OF.get(rule, ())
        if key in one.taxa
    ]
