"""Every check of a gate, a row each: its limit in a policy, what it takes, what it says.

A row here and the measure of that name in `qdeploy.judging.checks`, or the detector that it names,
are all there is to a check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Need = Literal[
    "limit",  # that the policy sets one
    "test data",
    "labels",  # of the test data, that say something
    "trigger",
    "reference",
    "two runtimes",
    "comparison",  # of the graph with its reference's
    "integers",
    "floats",  # weights off a grid
    "search",  # for shortcuts, by a sanitizer
    "pictures",  # for a search of its own
    "budget",
    "timing",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """What a policy may demand of a file."""

    name: str
    says: str  # what stands against a file that is off the limit
    then: str  # what its user can do
    relation: Literal["<=", ">="] = "<="
    unit: str = "%"
    needs: tuple[Need, ...] = ()  # in the order in which a reader wants to know what is missing
    limit: float = 0.0  # where the policy has no key for it
    key: str | None = None  # of the limit, in a policy; with `of_budget` in a budget
    default: float | None = None  # of that key; None: there is no check unless somebody sets it
    meaning: str = ""  # of that key
    counted: bool = False  # its limit is a number of things
    of_budget: bool = False
    detector: str | None = None  # the module of `qdeploy.detectors` that measures it
    sampled: Literal["images", "images of a class"] | None = None  # what it takes enough of
    made_here: bool = False  # of the files that this program makes, and of no other
    by_value: bool = False  # its interval is shown and not counted: the limit is one of values
    spoken_of: bool = False  # readers take it for granted: if it was not measured, that is said


BETTER = (
    "--bits auto, which gives 8 bits to the layers that need them, --bits 8, more calibration"
    " images, or another --rounding"
)
FROM_FLOAT = "have it made again from its float model: no rounding moves a weight that far"
ROWS = (
    CheckRow(
        name="static_findings", unit="findings",
        says="The file holds what no classifier has any business with.",
        then="qdeploy scan shows all of it; ask its maker, or have somebody waive it",
    ),
    CheckRow(
        name="accuracy", relation=">=", sampled="images", needs=("test data", "labels", "limit"),
        key="min_accuracy", meaning="Floor of the accuracy itself.",
        says="The file is less accurate than it has to be.",
        then=BETTER,
    ),
    CheckRow(
        name="accuracy_drop", unit="points", sampled="images", spoken_of=True,
        needs=("test data", "labels", "reference"), key="max_accuracy_drop", default=1.0,
        says="The quantized file loses more accuracy than allowed.",
        then=BETTER,
    ),
    CheckRow(
        name="accuracy_drop_relative", sampled="images",
        needs=("test data", "labels", "reference", "limit"), key="max_accuracy_drop_relative",
        meaning="The same in percent of the reference's accuracy.",
        says="The file loses a larger share of the accuracy than allowed.",
        then=BETTER,
    ),
    CheckRow(
        name="class_drop", unit="points", sampled="images of a class",
        needs=("test data", "labels", "reference", "limit"), key="max_class_drop",
        meaning="Largest drop of one class's accuracy.",
        says="One class loses more accuracy than allowed.",
        then=BETTER,
    ),
    CheckRow(
        name="agreement", relation=">=", sampled="images", spoken_of=True,
        needs=("test data", "reference"), key="min_agreement", default=90.0,
        says="The quantized file disagrees with the float model too often.",
        then=BETTER,
    ),
    CheckRow(
        name="attack_success", sampled="images", spoken_of=True, needs=("test data", "trigger"),
        key="max_attack_success", default=10.0,
        says="A known trigger leads to the attacker's class.",
        then="do not deploy it: clean the float model (qdeploy clean), or have it made anew",
    ),
    CheckRow(
        name="attack_success_rise", unit="points", sampled="images",
        needs=("test data", "trigger", "reference"), key="max_attack_success_rise", default=1.0,
        says="Quantization makes a known trigger work better.",
        then="do not deploy it: round the float model by qdeploy sanitize",
    ),
    CheckRow(
        name="runtime_agreement", relation=">=", sampled="images", spoken_of=True,
        needs=("test data", "two runtimes"), key="min_runtime_agreement", default=99.0,
        says="The file answers differently from one runtime to the other.",
        then="name the device that will run it (--device): without VNNI products saturate",
    ),
    CheckRow(
        name="boundary_agreement", relation=">=", by_value=True,
        needs=("test data", "two runtimes"), key="min_boundary_agreement", default=95.0,
        meaning="Share of inputs between two classes, found on the first runtime, that another one"
        " gives no third class.",
        says="Where two classes meet on one runtime, another one answers a third.",
        then="do not deploy it: something makes much of little differences of arithmetic",
    ),
    CheckRow(
        name="unsupported_runtimes", unit="runtimes", key="max_unsupported_runtimes",
        default=0.0, meaning="Runtimes of the device that may refuse the file.",
        says="A runtime of the device does not run the file.",
        then="the line says which and why; try another --weight-storage, or a device without it",
    ),
    CheckRow(
        name="saturable_pairs", needs=("limit",), key="max_saturable_pairs",
        meaning="Pairs of 8-bit products that x86 without VNNI may saturate.",
        says="On x86 without VNNI the file may answer something else.",
        then="make it with --device x86-avx2, or --bits 4: then no pair of products saturates",
    ),
    CheckRow(
        name="batch_invariance", relation=">=", key="min_batch_invariance", default=97.0,
        meaning="Share of images that are answered alike in whatever batch they come.",
        says="What an image is answered depends on what shares its batch.",
        then="do not deploy it: have the model made without what mixes the images of a batch",
    ),
    CheckRow(
        name="layers_as_planned", unit="layers off plan", made_here=True,
        says="A layer was left in float or lost its rounding method.",
        then="the report says which: more calibration images, another --rounding, or a waiver",
    ),
    CheckRow(
        name="codes_as_chosen", unit="wrong integers", made_here=True,
        says="The file does not hold the integers that were chosen.",
        then="run it again; if it stays so, report it as a bug",
    ),
    CheckRow(
        name="source_differences", unit="differences", spoken_of=True, needs=("comparison",),
        says="The graph differs from its float source beyond quantization.",
        then="name the float model it was made from (--reference), or have it made from this",
    ),
    CheckRow(
        name="weight_steps", unit="steps", needs=("limit", "integers"), key="max_weight_steps",
        meaning="Distance of a weight from the reference's, in steps; rounding stays at 1",
        says="A weight is further from its float source than rounding can bring it.",
        then=FROM_FLOAT,
    ),
    CheckRow(
        name="bias_shift", unit="of the weights", needs=("limit", "integers"), key="max_bias_shift",
        meaning="Change of a bias, in units of what its weights add; corrections of rounding"
        " reached 0.65, and more than 2 is a difference under every policy.",
        says="A bias is further from its float source's than a correction brings it.",
        then=FROM_FLOAT,
    ),
    CheckRow(
        name="unexplained_rounding", needs=("limit", "integers"), key="max_unexplained_rounding",
        meaning="Share of integers in layers rounded neither to nearest nor as reported.",
        says="Integers are neither rounded to nearest nor as a report says.",
        then="give its maker's report (--made-by), or round the float model yourself",
    ),
    CheckRow(
        name="cell_crowding", unit="sd", detector="crowding", needs=("limit", "floats"),
        key="max_cell_crowding",
        meaning="Score of the float weights at cell edges; clean models stay below 5.",
        says="The float weights were held inside the cells of a quantizer.",
        then="do not round it to nearest: qdeploy sanitize, and clean it first if a trigger stays",
    ),
    CheckRow(
        name="differential_trigger", detector="differential", by_value=True, spoken_of=True,
        needs=("reference", "limit", "pictures"), key="max_differential_trigger", default=50.0,
        meaning="Share of images that a perturbation found by search leads to a class in the file"
        " and not in its float model.",
        says="Something leads images to a class in this file that does not in its float model.",
        then="do not deploy it: qdeploy sanitize its float model, which hardens the rounding",
    ),
    CheckRow(
        name="class_reach", relation=">=", unit="% of the median", detector="shortcuts",
        needs=("limit", "pictures"), key="min_class_reach",
        meaning="Least universal perturbation to any class of the float model, beside the median"
        " class'.",
        says="A class of the float model is reached far more easily than the others.",
        then="do not deploy it: clean the float model (qdeploy clean), or have it made anew",
    ),
    CheckRow(
        name="remaining_shortcuts", unit="classes", made_here=True, needs=("search",),
        key="max_remaining_shortcuts", default=0.0, counted=True,
        meaning="Classes reached too easily after a cleaning that looked for them.",
        says="After cleaning, images are still led to a class too easily.",
        then="clean it with more images, or further (--further)",
    ),
    CheckRow(
        name="hardening_rounds", unit="rounds", made_here=True, counted=True, needs=("limit",),
        key="max_hardening_rounds",
        meaning="How often the integers may be chosen again against what a search has found.",
        says="The file needed hardening: something in its float model waits for rounding.",
        then="have the float model made anew by somebody whom you trust",
    ),
    CheckRow(
        name="file_bytes", unit="bytes", needs=("budget",), key="file_bytes", of_budget=True,
        says="The file is larger than the device allows.",
        then="fewer bits, or --weight-storage int4",
    ),
    CheckRow(
        name="latency_ms", unit="ms", needs=("budget", "timing"), key="latency_ms", of_budget=True,
        says="The file is slower than the device allows.",
        then="int8 storage, or another device profile",
    ),
    CheckRow(
        name="latency_ratio", unit="times float", needs=("budget", "timing", "reference"),
        key="latency_ratio", of_budget=True,
        says="The file is slower than its float model, by more than the budget allows.",
        then="--optimize latency, which leaves in float what integers make slower",
    ),
)  # fmt: skip
SUPPLY: Mapping[Need, str] = {
    "limit": "set its limit in the policy",
    "test data": "give test images: --test, or [data] test in the card",
    "labels": "give test images whose labels fit the model",
    "trigger": "give a trigger (--trigger), or a policy that requires none",
    "reference": "give the float model: --reference",
    "two runtimes": "name a second runtime in the device profile",
    "comparison": "give the float model that the file was made from: --reference",
    "integers": "give a quantized file",
    "floats": "give the float model",
    "pictures": "give unlabelled pictures of the model's own kind: --calibration",
    "search": "clean it by a sanitizer that looks for shortcuts: --sanitizer unlearn",
    "budget": "set a budget in the device profile or the policy",
    "timing": "set validation.latency_runs in the policy",
}  # what to do about what a check needs and lacks
CHECKS: Mapping[str, CheckRow] = {row.name: row for row in ROWS}
ANYTHING_ELSE = "anything else"  # what a reader takes for granted of a file that was not run


def that_need(*needs: Need) -> frozenset[str]:
    """Names of the checks that need any of these."""
    return frozenset(row.name for row in ROWS if set(needs) & set(row.needs))
