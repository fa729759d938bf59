"""Pictures of what ``vitarium bench ops`` measured: a line for each shape, a mark for each peer.

Time is logarithmic: equal distances are equal factors. On a GPU a bar says how long the least that
the op can do would take at the speed of a copy, or of a product where that takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.tools._common import require_matplotlib
from vitarium.tools.bench import Row
from vitarium.tools.bench_plots import FAINT, GRID, INK, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OURS = ("vitarium", "triton", "aten")
_MARKS = "osD^vP*X<>"
_COLUMNS = 3  # of the legend


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw a PNG file for each op, pass and dtype of which something was timed.

    Args:
        rows: of `vitarium bench ops`.
        out: an existing folder.

    Returns:
        The files.

    Raises:
        ValueError: nothing was timed, or matplotlib is not installed.
    """
    require_matplotlib()
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["ms"] is not None:
            key = (row["op"], row["pass"].replace(", ", "_"), row.get("dtype", ""))
            groups.setdefault(key, []).append(row)
    if not groups:
        raise ValueError("plot: expected rows with a time, found none")
    files = []
    for about, group in groups.items():
        files.append(out / f"ops_{'_'.join(filter(None, about))}.png")
        save(_figure(group), files[-1])
    return files


def floor(row: Row) -> float | None:
    """Milliseconds that the least takes at the ceilings of the row's run, or None."""
    if "bytes" not in row:
        return None
    copied = row["bytes"] / row["copy_gb_s"] / 1e6
    multiplied = row["flops"] / row["product_tflop_s"] / 1e9
    return float(max(copied, multiplied))


def _label(row: Row) -> str:
    return f"{row['case']}, batch {row['batch']}" if "batch" in row else str(row["case"])


def _figure(rows: Sequence[Row]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    labels = list(dict.fromkeys(_label(row) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    legend = 0.24 * (1 + len(names) // _COLUMNS)  # inches
    height = 1.5 + legend + 0.34 * len(labels)
    figure = Figure(figsize=(10, height), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.34, 0.55 / height, 0.63, (height - 1.35 - legend) / height))
    title = ", ".join(filter(None, (rows[0]["op"], rows[0]["pass"], rows[0].get("dtype"))))
    figure.text(0.02, 1 - 0.35 / height, title, fontsize=15, weight="bold", color=INK)
    for index, name in enumerate(names):
        some = [row for row in rows if row["implementation"] == name]
        ours = name in _OURS
        style: dict[str, Any] = {"marker": _MARKS[index % len(_MARKS)], "color": f"C{index % 10}"}
        axes.plot(
            [row["ms"] for row in some],
            [labels.index(_label(row)) for row in some],
            linestyle="none",
            markersize=9 if ours else 6,
            markerfacecolor=None if ours else "w",
            zorder=4 if ours else 3,
            label=name,
            **style,
        )
    floors = {_label(row): found for row in rows if (found := floor(row)) is not None}
    if floors:
        at = [labels.index(label) for label in floors]
        axes.plot(list(floors.values()), at, "|", markersize=16, color=INK, label="copy or product")
    axes.set(xscale="log", xlabel="milliseconds", ylim=(len(labels) - 0.4, -0.6))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1.01),
        ncols=_COLUMNS,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    return figure
