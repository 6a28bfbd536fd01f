"""Small figures: intervals and agreement as rows of HTML, curves, reliability and bars as inline SVG.

Numbers in, one string out. Rows stretch with the page and keep their letters readable on a phone; an SVG has its own
size. Colours are classes that the page's style sheet fills, so a figure follows the reader's light or dark theme:
``true`` and ``imagined`` for the two worlds. Every mark says its numbers when the pointer rests on it.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence

Mark = tuple[str, float, float, float]
"""A class of the style sheet, a value, and the ends of its interval (equal to the value where there is none)."""
Point = tuple[float, float, float, float]
"""A place on the axis, a rate, and the ends of its interval."""
SERIES = 5
"""Colours of lines in the style sheet; a sixth line begins again."""
SEGMENTS = {
    "fp": "imagined success only",
    "tp": "success in both",
    "fn": "true success only",
    "tn": "failure in both",
}
"""Two verdicts on one episode, in the order of the bar of :func:`draw_agreement`."""
MOST_POINTS = 400
"""A longer curve is thinned evenly: a page shows no more, and a run of many steps would make it heavy."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A rectangle of pixels with a linear map from data onto it.

    Attributes:
      width, height: of the whole figure, pixels.
      x, y: (low, high) of the data; equal ends are widened.
      left, right, top, bottom: margins for labels.
    """

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 40
    right: int = 12
    top: int = 10
    bottom: int = 24

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Returns the pixels of a data point, counted from the upper left corner."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0] or 1.0)
        up = (y - self.y[0]) / (self.y[1] - self.y[0] or 1.0)  # pixels count downwards, data upwards
        inner_width, inner_height = self.width - self.left - self.right, self.height - self.top - self.bottom
        return round(self.left + across * inner_width, 1), round(self.top + (1.0 - up) * inner_height, 1)

    def svg(self, *parts: str, label: str) -> str:
        """Returns the finished figure around ``parts``; ``label`` is what a screen reader says of it."""
        box = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        return f'<svg {box} role="img" aria-label="{html.escape(label, quote=True)}">{"".join(parts)}</svg>'


def draw_intervals(rows: Sequence[tuple[str, Sequence[Mark], str]], low: float = 0.0, high: float = 1.0) -> str:
    """Draws rates, or gains when ``low`` is negative, with their intervals on one axis from ``low`` to ``high``.

    Args:
      rows: (name, marks, what to say at the end).
      low, high: the ends of the axis; every mark lies between them.
    """

    def at(x: float) -> str:
        # Places in percent of the width, so that the figure stretches with the page.
        return f"{100 * (x - low) / (high - low):.1f}%"

    def label(x: float) -> str:
        return f"{x:.0%}" if low >= 0 else f"{100 * x:+.0f}"

    ticks = _ticks(low, high, 5)
    # A line at every tick, behind the marks; the one at zero is darker, for gains are read against it.
    grid = "".join(f'<s class="{"" if x else "zero"}" style="left:{at(x)}"></s>' for x in ticks)
    body = ""
    for name, marks, text in rows:
        track = grid
        for kind, rate, left, right in marks:
            numbers = f"{100 * rate:.1f}" + (f", 95% between {100 * left:.1f} and {100 * right:.1f}" * (left < right))
            reach = f'<i class="reach" style="left:{at(left)};width:{100 * (right - left) / (high - low):.1f}%"></i>'
            track += f'<b class="{kind}" title="{numbers}">{reach}<i class="dot" style="left:{at(rate)}"></i></b>'
        body += _row(name, f'<div class="track">{track}</div>', text)
    axis = "".join(f'<span style="left:{at(x)}">{label(x)}</span>' for x in ticks)
    axis = f'<div class="track axis">{axis}</div>'
    return f'<div class="rows">{body}{_row("", axis, "")}</div>'


def draw_agreement(rows: Sequence[tuple[str, Mapping[str, int], str]]) -> str:
    """Draws two verdicts on the same episodes, a bar for each row (name, counts tp, fp, fn and tn, what to say).

    From the left: imagined only, both, true only, neither. So imagined successes are the first two parts, true ones
    the middle two, and a line above and a line below the bar show both rates.
    """
    body = ""
    for name, counts, text in rows:
        episodes = max(sum(counts[part] for part in SEGMENTS), 1)
        # In this order the two kinds of success overlap in the middle, so both rates are one stretch of the bar.
        fp, tp, fn, _ = share = [100 * counts[part] / episodes for part in SEGMENTS]
        bar = "".join(
            f'<i class="{part}" style="width:{width:.2f}%" title="{words}: {counts[part]} of {episodes}">'
            f"{counts[part] if width >= 5 else ''}</i>"  # a narrower part has no room for its number
            for (part, words), width in zip(SEGMENTS.items(), share, strict=True)
        )
        above = f'<div class="span imagined" style="width:{fp + tp:.2f}%"></div>'
        below = f'<div class="span true" style="margin-left:{fp:.2f}%;width:{tp + fn:.2f}%"></div>'
        body += _row(name, f'{above}<div class="parts">{bar}</div>{below}', text)
    return f'<div class="rows">{body}</div>'


def draw_curve(
    points: Sequence[tuple[float, float | None]], label: str, *, span: tuple[float, float] | None = None
) -> str:
    """Draws one quantity over steps; a value of None breaks the line, and without any value nothing is drawn.

    ``span`` are the ends of the axis; by default they follow the values.
    """
    values = [y for _, y in points if y is not None]
    if not values:
        return ""
    low, high = span or _widen(min(values), max(values))
    # The steps of a curve of one point are widened, or all of it would lie on one spot.
    frame = Frame(262, 120, (points[0][0], max(points[-1][0], points[0][0] + 1)), (low, high), left=44, bottom=20)
    parts = _axes(frame, [points[-1][0]], _ticks(low, high, 3))
    # "M" lifts the pen and "L" draws: after a missing value the pen is lifted.
    path, pen = [], "M"
    for x, y in points[:: -(-len(points) // MOST_POINTS)]:
        if y is not None:
            path.append(f"{pen}{' '.join(map(str, frame.at(x, y)))}")
        pen = "M" if y is None else "L"
    parts.append(f'<path class="line" d="{"".join(path)}">{_hover(f"{label}: last {shorten(values[-1])}")}</path>')
    return frame.svg(*parts, label=label)


def draw_rates(
    lines: Sequence[tuple[str, Sequence[Point]]], label: str, *, log: bool = False, what: str = "true success"
) -> str:
    """Draws success rates against one quantity, a line for each name, and a key above them.

    Args:
      lines: (name, points in ascending order).
      label: what the quantity is.
      log: whether it has a logarithmic axis.
      what: rates of what.
    """
    place = math.log2 if log else float
    xs = sorted({x for _, points in lines for x, *_ in points})
    frame = Frame(520, 240, (place(xs[0]), place(xs[-1])), (0.0, 1.0), left=44, right=28, bottom=40)
    parts, key = _axes(frame, (), (0, 0.5, 1), label), ""
    parts += [_text(*frame.at(place(x), 0), shorten(x), dy=16, anchor="middle") for x in xs]
    for i, (name, points) in enumerate(lines):
        kind = f"series s{i % SERIES}"
        spots = [frame.at(place(x), y) for x, y, *_ in points]
        parts.append(f'<path class="line {kind}" d="M{"L".join(f"{cx} {cy}" for cx, cy in spots)}"/>')
        for (x, y, low, high), (cx, cy) in zip(points, spots, strict=True):
            numbers = f"{name}, {label} {shorten(x)}: {y:.1%}"
            numbers += f", 95% between {low:.1%} and {high:.1%}" * (low < high)
            parts.append(_rule(frame, place(x), low, place(x), high, kind=f"line {kind}"))
            parts.append(f'<circle class="dot {kind}" cx="{cx}" cy="{cy}" r="3.5">{_hover(numbers)}</circle>')
        key += f'<span><i class="{kind}"></i>{html.escape(name)}</span>'
    return f'<p class="key">{key}</p>{frame.svg(*parts, label=f"{what} against {label}")}'


def draw_scatter(points: Sequence[tuple[str, int, Point, Point]], label: str) -> str:
    """Draws one rate against another on two axes from 0 to 1, a dot with both intervals for each point.

    Args:
      points: (name, number of its colour, across, up); of a ``Point`` the rate and the ends of its interval are drawn.
      label: what the rates are, across first.
    """
    frame = Frame(262, 250, (0.0, 1.0), (0.0, 1.0), left=34, bottom=40)
    parts = _axes(frame, (0, 0.5, 1), (0, 0.5, 1), label)
    # On the diagonal the two rates agree.
    parts.append(_rule(frame, 0, 0, 1, 1, kind="ideal"))
    for name, colour, (_, x, left, right), (_, y, low, high) in points:
        kind = f"series s{colour % SERIES}"
        numbers = f"{name}: {x:.1%} across (95% between {left:.1%} and {right:.1%}), {y:.1%} up ({low:.1%}, {high:.1%})"
        parts += [_rule(frame, left, y, right, y, f"line {kind}"), _rule(frame, x, low, x, high, f"line {kind}")]
        cx, cy = frame.at(x, y)
        parts.append(f'<circle class="dot {kind}" cx="{cx}" cy="{cy}" r="4">{_hover(numbers)}</circle>')
    return frame.svg(*parts, label=label)


def draw_reliability(tables: Mapping[str, Mapping[str, Sequence[float]]], threshold: float | None) -> str:
    """Draws the observed frequency of success against the predicted probability; larger dots stand for more frames.

    Args:
      tables: class of the marks -> bins: ``predicted``, ``observed`` and ``count`` of each.
      threshold: the probability from which on a frame counts as success, drawn as a line.
    """
    frame = Frame(300, 280, (0.0, 1.0), (0.0, 1.0), left=44, bottom=40)
    parts = _axes(frame, (0, 0.5, 1), (0, 0.5, 1), "predicted probability")
    # On the diagonal a probability means what it says.
    parts.append(_rule(frame, 0, 0, 1, 1, kind="ideal"))
    if threshold is not None:
        parts.append(_rule(frame, threshold, 0, threshold, 1, kind="threshold"))
    for kind, table in tables.items():
        bins = [row for row in zip(table["predicted"], table["observed"], table["count"], strict=True) if row[2]]
        places = [" ".join(map(str, frame.at(x, y))) for x, y, _ in bins]
        parts.append(f'<path class="line {kind}" d="{"M" * bool(bins)}{"L".join(places)}"/>')
        for x, y, count in bins:
            # Frames without success outnumber the others by far: a logarithm keeps every dot in sight.
            radius = 2 + 5 * math.log1p(count) / math.log1p(max(table["count"]))
            numbers = _hover(f"{kind}: predicted {x:.2f}, observed {y:.2f}, {count} frames")
            (cx, cy) = frame.at(x, y)
            parts.append(f'<circle class="{kind} dot" cx="{cx}" cy="{cy}" r="{radius:.1f}">{numbers}</circle>')
    return frame.svg(*parts, label="reliability of the success classifier")


def draw_histogram(values: Sequence[int], label: str) -> str:
    """Draws how often each integer occurs, from 0 to the largest."""
    counts = [0] * (max(values) + 1)
    for value in values:
        counts[value] += 1
    frame = Frame(380, 180, (-0.5, len(counts) - 0.5), (0.0, max(counts)), left=44, bottom=40)
    parts = _axes(frame, _ticks(0, len(counts) - 1, 6), _ticks(0, max(counts), 3), label)
    for x, count in enumerate(counts):
        # A bar of 0.84 leaves a gap to its neighbours, by which single integers can be told apart.
        left, top = frame.at(x - 0.42, count)
        right, bottom = frame.at(x + 0.42, 0)
        size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
        parts.append(f'<rect class="bar" x="{left}" y="{top}" {size}>{_hover(f"{x}: {count}")}</rect>')
    return frame.svg(*parts, label=label)


def shorten(value: float) -> str:
    """Returns a number in few characters: 1200000 as 1.2M, 0.000031 as 3.1e-05."""
    # Thousands are shortened from 10,000 on only: 1234 is as short as 1.23k and says more.
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def _row(name: str, drawn: str, text: str) -> str:
    name, text = (f'<div class="{kind}">{html.escape(words)}</div>' for kind, words in (("name", name), ("said", text)))
    return f'{name}{text}<div class="drawn">{drawn}</div>'


def _axes(frame: Frame, xs: Sequence[float], ys: Sequence[float], label: str = "") -> list[str]:
    # Rules along the values only: a reader follows heights across, and steps by the labels.
    (left, right), low = frame.x, frame.y[0]
    parts = [_rule(frame, left, y, right, y) for y in ys]
    parts += [_text(frame.left - 8, frame.at(left, y)[1], shorten(y), dy=4, anchor="end") for y in ys]
    parts += [_text(*frame.at(x, low), shorten(x), dy=16, anchor="middle") for x in xs]
    return [*parts, _text(*frame.at((left + right) / 2, low), label, dy=34, anchor="middle")]


def _rule(frame: Frame, x1: float, y1: float, x2: float, y2: float, kind: str = "rule") -> str:
    (a, b), (c, d) = frame.at(x1, y1), frame.at(x2, y2)
    return f'<line class="{kind}" x1="{a}" y1="{b}" x2="{c}" y2="{d}"/>'


def _text(x: float, y: float, text: str, dy: int = 0, anchor: str = "start", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x}" y="{y + dy}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _hover(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _widen(low: float, high: float) -> tuple[float, float]:
    """Returns limits with a little air above and below, and with some height when all values are equal."""
    air = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return low - air, high + air


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Returns round numbers between ``low`` and ``high``, roughly ``about`` of them."""
    raw = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    # The slack of 1e-9 is for decimal steps that binary numbers miss by a hair, such as 0.1 * 3.
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
