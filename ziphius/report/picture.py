"""A figure as a file of its own, SVG or PNG."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ziphius.config.errors import BadInput
from ziphius.report.files import write_whole
from ziphius.report.style import drawing


def write_picture(output: Path, what: str, title: str, make: Callable[[], Figure]) -> None:
    """Draw a figure as SVG or PNG, as the file's name says, replacing it in one step.

    The same figure and title give the same file; text stays text. Raises BadInput, which says
    ``what`` was to be drawn, for another ending.
    """
    kind = output.suffix.lower()
    if kind not in (".svg", ".png"):
        raise BadInput(f"{output}: {what} is drawn as .svg or .png; name such a file")
    with drawing():
        figure = make()
        picture = io.BytesIO()
        if kind == ".svg":
            with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
                FigureCanvasSVG(figure)
                figure.savefig(picture, format="svg", metadata={"Date": None})
        else:
            FigureCanvasAgg(figure)
            figure.savefig(picture, format="png", dpi=144)
    write_whole(output, picture.getvalue())
