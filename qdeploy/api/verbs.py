"""What the commands do, from what was asked to what came of it.

The command line and the Python API call these. Nothing here prints, parses or exits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from qdeploy.inputs.requests import QuantizeRequest
from qdeploy.options import Options
from qdeploy.progress import Progress
from qdeploy.report.from_json import layers_of
from qdeploy.report.scans import Look, check_place
from qdeploy.report.values import Report
from qdeploy.request import (
    make_cleaning_order,
    make_gate_request,
    make_request,
    make_student_order,
    refuse_lost_models,
    request_for,
    with_private_seed,
)
from qdeploy.runs import pipeline
from qdeploy.runs.gate import Subject
from qdeploy.runs.gate import gate as judge
from qdeploy.runs.scan import Sight, look_at_each, write_looks
from qdeploy.values import FloatModel, QuantizedModel, QuantPlan

if TYPE_CHECKING:
    from qdeploy.runs.clean import Student


def plan(options: Options, progress: Progress) -> tuple[QuantizeRequest, FloatModel, QuantPlan]:
    """What `sanitize` would do, and to what."""
    request = make_request(options)
    make_cleaning_order(options, request)
    return request, *pipeline.make_plan(request, progress)


def sanitize(options: Options, progress: Progress) -> Report:
    """Clean the float model if that was asked for, quantize, measure the file, and judge it."""
    options = with_private_seed(options)
    request = make_request(options)
    order = make_cleaning_order(options, request)
    if order is not None:
        from qdeploy.runs.clean import clean_first  # torch takes a second to import

        request = clean_first(order, request, progress)
    return pipeline.sanitize(request, options.out, progress)


def quantize(options: Options, progress: Progress) -> tuple[QuantizeRequest, QuantizedModel]:
    """Quantize by any method, and judge nothing."""
    request = make_request(with_private_seed(options))
    return request, pipeline.quantize(request, options.out, progress)


def gate(options: Options, progress: Progress) -> Report:
    """Measure an ONNX file as it is, and judge it by a policy."""
    known = layers_of(options.made_by) if options.made_by is not None else frozenset()
    subject = Subject(options.file, options.reference is not None, known)
    return judge(make_gate_request(options), subject, progress)


def scan(options: Options, progress: Progress) -> Iterator[Look]:
    """Look at model files without running them; what is seen of each, as soon as it is.

    The reports that were asked for are written when the last has been looked at.
    """
    for path in options.report or ():
        check_place(path)
    refuse_lost_models(options)
    request_of = partial(request_for, options)
    sights = [Sight(path, request_of, options.reference) for path in options.models or ()]
    looks = []
    for look in look_at_each(sights, progress):
        looks.append(look)
        yield look
    write_looks(looks, options.report or ())


def export(options: Options, progress: Progress) -> FloatModel:
    """Write the prepared float model."""
    return pipeline.export_file(make_request(options), options.out, progress)


def clean(options: Options, progress: Progress) -> Student | None:
    """Teach a student what the model answers; None in a process that only helps another."""
    from qdeploy.runs.clean import assist, make_student
    from qdeploy.training.compute import computing

    order = make_student_order(options)
    with computing(order.accelerator) as compute:
        if compute.main:
            return make_student(order, compute, progress)
        assist(order, compute)
        return None
