"""What to do when no candidate passed the gate."""

from __future__ import annotations

from pathlib import Path

from robx.errors import GateFailed
from robx.records import Bundle


def gate_error(bundle: Bundle, folder: Path) -> GateFailed | None:
    """The error to end with when a bundle is not what was asked for; None when it is, or was forced."""
    if bundle.precision == bundle.requested or bundle.verdict == "FORCED":
        return None
    return GateFailed(
        f"no {bundle.requested} candidate passed the gate, and {folder} was written in {bundle.precision}: "
        f"{_advice(bundle)}, or ship {bundle.requested} all the same with --force"
    )


def _advice(bundle: Bundle) -> str:
    """Why no rung of the precision that was asked for shipped, by the one that came nearest, and what to do."""
    tried = [rung for rung in bundle.rungs if rung.precision == bundle.requested]
    accurate = [rung for rung in tried if rung.accuracy == "PASS" or (rung.accuracy != "FAIL" and not rung.was_judged)]
    if any(rung.speed == "INCONCLUSIVE" and "speedup_fp32" in rung.values for rung in accurate):
        return "an accurate one could not be timed well enough; run it again on a quiet machine"
    if accurate:
        return "the accurate ones are slower than asked for; allow it with a lower --min-speedup"
    open_ones = [rung for rung in tried if rung.accuracy == "INCONCLUSIVE" and rung.was_judged]
    if open_ones:
        judged = (rung.values.get("probe_drop", rung.values.get("cosine_mean")) for rung in open_ones)
        images = max((value.n or 0 for value in judged if value is not None), default=0)
        more = ", allow more with --max-drop" if any("probe_drop" in rung.values for rung in open_ones) else ""
        return (
            f"the drop of {len(open_ones)} of them is neither proven nor refuted by {images} images; "
            f"give more images to judge with (--test, --judging-images){more}"
        )
    if any("probe_drop" in rung.values for rung in tried):
        return "all lose more than asked for; allow more with --max-drop"
    if any(rung.values for rung in tried):
        return (
            "their embeddings differ too much from the student's; "
            "give labelled images, of classes that --data has too, so that accuracy can decide"
        )
    return "none could be made or run, and its rungs say why; choose another --format or --target"
