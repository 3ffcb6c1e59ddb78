"""What a run shows on its node, while it goes on and when it is done."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..host import current as host
from ..host import provenance
from ..messages import say

if TYPE_CHECKING:
    from ..engine.flux.prompts import TokenCounts
    from ..engine.run.pipeline import Pipeline
    from ..engine.run.report import Report
    from ..engine.run.request import GenerationRequest


def callbacks(node: Any) -> dict[str, Any]:
    """What the engine calls while it runs, by the names of its arguments."""
    on_stage = host.stage_teller(node.hidden.unique_id)
    return {"before_block": host.check_cancelled, "on_stage": on_stage}


def sampling_callbacks(
    node: Any, pipeline: "Pipeline", request: "GenerationRequest"
) -> dict[str, Any]:
    """The same of a run that samples, and the memory that its previews take."""
    device = pipeline.dit.patcher.device
    on_pass = host.progress(request.passes, request.workload.steps, device, node.hidden.unique_id)
    preview_bytes = host.preview_bytes(request.width, request.height)
    return {**callbacks(node), "on_pass": on_pass, "preview_bytes": preview_bytes}


def shown(
    node: Any, report: "Report", *lines: str, counts: "TokenCounts | None" = None, **values: Any
) -> Any:
    """`ui` of a node whose run is done; the pictures that come of it will carry its record.

    lines: below the report, empty ones are left out; counts: of the prompt that was read; values:
    what the record has besides the report.
    """
    record = {**values, **report.as_dict()}
    provenance.keep(node.hidden, record)
    text = [str(report), *lines]
    if counts is not None:
        text = [counts.warning, *text, str(counts)]
    return host.node_text(text, **record)


def sampling_shown(
    node: Any,
    pipeline: "Pipeline",
    request: "GenerationRequest",
    report: "Report",
    lines: Sequence[str],
) -> Any:
    """`shown` of a run that sampled. lines: about its inputs."""
    counts = None
    if request.mask_is_empty:
        unpainted = say("The mask is empty: nothing was painted, and the original is returned.")
        lines = [unpainted, *lines]
    elif isinstance(request.prompt, str):
        counts = pipeline.checked_text_encoders.count(request.prompt)
    return shown(node, report, *lines, counts=counts, seed=request.seed)
