"""A loss curve as lines of text."""

import math
import sys
from collections.abc import Mapping, Sequence

BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bits of the two columns of dots, from the top


def plot(
    history: Sequence[Mapping[str, float]], *, width: int = 60, height: int = 12, unicode: bool | None = None
) -> str:
    """Training and evaluation loss over steps, as lines of text; "" where there is nothing to draw.

    Args:
      history: records with "step" and "loss" or "eval/loss"; those that are not finite are left out.
      width, height: of the drawing, in characters.
      unicode: draw training loss in dots of braille, else in full stops; by default where stdout can show them.
    """
    if unicode is None:
        unicode = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
    train, evaluation = _points(history, "loss"), _points(history, "eval/loss")
    if len({step for step, _ in train + evaluation}) < 2:
        return ""
    train = _means(train, 2 * width)
    steps = [step for step, _ in train + evaluation]
    low, high = _range([loss for _, loss in train + evaluation])
    across, down = (2, 4) if unicode else (1, 1)

    def place(step: float, loss: float) -> tuple[int, int]:
        x = (step - min(steps)) / (max(steps) - min(steps)) * (width * across - 1)
        y = (high - min(max(loss, low), high)) / (high - low) * (height * down - 1)
        return round(x), round(y)

    dots = set()
    for (x0, y0), (x1, y1) in _pairs([place(*point) for point in train]):
        n = max(abs(x1 - x0), abs(y1 - y0), 1)
        dots |= {(round(x0 + (x1 - x0) * i / n), round(y0 + (y1 - y0) * i / n)) for i in range(n + 1)}
    canvas = [[" "] * width for _ in range(height)]
    for row in range(height):
        for column in range(width):
            bits = [
                BRAILLE[i][j] if unicode else 1
                for i in range(across)
                for j in range(down)
                if (column * across + i, row * down + j) in dots
            ]
            if bits:
                canvas[row][column] = chr(0x2800 + sum(bits)) if unicode else "."
    for x, y in [place(*point) for point in evaluation]:
        canvas[y // down][x // across] = "o"
    return _with_axes(canvas, (low, high), (min(steps), max(steps)), bool(train), bool(evaluation), unicode)


def _points(history: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(r["step"], r[name]) for r in history if name in r and math.isfinite(r[name])]


def _means(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours: a long noisy curve would fill the drawing."""
    size = -(-len(points) // most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _pairs(places: list[tuple[int, int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return list(zip(places, places[1:], strict=False)) or [(place, place) for place in places]


def _range(losses: list[float]) -> tuple[float, float]:
    """From the least to the greatest loss, so that a first spike does not flatten the rest: at most the 98th of 100."""
    ordered = sorted(losses)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 50:
        high = min(high, ordered[int(0.98 * len(ordered))] + (ordered[int(0.98 * len(ordered))] - low) * 0.5)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _with_axes(
    canvas: list[list[str]],
    losses: tuple[float, float],
    steps: tuple[float, float],
    has_train: bool,
    has_evaluation: bool,
    unicode: bool,
) -> str:
    side, corner, bottom = ("│", "└", "─") if unicode else ("|", "+", "-")
    height, width = len(canvas), len(canvas[0])
    low, high = losses
    labels = {round(i * (height - 1) / 3): high - (high - low) * i / 3 for i in range(4)}
    digits = max(0, 2 - math.floor(math.log10(high - low)))
    pad = max(len(f"{label:.{digits}f}") for label in labels.values())
    lines = [
        (f"{labels[row]:.{digits}f}" if row in labels else "").rjust(pad) + f" {side}" + "".join(canvas[row]).rstrip()
        for row in range(height)
    ]
    first, last = f"{steps[0]:.0f}", f"step {steps[1]:.0f}"
    drawn = {"⠤⠤ training" if unicode else ".. training": has_train, "o evaluation": has_evaluation}
    title = " " * (pad + 2) + "loss:  " + "   ".join(name for name, there in drawn.items() if there)
    axis = " " * pad + f" {corner}" + bottom * width
    return "\n".join([title, *lines, axis, " " * (pad + 2) + first + " " + last.rjust(width - len(first) - 1)])
