"""One HTML page that shows runs side by side; it needs no network and no other file.

Curves and bars are SVG that is drawn here, and colors follow the reader's light or dark scheme.
"""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer import TRAINER_STATE_NAME

from ..kernels.groups import QMAX
from ..version import __version__
from .atomic_writes import atomic_path
from .page import PAGE, WRITTEN_BY
from .run_files import RUN_CONFIG, SUMMARY, file_of_run
from .wording import loss_unit

# Bytes per parameter of weights, gradients and optimizer state in other ways to train.
BNB_STATE = 2 * (1 + 4 / 256)  # two moments of one byte each, with an FP32 scale per 256 values
OTHERS: dict[str, tuple[float, float, float]] = {
    "FP32 Adam": (4, 4, 8),
    "8-bit Adam, bf16 weights": (2, 2, BNB_STATE),
    "FlashOptim AdamW": (3, 2, 2),  # arXiv:2602.23349
    "LoRA's frozen bf16 weights": (2, 0, 0),
}
KINDS = ("weights", "gradients", "optimizer state")
HEALTH = {
    "qft/codes_moved": "codes that a step moved, share",
    "qft/sign_flips": "moved codes that went back, share",
    "qft/codes_saturated": "codes at 127, share",
    "qft/parameters_changed": "parameters changed since the start, share",
    "qft/scale_growth": "scales, against their first values",
    "qft/outlier_drift": "drift of outliers",
    "qft/updates_too_small": "groups that no step can move, share",
    "grad_norm": "norm of the gradient",
}
NEEDED = (  # keys of a summary
    "model", "parameters", "steps", "trained_tokens", "tokens_per_second", "peak_memory",
    "state_bytes", "before", "after",
)  # fmt: skip
WIDTH, HEIGHT = 460, 240  # size of a chart, with its margins
LEFT, RIGHT, TOP, BOTTOM = 72, 10, 10, 30  # margins; the left one has room for `0.0008465`
N_COLORS = 6  # colors of runs in the page's style
STROKES = ("", " dashed", " dotted")  # classes of the first runs, and of those whose color is taken
BAR_NAME = 30  # letters that have room beside a bar


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """The data that the page shows about one run."""

    name: str  # of the run's folder
    summary: Mapping[str, Any]  # contents of `summary.json`
    history: Sequence[Mapping[str, Any]]  # `log_history` of the run's Trainer
    options: Mapping[str, Any]  # contents of `run.yaml`: the options of the run

    def points(self, key: str) -> list[tuple[float, float]]:
        """Return the step and value of each log entry with this key and a finite number."""
        return [(entry["step"], entry[key]) for entry in self.history if _is_finite(entry.get(key))]

    def n_not_finite(self, keys: Iterable[str]) -> int:
        """Return how many values with these keys were logged that `points` leaves out."""
        return sum(
            not _is_finite(entry[key]) for entry in self.history for key in keys if key in entry
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)


class Line(NamedTuple):
    """Values of one run in a chart, against its steps or against codes."""

    title: str  # shown at the pointer
    run: int  # number of the run, which decides the color
    points: list[tuple[float, float]]
    as_points: bool = False  # whether they are not joined


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """Read runs to show side by side; runs whose folders have the same name are named by path.

    Raises:
        FileNotFoundError: As in `read_run`.
        ValueError: As in `read_run`.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [
        replace(run, name=str(folder)) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def read_run(folder: Path) -> ReportedRun:
    """Read the files of a finished run.

    Raises:
        FileNotFoundError: The folder holds no finished run.
        ValueError: A file is damaged, or was written by a version that recorded less.
    """
    try:
        summary, state, options = (
            file_of_run(folder, name) for name in (SUMMARY, TRAINER_STATE_NAME, RUN_CONFIG)
        )
    except ValueError as error:
        raise ValueError(f"{error}. Leave this run out.") from error
    absent = [f"{SUMMARY} has no {key}" for key in NEEDED if key not in summary]
    absent += [] if "log_history" in state else [f"{TRAINER_STATE_NAME} has no log_history"]
    if absent:
        raise ValueError(
            f"{folder} was written by another program, or by a version of qft_hf that recorded "
            f"less: {', '.join(absent)}. Leave this run out."
        )
    return ReportedRun(folder.resolve().name, summary, state["log_history"], options)


def write_report(runs: Sequence[ReportedRun], path: Path) -> None:
    """Write the page; an earlier one is replaced.

    Raises:
        FileExistsError: `path` is a folder, which may be a run, or another kind of file.
    """
    if path.is_dir() or (path.is_file() and not _is_page(path)):
        raise FileExistsError(
            f"{path} exists already and is not a report. Give --output the name of a file that "
            "does not exist yet."
        )
    with atomic_path(path) as draft:
        draft.write_text(page(runs), encoding="utf-8")


def _is_page(path: Path) -> bool:
    return f"<footer><p>{WRITTEN_BY}" in path.read_text(encoding="utf-8", errors="replace")


def page(runs: Sequence[ReportedRun]) -> str:
    """Return the page as HTML.

    Raises:
        ValueError: `runs` is empty.
    """
    if not runs:
        raise ValueError("a report needs at least one run. Give output folders of finished runs.")
    sections = [
        ("Runs", _overview(runs)),
        ("Loss", _losses(runs)),
        ("Learning rate", _logged(runs, _chart(_lines(runs, "learning_rate")), ["learning_rate"])),
        ("Memory of the training state", _memory(runs)),
        ("Health of training", _health(runs)),
        ("Codes before and after", _codes(runs)),
        ("Movement by layer", _movement(runs)),
        ("Differences of configuration" if len(runs) > 1 else "Configuration", _differences(runs)),
    ]
    body = "\n".join(f"<section><h2>{head}</h2>{text}</section>" for head, text in sections)
    title = ", ".join(html.escape(run.name) for run in runs)
    return PAGE.format(title=title, body=body, written_by=WRITTEN_BY, version=__version__)


def _overview(runs: Sequence[ReportedRun]) -> str:
    """Return a table with one row of figures for each run."""
    head = ["run", "model", "parameters", "steps", "tokens", "tokens/s", "peak memory"]
    scores = list(dict.fromkeys(name for run in runs for name in run.summary["after"] or {}))
    rows = []
    for number, run in enumerate(runs):
        s = run.summary
        before, after = s["before"] or {}, s["after"] or {}
        rows.append(
            [
                _name(number, run),
                html.escape(Path(s["model"]).name),
                _trained(s),
                f"{s['steps']:,}",
                f"{s['trained_tokens']:,}",
                f"{s['tokens_per_second']:,.0f}",
                f"{s['peak_memory']['bytes'] / 1e9:.2f} GB",
                *(_change(before[name], after[name]) if name in after else "" for name in scores),
            ]
        )
    return _table([*head, *(f"{name}, before → after" for name in scores)], rows)


def _change(before: float | None, after: float | None) -> str:
    """Return a score before and after training; None stands for a score that was not a number."""
    return " → ".join("undefined" if s is None else _number(s) for s in (before, after))


def _trained(summary: Mapping[str, Any]) -> str:
    """Return the number of trained parameters and, for a side network, how its base is stored."""
    total, side = f"{summary['parameters'] / 1e6:,.1f} M", summary.get("side")
    n_trained = summary.get("trained_parameters", summary["parameters"])
    trained = f"{n_trained / 1e6:,.2f} of {total}"
    if side is None:
        return total if n_trained == summary["parameters"] else trained
    return f"{trained}: a side network, base in {html.escape(side['base'])}"


def _losses(runs: Sequence[ReportedRun]) -> str:
    """Return a chart of the losses, and a note that says what is drawn and in which unit."""
    training = _lines(runs, "loss", "training")
    evaluation = _lines(runs, "eval_loss", "evaluation", as_points=True)
    drawn = ["Lines: training"] * bool(training) + ["Points: evaluation"] * bool(evaluation)
    unit = loss_unit([run.summary.get("task") for run in runs])
    note = f"<p class='note'>{'; '.join(drawn)}. In {unit}.</p>"
    charts = _chart([*training, *evaluation]) + note if drawn else ""
    return _logged(runs, charts, ["loss", "eval_loss"])


def _health(runs: Sequence[ReportedRun]) -> str:
    charts = "".join(
        _figure(lines, title) for key, title in HEALTH.items() if (lines := _lines(runs, key))
    )
    return _logged(runs, charts and f"<div class='grid'>{charts}</div>", HEALTH)


def _lines(
    runs: Sequence[ReportedRun], key: str, label: str = "", *, as_points: bool = False
) -> list[Line]:
    """Return what was logged under `key`, one line for each run that logged it."""
    return [
        Line(f"{run.name} {label}".strip(), number, points, as_points)
        for number, run in enumerate(runs)
        if (points := run.points(key))
    ]


def _logged(runs: Sequence[ReportedRun], charts: str, keys: Iterable[str]) -> str:
    """Return charts of the values with these keys, and a note of values that cannot be drawn."""
    left_out = [
        f"{n:,} of {html.escape(run.name)}" for run in runs if (n := run.n_not_finite(keys))
    ]
    note = "Values that are infinite or not a number are not drawn: " + ", ".join(left_out)
    drawn = f"{_legend(runs)}{charts}" if charts else ""
    drawn += f"<p class='note'>{note}.</p>" if left_out else ""
    return drawn or "<p>Nothing was logged.</p>"


def _memory(runs: Sequence[ReportedRun]) -> str:
    """Return stacked bars of bytes per parameter: measured for the runs, computed for others."""
    bars: list[tuple[str, list[float], bool]] = []
    for run in runs:
        parts = dict.fromkeys(KINDS, 0.0)
        for state, n_bytes in run.summary["state_bytes"].items():
            kind = {"gradients": "gradients", "momentum": "optimizer state"}.get(state, "weights")
            parts[kind] += n_bytes / run.summary["parameters"]
        bars.append((run.name, [*parts.values()], True))
    bars += [(name, [*sizes], False) for name, sizes in OTHERS.items()]
    largest = max(sum(sizes) for _, sizes, _ in bars)
    row, label, plot = 26, 230, 460
    drawn = []
    for place, (name, sizes, is_measured) in enumerate(bars):
        y, x = place * row, float(label)
        style = "" if is_measured else " class='arithmetic'"
        short = name if len(name) <= BAR_NAME else f"…{name[1 - BAR_NAME :]}"
        drawn.append(
            f"<text x='{label - 8}' y='{y + 17}' text-anchor='end'{style}>{html.escape(short)}"
            f"<title>{html.escape(name)}</title></text>"
        )
        for part, value in enumerate(sizes):
            width = plot * value / largest
            drawn.append(
                f"<rect x='{x:.1f}' y='{y + 4}' width='{width:.1f}' height='18' "
                f"class='kind{part}{'' if is_measured else ' arithmetic'}'>"
                f"<title>{KINDS[part]}: {value:.2f}</title></rect>"
            )
            x += width
        drawn.append(f"<text x='{x + 6:.1f}' y='{y + 17}'{style}>{sum(sizes):.2f}</text>")
    marks = "".join(
        f"<span><i class='swatch kind{n}'></i>{kind}</span>" for n, kind in enumerate(KINDS)
    )
    return (
        f"<p class='legend'>{marks}</p>"
        f"<svg viewBox='0 0 {label + plot + 60} {row * len(bars)}' class='wide' role='img' "
        f"aria-label='bytes per parameter'>{''.join(drawn)}</svg>"
        "<p class='note'>Bytes per parameter, without activations. Those of the runs were measured "
        "just before a step; the pale bars are computed from the dtypes that each method stores "
        "(FlashOptim: arXiv:2602.23349).</p>"
    )


def _codes(runs: Sequence[ReportedRun]) -> str:
    """Return histograms of sampled codes, before training and after."""
    charts = []
    for number, run in enumerate(runs):
        sampled = run.summary.get("sampled") or {}
        if not sampled:
            continue
        lines = []
        for when in ("after", "before"):
            counts = sampled[f"codes_{when}"]
            total = sum(counts)
            shares = {code - QMAX: count / total for code, count in enumerate(counts)}
            points = [(float(code), log10(share)) for code, share in shares.items() if share]
            lines.append(Line(f"{run.name}, {when}", number, points, as_points=when == "before"))
        charts.append(_figure(lines, html.escape(run.name)))
    if not charts:
        return "<p>Nothing was sampled.</p>"
    return (
        f"<div class='grid'>{''.join(charts)}</div><p class='note'>Shares of codes from -127 to "
        "127, as powers of ten. Points: before training; line: after. Sampled from some rows of "
        "each weight.</p>"
    )


def _movement(runs: Sequence[ReportedRun]) -> str:
    """Return a table for each run: shares of changed values by layer (rows) and module."""
    tables = []
    for run in runs:
        changed = (run.summary.get("sampled") or {}).get("changed") or {}
        if not changed:
            continue
        cells: dict[str, dict[str, float]] = {}
        for name, share in changed.items():
            layer, module = _place(name)
            cells.setdefault(layer, {})[module] = share
        modules = list(dict.fromkeys(module for row in cells.values() for module in row))
        rows = [
            [html.escape(layer), *(_shade(row.get(module)) for module in modules)]
            for layer, row in cells.items()
        ]
        head = ["layer", *map(html.escape, modules)]
        tables.append(f"<h3>{html.escape(run.name)}</h3>{_table(head, rows, style='heat')}")
    if not tables:
        return "<p>Nothing was sampled.</p>"
    note = "<p class='note'>Shares of sampled values that differ from when training began.</p>"
    return "".join(tables) + note


def _place(name: str) -> tuple[str, str]:
    """Split a parameter's name after its layer number."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return "outside of layers", ".".join(parts)
    return ".".join(parts[: numbers[0] + 1]), ".".join(parts[numbers[0] + 1 :])


def _shade(share: float | None) -> str:
    if share is None:
        return ""
    return f"<span class='shade' style='--share:{share:.3f}'>{100 * share:.1f} %</span>"


def _differences(runs: Sequence[ReportedRun]) -> str:
    """Return a table of the options in which runs differ, or of all options of a single run."""
    if len(runs) == 1:
        rows = [[html.escape(key), _value(value)] for key, value in runs[0].options.items()]
        return _table(["key", _name(0, runs[0])], rows)
    keys = dict.fromkeys(key for run in runs for key in run.options)
    rows = [
        [html.escape(key), *(_value(run.options.get(key)) for run in runs)]
        for key in keys
        if len({json.dumps(run.options.get(key), sort_keys=True) for run in runs}) > 1
    ]
    if not rows:
        return "<p>None: all runs have the same options.</p>"
    return _table(["key", *(_name(number, run) for number, run in enumerate(runs))], rows)


def _value(value: Any) -> str:
    return "<i>default</i>" if value is None else html.escape(str(value))


def _figure(lines: Sequence[Line], caption: str) -> str:
    return f"<figure>{_chart(lines)}<figcaption>{caption}</figcaption></figure>"


def _chart(lines: Sequence[Line]) -> str:
    """Draw all lines, each in the color of its run; return nothing if there are none."""
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    (x_low, x_high), (y_low, y_high) = _range(xs), _range(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    drawn = []
    for y in _ticks(y_low, y_high):
        _, at = place(x_low, y)
        ends = f"x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{at:.1f}' y2='{at:.1f}'"
        drawn.append(f"<line class='rule' {ends}/>")
        drawn.append(f"<text x='{LEFT - 6}' y='{at + 4:.1f}' text-anchor='end'>{y:.8g}</text>")
    for x in _ticks(x_low, x_high, apart=1):  # steps and codes are integers
        at, _ = place(x, y_low)
        middle = f"x='{at:.1f}' y='{HEIGHT - 8}' text-anchor='middle'"
        drawn.append(f"<text {middle}>{x:,.0f}</text>")
    for line in lines:
        color, title = _color(line.run), html.escape(line.title)
        places = [place(x, y) for x, y in line.points]
        if line.as_points:
            drawn += [
                f"<circle class='{color}' cx='{x:.1f}' cy='{y:.1f}' r='3'>"
                f"<title>{title}: {_number(value)}</title></circle>"
                for (x, y), (_, value) in zip(places, line.points, strict=True)
            ]
        else:
            if len(places) == 1:  # a short line, which is not taken for an evaluation
                (x, y) = places[0]
                places = [(x - 5, y), (x + 5, y)]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            drawn.append(
                f"<polyline class='{color}' points='{path}'><title>{title}</title></polyline>"
            )
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>{''.join(drawn)}</svg>"


def _range(values: list[float]) -> tuple[float, float]:
    """Return the ends of an axis, which differ even if all values are the same."""
    low, high = min(values), max(values)
    margin = 0.03 * (high - low) or 0.5 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, apart: float = 0.0) -> list[float]:
    """Return three to six round numbers within an axis, or fewer to keep them `apart`."""
    step = 10.0 ** floor(log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (factor * step) >= 3)
    step = max(step, apart)
    first = floor(low / step) + 1
    return [number * step for number in range(first, floor(high / step) + 1)]


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _color(number: int) -> str:
    """Return the classes by which a run is told from others."""
    return f"run{number % N_COLORS}{STROKES[number // N_COLORS % len(STROKES)]}"


def _name(number: int, run: ReportedRun) -> str:
    swatch = f"<i class='swatch {_color(number)}'></i>"
    return f"<span class='name'>{swatch}{html.escape(run.name)}</span>"


def _legend(runs: Sequence[ReportedRun]) -> str:
    names = "".join(_name(number, run) for number, run in enumerate(runs))
    return f"<p class='legend'>{names}</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """Return an HTML table; the cells must be HTML."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='scroll'><table class='{style}'>{body}</table></div>"
