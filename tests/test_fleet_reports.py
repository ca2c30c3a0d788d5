"""What a fleet tells, and the scripts that schedulers run it by."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qdeploy.errors import UsageError
from qdeploy.fleet.cells import Cell
from qdeploy.fleet.document import FleetDocument, Record
from qdeploy.fleet.emit import Job, to_k8s, to_slurm
from qdeploy.fleet.forms import render, to_csv, to_html
from qdeploy.fleet.whole import changes, read_fleet, whole
from qdeploy.judging.verdict import Outcome
from tests.fleet_lab import (
    cells,
    fleet,
    one_process,
    place,
    spec_of,
    status,
)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["ACCEPT", "DONE"], Outcome.ACCEPT),
        (["ACCEPT", "NO VERDICT"], Outcome.NO_VERDICT),
        (["ACCEPT", "FAILED"], Outcome.NO_VERDICT),
        (["ACCEPT", "BAD INPUT"], Outcome.NO_VERDICT),
        (["FAILED", "REJECT", "ACCEPT"], Outcome.REJECT),
        ([], Outcome.ACCEPT),
    ],
)
def test_the_verdict_over_all_is_that_of_the_worst_cell(outcomes, expected):
    assert whole(record(str(i), outcome=o) for i, o in enumerate(outcomes)) is expected


def record(name: str, **said) -> Record:
    return Record(
        **{"id": name, "title": name, "model": name, "verb": "gate", "outcome": "ACCEPT", **said}
    )


def test_what_has_changed_is_told_by_cell():
    before = [record("a"), record("b"), record("c", sha256="1" * 64), record("d")]
    now = [record("a"), record("b", outcome="REJECT"), record("c", sha256="2" * 64), record("e")]
    found = {one.title: (one.before, one.now) for one in changes(before, now)}
    assert found == {
        "b": ("ACCEPT", "REJECT"),
        "c": ("ACCEPT, file 111111111111", "ACCEPT, file 222222222222"),
        "d": ("ACCEPT", None),
        "e": (None, "ACCEPT"),
    }


def document(*records: Record) -> FleetDocument:
    return FleetDocument(
        schema_version=1, name="f", outcome="ACCEPT", version="0", started="", seconds=1.0,
        computed=0, cells=records,
    )  # fmt: skip


def test_names_of_strangers_are_texts_on_the_page_and_in_the_table():
    hostile = record("x", model="<script>alert(1)</script>", reason="=cmd|' /C calc'!A0\u202e")
    page = to_html(document(hostile)).decode()
    assert "<script>alert(1)" not in page
    assert page.count("<script>") == 1
    assert "\u202e" not in page
    row = list(csv.reader(io.StringIO(to_csv(document(hostile)).decode())))[1]
    assert "'=cmd|' /C calc'!A0\\u202e" in row


def test_a_page_shows_the_worst_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr("qdeploy.fleet.forms.MOST_ROWS", 1)
    page = to_html(document(record("good"), record("bad", outcome="REJECT"))).decode()
    assert ">bad<" in page
    assert ">good<" not in page
    assert "2 cells." in page
    assert "These are the 1 worst; all are in fleet.json." in page


def test_the_script_of_the_page_is_the_one_that_its_policy_names():
    page = to_html(document(record("x"))).decode()
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.replace("&#39;", "'")


def test_a_report_is_written_as_its_name_asks(place, one_process):
    with pytest.raises(UsageError, match="a fleet is written as"):
        render(document(), Path("x.md"))
    assert fleet("--report", "x.md") == 2


# Schedulers

SLURM = """\
#!/bin/sh
#SBATCH --job-name=two
#SBATCH --array=0-1
#SBATCH --cpus-per-task=2
#SBATCH --time=50
#SBATCH --mem=3815M
#SBATCH --partition=edge
#SBATCH --requeue
#SBATCH --output=/o/slurm-%A-%a.log
# 2 cells. After it: qdeploy fleet /m/fleet.toml --out /o
module load python
exec qdeploy fleet /m/fleet.toml --out /o --executor local --workers 1 \\
  --share "$SLURM_ARRAY_TASK_ID/2"
"""


def job_of(count: int = 2, **said) -> Job:
    limits = {"minutes": 10, "cores": 2, "memory_gb": 2, "retries": 3}
    spec = spec_of(**{"limits": limits, **said})
    return Job(spec, Path("/m/fleet.toml"), Path("/o"), cells(count))


def test_a_job_array_of_slurm():
    emit = {"slurm": {"partition": "edge", "lines": ["module load python"]}}
    assert to_slurm(job_of(emit=emit)) == SLURM
    assert "--array=0-999\n" in to_slurm(job_of(2500))
    assert "--time=130\n" in to_slurm(job_of(2500))  # three cells each


def test_a_device_with_a_gpu_is_asked_for():
    job = job_of()
    asked = replace(job.cells[0].asked, device="cuda")
    on_gpu = replace(job, cells=[Cell("id", asked, "t")])
    assert "--gres=gpu:1\n" in to_slurm(on_gpu)


def test_an_indexed_job_of_kubernetes():
    k8s = {"image": "registry/qdeploy:1", "claim": "models", "key_secret": "fleet"}
    table = json.loads(to_k8s(job_of(emit={"k8s": k8s})))
    (container,) = table["spec"]["template"]["spec"]["containers"]
    assert (table["kind"], table["metadata"]["name"]) == ("Job", "two")
    assert (table["spec"]["completions"], table["spec"]["completionMode"]) == (2, "Indexed")
    assert container["command"] == ["qdeploy"]
    assert container["args"] == [
        "fleet", "/fleet/fleet.toml", "--out", "/fleet/out", "--executor", "local",
        "--workers", "1", "--share", "$(JOB_COMPLETION_INDEX)/2",
    ]  # fmt: skip
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "3815Mi"}
    assert container["env"] == [{"name": "QDEPLOY_KEY", "value": "/key/key"}]
    with pytest.raises(UsageError, match="in which container"):
        to_k8s(job_of())


@pytest.mark.parametrize("where", [{"manifest": Path("/m\ntouch x #/f")}, {"out": Path("/o\x1b")}])
def test_a_script_has_no_names_with_lines_of_their_own(where):
    with pytest.raises(UsageError, match="cannot be written into a script"):
        to_slurm(replace(job_of(), **where))


@pytest.mark.parametrize("content", ["[]", "x", '{"name": 1}', "{}"])
def test_a_status_that_is_none_is_one_line(place, one_process, content):
    (place / "out").mkdir()
    assert fleet("--watch") == 2  # none has begun
    (place / "out" / "status.json").write_text(content)
    assert fleet("--watch") == 2
    (place / "out" / "status.json").write_text(status(process=999_999_999).model_dump_json())
    assert fleet("--watch") == 2  # it has ended before the last cell


def test_an_executor_that_is_not_installed_is_one_line(place, monkeypatch, one_process):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert fleet("--executor", "ray") == 2


def test_cells_on_a_ray_cluster_are_the_same(place):
    pytest.importorskip("ray", reason="needs ray")
    assert fleet("--executor", "ray") == 3
    document = read_fleet(place / "out" / "fleet.json")
    assert [r.outcome.value for r in document.cells] == ["ACCEPT", "REJECT"]
