#!/usr/bin/env python3
"""Draws what runs learned by the clock, as an SVG picture. Needs nothing but Python.

    dev/bench/curves.py --out doc/clock.svg dense='runs/clock/dense-seed*' mixture='runs/clock/mixture-seed*'
    dev/bench/curves.py --out doc/clock.svg --title "TinyStories, width 64" fast=runs/contest/fast

Each argument is NAME=FOLDERS, where * stands for anything: runs of the same kind, one a seed, each with a log.jsonl of
train_moe. A curve is the mean of the seeds' bits per byte over the seconds of their training steps, evaluations and
checkpoints not counted; the band around it goes from the lowest seed to the highest. Between evaluations curves are
straight, and a mean ends where the first of its seeds ends. The picture is readable on light and on dark paper.
"""
import argparse
import glob
import json
import math
import os
import sys
from xml.sax.saxutils import escape

LEFT, TOP, WIDTH, HEIGHT = 64, 40, 560, 320
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # apart for all kinds of eyes (Okabe and Ito)


def read_curve(folder):
    """The points (seconds, bits per byte) of a run's evaluations, as far as its log goes."""
    points, seconds, step = [], 0.0, 0
    path = os.path.join(folder, "log.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: cannot be read: {error}")
    for line in lines:
        if line["type"] == "step":  # ms is the mean of the steps since the line before; null: the clock stood still
            seconds += (line["step"] - step) * (line["ms"] or 0) / 1000
            step = line["step"]
        elif line["type"] == "eval":
            points.append((seconds, line["val_bpb"]))
    if len(points) < 2:
        sys.exit(f"{path}: a curve needs two evaluations, and there are {len(points)}; --eval-every makes more")
    return points


def value(curve, t):
    """The curve at t seconds: straight between its points."""
    for (t0, y0), (t1, y1) in zip(curve, curve[1:]):
        if t0 <= t <= t1:
            return y0 + (y1 - y0) * ((t - t0) / (t1 - t0) if t1 > t0 else 1)
    return curve[0][1] if t < curve[0][0] else curve[-1][1]


def merge(curves):
    """Rows (seconds, mean, lowest, highest) of several curves, where all of them are known."""
    first, last = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    if first > last:
        sys.exit("the seeds of a curve have no time in common")
    times = sorted({t for c in curves for t, _ in c if first <= t <= last} | {first, last})
    rows = []
    for t in times:
        values = [value(c, t) for c in curves]
        rows.append((t, sum(values) / len(values), min(values), max(values)))
    return rows


def ticks(low, high, about):
    """Round numbers from low to high, some `about` of them."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    size = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [round(i * size, 10) for i in range(first, math.floor(high / size + 1e-9) + 1)]


def draw(groups, title):
    """The picture. groups: (name, rows) pairs."""
    t_most = max(rows[-1][0] for _, rows in groups)
    unit, per = ("minutes", 60) if t_most >= 300 else ("seconds", 1)
    right = t_most / per
    low, high = min(r[2] for _, rows in groups for r in rows), max(r[3] for _, rows in groups for r in rows)

    # The first evaluations are far above what follows; the picture shows the part in which the curves differ.
    ends = max(rows[-1][3] for _, rows in groups)
    high = min(high, low + 4 * (ends - low) if ends - low > 0.1 * (high - low) else low + 0.6 * (high - low))
    pad = 0.04 * (high - low) or 0.01
    low, high = low - pad, high + pad

    def x(t):
        return LEFT + WIDTH * t / per / right

    def y(v):
        return TOP + HEIGHT * (high - v) / (high - low)

    def path(points):
        return "M" + "L".join(f"{x(t):.1f} {y(v):.1f}" for t, v in points)

    total = HEIGHT + TOP + 60
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {total}" '
           f'width="{LEFT + WIDTH + 20}" height="{total}" font-family="sans-serif" font-size="13" role="img">',
           f"<title>{escape(title)}</title>",
           "<style>text{fill:#333}.axis{stroke:#333;fill:none}.grid{stroke:#8886;fill:none}"
           "@media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#ddd}}</style>",
           f'<clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/></clipPath>',
           f'<text x="{LEFT + WIDTH / 2}" y="20" text-anchor="middle" font-size="15">{escape(title)}</text>']
    for v in ticks(low, high, 6):
        out.append(f'<path class="grid" d="M{LEFT} {y(v):.1f}H{LEFT + WIDTH}"/>'
                   f'<text x="{LEFT - 7}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    for t in ticks(0, right, 7):
        out.append(f'<path class="grid" d="M{x(t * per):.1f} {TOP}V{TOP + HEIGHT}"/>'
                   f'<text x="{x(t * per):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{t:g}</text>')
    out.append(f'<path class="axis" d="M{LEFT} {TOP}V{TOP + HEIGHT}H{LEFT + WIDTH}"/>')
    out.append(f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 40}" text-anchor="middle">time of the training steps, {unit}</text>')
    out.append(f'<text transform="translate(16 {TOP + HEIGHT / 2}) rotate(-90)" text-anchor="middle">validation, bits per byte</text>')
    legend = LEFT + WIDTH - 60 - 8 * max(len(f"{name}, {rows[-1][1]:.4f}") for name, rows in groups)
    for i, (name, rows) in enumerate(groups):
        color = COLORS[i % len(COLORS)]
        band = [(t, top) for t, _, _, top in rows] + [(t, bottom) for t, _, bottom, _ in reversed(rows)]
        out.append(f'<g clip-path="url(#plot)"><path fill="{color}" fill-opacity="0.2" d="{path(band)}Z"/>'
                   f'<path fill="none" stroke="{color}" stroke-width="2" d="{path([r[:2] for r in rows])}"/></g>')
        at = TOP + 18 + 20 * i
        out.append(f'<path stroke="{color}" stroke-width="2" d="M{legend} {at - 4}h24"/>'
                   f'<text x="{legend + 30}" y="{at}">{escape(name)}, {rows[-1][1]:.4f}</text>')
    return "\n".join(out) + "\n</svg>\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDERS")
    parser.add_argument("--out", required=True, help="the SVG file")
    parser.add_argument("--title", default="Learned by the clock")
    c = parser.parse_args()
    folders = []
    for word in c.runs:
        name, is_named, pattern = word.partition("=")
        found = sorted(glob.glob(pattern)) if is_named else []
        if not found:
            sys.exit(f"{word}: {'there is no such folder' if is_named else 'expected NAME=FOLDERS'}")
        folders.append((name, found))
    picture = draw([(f"{name}" + (f" ({len(f)} seeds)" if len(f) > 1 else ""), merge([read_curve(d) for d in f]))
                    for name, f in folders], c.title)
    with open(c.out, "w", encoding="utf-8") as file:
        file.write(picture)


if __name__ == "__main__":
    main()
