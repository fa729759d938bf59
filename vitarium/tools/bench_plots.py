"""``vitarium bench plot``: pictures of what `vitarium bench models` and timm's benchmark.py wrote.

Throughput against GFLOPs, with the front of the models that no other beats in both, and, where
models were run at several image sizes, throughput against size. Axes are logarithmic: equal
distances are equal factors.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm

from vitarium.tools._common import require_matplotlib
from vitarium.tools.bench import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MODES = {"infer": "inference", "train": "training"}
_MOST_NAMES = 40  # beyond them only the front is named
_MOST_LINES = 20
_FEW_SIZES = 4
INK, FAINT, GRID = "#222222", "#777777", "#e6e6e6"
_FONT = 8.5
_LINE = 0.042  # between two names, of the axes' height


@dataclass(frozen=True)
class Point:
    """What one model did at one image size.

    Attributes:
        model: its name.
        series: what its run had that others had not, e.g. ``compiled``.
        speed: images per second.
        gflops: multiply-adds of one image, in 10^9.
        size: height and width of the image, in pixels.
    """

    model: str
    series: str
    speed: float
    gflops: float
    size: tuple[int, int]

    @property
    def size_name(self) -> str:
        """The size as people say it."""
        height, width = self.size
        return f"{height}" if height == width else f"{height} x {width}"

    @property
    def ours(self) -> bool:
        """Whether the model is vitarium's."""
        name = self.model.split(".")[0]
        return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("vitarium")


def read(paths: Sequence[str]) -> list[Row]:
    """The rows of result files, numbers as numbers, each with its file's name as ``source``.

    Raises:
        ValueError: a file without a column that the plots need, or no number in one.
        OSError: a file cannot be read.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected a text file, got {error.reason}") from error
        reader = csv.DictReader(line for line in lines if not line.startswith("#"))
        columns = reader.fieldnames or ()
        modes = [mode for mode in _MODES if f"{mode}_samples_per_sec" in columns]
        needed = ["model", *(f"{mode}_img_size" for mode in modes), "infer_gmacs"]
        if not modes:
            needed.insert(1, "infer_samples_per_sec")
        for column in needed:
            if column not in columns:
                raise ValueError(f"{path}: no column {column}")
        numbers = ["infer_gmacs", *(f"{mode}_samples_per_sec" for mode in modes)]
        for row in reader:
            try:
                values = {x: float(row[x]) if row[x] else None for x in numbers}
                for mode in modes:
                    _size(row[f"{mode}_img_size"] or "1")
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, {row['model']}: {error}") from error
            rows.append({**row, **values, "source": Path(path).stem})
    return rows


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draw what the rows allow into PNG files.

    Args:
        rows: with the columns of `vitarium bench models` or of timm's benchmark.py.
        out: an existing folder.

    Returns:
        The files.

    Raises:
        ValueError: nothing in the rows was measured, or matplotlib is not installed.
    """
    require_matplotlib()
    files = []
    for mode in _MODES:
        points, terms = _points(rows, mode)
        if not points:
            continue
        files.append(out / f"{mode}_gflops.png")
        save(_over_gflops(points, f"Throughput and compute, {_MODES[mode]}", terms), files[-1])
        if any(len(line) > 1 for line in _lines(points)):
            files.append(out / f"{mode}_size.png")
            save(_over_size(points, f"Throughput and image size, {_MODES[mode]}", terms), files[-1])
    if not files:
        raise ValueError("plot: expected rows with a throughput and infer_gmacs, found none")
    return files


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _points(rows: Sequence[Row], mode: str) -> tuple[list[Point], str]:
    """The points of a mode, and in words what all of them have in common."""
    speed, size = f"{mode}_samples_per_sec", f"{mode}_img_size"
    done = [row for row in rows if row.get(speed) and row.get("infer_gmacs")]
    terms = [_terms(row, mode) for row in done]
    differ = [key for key in _terms({}, mode) if len({term[key] for term in terms}) > 1]
    same = [key for key in _terms({}, mode) if key not in ("source", *differ)]
    if "batch" in differ:  # as in timm's tables, with one for each model: then it makes no series
        others = [key for key in differ if key != "batch"]
        pairs = zip(done, terms, strict=True)
        cases = {(row["model"], str(row[size]), *(term[x] for x in others)) for row, term in pairs}
        differ = others if len(cases) == len(done) else differ
    points = [
        Point(
            model=row["model"],
            series=", ".join(term[key] for key in differ if term[key]),
            speed=float(row[speed]),
            gflops=float(row["infer_gmacs"]),
            size=_size(str(row[size])),
        )
        for row, term in zip(done, terms, strict=True)
    ]
    shared = [terms[0][key] for key in same] if terms else []
    return points, ", ".join(filter(None, shared))


def _terms(row: Row, mode: str) -> dict[str, str]:
    """Under what terms a row was measured, in words; empty where it does not say."""
    threads = str(row.get("threads") or "")
    return {
        "source": row.get("source", ""),
        "compiled": {"True": "compiled", "False": "eager"}.get(str(row.get("compiled")), ""),
        "batch": f"batch {row[f'{mode}_batch_size']}" if row.get(f"{mode}_batch_size") else "",
        "dtype": row.get("dtype") or "",
        "device": row.get("device") or "",
        "threads": {"": "", "1": "1 thread"}.get(threads, f"{threads} threads"),
    }


def _lines(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each model and series, from small images to large ones."""
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in sorted(points, key=lambda point: math.prod(point.size)):
        lines.setdefault((point.model, point.series), []).append(point)
    return list(lines.values())


def _front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, from few GFLOPs to many."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.gflops, -point.speed)):
        if not front or point.speed > front[-1].speed:
            front.append(point)
    return front[::-1]


def _over_gflops(points: Sequence[Point], title: str, terms: str) -> Figure:
    """Every model at every size, and a front for each series; for each size if these are few."""
    sizes = {point.size_name for point in points}
    one_size = next(iter(sizes)) + " pixels" if len(sizes) == 1 else ""
    explained = "lines: Pareto fronts"
    figure, axes = canvas(title, ", ".join(filter(None, (terms, one_size, explained))))
    axes.set_xlabel("GFLOPs of one image's forward pass (multiply-adds)")
    few_sizes = len(sizes) <= _FEW_SIZES
    few_points = len(points) <= _MOST_NAMES
    groups: dict[str, list[Point]] = {}
    for point in points:
        split = [point.series, point.size_name if few_sizes and not one_size else ""]
        groups.setdefault(", ".join(filter(None, split)), []).append(point)
    names: list[tuple[Point, str, str]] = []
    fronts = [_front(group) for group in groups.values()]
    for index, (group, front) in enumerate(zip(groups.values(), fronts, strict=True)):
        colour = f"C{index % 10}"
        label = list(groups)[index] or None
        axes.plot(*_xy(front), color=colour, linewidth=1.5, alpha=0.45, label=label)
        for ours in (False, True):
            some = [point for point in group if point.ours == ours]
            face = colour if ours else "w"
            area = 34 if few_points else 12
            axes.scatter(*_xy(some), s=area, c=face, edgecolor=colour, zorder=3)
        for point in group if few_points else front:
            size = "" if few_sizes else f", {point.size_name}"
            names.append((point, point.model + size, colour))
    for ours, text in ((True, "vitarium"), (False, "timm")):
        if any(point.ours == ours for point in points):
            face = FAINT if ours else "w"
            axes.scatter([], [], s=34, c=face, edgecolor=FAINT, label=text)
    axes.margins(0.12)
    _finish(axes)
    _name_points(axes, names, points, fronts)
    return figure


def _over_size(points: Sequence[Point], title: str, terms: str) -> Figure:
    """A line for each model that was run at several sizes, named at its end."""
    lines = [line for line in _lines(points) if len(line) > 1]
    lines.sort(key=lambda line: -line[-1].speed)
    if len(lines) > _MOST_LINES:
        some = f"the fastest {_MOST_LINES} of {len(lines)}"
        terms = ", ".join(filter(None, (terms, some)))
        del lines[_MOST_LINES:]
    figure, axes = canvas(title, terms, right=0.7)
    axes.set_xlabel("image, height x width in pixels (equal steps: equal factors of pixels)")
    for index, line in enumerate(lines):
        face = f"C{index % 10}" if line[0].ours else "w"
        x, y = [math.prod(point.size) for point in line], [point.speed for point in line]
        style = "-" if index < 10 else "--"
        axes.plot(x, y, style, color=f"C{index % 10}", marker="o", markerfacecolor=face)
    _finish(axes)
    sizes = {math.prod(p.size): p.size_name for line in lines for p in line}
    axes.set_xticks(list(sizes), list(sizes.values()))
    _name_lines(axes, lines)
    return figure


def canvas(title: str, terms: str, right: float = 0.97) -> tuple[Figure, Axes]:
    """A figure with titles and logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), dpi=130)
    FigureCanvasAgg(figure)  # texts are measured before the figure is saved
    axes = figure.add_axes((0.09, 0.09, right - 0.09, 0.73))
    figure.text(0.09, 0.945, title, fontsize=15, weight="bold", color=INK)
    figure.text(0.09, 0.905, terms, fontsize=10, color=FAINT)
    axes.set(xscale="log", yscale="log", ylabel="images per second")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(axes: Axes) -> None:
    """Plain numbers at the axes, and the legend above them."""
    from matplotlib.ticker import LogLocator, NullLocator

    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low < 10 else (1, 2, 5)
        axis.set_major_locator(LogLocator(subs=steps if high / low < 1000 else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.01),
            ncols=4,
            frameon=False,
            fontsize=_FONT,
            labelcolor=INK,
            borderaxespad=0,
        )


def _xy(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.gflops for point in points], [point.speed for point in points]


def _name_points(
    axes: Axes,
    names: Sequence[tuple[Point, str, str]],
    points: Sequence[Point],
    fronts: Sequence[Sequence[Point]],
) -> None:
    """Write names near their points, the nearest free place first.

    Args:
        axes: with its final limits.
        names: point, text and colour.
        points: all that are drawn; no name covers them.
        fronts: lines that no name covers either.
    """
    from matplotlib.transforms import Bbox

    def around(centre: Any, width: float, height: float) -> Bbox:
        x, y = centre
        return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)

    canvas: Any = axes.figure.canvas
    at = {point: axes.transData.transform((point.gflops, point.speed)) for point in points}
    taken = [around(at[point], 12, 12) for point in points]
    for front in fronts:
        for a, b in pairwise(front):
            steps = max(1, int(math.dist(at[a], at[b]) / 8))
            taken += [around(at[a] + (at[b] - at[a]) * i / steps, 4, 4) for i in range(steps)]
    frame = axes.get_window_extent()
    left_out = 0
    for point, text, colour in sorted(names, key=lambda name: not name[0].ours):
        x, y = at[point]
        style: dict[str, Any] = {
            "fontsize": _FONT,
            "color": colour,
            "weight": "bold" if point.ours else "normal",
        }
        written = axes.text(0, 0, text, **style)
        extent = written.get_window_extent(canvas.get_renderer())
        written.remove()
        for reach, turn in product((12, 22, 36, 54, 76, 100), range(16)):
            angle = math.pi * (turn + 2) / 8  # above and to the right first
            dx = math.cos(angle) * (reach + extent.width / 2)
            dy = math.sin(angle) * (reach + extent.height / 2)
            box = around((x + dx, y + dy), extent.width + 4, extent.height)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0
            if inside and box.y1 <= frame.y1 and not box.count_overlaps(taken):
                line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkB": 3}
                line["relpos"] = ((1 - math.cos(angle)) / 2, (1 - math.sin(angle)) / 2)
                axes.annotate(
                    text,
                    (point.gflops, point.speed),
                    xytext=(dx, dy),
                    textcoords="offset pixels",
                    ha="center",
                    va="center",
                    arrowprops=line if reach > 22 else None,
                    **style,
                )
                taken.append(box)
                break
        else:
            left_out += 1
    if left_out:
        text = f"{left_out} names left out for want of room"
        axes.figure.text(0.97, 0.02, text, ha="right", fontsize=_FONT, color=FAINT)


def _name_lines(axes: Axes, lines: Sequence[Sequence[Point]]) -> None:
    """Write names at the right, in the order of the lines' ends, without overlap."""
    to_axes = axes.transData - axes.transAxes
    order = sorted(range(len(lines)), key=lambda i: lines[i][-1].speed)
    ends = [(math.prod(lines[i][-1].size), lines[i][-1].speed) for i in order]
    places: list[float] = []
    for _, y in to_axes.transform(ends):
        places.append(max(y, places[-1] + _LINE) if places else y)
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], 1 - _LINE * (len(places) - 1 - i))
    for i, end, y in zip(order, ends, places, strict=True):
        point, colour = lines[i][-1], f"C{i % 10}"
        axes.annotate(
            ", ".join(filter(None, (point.model, point.series))),
            end,
            xytext=(1.03, y),
            textcoords="axes fraction",
            va="center",
            fontsize=_FONT,
            color=colour,
            weight="bold" if point.ours else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5)},
        )


def save(figure: Figure, file: Path) -> None:
    """Write under a temporary name first."""
    temporary = file.with_name(f"{file.stem}.part.png")
    figure.savefig(temporary)
    temporary.replace(file)
