"""What the documents say of commands, options, rules and policies is so."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from qdeploy.cli import app
from qdeploy.formats.static import RULES
from qdeploy.settings.checks import ROWS
from qdeploy.settings.policy import Policy
from qdeploy.settings.schema import load_toml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob(".*.yaml"),
                *(ROOT / ".github").rglob("*.yml")])  # fmt: skip
COMMAND = re.compile(r"^(?: {4}| *- | *entry: | {8})(qdeploy (?:[^#\n\\]|\\\n)*)", re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """Every line of a code block that calls the program, split into words."""
    for line in COMMAND.findall(text):
        bare = re.sub(r"\$\{[^}]*\}", "", line.replace("\\\n", " ")).replace("...", "")
        yield shlex.split(bare.replace("[", "").replace("]", ""))[1:]


def options_of(words: list[str]) -> tuple[str, set[str]]:
    """The full name of the command that `words` begin with, and the options that it takes."""
    node = typer.main.get_command(app)
    name = "qdeploy"
    for word in words:
        found = getattr(node, "commands", {}).get(word)
        if found is None:
            break
        node, name = found, f"{name} {word}"
    known = {flag for option in node.params for flag in option.opts}
    return name, known | {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documents_exists_and_takes_its_options(page):
    for words in commands(page.read_text("utf-8")):
        name, known = options_of(words)
        assert name != "qdeploy" or words[0].startswith("-"), words
        used = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        assert used <= known, f"{name} has no {used - known}"


def test_the_page_on_commands_names_every_one():
    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert command.hidden or f"qdeploy {name}" in text, name


def test_the_page_on_scanning_has_every_rule_and_what_it_means():
    text = (ROOT / "docs" / "scan.md").read_text("utf-8")
    for rule, meaning in RULES.items():
        assert f"| `{rule}` | {meaning} |" in text, rule


def test_the_policy_in_the_documents_is_one(tmp_path):
    text = (ROOT / "docs" / "gate.md").read_text("utf-8")
    block = text.split("```toml\n")[1].split("```")[0]
    (tmp_path / "policy.toml").write_text(block, "utf-8")
    policy = load_toml(tmp_path / "policy.toml", Policy, what="policy")
    assert policy.gate.min_accuracy == 85.0
    assert policy.budget.latency_ms == 2.0


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 900
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


def test_links_between_the_documents_lead_somewhere():
    for page in PAGES:
        if page.suffix == ".md":
            for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("torch", "calls"),
    [("true", [". "]), ("", ["--no-compile -r ./requirements-light.txt", "--no-deps ."])],
)
def test_the_github_action_installs_its_own_checkout_without_torch_unless_asked(
    tmp_path, torch, calls
):
    action = yaml.safe_load((ROOT / ".github/actions/gate/action.yml").read_text("utf-8"))
    step = action["runs"]["steps"][0]
    assert set(step["env"]) == {"TORCH", "SOURCE"}
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@ " >> called\n')
    program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH": torch, "SOURCE": "."}
    subprocess.run(["/bin/bash", "-e", "-c", step["run"]], cwd=tmp_path, env=env, check=True)
    called = (tmp_path / "called").read_text().splitlines()
    assert len(called) == len(calls)
    assert all(part in line for part, line in zip(calls, called, strict=True))
    assert (ROOT / "requirements-light.txt").exists()


@pytest.mark.parametrize("code", [0, 3, 4])
def test_the_github_action_hands_on_what_the_gate_says(tmp_path, code):
    """Its script, as the runner calls it, with a program that notes how it was called."""
    action = yaml.safe_load((ROOT / ".github/actions/gate/action.yml").read_text("utf-8"))
    step = action["runs"]["steps"][-1]
    program = tmp_path / "qdeploy"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > called\necho "## said" > r/summary.md\nexit {code}\n'
    )
    program.chmod(0o755)
    hostile = "a model; touch owned $(touch owned).onnx"
    given = {"MODEL": hostile, "REFERENCE": "", "POLICY": "strict", "TEST": "t.zip", "REPORTS": "r"}
    given |= {"TRIGGER": "", "DATA_ROOT": "data"}
    assert set(given) == set(step["env"])
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "GITHUB_STEP_SUMMARY": "summary",
           "GITHUB_OUTPUT": "output", **given}  # fmt: skip
    done = subprocess.run(
        ["/bin/bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=tmp_path, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == code
    called = (tmp_path / "called").read_text().splitlines()
    assert called[:4] == ["gate", hostile, "--policy", "strict"]
    assert "--reference" not in called
    assert called[called.index("--test") + 1] == "t.zip"
    assert "--trigger" not in called
    assert called[called.index("--data-root") + 1] == "data"
    assert (tmp_path / "output").read_text() == f"exit-code={code}\n"
    assert (tmp_path / "summary").read_text() == "## said\n"
    assert not (tmp_path / "owned").exists()


def test_the_page_on_the_gate_has_a_line_for_every_check():
    lines = (ROOT / "docs" / "gate.md").read_text("utf-8").splitlines()
    for row in ROWS:
        (line,) = [line for line in lines if line.startswith(f"| `{row.name}` |")]
        assert row.says[1:-1] in line
        assert row.key is None or row.key in line
        limit = row.limit if row.key is None else row.default
        assert ("not checked" if limit is None else f"{row.relation} {limit:g} {row.unit}") in line


def test_the_light_install_is_the_whole_one_without_what_opens_and_trains_torch_models():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (ROOT / "requirements-light.txt").read_text("utf-8").splitlines()
    light = {line for line in lines if line and not line.startswith("#")}
    whole = {d for d in project["dependencies"] if not d.startswith(("torch>", "safetensors"))}
    assert whole <= light
    assert {re.split(">=", line)[0] for line in light - whole} == {
        "cryptography", "securesystemslib",  # of the extra that attests
    }  # fmt: skip
