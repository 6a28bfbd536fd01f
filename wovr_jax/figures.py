"""Small figures as inline SVG: intervals, curves, reliability, bars.

Numbers in, one ``<svg>`` string out. Colours are classes that the page's style sheet fills, so a figure follows the
reader's light or dark theme: ``true`` and ``imagined`` for the two worlds, ``ink`` and ``rule`` for the rest. Every
mark carries a ``<title>``, which browsers show on hover.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

MOST_POINTS = 400
"""A longer curve is thinned evenly: a page shows no more."""


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
        """Pixels of a data point."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0] or 1.0)
        up = (y - self.y[0]) / (self.y[1] - self.y[0] or 1.0)
        inner_width, inner_height = self.width - self.left - self.right, self.height - self.top - self.bottom
        return round(self.left + across * inner_width, 1), round(self.top + (1.0 - up) * inner_height, 1)

    def svg(self, *parts: str, label: str) -> str:
        """The finished figure around ``parts``."""
        box = f'viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}"'
        return f'<svg {box} role="img" aria-label="{html.escape(label, quote=True)}">{"".join(parts)}</svg>'


def success(rows: Sequence[tuple[str, dict | None, dict | None, float | None]]) -> str:
    """Success rates of policies, one row each, with their intervals.

    Args:
      rows: (name, true, greedy, imagined) where true and greedy are dictionaries with rate, low and high
        in [0, 1], or None, and imagined is a rate or None.
    """
    room = 12 + int(7.8 * max(len(name) for name, *_ in rows))
    frame = Frame(720, 44 * len(rows) + 34, (0.0, 1.0), (len(rows), 0.0), left=room, right=70, top=4, bottom=26)
    parts = [_rule(frame, x, 0, x, len(rows)) for x in (0, 0.25, 0.5, 0.75, 1)]
    parts += [_text(*frame.at(x, len(rows)), f"{x:.0%}", dy=17, anchor="middle") for x in (0, 0.25, 0.5, 0.75, 1)]
    for row, (name, true, greedy, imagined) in enumerate(rows):
        parts.append(_text(room - 12, frame.at(0, row + 0.5)[1], name, dy=5, anchor="end", kind="name"))
        if greedy:
            parts.append(_interval(frame, row + 0.72, greedy, f"{name}, greedy", "true hollow", radius=4))
        if true:
            parts.append(_interval(frame, row + 0.45, true, f"{name}, sampled", "true", radius=6))
            x, y = frame.at(1, row + 0.45)
            parts.append(_text(x + 14, y, f"{true['rate']:.1%}", dy=5, kind="name"))
        if imagined is not None:
            x, y = frame.at(imagined, row + 0.45)
            shape = f"M{x} {y - 6}l6 6l-6 6l-6 -6z"
            parts.append(f'<path class="imagined" d="{shape}">{_hover(f"{name}, imagined: {imagined:.1%}")}</path>')
    return frame.svg(*parts, label="success rates with 95% intervals")


def curve(points: Sequence[tuple[float, float | None]], label: str) -> str:
    """One quantity over steps; a value of None breaks the line."""
    values = [y for _, y in points if y is not None]
    if not values:
        return ""
    low, high = _widened(min(values), max(values))
    frame = Frame(230, 120, (points[0][0], max(points[-1][0], points[0][0] + 1)), (low, high), left=44, bottom=20)
    ticks = _ticks(low, high, 3)
    parts = [_rule(frame, frame.x[0], y, frame.x[1], y) for y in ticks]
    parts += [_text(frame.left - 6, frame.at(0, y)[1], short(y), dy=4, anchor="end") for y in ticks]
    parts += [_text(*frame.at(frame.x[1], low), short(points[-1][0]), dy=16, anchor="end")]
    thinned = points[:: -(-len(points) // MOST_POINTS)]
    path, pen = [], "M"
    for x, y in thinned:
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{' '.join(map(str, frame.at(x, y)))}")
        pen = "L"
    parts.append(f'<path class="line" d="{"".join(path)}">{_hover(f"{label}: last {short(values[-1])}")}</path>')
    return frame.svg(*parts, label=label)


def reliability(bins: Sequence[dict], threshold: float | None) -> str:
    """Observed frequency of success against predicted probability; area of a dot: how many frames.

    Args:
      bins: dictionaries with mean_prob, frequency, count (and low, high).
      threshold: the probability from which on a frame counts as success, drawn as a line.
    """
    frame = Frame(320, 300, (0.0, 1.0), (0.0, 1.0), left=44, bottom=40)
    parts = [_rule(frame, x, 0, x, 1) for x in (0, 0.5, 1)] + [_rule(frame, 0, y, 1, y) for y in (0, 0.5, 1)]
    parts += [_text(*frame.at(x, 0), f"{x:g}", dy=16, anchor="middle") for x in (0, 0.5, 1)]
    parts += [_text(frame.left - 8, frame.at(0, y)[1], f"{y:g}", dy=4, anchor="end") for y in (0, 0.5, 1)]
    parts.append(_text(*frame.at(0.5, 0), "predicted probability", dy=34, anchor="middle"))
    parts.append(_rule(frame, 0, 0, 1, 1, kind="ideal"))
    if threshold is not None:
        parts.append(_rule(frame, threshold, 0, threshold, 1, kind="threshold"))
    filled = [one for one in bins if one["count"]]
    if not filled:
        return frame.svg(*parts, label="reliability of the success classifier")
    most = max(one["count"] for one in filled)
    places = [frame.at(one["mean_prob"], one["frequency"]) for one in filled]
    parts.append(f'<path class="line" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>')
    for one, (x, y) in zip(filled, places, strict=True):
        # Frames without success outnumber the others by far: a logarithm keeps every dot in sight.
        radius = 2.5 + 6.5 * math.log1p(one["count"]) / math.log1p(most)
        said = f"predicted {one['mean_prob']:.2f}, observed {one['frequency']:.2f}, {one['count']} frames"
        parts.append(f'<circle class="imagined dot" cx="{x}" cy="{y}" r="{radius:.1f}">{_hover(said)}</circle>')
    return frame.svg(*parts, label="reliability of the success classifier")


def histogram(values: Sequence[int], label: str) -> str:
    """How often each integer occurs, from 0 to the largest."""
    counts = [0] * (max(values) + 1)
    for value in values:
        counts[value] += 1
    frame = Frame(420, 200, (-0.5, len(counts) - 0.5), (0.0, max(counts)), left=44, bottom=40)
    ticks = _ticks(0, max(counts), 3)
    parts = [_rule(frame, -0.5, y, len(counts) - 0.5, y) for y in ticks]
    parts += [_text(frame.left - 8, frame.at(0, y)[1], short(y), dy=4, anchor="end") for y in ticks]
    for x, count in enumerate(counts):
        left, top = frame.at(x - 0.42, count)
        right, bottom = frame.at(x + 0.42, 0)
        size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
        parts.append(f'<rect class="bar" x="{left}" y="{top}" {size}>{_hover(f"{x}: {count}")}</rect>')
    parts += [_text(*frame.at(x, 0), f"{x:g}", dy=16, anchor="middle") for x in _ticks(0, len(counts) - 1, 6)]
    parts.append(_text(*frame.at((len(counts) - 1) / 2, 0), label, dy=34, anchor="middle"))
    return frame.svg(*parts, label=label)


def short(value: float) -> str:
    """A number in few characters: 1200000 as 1.2M, 0.000031 as 3.1e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def _interval(frame: Frame, row: float, rate: dict, name: str, kind: str, radius: int) -> str:
    (low, y), (high, _), (x, _) = (frame.at(rate[end], row) for end in ("low", "high", "rate"))
    said = f"{name}: {rate['rate']:.1%}, 95% between {rate['low']:.1%} and {rate['high']:.1%}"
    if "n" in rate:
        said += f", {rate['successes']} of {rate['n']}"
    bar = f'<line x1="{low}" y1="{y}" x2="{high}" y2="{y}"/>'
    return f'<g class="{kind}">{_hover(said)}{bar}<circle cx="{x}" cy="{y}" r="{radius}"/></g>'


def _rule(frame: Frame, x1: float, y1: float, x2: float, y2: float, kind: str = "rule") -> str:
    (a, b), (c, d) = frame.at(x1, y1), frame.at(x2, y2)
    return f'<line class="{kind}" x1="{a}" y1="{b}" x2="{c}" y2="{d}"/>'


def _text(x: float, y: float, text: str, dy: int = 0, anchor: str = "start", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x}" y="{y + dy}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _hover(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _widened(low: float, high: float) -> tuple[float, float]:
    """A little air above and below; something to see when all values are equal."""
    air = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return low - air, high + air


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between ``low`` and ``high``, roughly ``about`` of them."""
    raw = (high - low) / about or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
