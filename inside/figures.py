"""Small figures as SVG, for learn.ipynb: it needs no plotting package. Curves, and maps of numbers as shades."""
import base64
import math
import struct
import zlib
from html import escape

import torch

COLOURS = "#0b62ad", "#b8540a", "#3d7a4a", "#8a4f9e", "#6b6b6b"      # told apart by colour-blind people in this order
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 620, 300, 64, 34, 150, 46


class Figure:
    """What a notebook shows: an SVG. `text` is its source."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self):
        return "Figure"

    def _repr_svg_(self):
        return self.text


def ticks(low: float, high: float, log: bool) -> list[float]:
    """About five round numbers from low to high."""
    if log:
        return [10.0**e for e in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= 6)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def axes(title, xlabel, ylabel, xticks, yticks, place_x, place_y, width=WIDTH - LEFT - RIGHT, height=HEIGHT - TOP - BOTTOM):
    """Frame, ticks and words: the start of every figure."""
    bottom, line = TOP + height, 'stroke="#dcd9d2"'
    total = f"{LEFT + width + RIGHT} {bottom + BOTTOM}"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total}" width="{total.split()[0]}" font-size="12" '
             'font-family="Helvetica, Arial, sans-serif" fill="#1b1d21"><rect width="100%" height="100%" fill="#ffffff"/>',
             f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
             f'<text x="{LEFT + width / 2}" y="{bottom + 38}" text-anchor="middle">{escape(xlabel)}</text>',
             f'<text transform="translate(16 {TOP + height / 2}) rotate(-90)" text-anchor="middle">{escape(ylabel)}</text>']
    for value in xticks:
        x = place_x(value)
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" {line}/>'
                     f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:,g}</text>')
    for value in yticks:
        y = place_y(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + width}" {line}/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,g}</text>')
    return parts


def scale(low: float, high: float, log: bool, start: float, size: float):
    """-> where a number from low to high stands on an axis of that many pixels, and the ticks."""
    high, f = high if high > low else low + 1, math.log10 if log else float
    return lambda v: start + size * (f(v) - f(low)) / (f(high) - f(low)), ticks(low, high, log)


def curves(series: dict, title: str, xlabel: str, ylabel: str, logx=False, logy=False, zero=False, dots=False) -> Figure:
    """series: {name: (x, y)}, two lists of numbers each; those that are not finite are left out. zero: the y axis begins at 0."""
    points = {name: [(float(x), float(y)) for x, y in zip(*xy, strict=True) if math.isfinite(y)] for name, xy in series.items()}
    xs, ys = ([p[i] for one in points.values() for p in one] for i in (0, 1))
    place_x, xticks = scale(min(xs), max(xs), logx, LEFT, WIDTH - LEFT - RIGHT)
    place_y, yticks = scale(0.0 if zero else min(ys), max(ys), logy, HEIGHT - BOTTOM, -(HEIGHT - TOP - BOTTOM))
    parts = axes(title, xlabel, ylabel, xticks, yticks, place_x, place_y)
    for i, (name, one) in enumerate(points.items()):
        colour, way = COLOURS[i % len(COLOURS)], [(place_x(x), place_y(y)) for x, y in one]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in way)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{line}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in way if dots]
        y = TOP + 14 + 18 * i
        parts.append(f'<path d="M{WIDTH - RIGHT + 10} {y - 4}h18" stroke="{colour}" stroke-width="3"/>'
                     f'<text x="{WIDTH - RIGHT + 34}" y="{y}">{escape(name)}</text>')
    return Figure("\n".join([*parts, "</svg>"]))


def png(shades: torch.Tensor, colour: str) -> str:
    """shades [height, width] from 0 (white) to 1 (the colour) as a PNG in a data address."""
    full = torch.tensor([int(colour[i:i + 2], 16) for i in (1, 3, 5)])
    pixels = (255 + shades.double().clamp(0, 1)[..., None] * (full - 255)).round().to(torch.uint8)
    raw = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in pixels)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", shades.shape[1], shades.shape[0], 8, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(whole).decode()


def heat(values: torch.Tensor, title: str, xlabel: str, ylabel: str, unit: str, most: float | None = None, root=False, cell=None,
         colour=COLOURS[0]) -> Figure:
    """values [rows, columns], at least 0, as shades; row 0 on top. most: the number of the deepest shade (None: the largest);
    root: shades grow with the square root, so that small numbers show; cell: (width, height) of one, in pixels."""
    rows, columns = values.shape
    most = most or values.max().item() or 1.0
    shades = (values / most).clamp(0, 1)
    wide, high = cell or (min(400 / columns, 24), min(300 / rows, 24))
    width, height = wide * columns, high * rows

    def every(n):
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if n / s <= 8)
        return range(0, n, step)
    parts = axes(title, xlabel, ylabel, every(columns), every(rows), lambda v: LEFT + wide * (v + 0.5),
                 lambda v: TOP + high * (v + 0.5), width, height)
    parts.append(f'<image x="{LEFT}" y="{TOP}" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none" '
                 f'style="image-rendering:pixelated" href="{png(shades.sqrt() if root else shades, colour)}"/>'
                 f'<rect x="{LEFT}" y="{TOP}" width="{width:.1f}" height="{height:.1f}" fill="none" stroke="#8a97a5"/>')
    x = LEFT + width + 16
    ramp = png((torch.arange(32, 0, -1) / 32)[:, None] ** (0.5 if root else 1), colour)
    parts.append(f'<image x="{x}" y="{TOP + 16}" width="14" height="100" preserveAspectRatio="none" href="{ramp}"/>'
                 f'<text x="{x}" y="{TOP + 8}">{escape(unit)}</text><text x="{x + 20}" y="{TOP + 26}">{most:.3g}</text>'
                 f'<text x="{x + 20}" y="{TOP + 118}">0</text>')
    return Figure("\n".join([*parts, "</svg>"]))
