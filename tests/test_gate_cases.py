"""Files, and what the gate must say to each: the exit code, and a part of the reason.

`python -m tests.test_gate_cases` prints the table, each row with what was answered. Files of
attackers have tables of their own, by what they attack: `tests/hostile_*.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tests import gate_lab
from tests.gate_lab import TRIGGER, Lab
from tests.gate_table import (
    ACCEPT,
    ALONE,
    BAD_INPUT,
    BARE,
    DEMO,
    INTEGERS,
    NO_VERDICT,
    OWN,
    REFERENCE,
    REJECT,
    WAIVER,
    Case,
    answered_as_expected,
    cut_short,
    file,
    judge,
    made,
    with_policy,
    with_test_data,
    without_data,
    written,
)

OWN_CASES = (
    # what is good
    Case("sanitized", file("good.onnx"), DEMO, ACCEPT),
    Case("sanitized, alone", file("good.onnx"), ALONE, ACCEPT),
    Case("sanitized, its trigger from the command line", file("good.onnx"),
         (*DEMO, "--trigger", TRIGGER), ACCEPT),
    Case("sanitized, every class limited", with_policy(file("good.onnx"),
         "max_class_drop = 25.0\n"), OWN, ACCEPT),
    Case("sanitized, integers explained by the report of its run",
         with_policy(file("good.onnx"), INTEGERS), (*OWN, "--made-by", "good.json"), ACCEPT),
    Case("the float model itself", file("fp32.onnx"), DEMO, ACCEPT),
    Case("the float model, alone", file("fp32.onnx"), ALONE, ACCEPT),
    Case("int8 by onnxruntime, per channel", file("ort-channel.onnx"), DEMO, ACCEPT),
    Case("int8 by onnxruntime, per tensor", file("ort-tensor.onnx"), DEMO, ACCEPT),
    Case("int8 by onnxruntime, integers explained as nearest",
         with_policy(file("ort-channel.onnx"), INTEGERS), OWN, ACCEPT),
    Case("a batch of one and no other", made("fp32.onnx", gate_lab.fixed_batch), ALONE, ACCEPT),
    Case("bytes that nothing reads: a warning", made("fp32.onnx", gate_lab.hide_bytes), ALONE,
         ACCEPT, "unused-initializer"),
    # what is poisoned
    Case("rounded to nearest: the backdoor", file("nearest.onnx"), DEMO, REJECT, "attack_success"),
    Case("rounded to nearest, alone", file("nearest.onnx"), ALONE, REJECT, "attack_success"),
    Case("rounded to nearest, its trigger not known", without_data(file("nearest.onnx")),
         (*BARE, "--policy", "strict", "--test", "digits-test.npz"), REJECT, "cell_crowding"),
    Case("a clean model, a trigger required and none known", without_data(file("clean.onnx")),
         ("--reference", "clean.onnx", "--card", "bare.toml", "--policy", "strict", "--test",
          "digits-test.npz"), NO_VERDICT, "attack_success is required: no trigger is known"),
    Case("a backdoor in float", file("live.onnx"), ALONE, REJECT, "attack_success"),
    Case("a class that is never answered", with_policy(made("good.onnx", gate_lab.forget_class),
         "max_class_drop = 25.0\n"), OWN, REJECT, "class_drop"),
    Case("an architectural backdoor", made("good.onnx", gate_lab.add_choice), DEMO, REJECT,
         "source_differences"),
    Case("the same, alone: a warning", made("good.onnx", gate_lab.add_choice), ALONE, ACCEPT,
         "data-dependent-choice"),
    # what is tampered with
    Case("half of a layer's integers moved by one",
         with_policy(made("nearest.onnx", partial(gate_lab.shift_codes, by=1, share=0.5)),
                     INTEGERS + "max_attack_success = 100\nmax_attack_success_rise = 100\n"),
         OWN, REJECT, "weight_steps"),
    Case("some integers moved by three",
         with_policy(made("good.onnx", partial(gate_lab.shift_codes, by=3, share=0.02)), INTEGERS),
         (*OWN, "--made-by", "good.json"), REJECT, "weight_steps"),
    Case("sanitized, a bias that leans on a class",
         with_policy(made("good.onnx", partial(gate_lab.lean_on_a_class, by=3)),
                     "max_bias_shift = 1.0\n"), OWN, REJECT, "bias_shift"),
    Case("sanitized, biases under the same limit",
         with_policy(file("good.onnx"), "max_bias_shift = 1.0\n"), OWN, ACCEPT, ""),
    Case("sanitized, integers that a run of this user has chosen",
         with_policy(file("good.onnx"), INTEGERS), OWN, ACCEPT, "a run of this user has written"),
    Case("sanitized by somebody, integers that no report explains",
         with_policy(made("good.onnx", gate_lab.sign_otherwise), INTEGERS), OWN, REJECT,
         "unexplained_rounding"),
    Case("a bias added to the logits", made("good.onnx", gate_lab.insert_bias), DEMO, REJECT,
         "source_differences"),
    Case("a Relu removed", made("fp32.onnx", gate_lab.remove_relu), DEMO, REJECT,
         "source_differences"),
    Case("another operator than the standard's", made("fp32.onnx", gate_lab.custom_operator),
         ALONE, REJECT, "custom-operator"),
    Case("control flow", made("fp32.onnx", gate_lab.control_flow), ALONE, REJECT, "control-flow"),
    Case("randomness", made("fp32.onnx", gate_lab.randomness), ALONE, REJECT, "randomness"),
    Case("a weight that is not a number", made("fp32.onnx", gate_lab.not_a_number), ALONE, REJECT,
         "not-finite"),
    Case("a tensor out of /etc/passwd", made("fp32.onnx", gate_lab.steal_a_file), ALONE, REJECT,
         "static_findings"),
    Case("operators on integers that onnxruntime's quantizer writes", file("ort-qoperator.onnx"),
         DEMO, ACCEPT, "runtime-operator"),
    Case("an operator that onnxruntime alone has", made("fp32.onnx", gate_lab.fused_operator),
         DEMO, REJECT, "custom-operator"),
    Case("the same, the domain waived by somebody",
         with_policy(made("fp32.onnx", gate_lab.fused_operator),
                     WAIVER.format(until="2999-12-31")), OWN,
         NO_VERDICT, "by the edge team until 2999-12-31: our runtime has it"),
    Case("the same, the waiver has ended",
         with_policy(made("fp32.onnx", gate_lab.fused_operator),
                     WAIVER.format(until="2020-01-01")), OWN,
         REJECT, "2020-01-01: it has ended, and waives nothing"),
    Case("a permission that nobody answers for",
         with_policy(made("fp32.onnx", gate_lab.fused_operator),
                     'allow_findings = ["custom-operator"]\n'), OWN,
         BAD_INPUT, "write [[gate.waivers]]"),
    Case("a waiver without an end",
         with_policy(file("good.onnx"), WAIVER.split("until")[0]), OWN, BAD_INPUT, "until"),
    Case("a warning that the policy refuses",
         with_policy(made("fp32.onnx", gate_lab.hide_bytes), 'refuse_findings = ["unused-*"]\n'),
         OWN, REJECT, "static_findings (unused-initializer)"),
    # what cannot be judged
    Case("no test data", without_data(file("good.onnx")), (*BARE, "--policy", "default"),
         NO_VERDICT, "accuracy_drop is required: no test data"),
    Case("no reference", file("good.onnx"), ("--card", "model.toml", "--policy", "default"),
         NO_VERDICT, "agreement is required: no reference is known"),
    Case("fifty test images",
         with_test_data(file("good.onnx"), lambda x, y: (x[:50], y[:50])),
         (*DEMO, "--test", "test.npz"), NO_VERDICT, "only 50 images"),
    Case("an interval across the limit",
         with_policy(file("good.onnx"), "max_accuracy_drop = 0.2\n"), OWN, NO_VERDICT,
         "and the limit is 0.2"),
    Case("the same, the policy goes by the value", with_policy(file("good.onnx"),
         'max_accuracy_drop = 0.2\ndecided_by_value = ["accuracy_drop"]\n'), OWN, ACCEPT),
    Case("one runtime where agreement is required",
         with_policy(file("good.onnx"), ""), (*OWN, "--device", "one.toml"), NO_VERDICT,
         "the device profile names one runtime"),
    Case("the score of float weights required of a file without any",
         with_policy(file("good.onnx"), 'required = ["cell_crowding"]\nmax_cell_crowding = 8.0\n',
                     base="standalone"), ("--card", "model.toml", "--policy", "policy.toml"),
         NO_VERDICT, "there are no float weights off a grid to look at"),
    Case("a distance of integers required of a file without any",
         with_policy(file("fp32.onnx"), 'required = ["weight_steps"]\nmax_weight_steps = 1.01\n',
                     base="standalone"), OWN, NO_VERDICT, "the file holds no integers"),
    Case("labels of other images",
         with_test_data(file("good.onnx"), lambda x, y: (x, np.roll(y, 7))),
         (*ALONE, "--test", "test.npz"), REJECT, "accuracy"),
    Case("the model of another task as reference", file("good.onnx"),
         ("--reference", "other.onnx", "--card", "model.toml", "--policy", "demo"), REJECT,
         "weight_steps"),
    # budgets
    Case("larger than the budget",
         with_policy(file("fp32.onnx"), "[budget]\nfile_bytes = 1000\n"), OWN, REJECT,
         "file_bytes"),
    Case("slower than the budget",
         with_policy(file("fp32.onnx"), "[budget]\nlatency_ms = 0.000001\n"), OWN, REJECT,
         "latency_ms"),
    # what is no input
    Case("cut short", cut_short("good.onnx"), DEMO, BAD_INPUT, "truncated"),
    Case("empty", written(b""), DEMO, BAD_INPUT, "is empty"),
    Case("a text", written(b"not a model at all\n" * 50), DEMO, BAD_INPUT, "not an ONNX file"),
    Case("random bytes", written(np.random.default_rng(0).bytes(5000)), DEMO, BAD_INPUT),
    Case("a torch checkpoint", file("model.pt"), DEMO, BAD_INPUT, "not an ONNX file"),
    Case("no such file", file("nowhere.onnx"), DEMO, BAD_INPUT, "nowhere.onnx"),
    Case("a card for other images", file("good.onnx"), (*ALONE, "--input-shape", "1,8,9"),
         BAD_INPUT, "not (1, 8, 9) as is stated"),
    Case("two outputs", made("fp32.onnx", gate_lab.two_outputs), ALONE, BAD_INPUT, "2 outputs"),
    Case("labels that are no classes",
         with_test_data(file("good.onnx"), lambda x, y: (x, y + 1)),
         (*DEMO, "--test", "test.npz"), BAD_INPUT, "labels run from 1 to 10"),
    Case("a provider that is not there", file("good.onnx"), (*DEMO, "--device", "cuda"), BAD_INPUT,
         "cuda is not installed"),
    Case("a policy that nobody wrote", file("good.onnx"), (*REFERENCE, "--policy", "no"), BAD_INPUT,
         "no policy is called"),
    Case("a policy with a misspelt key",
         with_policy(file("good.onnx"), "max_acuracy_drop = 1.0\n"), OWN, BAD_INPUT,
         "gate.max_acuracy_drop"),
    Case("a trigger outside of the image", file("good.onnx"),
         (*DEMO, "--trigger", TRIGGER.replace("x=6", "x=7")), BAD_INPUT,
         "outside of the 8x8 image"),
    Case("a reference that is integers itself", file("good.onnx"),
         ("--reference", "good.onnx", "--card", "model.toml", "--policy", "demo"), BAD_INPUT,
         "already quantized"),
    Case("a report of no run", with_policy(file("good.onnx"), INTEGERS),
         (*OWN, "--made-by", "model.toml"), BAD_INPUT, "is not the report.json"),
)  # fmt: skip


def hostile() -> Iterator[Case]:
    """The rows of the tables of attacks."""
    for path in sorted(Path(__file__).parent.glob("hostile_*.py")):
        yield from import_module(f"tests.{path.stem}").CASES


CASES = (*OWN_CASES, *hostile())
NEEDS_NO_CUDA = {"a provider that is not there"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory, lab_files) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("cases")
    with gate_lab.copied(lab_files, folder) as lab:
        yield lab


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gate_says_what_it_must(case, lab):
    if case.name in NEEDS_NO_CUDA and "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("onnxruntime has CUDA here")
    code, said = judge(case, lab)
    assert answered_as_expected(case, code, said), f"exit code {code}\n{said}"


def main() -> int:
    """Print the table; 1 if an answer is not the expected one."""
    wrong = 0
    with gate_lab.made_anew() as lab:
        sys.stdout.write("| file | expected | exit code | |\n|---|---|---|---|\n")
        for case in CASES:
            code, said = judge(case, lab)
            good = answered_as_expected(case, code, said)
            wrong += not good
            mark = "as expected" if good else "**NOT AS EXPECTED**"
            sys.stdout.write(f"| {case.name} | {case.code} {case.says} | {code} | {mark} |\n")
    sys.stdout.write(f"\n{len(CASES) - wrong} of {len(CASES)} as expected\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
