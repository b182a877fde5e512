"""matplotlib figures as inline SVG elements: the same bytes for the same data.

Colours are drawn as placeholders and replaced by CSS variables, so that one figure works in light, dark and print.
Text stays text, in the page's font.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

# placeholder colour -> CSS variable of the page
_INKS = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--rule",
    "#040404": "--fp32",
    "#050505": "--fp16",
    "#060606": "--int8",
    "#070707": "--paper",
}
INK, MUTED, RULE, FP32, FP16, INT8, PAPER = _INKS
_SETTINGS: Any = {
    "svg.hashsalt": "robx",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 9.5,
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
}


def draw(paint: Callable[[Canvas], None], *, name: str, title: str, text: str, size: tuple[float, float]) -> str:
    """The SVG element that `paint` draws on a canvas of `size` inches, with its alternative text.

    Args:
        paint: draws on the canvas.
        name: prefix of every id in it, unique on the page.
        title: the figure's name, for a screen reader.
        text: what it shows, in words, for a screen reader.
        size: width and height in inches; on the page the width is the column's.
    """
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # The text is shown in the page's font, so glyphs missing from matplotlib's do not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas = Canvas(figsize=size, layout="constrained")
        canvas.patch.set_alpha(0)
        FigureCanvasAgg(canvas)  # measures text, to place the labels
        paint(canvas)
        FigureCanvasSVG(canvas)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return _inline(buffer.getvalue(), name=name, title=title, text=text)


def _inline(svg: str, *, name: str, title: str, text: str) -> str:
    """matplotlib's SVG as an element of the page: no header or metadata, own ids, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # matplotlib escapes < and > in text, so this matches tags only, never a user's text.
    svg = re.sub(r"<[^<>]+>", lambda tag: _own(tag.group(), name), svg)
    box = re.search(r'viewBox="[^"]* ([0-9.]+) [0-9.]+"', svg)
    # On a narrow screen the page does not shrink a figure below its natural width, or its text could not be read.
    size = f'{box.group()} style="--natural: {float(box.group(1)):g}px"' if box else ""
    head = (
        f'<svg {size} role="img" aria-labelledby="{name}-title {name}-desc" '
        f'xmlns="http://www.w3.org/2000/svg"><title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-desc">{html.escape(text)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :].strip()


def _own(tag: str, name: str) -> str:
    tag = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", tag).replace("xlink:href=", "href=")
    tag = re.sub(r"font-family: [^;\"]*;?", "", tag)
    for marker, variable in _INKS.items():
        tag = tag.replace(marker, f"var({variable})")
    return tag
