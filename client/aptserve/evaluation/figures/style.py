"""How all figures look: one palette, one font size, no state of a global plotting session."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

# Okabe and Ito's colours, told apart under every common colour blindness; yellow is left out as
# too faint for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX<>*"
_DASHES = ("-", "--", ":")
_HATCHES = ("", "///", "xxx")
TIER_COLOURS = {"kv": "#0072B2", "hidden": "#E69F00", "kv8": "#009E73"}
OTHER_COLOUR = "#999999"
INK = "#333333"
_DPI = 150
_RC: dict[str, object] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


class Look:
    """Colour, marker and dash of each name; equal names look alike in all figures of a set."""

    def __init__(self, names: Iterable[str]) -> None:
        self._places = {name: place for place, name in enumerate(dict.fromkeys(names))}

    def colour(self, name: str) -> str:
        """Of lines and bars."""
        return _COLOURS[self._places[name] % len(_COLOURS)]

    def bar(self, name: str) -> dict[str, Any]:
        """Arguments of a bar; hatching tells what a repeated colour does not."""
        hatch = _HATCHES[self._places[name] // len(_COLOURS) % len(_HATCHES)]
        return {"facecolor": self.colour(name), "hatch": hatch, "edgecolor": "white"}

    def line(self, name: str) -> dict[str, Any]:
        """Arguments of a line; the marker tells what a repeated colour does not."""
        place = self._places[name]
        return {
            "color": self.colour(name),
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": _DASHES[place // len(_COLOURS) % len(_DASHES)],
        }


def render(width: float, height: float, draw: Callable[[Figure], None]) -> bytes:
    """A PNG of so many inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        # No version of a library in the file: equal data give an equal picture.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def legend_below(figure: FigureBase, axes: Iterable[Axes], num_columns: int = 6) -> None:
    """One legend under all panels, an entry for each label."""
    entries: dict[str, Artist] = {
        label: handle
        for panel in axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=min(num_columns, max(1, len(entries))),
    )
