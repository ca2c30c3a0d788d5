from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from qdeploy.cli import console, main
from qdeploy.core.crowding import Crowding
from qdeploy.core.grids import IntType
from qdeploy.core.metrics import Estimate
from qdeploy.detectors.crowding import CellCrowding, Convention
from qdeploy.errors import UsageError
from qdeploy.formats.static import RULES
from qdeploy.judging.measure import Variant
from qdeploy.judging.rates import AgainstFloat, ArmRates, RuntimeAgreement, Sample
from qdeploy.judging.verdict import Check, Outcome
from qdeploy.provenance.trace import LayerTrace, Provenance
from qdeploy.report.document import DOCUMENTS, WrittenReport, json_schema
from qdeploy.report.kept import read_report
from qdeploy.report.render import FORMATS, check_format, render
from qdeploy.report.scans import OF_WEIGHTS
from qdeploy.report.taxa import RULES_OF, TAXA_OF, TAXONOMIES
from qdeploy.report.to_cyclonedx import to_cyclonedx
from qdeploy.report.to_html import to_html
from qdeploy.report.to_json import to_json, written
from qdeploy.report.to_junit import to_junit
from qdeploy.report.to_markdown import to_markdown
from qdeploy.report.to_sarif import to_sarif
from qdeploy.report.values import Report
from qdeploy.settings.checks import CHECKS
from qdeploy.settings.recipe import WeightGridSpec
from qdeploy.values import (
    Arm,
    BitSearch,
    Cleaning,
    DataUsed,
    FileMade,
    Finding,
    Latency,
    LayerPlan,
    Origin,
    RoundedLayer,
    Sensitivity,
    StageTime,
    WeightSite,
)


@pytest.fixture
def report() -> Report:
    """A small report in which one thing was not measured."""
    estimate = Estimate(90.0, 88.0, 92.0, 500)
    beside = AgainstFloat(estimate, estimate, estimate, estimate, {"patch": estimate})
    rates = tuple(
        ArmRates(Arm(variant, "cpu"), estimate, (90.0, math.nan), {"patch": estimate}, beside)
        for variant in ("fp32", "nearest", "result")
    )  # fmt: skip
    site = WeightSite("conv1", "conv1.weight", (2, 1, 1, 1), 0, 1, ())
    codes = np.zeros((2, 1, 1, 1), np.int32)
    layer = RoundedLayer("conv1", codes, "nearest", None, 0.5, math.nan, math.nan, (), 0.1)
    return Report(
        differential=None,
        hardening=(),
        bits=BitSearch((Sensitivity("conv1", 2, 0.25, 0.0),), 4.5, 97.0, 95.0, "nearest"),
        run_id="abc", started="2026-01-01T00:00:00+00:00", versions={"qdeploy": "0"},
        command="qdeploy sanitize", origin=Origin("m.pt", "0" * 64, "ONNX"), recipe={"bits": 4},
        policy={"name": "p"}, device={"name": "x"},
        data=(DataUsed("test", "t.zip", 500, "1" * 64, "model card"),),
        stages=(StageTime("load", 0.5),),
        plan=(LayerPlan(site, 4, 7, WeightGridSpec(), IntType.INT8, "nearest"),),
        layers=(layer,), left_float=(),
        files=tuple(FileMade(v, "2" * 64, 1000, {}) for v in ("fp32", "nearest", "result")),
        classes=("cat", "dog"), rates=rates,
        runtimes=(RuntimeAgreement("cpu, unoptimized", estimate),),
        latencies=(
            Latency("fp32", 1, 0.002, 30, 0.0019, 0.0021),
            Latency("result", 1, 0.001, 30, 0.0009, 0.0011),
        ),
        checks=(Check("attack_success", 90.0, "<=", 10.0, "%", "cpu", "patch", 500, 200),),
        required=frozenset({"b", "a"}), outcome=Outcome.REJECT,
        reasons=("attack_success: too high",), next_steps=("attack_success: do not",),
        not_measured=("agreement: no test data",),
        notes=("a note",), crowding=(), findings=(), provenance=None, explanations={},
        samples=(), cleaning=None, output="m.rejected.onnx",
    )  # fmt: skip


def test_json_holds_everything_and_null_for_what_was_not_measured(report):
    document = json.loads(to_json(report))
    assert document["outcome"] == "REJECT"
    assert document["measurements"][2]["class_accuracy"][1] == {"class": "dog", "accuracy": None}
    assert document["layers"][0]["output_error"] is None
    assert document["layers"][0]["codes_sha256"] == report.layers[0].sha256
    assert document["checks"][0]["within"] is False
    assert document["checks"][0]["low"] is None
    assert document["required"] == ["a", "b"]
    renames = {"rates": "measurements", "crowding": "fingerprints"}
    fields = {renames.get(name, name) for name in Report.__slots__}
    renamed = {"plan", "classes", "runtimes", "latencies", "samples", "explanations"}
    assert fields - renamed <= set(document)


SCHEMA = json_schema(WrittenReport)


def test_json_is_what_its_schema_says(report):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    convention = Convention(8, "absmax", "channel")
    found = CellCrowding(convention, Crowding(30, 10.0), "conv1", Crowding(0, 0.0))
    used = DataUsed("distillation", "u.zip", 5, "3" * 64, "command line")
    cleaned = Cleaning(report.origin, {"kind": "unlearn"}, used, "s.pt", 3, (1,), (), 97.5, 8.0)
    full = with_samples(replace(report, crowding=(found,), cleaning=cleaned))
    jsonschema.validate(json.loads(to_json(full)), SCHEMA)
    less = json.loads(to_json(full))
    del less["checks"][0]["within"]
    with pytest.raises(jsonschema.ValidationError, match="within"):
        jsonschema.validate(less, SCHEMA)


def test_what_is_read_back_is_what_was_written(report, tmp_path):
    (tmp_path / "r.json").write_bytes(to_json(report))
    assert read_report(tmp_path / "r.json").content == written(report)
    more = {**json.loads(to_json(report)), "of_a_later_version": 1}
    (tmp_path / "r.json").write_text(json.dumps(more))
    assert read_report(tmp_path / "r.json").content == written(report)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_command_line_prints_the_schema(name, capsys):
    with pytest.raises(SystemExit):
        main(["schema", name])
    assert json.loads(capsys.readouterr().out) == json_schema(DOCUMENTS[name])


def test_json_is_the_same_every_time(report):
    assert to_json(report) == to_json(report)


def test_the_terminal_shows_variants_side_by_side_and_the_verdict_last(report, capsys):
    console.show_report(report)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("FP32", "nearest", "this file"))]
    assert len(rows) == 3
    assert "2.0x" in rows[2]
    verdict = next(i for i, line in enumerate(lines) if line.startswith("REJECT"))
    assert "m.rejected.onnx" in lines[verdict]
    assert "not measured: agreement: no test data" in lines[verdict]
    assert lines[verdict + 1].strip() == "- attack_success: too high"
    assert lines[verdict + 2].strip() == "next: attack_success: do not"
    assert lines[-1].strip() == "note: a note"


def of_a_foreign_file(report: Report) -> Report:
    """What `gate` makes of a file that somebody else has rounded."""
    layer = LayerTrace(
        "conv1", (2, 1, 1, 1), "int8", 4, 2, 0.25, 0.75, 0, 0.0, False, "a" * 64, "b" * 64
    )
    differs = Finding("graph-differs", "error", "relu_1", "is not in the source")
    found = Finding("unused-initializer", "warning", "w", "is read by nothing")
    return replace(
        report, recipe=None, plan=(), layers=(), findings=(found,),
        provenance=Provenance((layer,), (differs,), None, None),
        explanations={"conv1": "unexplained"},
    )  # fmt: skip


def test_every_format_speaks_of_a_file_that_was_made_elsewhere(report):
    foreign = of_a_foreign_file(report)
    document = json.loads(to_json(foreign))
    jsonschema.validate(document, SCHEMA)
    assert document["provenance"]["layers"][0]["explanation"] == "unexplained"
    page = to_html(foreign).decode()
    assert all(word in page for word in ("unexplained", "relu_1", "unused-initializer", "25.0 %"))
    assert "unused-initializer" in to_markdown(foreign).decode()
    results = json.loads(to_sarif(foreign))["runs"][0]["results"]
    assert ("unused-initializer", "warning") in {(r["ruleId"], r["level"]) for r in results}


def test_a_file_without_a_float_model_has_no_differences_to_show(report):
    alone = replace(
        report,
        rates=tuple(
            replace(r, against_float=None) for r in report.rates if r.arm.variant == "result"
        ),
        recipe=None,
    )
    document = json.loads(to_json(alone))
    jsonschema.validate(document, SCHEMA)
    assert document["measurements"][0]["agreement"] is None
    for suffix in FORMATS:
        assert render(alone, Path(f"r{suffix}"))


def with_samples(report: Report) -> Report:
    pixels = np.zeros((3, 4, 4), np.uint8)
    clean = Sample(pixels, 0, None, None, {"fp32": 0, "nearest": 1, "result": 0})
    triggered = Sample(pixels, 0, "patch", 1, {"fp32": 0, "nearest": 1, "result": -1})
    return replace(report, samples=(clean, triggered))


def test_the_page_says_the_verdict_first_and_needs_nothing_from_outside(report):
    page = to_html(with_samples(report)).decode()
    body = page[page.index("<body>") :]
    assert body.index("REJECT") < body.index("attack_success: too high") < body.index("Checks")
    assert "agreement: no test data" in page
    links = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>]*)", page)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in page
    assert page.count('src="data:image/png;base64,') == 2


def test_the_page_marks_what_a_file_gets_wrong(report):
    page = to_html(with_samples(report)).decode()
    figures = page.split("<figure>")[1:]
    wrong = [re.findall(r'<span class="(off)?">([^<]+)</span>', figure) for figure in figures]
    assert wrong[0] == [("", "cat"), ("off", "dog"), ("", "cat")]
    assert wrong[1] == [("", "cat"), ("off", "dog"), ("", "not finite")]


HOSTILE = "<script>alert(1)</script>\x1b[31m|`"


def test_every_variant_has_its_colour(report):
    page = to_html(report).decode()
    for variant in get_args(Variant):
        assert f".{variant} {{ --c: var(--{variant}); }}" in page
        assert page.count(f"--{variant}: #") == 2  # by day and by night


def test_names_from_strangers_stay_names(report):
    renamed = replace(report, classes=(HOSTILE, "dog"), notes=(HOSTILE,), reasons=(HOSTILE,))
    renamed = with_samples(replace(renamed, origin=Origin(HOSTILE, "0" * 64, "ONNX")))
    checks = (replace(report.checks[0], subject=HOSTILE),)
    renamed = replace(renamed, checks=checks)
    assert b"<script>" not in to_html(renamed)
    assert b"<script>" not in to_markdown(renamed)
    assert b"\x1b" not in to_markdown(renamed)
    odd = replace(renamed, notes=("\ud800",), policy={"gate": {"max_size": math.inf}})
    document = json.loads(to_json(odd))
    assert (document["notes"], document["policy"]["gate"]["max_size"]) == (["\ud800"], None)
    ET.fromstring(to_junit(renamed))
    json.loads(to_sarif(renamed))


def test_junit_counts_what_failed_and_what_is_missing(report):
    suite = ET.fromstring(to_junit(report))
    assert {case.attrib["classname"] for case in suite.iter("testcase")} == {"qdeploy.gate"}
    assert suite.attrib["tests"] == "3"
    assert (suite.attrib["failures"], suite.attrib["errors"]) == ("1", "2")
    cases = {case.attrib["name"]: case[0].tag for case in suite}
    assert cases == {"attack_success, patch, cpu": "failure", "a": "error", "b": "error"}


def test_junit_calls_a_check_on_too_few_images_an_error(report):
    few = Check("a", 5.0, "<=", 10.0, "%", "cpu", None, 20, 200)
    suite = ET.fromstring(to_junit(replace(report, checks=(few,))))
    assert suite[0][0].attrib["message"] == "a (cpu): 5 %, on 20 images of 200 needed"


def test_junit_calls_an_interval_across_the_limit_an_error(report):
    unclear = Check("z", 9.0, "<=", 10.0, "%", "cpu", None, 500, 200, 7.0, 11.0)
    suite = ET.fromstring(to_junit(replace(report, checks=(unclear,), required=frozenset())))
    assert suite.attrib["errors"] == "1"
    assert "it may be 7.00 to 11.00" in suite[0][0].attrib["message"]


def test_sarif_has_a_result_for_everything_that_stands_against_the_file(report):
    (run,) = json.loads(to_sarif(report))["runs"]
    assert [(r["ruleId"], r["level"]) for r in run["results"]] == [
        ("attack_success", "error"), ("a", "warning"), ("b", "warning"),
    ]  # fmt: skip
    rules = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert rules == CHECKS.keys() | set(RULES)
    assert not CHECKS.keys() & set(RULES)
    uri = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == "m.rejected.onnx"


def test_sarif_says_what_a_rule_is_called_in_the_taxonomies_of_others(report):
    (run,) = json.loads(to_sarif(report))["runs"]
    for number, taxonomy in enumerate(run["taxonomies"]):
        listed = run["tool"]["driver"]["supportedTaxonomies"][number]
        assert listed == {"name": taxonomy["name"], "index": number}
    attack = next(r for r in run["results"] if r["ruleId"] == "attack_success")
    called = [
        run["taxonomies"][one["toolComponent"]["index"]]["taxa"][one["index"]]["name"]
        for one in attack["taxa"]
    ]
    assert [one["id"] for one in attack["taxa"]] == [
        "AML.T0018.000",
        "AML.T0043.004",
        "NISTAML.023",
    ]
    assert called[2] == "Backdoor Poisoning"
    (rule,) = (r for r in run["tool"]["driver"]["rules"] if r["id"] == "attack_success")
    assert [r["target"] for r in rule["relationships"]] == attack["taxa"]


def test_taxa_are_of_rules_that_there_are():
    assert TAXA_OF.keys() <= CHECKS.keys() | set(RULES) | set(OF_WEIGHTS)
    known = {key for taxonomy in TAXONOMIES for key in taxonomy.taxa}
    assert {taxon for taxa in TAXA_OF.values() for taxon in taxa} == known
    assert len(TAXA_OF) == sum(map(len, RULES_OF.values()))  # no rule twice


def test_the_bill_of_materials_is_what_its_schema_says(report):
    hostile = replace(report.data[0], name='x"\n\x1b[31m', sha256=None, images=None)
    unmeasured = tuple(
        replace(rates, accuracy=Estimate(math.nan, math.nan, math.nan, 0)) for rates in report.rates
    )
    odd = replace(report, data=(hostile,), rates=unmeasured, files=(), policy={}, device={})
    for one in (report, of_a_foreign_file(report), with_samples(report), odd):
        wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(to_cyclonedx(one).decode())
        assert wrong is None, wrong


def test_the_bill_of_materials_says_what_was_measured_with_its_intervals(report):
    document = json.loads(to_cyclonedx(report))
    judged = document["metadata"]["component"]
    assert (judged["name"], judged["hashes"][0]["content"]) == ("m.rejected.onnx", "2" * 64)
    assert judged["pedigree"]["ancestors"][0]["hashes"][0]["content"] == "0" * 64
    metrics = judged["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {
        "type": "attack success of patch, %", "slice": "this file, cpu", "value": "90",
        "confidenceInterval": {"lowerBound": "88", "upperBound": "92"},
    } in metrics  # fmt: skip
    (data,) = document["components"]
    assert judged["modelCard"]["modelParameters"]["datasets"] == [{"ref": data["bom-ref"]}]
    said = {one["name"]: one["value"] for one in judged["properties"]}
    assert said["qdeploy:outcome"] == "REJECT"
    assert said["qdeploy:check:attack_success (patch, cpu)"] == "off: 90 %, limit <= 10"


def test_the_summary_fits_a_pull_request(report):
    text = to_markdown(report).decode()
    assert text.startswith("## ❌ REJECT: m.rejected.onnx\n\nmade from m.pt\n")
    assert "- attack\\_success: too high" in text
    assert "| this file, cpu | 90.00 (88.00 to 92.00) |" in text


def test_an_accepted_file_has_nothing_against_it(report):
    good = replace(report.checks[0], value=1.0)
    accepted = replace(
        report, checks=(good,), required=frozenset(), outcome=Outcome.ACCEPT, reasons=()
    )
    assert json.loads(to_sarif(accepted))["runs"][0]["results"] == []
    assert ET.fromstring(to_junit(accepted)).attrib["failures"] == "0"
    assert "ACCEPT" in to_html(accepted).decode()


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_every_format_is_the_same_every_time(report, suffix):
    path = Path(f"r{suffix}")
    assert render(with_samples(report), path) == render(with_samples(report), path)


def test_an_unknown_format_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match=r"no format ends in '\.pdf'"):
        check_format(Path("r.pdf"))


@pytest.fixture
def published() -> Path:
    """The schemas of other people's formats, which do not come with the repository."""
    folder = os.environ.get("PUBLISHED_SCHEMAS")
    if folder is None:
        pytest.skip(
            "needs PUBLISHED_SCHEMAS=FOLDER with sarif-schema-2.1.0.json (OASIS) and junit-10.xsd"
            " (Jenkins xunit plugin), and xmlschema"
        )
    return Path(folder)


def test_what_others_read_is_as_they_publish_it(report, published):
    xmlschema = pytest.importorskip("xmlschema")
    junit = xmlschema.XMLSchema(str(published / "junit-10.xsd"))
    schema = json.loads((published / "sarif-schema-2.1.0.json").read_text("utf-8"))
    accepted = replace(report, checks=(), required=frozenset(), outcome=Outcome.ACCEPT, reasons=())
    for one in (report, of_a_foreign_file(report), with_samples(report), accepted):
        jsonschema.validate(json.loads(to_sarif(one)), schema)
        junit.validate(to_junit(one).decode())


class Outline(HTMLParser):
    """What a reader without eyes gets of the page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.headers: list[str | None] = []  # the scope of every <th>
        self.scrolled: list[str | None] = []  # the label of every table
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.anchors.add(str(given["id"]))
        if tag == "a":
            self.links.add(str(given["href"]).removeprefix("#"))
        if tag == "th":
            self.headers.append(given.get("scope"))
        if given.get("class") == "scroll":
            self.scrolled.append(given.get("aria-label") if given.get("tabindex") else None)


def test_every_link_leads_somewhere_and_every_table_has_headers_and_a_name(report):
    for one in (report, with_samples(report), of_a_foreign_file(report)):
        page = to_html(one)
        outline = Outline(page)
        assert outline.links
        assert outline.links <= outline.anchors
        assert set(outline.headers) == {"col", "row"}
        assert all(outline.scrolled)
        assert b"<th></th>" not in page
        assert len(outline.scrolled) == page.count(b"<table")


def test_what_bits_cost_stands_beside_each_layer(report):
    page = to_html(report).decode()
    assert "4.50 a weight on average" in page
    assert "measured by nearest" in page
    assert '<td class="n">25.000</td>' in page
    assert "Bits were looked for" not in to_html(replace(report, bits=None)).decode()


def axe() -> Path | None:
    """Where `npm install axe-core puppeteer-core` has put them, if somebody did."""
    named = os.environ.get("QDEPLOY_AXE")
    return Path(named) if named and (Path(named) / "axe-core").is_dir() else None


AXE = """
const [modules, browser, page] = process.argv.slice(2);
const core = `${modules}/puppeteer-core/lib/esm/puppeteer/puppeteer-core.js`;
const puppeteer = (await import(core)).default;
const axe = (await import('fs')).readFileSync(`${modules}/axe-core/axe.min.js`, 'utf8');
const args = ['--no-sandbox', '--disable-gpu'];
const b = await puppeteer.launch({executablePath: browser, args});
const found = [];
for (const width of [390, 768, 1280]) for (const mode of ['light', 'dark', 'print']) {
  const p = await b.newPage();
  await p.setBypassCSP(true);
  await p.setViewport({width, height: 900});
  const scheme = mode === 'dark' ? 'dark' : 'light';
  await p.emulateMediaFeatures([{name: 'prefers-color-scheme', value: scheme}]);
  if (mode === 'print') await p.emulateMediaType('print');
  await p.goto('file://' + page);
  await p.evaluate(axe);
  const result = await p.evaluate(() => axe.run(document));
  for (const v of result.violations) found.push([width, mode, v.id, v.nodes[0].html]);
  const wide = await p.evaluate(() => document.documentElement.scrollWidth);
  if (wide > width) found.push([width, mode, 'wider than the screen', wide]);
}
console.log(JSON.stringify(found));
await b.close();
"""


@pytest.mark.slow
def test_the_page_passes_axe_in_a_real_browser(report, tmp_path):
    browser, node, modules = shutil.which("chromium"), shutil.which("node"), axe()
    if browser is None or node is None or modules is None:
        pytest.skip("needs Chromium, node, and QDEPLOY_AXE=node_modules with axe-core in it")
    (tmp_path / "axe.mjs").write_text(AXE)
    for name, one in {"few": report, "many": with_samples(report)}.items():
        (tmp_path / f"{name}.html").write_bytes(to_html(one))
        call = [node, tmp_path / "axe.mjs", modules, browser, tmp_path / f"{name}.html"]
        done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=True)
        assert json.loads(done.stdout) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_screen_in_a_real_browser(report, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium (apt install chromium)")
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth,"
        " document.querySelectorAll('img').length,"
        " document.images[0].naturalWidth].join()</script>"
    )
    page = to_html(with_samples(report)).decode()
    page = page.replace("default-src 'none'", "default-src 'unsafe-inline'")  # for the probe alone
    page = page.replace("</body>", f"{probe}</body>")
    (tmp_path / "r.html").write_text(page)
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/r.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r"<title>(\d+),(\d+),(\d+)</title>", done.stdout)
    assert found is not None
    wide, images, loaded = map(int, found.groups())
    assert wide <= max(width, 500)  # Chromium's own windows are no narrower than 500
    assert (images, loaded) == (2, 4)


@pytest.mark.parametrize(
    ("changes", "judged", "said"),
    [
        ({"output": "out/a.onnx"}, "out/a.onnx", "made from model.pt"),
        ({"output": "b.onnx", "recipe": None}, "b.onnx", "judged beside model.pt"),
        ({"output": None}, "model.pt", ""),
        ({"output": "model.pt", "recipe": None}, "model.pt", ""),
    ],
    ids=["sanitized", "gated", "not written", "alone"],
)
def test_the_verdict_names_the_file_that_it_is_about(report, changes, judged, said):
    origin = replace(report.origin, path="model.pt")
    named = replace(report, origin=origin, **changes)
    text, page = to_markdown(named).decode(), to_html(named).decode()
    assert text.splitlines()[0].endswith(f": {judged}")
    assert f"<title>{named.outcome.value}: {judged}</title>" in page
    assert not said or (said in text and said in page)
    assert "Written to" not in text
