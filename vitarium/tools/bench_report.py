"""What ``vitarium bench models`` prints: a table for each setting, and verdicts on our goals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from vitarium.tools import bench
from vitarium.tools.bench import Row

FLAG = "+fused_attn"  # behind a model's name: with timm's attention fused wherever it can be
ATEN = "+aten"  # behind a model's name: with our ops as ordinary torch functions
_CPU: dict[str, tuple[Any, ...]] = {"dtype": ("float32",), "device": ("cpu",), "threads": (1,)}
_GPU: dict[str, tuple[Any, ...]] = {"dtype": ("bfloat16", "float16"), "device": ("cuda",)}


@dataclass(frozen=True)
class Goal:
    """A bound on one figure, or on it over another.

    Attributes:
        title: what is compared.
        ours: model and size of the figure above.
        other: those of the figure below, or None for a bound on the figure itself.
        figure: column of both, of inference or of training.
        bound: of the ratio: from below for images/s; from above for time and memory.
        per_pixel: divide the figures by the pixels of an image.
        batch_size: the only one that counts, or None.
        compiled: whether both are compiled.
        gpu: whether it is about half precision on a GPU, not float32 on one CPU thread.
    """

    title: str
    ours: tuple[str, str]
    other: tuple[str, str] | None
    figure: str
    bound: float
    per_pixel: bool = False
    batch_size: int | None = None
    compiled: bool = False
    gpu: bool = False

    @property
    def at_most(self) -> bool:
        """Whether the figure is of what should be little."""
        return not self.figure.endswith("samples_per_sec")

    def figures(self, rows: list[Row], key: tuple[str, str]) -> dict[int, float]:
        """Batch size -> figure of a model at a size, where it was measured as it has to be."""
        mode = self.figure.partition("_")[0]
        terms = {"model": key[0], f"{mode}_img_size": key[1], "compiled": self.compiled}
        places = _GPU if self.gpu else _CPU
        return {
            row[f"{mode}_batch_size"]: row[self.figure] / (_pixels(key[1]) if self.per_pixel else 1)
            for row in rows
            if row.get(self.figure) is not None
            and self.batch_size in (None, row[f"{mode}_batch_size"])
            and all(row[column] == value for column, value in terms.items())
            and all(_place(row, column) in values for column, values in places.items())
        }


def _place(row: Row, column: str) -> Any:
    """A value of a row, a device without its number."""
    return row[column].partition(":")[0] if column == "device" else row[column]


_SWIN = "swin_tiny_patch4_window7_224"
_LARGE, _SMALL = ("nat_tiny", "800x1216"), ("nat_tiny", "224")
_GROWTH = "nat_tiny, 800 x 1216 over 224 x 224: {} per pixel"


def _over(
    other: str, size: str, batch_size: int | None, figure: str, bound: float, **kw: Any
) -> Goal:
    """A bound on one of timm's models with our ops over another form of it."""
    plain, _, flag = other.partition("+")
    peer = "timm's" + (" with its flag" if flag else "")
    how = ", compiled" if kw.get("compiled") else ""
    title = f"fused_{plain} over {peer}{how}, {size}: {_FIGURES[figure]}"
    ours = (f"fused_{plain}", size)
    return Goal(title, ours, (other, size), figure, bound, batch_size=batch_size, **kw)


_FIGURES = {
    "infer_samples_per_sec": "images/s",
    "infer_peak_mib": "peak memory",
    "train_samples_per_sec": "images/s in training",
    "train_peak_mib": "peak memory in training",
}
_FLAGGED = f"{_SWIN}{FLAG}"
_FUSED = [
    goal
    for size, batch_size in (("224", 8), ("800x1216", 1))
    for goal in (
        _over(_SWIN, size, batch_size, "infer_samples_per_sec", 1.4),
        _over(_FLAGGED, size, batch_size, "infer_samples_per_sec", 1.08),
        _over(_FLAGGED, size, batch_size, "infer_samples_per_sec", 0.98, compiled=True),
        _over(_SWIN, size, batch_size, "infer_peak_mib", 1.0),
        _over(_SWIN, size, None, "train_samples_per_sec", 1.0),
        _over(_SWIN, size, None, "train_peak_mib", 1.0),
    )
]
_SPEED = "infer_samples_per_sec"
_ON_GPU: dict[str, Any] = {"figure": _SPEED, "compiled": True, "gpu": True}
_KERNELS = [
    Goal(
        f"fused_{_SWIN} over timm's, compiled: images/s",
        (f"fused_{_SWIN}", "224"),
        (_SWIN, "224"),
        bound=1.2,
        **_ON_GPU,
    ),
    *(
        Goal(f"{name}, compiled: images/s on an H200", (name, "224"), None, bound=bound, **_ON_GPU)
        for name, bound in ((f"fused_{_SWIN}", 15_000.0), ("nat_tiny", 8_000.0))
    ),
    *(
        Goal(
            f"{name} over it without kernels, compiled: images/s",
            (name, "224"),
            (f"{name}{ATEN}", "224"),
            bound=2.0,
            **_ON_GPU,
        )
        for name in ("biformer_small", "agent_swin_tiny")
    ),
]
_GOALS = (
    *_FUSED,
    *_KERNELS,
    _over("davit_tiny", "224", 8, "infer_samples_per_sec", 1.1),
    Goal(
        f"dinat_s_tiny over {_SWIN}, 224 x 224: images/s",
        ours=("dinat_s_tiny", "224"),
        other=(_SWIN, "224"),
        figure="infer_samples_per_sec",
        bound=0.75,
    ),
    Goal(_GROWTH.format("time"), _LARGE, _SMALL, "infer_step_time", 1.2, True, 1),
    Goal(_GROWTH.format("peak memory"), _LARGE, _SMALL, "infer_peak_mib", 1.2, True, 1),
)


def label(row: Row) -> str:
    """A candidate's name."""
    return row["model"] + (", compiled" if row["compiled"] else "")


def show(console: Console, title: str, mode: str, rows: list[Row], sweep: bool) -> None:
    """Print what the models did in one setting.

    Args:
        console: where the table goes.
        title: of the table.
        mode: ``infer`` or ``train``.
        rows: of the setting.
        sweep: whether there are other image sizes, to compare with the first.
    """
    columns = {
        "images/s": (f"{mode}_samples_per_sec", ".2f"),
        "ms": (f"{mode}_step_time", ".1f"),
        "x base": (f"{mode}_over_base", ".2f"),
        "GFLOPs": ("infer_gmacs", ".2f"),
        "images/s per GFLOP": ("per_gflop", ".3g"),
        "params M": ("param_count", ".1f"),
        "peak extra MiB": (f"{mode}_peak_mib", ".1f"),
    }
    if sweep:
        columns["ms/pixel"] = (f"{mode}_pixel_time_growth", ".2f")
        columns["bytes/pixel"] = (f"{mode}_pixel_memory_growth", ".2f")
    table, notes = [], []
    for row in rows:
        speed = row[f"{mode}_samples_per_sec"]
        if speed is None:
            notes.append(f"  not run: {label(row)}: {row['note']}")
            continue
        values = row | {"per_gflop": speed / row["infer_gmacs"]}
        cells = [(values[column], form) for column, form in columns.values()]
        table.append([label(row), *("" if x is None else f"{x:{form}}" for x, form in cells)])
    title += f", {rows[0]['dtype']}, {rows[0]['device']}; base {rows[0]['base']}"
    bench.show(console, title + "; per pixel: x first size" * sweep, ["", *columns], table)
    for note in notes:
        console.print(note)


def judge(console: Console, rows: list[Row]) -> None:
    """Print a verdict on every goal that the rows of a run speak of."""
    verdicts: dict[bool, list[list[str]]] = {False: [], True: []}
    for goal in _GOALS:
        ours = goal.figures(rows, goal.ours)
        other = dict.fromkeys(ours, 1.0)
        if goal.other is not None:
            other = goal.figures(rows, goal.other)
        for batch_size in sorted(ours.keys() & other.keys()):
            found = ours[batch_size] / other[batch_size]
            met = found <= goal.bound if goal.at_most else found >= goal.bound
            bound = f"{'<=' if goal.at_most else '>='} {goal.bound:,g}"
            reached = f"{found:.2f}" if goal.other is not None else f"{found:,.0f}"
            title = f"{goal.title}, batch {batch_size}"
            verdicts[goal.gpu].append([title, reached, bound, "met" if met else "MISSED"])
    for gpu, where in ((False, "one CPU thread, float32"), (True, "GPU, half precision")):
        if verdicts[gpu]:
            bench.show(console, f"Goals: {where}", ["", "reached", "goal", ""], verdicts[gpu])


def _pixels(img_size: str) -> int:
    height, _, width = img_size.partition("x")
    return int(height) * int(width or height)
