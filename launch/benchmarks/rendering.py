"""Results of a benchmark as lines, Markdown and a page with a plot; nothing is measured here."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from wovr_jax.report import figures

HEAD = ("part", "batch", "ms", "low", "high", "frames/s", "TFLOP", "TFLOP/s", "share", "memory", "by", "compile s")
WIDTHS = (10, 6, 9, 9, 9, 9, 9, 9, 6, 9, 8, 9)


def head_line() -> str:
    """Returns the titles of the columns of :func:`part_line`."""
    return _line(HEAD)


def part_line(row: Mapping[str, Any]) -> str:
    """Returns a measured part, or why it was not measured, as a line of the table."""
    if "error" in row:
        return f"{row['part']:>10s} {_batch(row):>6s}  not measured: {row['error']}"
    return _line(_cells(row))


def pair_line(row: Mapping[str, Any]) -> str:
    """Returns a pair of settings as a line: the second's time by the first's, and both medians."""
    a, b = row["values"]
    what = f"{row['part']} {_batch(row)}: {row['setting']} {b} by {a}"
    if "error" in row:
        return f"{what}: not measured: {row['error']}"
    ratio, (first, second) = row["ratio"], (spent["seconds"]["median"] for spent in row["rows"])
    numbers = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    return f"{what}: {numbers}, {1e3 * second:.4g} ms by {1e3 * first:.4g} ms"


def markdown(results: Mapping[str, Any]) -> str:
    """Returns all results as Markdown that a page of the documentation can take in."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"`{results['title']}`",
        "",
        f"{results['device']}, load {results['load']:.1f} at the start; {versions}; {results['when']}.",
        f"Frozen weights in {_weights(results)}; {results.get('seconds', 0):.0f} s in all.",
        "",
    ]
    if results["matrix"]:
        lines += ["| matrix products | TFLOP/s | at a side of |", "|---|---|---|"]
        lines += [
            f"| {dtype} | {_number(of['rate'] / 1e12)} | {of['size']} |" for dtype, of in results["matrix"].items()
        ]
        lines.append("")
    if results["parts"]:
        lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
        lines += [_part_row(row) for row in results["parts"]] + [""]
    if results["pairs"]:
        lines += ["| part | batch | setting | ratio of times | low | high |", "|---|---|---|---|---|---|"]
        lines += [_pair_row(row) for row in results["pairs"]] + [""]
    if results.get("beside"):
        lines += ["| beside | batch | ms | low | high |", "|---|---|---|---|---|"]
        lines += [_beside_row(row) for row in results["beside"]] + [""]
    return "\n".join([*lines, *(f"- {note}" for note in results["notes"])]).rstrip() + "\n"


def page(results: Mapping[str, Any]) -> str:
    """Returns a page of its own with the plot: each part's share of the measured matrix rate, lowest and highest."""
    style = pathlib.Path(figures.__file__).with_name("page.css").read_text(encoding="utf-8")
    rows = []
    for row in results["parts"]:
        if row.get("share"):
            low, high = (row["share"] * row["seconds"]["median"] / row["seconds"][end] for end in ("high", "low"))
            said = f"{_number(row['rate'] / 1e12)} TFLOP/s, {_number(1e3 * row['seconds']['median'])} ms"
            rows.append((f"{row['part']} {_batch(row)}", [("true", row["share"], low, high)], said))
    # A short program on a busy machine can beat the matrix products that were timed before it.
    top = max([1.0, *(marks[0][3] for _, marks, _ in rows)])
    drawn = figures.draw_intervals(rows, 0.0, top) if rows else "<p>Nothing was measured.</p>"
    title = html.escape(f"{results['title']}: share of the measured matrix rate")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<main><h1>{title}</h1><p>{html.escape(results['device'])}</p>{drawn}</main></html>\n"
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = row["seconds"]
    times = (_number(1e3 * seconds[name]) for name in ("median", "low", "high"))
    share = f"{row['share']:.0%}" if row["share"] is not None else "-"
    frames = _number(row["frames_per_second"]) if row["frames_per_second"] else "-"
    work = (_number(row["flops"] / 1e12), _number(row["rate"] / 1e12))
    memory = (_size(row["bytes"]), row["bytes_from"])
    return (row["part"], _batch(row), *times, frames, *work, share, *memory, f"{row['compile_s']:.1f}")


def _line(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{width}s}" for cell, width in zip(cells, WIDTHS, strict=True))


def _part_row(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"| {row['part']} | {_batch(row)} | not measured: {_escape(row['error'])} {'| ' * (len(HEAD) - 2)}"
    return f"| {' | '.join(_cells(row))} |"


def _pair_row(row: Mapping[str, Any]) -> str:
    a, b = row["values"]
    begin = f"| {row['part']} | {_batch(row)} | {row['setting']}: {b} by {a} |"
    if "error" in row:
        return f"{begin} not measured: {_escape(row['error'])} | | |"
    numbers = " | ".join(f"{row['ratio'][name]:.3f}" for name in ("median", "low", "high"))
    return f"{begin} {numbers} |"


def _beside_row(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"| {row['part']} | {row['batch']} | not measured: {_escape(row['error'])} | | |"
    times = " | ".join(_number(1e3 * row["seconds"][name]) for name in ("median", "low", "high"))
    return f"| {row['part']} | {row['batch']} | {times} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _batch(row: Mapping[str, Any]) -> str:
    return "-" if row["batch"] is None else str(row["batch"])


def _weights(results: Mapping[str, Any]) -> str:
    return "their compute dtype" if results["frozen_weights"] == "compute" else "float32"


def _number(value: float) -> str:
    """Returns three digits, without an exponent where that is readable."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**30:.2f}GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f}MiB"
