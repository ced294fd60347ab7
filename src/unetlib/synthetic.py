"""Studio-car scenes with exact masks, in the layout of Kaggle's Carvana Image Masking Challenge.

No photograph is involved: a car is a side profile swept into a mesh, its paintwork a flat drawing wrapped round the
mesh, and picture and mask come from the same projected triangles. The same seed, car and view give the same scene at
any size. The scenes serve tests, first steps and documentation; they are no substitute for photographs.

The file reads in the order in which a scene is made: what the car is (`_Car`), its flat drawing (`_Drawing`), its
surfaces (`_surfaces`), the camera and the studio (`_Camera`, `_Studio`), the painting (`_paint_studio`,
`_paint_car`), the files (`write_carvana`).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import operator
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

__all__ = ["VIEWS", "car_name", "render_scene", "write_carvana"]

Array = NDArray[Any]
Color = tuple[int, int, int, int]  # red, green, blue and gloss, the reflectance at normal incidence; 0 to 255

logger = logging.getLogger("unetlib")

VIEWS = 16  # of each car, an even turn between them: 1 the front, 5 and 13 the sides, 9 the rear

# ---- the car -------------------------------------------------------------------------------------------------------

# How often; length, width and height in metres; the share of its width that the roof keeps; the top line from the
# front lip to the rear lip, x in half lengths (-1 is the front), z in heights.
_BODIES: dict[str, tuple[int, tuple[float, float, float], float, list[tuple[float, float]]]] = {
    "sedan": (9, (4.75, 1.84, 1.45), 0.68, [
        (-1, 0.2), (-1, 0.36), (-0.985, 0.47), (-0.93, 0.54), (-0.42, 0.68), (-0.1, 0.97), (0.08, 1), (0.3, 0.985),
        (0.66, 0.76), (0.94, 0.73), (0.985, 0.62), (1, 0.4), (0.985, 0.22)]),
    "hatchback": (4, (4.15, 1.76, 1.5), 0.7, [
        (-1, 0.2), (-1, 0.36), (-0.98, 0.47), (-0.91, 0.55), (-0.5, 0.67), (-0.12, 0.965), (0.1, 1), (0.74, 0.95),
        (0.93, 0.68), (0.975, 0.6), (1, 0.4), (0.985, 0.22)]),
    "wagon": (2, (4.8, 1.84, 1.48), 0.7, [
        (-1, 0.2), (-1, 0.36), (-0.985, 0.47), (-0.93, 0.54), (-0.44, 0.67), (-0.12, 0.965), (0.08, 1), (0.72, 0.96),
        (0.93, 0.69), (0.975, 0.62), (1, 0.4), (0.985, 0.22)]),
    "suv": (7, (4.7, 1.9, 1.76), 0.72, [
        (-1, 0.22), (-1, 0.4), (-0.99, 0.52), (-0.94, 0.58), (-0.46, 0.65), (-0.18, 0.965), (0.05, 1), (0.8, 0.965),
        (0.945, 0.67), (0.98, 0.6), (1, 0.4), (0.985, 0.24)]),
    "coupe": (3, (4.5, 1.86, 1.33), 0.66, [
        (-1, 0.2), (-1, 0.36), (-0.985, 0.47), (-0.92, 0.54), (-0.3, 0.7), (0.02, 0.975), (0.14, 1), (0.36, 0.96),
        (0.8, 0.77), (0.95, 0.74), (0.985, 0.6), (1, 0.4), (0.98, 0.22)]),
    "pickup": (3, (5.5, 1.98, 1.85), 0.76, [
        (-1, 0.24), (-1, 0.42), (-0.99, 0.54), (-0.95, 0.59), (-0.45, 0.65), (-0.27, 0.97), (-0.1, 1), (0.18, 0.98),
        (0.255, 0.66), (0.3, 0.645), (0.96, 0.645), (1, 0.63), (1, 0.42), (0.99, 0.26)]),
    "van": (2, (5.0, 1.96, 1.9), 0.78, [
        (-1, 0.18), (-1, 0.34), (-0.98, 0.44), (-0.92, 0.49), (-0.66, 0.58), (-0.28, 0.95), (-0.05, 1), (0.86, 0.97),
        (0.965, 0.62), (0.985, 0.5), (1, 0.34), (0.985, 0.2)]),
}  # fmt: skip
_MARKS = (4, 5, 7, 8)  # points of every top line: windscreen bottom and top, rear window top and bottom
_PAINTS = [
    (236, 237, 236), (228, 227, 220), (196, 199, 202), (168, 171, 174), (120, 123, 127), (74, 77, 82), (34, 35, 38),
    (22, 22, 24), (28, 38, 66), (38, 66, 122), (92, 122, 158), (142, 22, 28), (98, 16, 24), (104, 86, 68),
    (178, 164, 138), (38, 62, 50), (196, 92, 28), (206, 176, 44),
]  # fmt: skip
_PAINT_WEIGHTS = [12, 5, 12, 6, 9, 8, 10, 9, 5, 5, 3, 7, 3, 3, 4, 2, 1, 1]
_RIMS: list[Color] = [(176, 178, 181, 40), (196, 198, 201, 60), (52, 53, 56, 40)]
_BLACK: Color = (26, 26, 28, 7)
_CHROME: Color = (200, 202, 205, 110)


@dataclass(frozen=True, eq=False)
class _Car:
    """One car; lengths in metres, x to the rear, z up, the ground at 0."""

    body: str
    top: Array  # (n, 2): x and z along the top line, front lip to rear lip
    marks: Array  # (4, 2), see `_MARKS`
    width: float  # half the width
    roof: float  # share of the width
    belt: float  # height of the lower edge of the side windows at their front
    rise: float  # of that edge towards the rear
    sill: float  # height of the body's lower edge
    axles: tuple[float, float]
    tyre: float  # radius
    paint: Color
    tint: int  # grey of the glass
    trim: Color
    cladding: bool  # black plastic along the sills and the wheel arches
    red: Color  # of the tail lights
    grille: float  # half its width
    sunroof: bool
    high_plate: bool
    plate: Color
    spokes: int
    spoke: float  # half a spoke's thickness, radians
    metal: Color
    rim: float  # radius


def _arc(points: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])


def _smooth(points: Array, count: int, rounds: int = 3) -> Array:
    """Cut corners (Chaikin 1974), ends kept, and place `count` points evenly along the result."""
    for _ in range(rounds):
        a, b = points[:-1], points[1:]
        cut = np.stack([0.8 * a + 0.2 * b, 0.2 * a + 0.8 * b], 1).reshape(-1, 2)
        points = np.concatenate([points[:1], cut[1:-1], points[-1:]])
    arc = _arc(points)
    even = np.linspace(0, arc[-1], count)
    return np.stack([np.interp(even, arc, points[:, k]) for k in (0, 1)], 1)


def _design_car(rng: np.random.Generator) -> _Car:
    often = np.array([entry[0] for entry in _BODIES.values()], float)
    body = str(rng.choice(list(_BODIES), p=often / often.sum()))
    _, (length, width, height), roof, line = _BODIES[body]
    half = length / 2 * rng.uniform(0.94, 1.06)
    height *= rng.uniform(0.96, 1.04)
    control = np.array(line, float)
    control[2:-2] += rng.uniform(-0.012, 0.012, control[2:-2].shape)
    control *= half, height
    share = np.array(_PAINT_WEIGHTS, float)
    paint = np.array(_PAINTS[rng.choice(len(_PAINTS), p=share / share.sum())])
    paint = np.clip(paint + rng.integers(-9, 10, 3), 8, 245)
    tall = body in ("suv", "pickup")
    tyre = rng.uniform(0.36, 0.41) if tall else rng.uniform(0.31, 0.35)
    return _Car(
        body=body,
        top=_smooth(control, 96),
        marks=control[list(_MARKS)],
        width=width / 2 * rng.uniform(0.97, 1.03),
        roof=roof * rng.uniform(0.97, 1.05),
        belt=control[_MARKS[0], 1] * rng.uniform(0.965, 1.0),
        sill=rng.uniform(0.26, 0.33) if tall else rng.uniform(0.17, 0.22),
        axles=(-half * rng.uniform(0.6, 0.65), half * rng.uniform(0.58, 0.63)),
        tyre=tyre,
        paint=(*paint.tolist(), int(rng.choice([11, 18, 28]))),
        **_design_details(np.random.default_rng(int(rng.integers(2**31))), tall, tyre),
    )


def _design_details(rng: np.random.Generator, tall: bool, tyre: float) -> dict[str, Any]:
    # The order of the draws is part of what a seed means: add new ones at the end.
    details: dict[str, Any] = {"tint": int(rng.integers(18, 70))}
    details["trim"] = _CHROME if rng.random() < 0.45 else _BLACK
    details["cladding"] = tall and rng.random() < 0.6
    details["red"] = (int(rng.integers(140, 190)), 18, 24, 36)
    details["rise"] = rng.uniform(0.0, 0.06)
    details["grille"] = rng.uniform(0.3, 0.55)
    details["sunroof"] = rng.random() < 0.4
    details["high_plate"] = rng.random() < 0.5
    details["plate"] = (225, 228, int(rng.integers(150, 240)), 20)
    details["spokes"] = int(rng.choice([5, 6, 7, 10, 12]))
    details["metal"] = _RIMS[int(rng.choice(3, p=[0.5, 0.35, 0.15]))]
    details["rim"] = tyre * rng.uniform(0.64, 0.76)
    details["spoke"] = rng.uniform(0.4, 0.62) / details["spokes"]
    return details


# ---- its drawing: the side, the unrolled top line and the wheel, flat on one sheet ---------------------------------

_SCALE = 200  # pixels in a metre
_SHEET = (10.0, 4.6)  # metres
_SWATCHES = {"paint": (9.2, 0.2), "black": (9.2, 0.6)}

Place = Callable[[ArrayLike, ArrayLike], Array]  # a panel's own coordinates -> places on the sheet, in metres


def _on_side(x: ArrayLike, z: ArrayLike) -> Array:
    return np.stack(np.broadcast_arrays(np.asarray(x) + 3.2, 2.2 - np.asarray(z)), -1)


def _on_strip(s: ArrayLike, y: ArrayLike) -> Array:
    """`s` metres along the top line from the front lip, `y` metres off the middle."""
    return np.stack(np.broadcast_arrays(np.asarray(s) + 0.1, np.asarray(y) + 3.45), -1)


def _on_wheel(x: ArrayLike, z: ArrayLike) -> Array:
    return np.stack(np.broadcast_arrays(np.asarray(x) + 7.6, 1 - np.asarray(z)), -1)


def _tone(color: Color, factor: float) -> Color:
    r, g, b = (int(min(255, c * factor)) for c in color[:3])
    return r, g, b, color[3]


class _Drawing:
    """The flat drawing of a car; `sheet` is (rows, columns, 4) uint8: red, green, blue, gloss."""

    def __init__(self, car: _Car) -> None:
        self.car = car
        image = Image.new("RGBA", (int(_SHEET[0] * _SCALE), int(_SHEET[1] * _SCALE)), car.paint)
        self._pen = ImageDraw.Draw(image)
        dark = sum(car.paint[:3]) < 150
        self.seam = (8, 8, 9, 10) if dark else _tone(car.paint, 0.55)
        self.shade = _tone(car.paint, 0.7 if dark else 0.8)
        self.glass: Color = (car.tint, car.tint + 2, car.tint + 4, 34)
        self.inside: Color = (int(car.tint * 0.7), int(car.tint * 0.7), int(car.tint * 0.72), 30)
        self.lamp: Color = (205, 210, 214, 60)
        self.tail = 0.8 if car.body == "van" else 0.44 * float(car.marks[3, 1]) + 0.32  # height of the tail lights
        self.fill(np.array(_SWATCHES["black"]) + 0.2 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), _BLACK)
        self._side()
        self._strip()
        self._wheel()
        self.sheet = np.asarray(image)

    def fill(self, points: Array, color: Color) -> None:
        self._pen.polygon([tuple(p) for p in (points * _SCALE).tolist()], fill=color)

    def stroke(self, points: Array, color: Color, metres: float) -> None:
        self._pen.line([tuple(p) for p in (points * _SCALE).tolist()], color, width=max(1, round(metres * _SCALE)))

    def box(self, on: Place, a: float, b: float, c: float, d: float, color: Color, cut: float = 0.0) -> None:
        """A box from (a, b) to (c, d), its corners cut off."""
        u = np.array([a, a + cut, c - cut, c, c, c - cut, a + cut, a])
        v = np.array([b + cut, b, b, b + cut, d - cut, d, d, d - cut])
        self.fill(on(u, v), color)

    def circle(self, on: Place, u: float, v: float, radius: float, color: Color) -> None:
        turn = np.linspace(0, 2 * math.pi, 48)
        self.fill(on(u + radius * np.cos(turn), v + radius * np.sin(turn)), color)

    def _side(self) -> None:
        car, belt, sill = self.car, self.car.belt, self.car.sill
        x0, x1 = float(car.top[:, 0].min()), float(car.top[:, 0].max())
        cowl, _, back_top, back = car.marks[:, 0].tolist()
        self.box(_on_side, x0, sill - 0.1, x1, sill + (0.16 if car.cladding else 0.06), _BLACK)
        self.stroke(_on_side([x0 + 0.3, x1 - 0.2], [0.64 * belt, 0.7 * belt]), self.shade, 0.03)
        for axle in car.axles:
            self.circle(_on_side, axle, car.tyre, car.tyre * 1.3, _BLACK if car.cladding else self.shade)
            self.circle(_on_side, axle, car.tyre, car.tyre * 1.17, (10, 10, 11, 0))
        # The windows lie between the belt line and a line a little under the top line.
        x = np.linspace(cowl, back, 120)
        upper = np.interp(x, car.top[:, 0], car.top[:, 1]) - 0.12
        lower = belt + car.rise * (x - cowl) / (back - cowl)
        last = back_top - 0.08 if car.body == "pickup" else back_top + 0.45 * (back - back_top)
        there = (upper > lower + 0.03) & (x > cowl + 0.25) & (x < last)
        x, upper, lower = x[there], upper[there], lower[there]
        left, span = float(x[0]), float(x[-1] - x[0])
        window = _on_side(np.concatenate([x, x[::-1], x[:1]]), np.concatenate([upper, lower[::-1], upper[:1]]))
        self.fill(window, self.glass)
        for place in (0.34, 0.62):
            seat = left + place * span
            self.box(_on_side, seat, belt + car.rise + 0.02, seat + 0.2, belt + 0.27, self.inside, 0.05)
        doors = {"coupe": [0.66], "van": [0.36, 0.68]}.get(car.body, [0.48, 0.82])
        for place in doors:
            post = left + place * span
            self.fill(_on_side([post - 0.04, post + 0.04, post + 0.02, post - 0.06], [belt, belt, 2.2, 2.2]), _BLACK)
        # The posts reach past the windows: the paint above comes back over them.
        self.fill(_on_side([*x, x[-1], x[0]], [*upper, 2.25, 2.25]), car.paint)
        self.stroke(window, car.trim, 0.025)
        for place in (0.06, *doors):
            post = left + place * span
            foot = min(post, car.axles[1] - car.tyre * 1.2)
            self.stroke(_on_side([post, post, foot], [belt, belt * 0.72, sill + 0.1]), self.seam, 0.012)
            if place in doors:
                handle = self.shade if car.trim == _BLACK else car.trim
                self.box(_on_side, post - 0.3, belt - 0.16, post - 0.1, belt - 0.125, handle, 0.01)
        nose = np.array([0, 0.12, 0.42, 0.3, 0]) + x0
        self.fill(_on_side(nose, np.array([0.64, 0.64, 0.8, 0.815, 0.8]) * belt), self.lamp)
        self.box(_on_side, x1 - 0.26, self.tail, x1 + 0.05, self.tail + 0.17, car.red, 0.02)

    def _strip(self) -> None:
        car, belt, w = self.car, self.car.belt, self.car.width
        arc = _arc(car.top)
        end = float(arc[-1])
        cowl, head, back, base = (float(arc[np.hypot(*(car.top - mark).T).argmin()]) for mark in car.marks)

        def front(z: float) -> float:
            return float(np.interp(z, np.maximum.accumulate(car.top[:24, 1]), arc[:24]))

        def rear(z: float) -> float:
            return float(np.interp(z, np.maximum.accumulate(car.top[:-25:-1, 1]), arc[:-25:-1]))

        low, mid, high = belt * 0.36, belt * 0.55, belt * 0.8
        # Nose and bonnet.
        self.box(_on_strip, -0.1, -1.15, front(car.sill + 0.1), 1.15, _BLACK)
        self.box(_on_strip, front(low), -0.62, front(mid * 0.92), 0.62, (14, 14, 15, 12), 0.05)
        bottom, top = front(mid * 1.08), front(high)
        self.box(_on_strip, bottom, -car.grille, top, car.grille, (18, 18, 19, 16), 0.04)
        for k in (1, 2, 3):
            s = bottom + (top - bottom) * k / 4
            self.stroke(_on_strip([s, s], [-car.grille, car.grille]), car.trim, 0.014)
        for side in (-1, 1):
            y = sorted((side * 0.5, side * 1.0))
            self.box(_on_strip, front(belt * 0.64), y[0], top, y[1], self.lamp, 0.05)
            self.circle(_on_strip, front(belt * 0.72), side * 0.64, 0.055, (90, 94, 98, 90))
            self.circle(_on_strip, front(low * 1.2), side * 0.74, 0.06, (150, 152, 155, 60))
            self.stroke(_on_strip([top + 0.15, cowl - 0.1], [side * 0.34, side * 0.56]), self.shade, 0.02)
            y = sorted((side * (w - 0.36), side * 1.15))
            self.box(_on_strip, rear(self.tail + 0.17), y[0], rear(self.tail), y[1], car.red, 0.03)
            self.circle(_on_strip, rear(self.tail + 0.06), side * (w - 0.24), 0.04, (220, 190, 180, 50))
        # Windscreen, rear window and roof.
        self.stroke(_on_strip([cowl - 0.06, cowl - 0.06], [-w, w]), _BLACK, 0.08)
        roof = w * car.roof
        for a, b, wide_a, wide_b in ((cowl, head, w - 0.14, roof - 0.06), (base, back, 0.86 * w - 0.06, roof - 0.09)):
            self.fill(_on_strip([a, b, b, a], [-wide_a, -wide_b, wide_b, wide_a]), self.glass)
            for seat in (-0.38, 0.38):
                near, far = sorted((a, a + 0.35 * (b - a)))
                self.box(_on_strip, near, seat - 0.2, far, seat + 0.2, self.inside, 0.05)
            self.stroke(_on_strip([a, b, b, a, a], [-wide_a, -wide_b, wide_b, wide_a, -wide_a]), _BLACK, 0.03)
        if car.body == "pickup":
            bed = rear(float(car.marks[3, 1]) * 0.9) - 0.12
            self.box(_on_strip, base + 0.05, -w * 0.82, bed, w * 0.82, (24, 24, 26, 4))
        elif car.sunroof:
            self.box(_on_strip, head + 0.15, -roof * 0.6, head + 0.8, roof * 0.6, self.glass, 0.06)
        # Tail and plates.
        self.stroke(_on_strip([rear(mid), rear(mid)], [-w, w]), self.seam, 0.014)
        self.box(_on_strip, rear(car.sill + 0.14), -1.15, end + 0.2, 1.15, _BLACK)
        for s in (front(mid * 0.92), rear(self.tail - 0.05) if car.high_plate else rear(mid * 0.9)):
            self.box(_on_strip, s - 0.075, -0.24, s + 0.075, 0.24, car.plate)
            for k in range(6):
                y0 = -0.17 + 0.06 * k
                self.stroke(_on_strip([s - 0.03, s + 0.035], [y0, y0 + 0.02]), (40, 60, 110, 20), 0.018)

    def _wheel(self) -> None:
        car, rim = self.car, self.car.rim
        for share, color in ((1.2, (24, 24, 26, 4)), (0.97, (34, 34, 36, 6)), (0.9, (22, 22, 24, 6))):
            self.circle(_on_wheel, 0, 0, car.tyre * share, color)
        for share, color in ((1.0, car.metal), (0.92, (30, 30, 32, 10)), (0.55, (74, 74, 76, 20))):
            self.circle(_on_wheel, 0, 0, rim * share, color)
        reach = np.array([0.22, 0.95, 0.95, 0.22]) * rim
        for k in range(car.spokes):
            turn = 2 * math.pi * k / car.spokes + car.spoke * np.array([-2.6, -1, 1, 2.6])
            self.fill(_on_wheel(reach * np.cos(turn), reach * np.sin(turn)), car.metal)
        self.circle(_on_wheel, 0, 0, rim * 0.24, car.metal)
        self.circle(_on_wheel, 0, 0, rim * 0.13, _tone(car.metal, 0.6))


# ---- its surfaces ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Surface:
    """A grid of quads: (n, m, 3) points and normals that point out, (n, m, 2) places on the drawing's sheet."""

    points: Array
    normals: Array
    places: Array
    kind: str  # "body", "disc" (a wheel's outer face), "tread", "mirror"
    side: int = 0  # of the car: -1 or 1


def _surfaces(car: _Car) -> list[_Surface]:
    return _body(car) + [part for side in (-1, 1) for part in (*_wheels(car, side), _mirror(car, side))]


def _body(car: _Car) -> list[_Surface]:
    """A section at every station of the top line: the floor, up the side, round the corner, across the top."""
    x, z_top = car.top.T
    half = float(np.abs(x).max())
    ends = np.clip((np.abs(x) / half - 0.72) / 0.28, 0, 1)
    z_low = np.minimum(car.sill + 0.1 * ends**2, z_top)
    z_low[[0, -1]] = z_top[[0, -1]]  # the first and the last section have no height: they close the body
    tall = (z_top - z_low)[:, None]
    corner = np.minimum(0.1, 0.45 * tall)
    bulge = np.array([0, 0.2, 0.32, 0.55, 0.78 * car.belt, car.belt, float(z_top.max())])
    widths = car.width * np.array([0.9, 0.93, 0.975, 1.0, 0.985, 0.95, car.roof + 0.06])
    z_side = z_low[:, None] + np.linspace(0, 1, 14) * (tall - corner)
    y_side = np.interp(z_side, bulge, widths)
    y_edge, z_edge = y_side[:, -1:] - corner, z_top[:, None] - corner
    turn = np.linspace(0, math.pi / 2, 7)[1:]
    inward = np.linspace(1, 0, 7)[1:]
    crown = z_top[:, None] + 0.045 * np.minimum(1, 3 * tall) * (1 - inward**2)
    y = np.concatenate([y_side[:, :1] * [0.0, 0.9], y_side, y_edge + corner * np.cos(turn), y_edge * inward], 1)
    z = np.concatenate([z_low[:, None].repeat(2, 1), z_side, z_edge + corner * np.sin(turn), crown], 1)
    y, z = np.concatenate([-y, y[:, -2::-1]], 1), np.concatenate([z, z[:, -2::-1]], 1)
    flat = np.repeat(x[:, None], y.shape[1], 1)
    # Seen from above nose and tail are round: their corners are pulled back and in.
    pull = np.clip((np.abs(flat) / half - 0.45) / 0.55, 0, 1) ** 2
    bent = flat - np.sign(flat) * 0.3 * pull * np.abs(y / car.width) ** 3
    points = np.stack([bent, y * (1 - 0.07 * pull), z], -1)
    normals = np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1))
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
    drawn_z = z.copy()
    drawn_z[:, [0, 1, -2, -1]] = car.sill - 0.05  # the floor takes the black of the sills
    side, strip = _on_side(flat, drawn_z), _on_strip(_arc(car.top)[:, None], y)
    seam = 2 + 14 + 3  # columns up to the middle of the corner, where the side's drawing meets the strip's
    cuts = ((slice(seam), side), (slice(seam - 1, 1 - seam), strip), (slice(-seam, None), side))
    return [_Surface(points[:, cut], normals[:, cut], panel[:, cut], "body") for cut, panel in cuts]


def _wheels(car: _Car, side: int) -> list[_Surface]:
    turn = np.linspace(0, 2 * math.pi, 41)[::-side]
    cos, sin = np.cos(turn), np.sin(turn)
    out, r = side * (car.width + 0.012), car.tyre
    reach = np.array([[0.0], [0.7], [0.93], [1.0]]) * r
    dish = out - side * np.array([[0.03], [0.03], [0.0], [0.015]])
    across = out - side * np.array([[0.015], [0.25]])
    black = np.broadcast_to(_SWATCHES["black"], (2, 41, 2))
    parts = []
    for axle in car.axles:
        disc = np.stack(np.broadcast_arrays(axle + reach * cos, dish, r + reach * sin), -1)
        face = np.broadcast_to([0.0, side, 0.0], disc.shape)
        parts.append(_Surface(disc, face, _on_wheel(reach * cos, reach * sin), "disc", side))
        tread = np.stack(np.broadcast_arrays(axle + r * cos, across, r + r * sin), -1)
        around = np.stack(np.broadcast_arrays(cos, 0 * across, sin), -1)
        parts.append(_Surface(tread, around, black, "tread", side))
    return parts


def _mirror(car: _Car, side: int) -> _Surface:
    a, b = np.meshgrid(np.linspace(0, math.pi, 9), np.linspace(0, 2 * math.pi, 17), indexing="ij")
    ball = np.stack([np.sin(a) * np.cos(b), np.sin(a) * np.sin(b), np.cos(a)], -1)
    centre = np.array([car.marks[0, 0] + 0.42, side * (car.width + 0.09), car.belt + 0.1])
    shell = centre + np.sign(ball) * np.abs(ball) ** 0.6 * (0.06, 0.12, 0.07)
    return _Surface(shell, ball, np.where(ball[..., 2:] < -0.3, _SWATCHES["black"], _SWATCHES["paint"]), "mirror", side)


@functools.lru_cache(maxsize=4)
def _build(car: int, seed: int) -> tuple[_Car, Array, list[_Surface]]:
    spec = _design_car(np.random.default_rng([1, seed, car]))
    return spec, _Drawing(spec).sheet, _surfaces(spec)


# ---- the camera and the studio ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Camera:
    """A slightly raised camera that looks at the turntable's middle. World: X right, Y away, Z up, in metres."""

    distance: float
    height: float
    zoom: float  # focal length, in units
    shift: tuple[float, float]  # of the picture's middle, right and down, in units
    size: tuple[int, int]  # of the picture: height, width

    @property
    def unit(self) -> float:
        """Width of the largest 3:2 picture inside this one: scenes are laid out in it, whatever the picture's form."""
        return min(self.size[1], 1.5 * self.size[0])

    @property
    def _tilt(self) -> tuple[float, float]:
        angle = math.atan2(self.height - 0.72, self.distance)
        return math.cos(angle), math.sin(angle)

    @property
    def _middle(self) -> tuple[float, float]:
        return self.size[1] / 2 + self.shift[0] * self.unit, self.size[0] / 2 + self.shift[1] * self.unit

    def project(self, points: Array) -> tuple[Array, Array]:
        """World points (..., 3) -> places in the picture (..., 2), column and row, and their depths (...)."""
        x, y, z = points[..., 0], points[..., 1] + self.distance, points[..., 2] - self.height
        cos, sin = self._tilt
        depth = y * cos - z * sin
        scale = self.zoom * self.unit / depth
        return np.stack([self._middle[0] + scale * x, self._middle[1] - scale * (y * sin + z * cos)], -1), depth

    def rays(self, columns: Array, rows: Array) -> Array:
        """Unit vectors in the world, (3, n) float32, through places in the picture."""
        focal = self.zoom * self.unit
        right, up = ((columns - self._middle[0]) / focal, (self._middle[1] - rows) / focal)
        cos, sin = self._tilt
        ray = np.stack([right, cos + up * sin, up * cos - sin]).astype(np.float32)
        ray /= np.sqrt((ray * ray).sum(0))
        return ray


@dataclass(frozen=True)
class _Studio:
    """Light, wall and floor, the same for all views of a car."""

    camera: _Camera
    wall: float
    floor: float
    cast: tuple[float, float, float]  # the light's colour
    horizon: float  # where the wall meets the floor: units below the picture's middle
    bow: float  # how far that line sinks towards the picture's sides
    table: float  # radius of the turntable
    table_tone: float
    sign: str  # lettering on the wall
    sign_size: float
    sign_tone: int
    key: tuple[float, float, float]  # direction of the main lamp
    exposure: float
    shadow: float
    noise: float


_SIGNS = ("STUDIO", "MOTORS", "AUTO HALL", "GARAGE", "CITY CARS", "UNETLIB", "SHOWROOM", "DRIVE")


def _design_studio(rng: np.random.Generator, size: tuple[int, int]) -> _Studio:
    def pick(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    far = pick(7.8, 9.6)
    camera = _Camera(far, pick(1.9, 2.8), pick(0.142, 0.165) * far, (pick(-0.02, 0.02), pick(-0.01, 0.06)), size)
    azimuth = pick(-2.6, -0.5)
    return _Studio(
        camera=camera,
        wall=pick(0.9, 1.04),
        floor=pick(0.62, 0.86),
        cast=(pick(0.965, 1.0), pick(0.98, 1.0), pick(0.955, 1.02)),
        horizon=pick(-0.16, -0.04),
        bow=pick(-0.12, 0.12),
        table=pick(2.9, 3.6),
        table_tone=pick(-0.08, 0.08),
        sign=str(rng.choice(_SIGNS)) if rng.random() < 0.75 else "",
        sign_size=pick(0.11, 0.19),
        sign_tone=int(rng.integers(60, 170)),
        key=(math.cos(azimuth) * 0.6, math.sin(azimuth) * 0.6, 0.8),
        exposure=pick(0.92, 1.12),
        shadow=pick(0.5, 0.85),
        noise=pick(1.0, 4.0),
    )


def _turn(points: Array, angle: float) -> Array:
    """Turn points (..., 3) about the vertical."""
    cos, sin = math.cos(angle), math.sin(angle)
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    return np.stack([x * cos - y * sin, x * sin + y * cos, z], -1)


# ---- the painting ----------------------------------------------------------------------------------------------------


def _paint_studio(studio: _Studio, car: _Car, angle: float) -> Image.Image:
    camera, (height, width), unit = studio.camera, studio.camera.size, studio.camera.unit

    def outline(points: Array) -> list[tuple[float, float]]:
        return [tuple(p) for p in camera.project(points)[0].tolist()]

    # What is smooth is made on a coarse grid and enlarged; what is sharp is drawn at the full size.
    grid = [max(2, round(side * 240 / max(width, height))) for side in (height, width)]
    v = ((np.arange(grid[0]) + 0.5) / grid[0] - 0.5)[:, None] * height / unit
    u = ((np.arange(grid[1]) + 0.5) / grid[1] - 0.5) * width / unit
    fade = 1 - 0.12 * (u**2 + v**2) / 0.36
    wall = studio.wall * (1.02 - 0.1 * np.abs(v + 0.25)) * fade
    floor = studio.floor * (1 - 0.25 * (v - studio.horizon)) * fade + 0.1 * np.exp(-((u * 2) ** 2) - (v * 5) ** 2)

    def enlarge(tones: Array) -> Image.Image:
        colors = np.clip(tones[..., None] * np.array(studio.cast) * studio.exposure, 0, 1) * 255
        return Image.fromarray(colors.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)

    image = enlarge(wall)
    draw = ImageDraw.Draw(image, "RGBA")
    middle, top = width / 2, height / 2 + studio.horizon * unit
    for seam in (-0.31, -0.02, 0.27):
        x = middle + (seam + studio.bow / 5) * unit
        draw.line([(x, 0), (x, height)], fill=(90, 90, 95, 26), width=max(1, round(unit / 900)))
    if studio.sign:
        font = ImageFont.load_default(max(1.0, studio.sign_size * unit))
        length = font.getlength(studio.sign)
        spread = min(1.5, 0.94 * unit / length)
        ink = (studio.sign_tone, studio.sign_tone, studio.sign_tone + 5, 235)
        for k, letter in enumerate(studio.sign):
            x = middle + (font.getlength(studio.sign[:k]) - length / 2) * spread
            bold = round(0.004 * unit * (k % 2))
            draw.text((x, top - 0.004 * unit), letter, ink, font, anchor="ls", stroke_width=bold)
    # The floor rises into the wall: a soft edge.
    edge = top + studio.bow * ((np.arange(width) + 0.5 - middle) / unit) ** 2 * unit
    below = (np.arange(height, dtype=np.float32)[:, None] + 0.5 - edge.astype(np.float32)) / (0.008 * unit) + 0.5
    image.paste(enlarge(floor), mask=Image.fromarray((np.clip(below, 0, 1) * 255).astype(np.uint8)))

    draw = ImageDraw.Draw(image, "RGBA")
    turn = np.linspace(0, 2 * math.pi, 121)
    ring = np.stack([np.cos(turn), np.sin(turn), 0 * turn], -1)
    tone = 255 if studio.table_tone > 0 else 0
    draw.polygon(outline(ring * studio.table), fill=(tone, tone, tone, int(255 * abs(studio.table_tone))))
    draw.line(outline(ring * studio.table), fill=(50, 50, 50, 110), width=max(1, round(unit / 500)))
    draw.line(outline(ring * (studio.table + 0.04)), fill=(240, 240, 240, 120), width=max(1, round(unit / 700)))
    for k in range(8):
        joint = _turn(np.array([[0.3, 0, 0], [studio.table, 0, 0]]), angle + k * math.pi / 4)
        draw.line(outline(joint), fill=(40, 40, 40, 20), width=max(1, round(unit / 900)))

    # The car's shadow: dark under the sills, a wide soft skirt away from the main lamp. It is not car.
    small = (max(2, round(240 * width / unit)), max(2, round(240 * height / unit)))
    x0, x1 = float(car.top[:, 0].min()), float(car.top[:, 0].max())
    light = np.ones((small[1], small[0]))
    for grow, blur, strength in ((-0.05, 0.009, 0.75), (0.12, 0.022, 0.45), (0.5, 0.05, 0.3)):
        wide = car.width + grow
        foot = np.array([[x0 - grow, -wide, 0], [x1 + grow, -wide, 0], [x1 + grow, wide, 0], [x0 - grow, wide, 0]])
        foot = _turn(foot, angle)
        foot -= np.array([*studio.key[:2], 0]) * max(grow, 0) * 0.6
        blob = Image.new("L", small, 0)
        shape = np.array(outline(foot)) * small[0] / width
        ImageDraw.Draw(blob).polygon([tuple(p) for p in shape.tolist()], fill=int(255 * strength * studio.shadow))
        light *= 1 - np.asarray(blob.filter(ImageFilter.GaussianBlur(blur * 240))) / 255
    dark = Image.fromarray(((1 - light) * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((18, 18, 20), mask=dark)
    return image


def _paint_car(surfaces: list[_Surface], sheet: Array, studio: _Studio, angle: float) -> tuple[Image.Image, Array]:
    """Paint the car alone: an RGBA picture, its alpha the share of each pixel that is car, and its corner (x, y)."""
    camera = studio.camera
    over = 1.5 if camera.unit > 1000 else 2.0 if camera.unit > 360 else 4.0  # samples in a pixel, each way
    corners, normals, places, layers, shell = [], [], [], [], []
    for surface in surfaces:
        # The camera from the car's side: parts of the near side lie over the body, those of the far side under it.
        near = -surface.side * camera.distance * math.cos(angle) > 1.0
        if surface.kind == "disc" and not near:
            continue
        spot, depth = camera.project(_turn(surface.points, angle))
        corners.append(_triangles(np.concatenate([spot * over, depth[..., None]], -1)))
        normals.append(_triangles(_turn(surface.normals, angle)))
        places.append(_triangles(surface.places * _SCALE))
        layer = 1 if surface.kind == "body" else 2 if near and surface.kind != "tread" else 0
        layers.append(np.full(len(corners[-1]), layer))
        shell.append(np.full(len(corners[-1]), surface.kind == "body"))  # kept whole: its far side closes gaps
    corner = np.concatenate(corners)
    value = np.concatenate([np.concatenate(normals), np.concatenate(places)], -1).astype(np.float32)
    e1, e2 = corner[:, 1, :2] - corner[:, 0, :2], corner[:, 2, :2] - corner[:, 0, :2]
    area = e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0]
    order = np.argsort(np.concatenate(layers) * 1000 - corner[..., 2].mean(1), kind="stable")  # far to near
    order = order[(area[order] < 0) | np.concatenate(shell)[order]]
    corner, value, e1, e2, area = (each[order] for each in (corner, value, e1, e2, area))

    # Painter's algorithm, but what is painted is the number of the triangle.
    first = np.maximum(np.floor(corner[..., :2].min((0, 1)) / over) - 2, 0)
    last = np.minimum(np.ceil(corner[..., :2].max((0, 1)) / over) + 2, (camera.size[1], camera.size[0]))
    width, height = (last - first).astype(int).tolist()
    canvas = Image.new("I", (math.ceil(width * over), math.ceil(height * over)), -1)
    draw = ImageDraw.Draw(canvas)
    for index, points in enumerate((corner[..., :2] - first * over - 0.5).reshape(-1, 6).tolist()):
        draw.polygon(points, fill=index)

    # Each sample's triangle then gives its normal and its place in the drawing.
    numbers = np.asarray(canvas)
    rows, columns = np.nonzero(numbers >= 0)
    number = numbers[rows, columns]
    column, row = columns + (first[0] * over + 0.5), rows + (first[1] * over + 0.5)
    dx, dy = column - corner[number, 0, 0], row - corner[number, 0, 1]
    area = np.where(np.abs(area) < 0.05, -0.05, area)  # slivers: bounded slopes
    b1 = np.clip(dx * (e2[:, 1] / area)[number] - dy * (e2[:, 0] / area)[number], 0, 1).astype(np.float32)
    b2 = np.clip(dy * (e1[:, 0] / area)[number] - dx * (e1[:, 1] / area)[number], 0, 1).astype(np.float32)
    base, step1, step2 = value[:, 0], value[:, 1] - value[:, 0], value[:, 2] - value[:, 0]
    mixed = [base[number, k] + b1 * step1[number, k] + b2 * step2[number, k] for k in range(5)]
    u, v = (np.clip(mixed[3 + k].astype(int), 0, sheet.shape[1 - k] - 1) for k in (0, 1))
    painted = np.zeros((*numbers.shape, 4), np.uint8)
    painted[rows, columns, :3] = _shade(mixed[:3], camera.rays(column / over, row / over), sheet[v, u], studio)
    painted[rows, columns, 3] = 255
    layer_image = Image.fromarray(painted).convert("RGBa")  # colours weighted by alpha, for the reduction
    reduced = layer_image.resize((width, height), Image.Resampling.BOX, (0, 0, width * over, height * over))
    return reduced.convert("RGBA"), first.astype(int)


def _triangles(grid: Array) -> Array:
    """Values at the points of a grid of quads, (n, m, k) -> at the corners of its triangles, (2 (n-1) (m-1), 3, k)."""
    a, b, c, d = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    return np.concatenate([np.stack([a, b, c], 2), np.stack([a, c, d], 2)]).reshape(-1, 3, grid.shape[-1])


def _shade(normal: list[Array], ray: Array, albedo: Array, studio: _Studio) -> Array:
    """Light samples: (n, 3) uint8.

    Diffuse light comes from above and from the main lamp; the glossy share mirrors floor, wall and lamps, more at a
    grazing view (Schlick 1994).
    """
    nx, ny, nz = normal
    length = np.maximum(np.sqrt(nx * nx + ny * ny + nz * nz), 1e-6)
    nx, ny, nz = nx / length, ny / length, nz / length
    kx, ky, kz = studio.key
    to_key = nx * kx + ny * ky + nz * kz
    facing = np.minimum(nx * ray[0] + ny * ray[1] + nz * ray[2], -0.02)
    up = ray[2] - 2 * facing * nz
    glare = ray[0] * kx + ray[1] * ky + ray[2] * kz - 2 * facing * to_key
    wall = np.clip((up + 0.05) * 8, 0, 1)
    room = 0.7 * studio.floor**2 * (1 - wall) + studio.wall**2 * wall
    room *= 1 - 0.6 * np.exp(-(((up - 0.03) * 12) ** 2))  # the dark line where floor and wall meet
    room += 2.0 * np.clip((glare - 0.86) * 9, 0, 1) + 0.8 * np.clip((up - 0.85) * 10, 0, 1)
    diffuse = 0.56 + 0.26 * nz + 0.42 * np.maximum(to_key, 0)
    gloss = albedo[:, 3].astype(np.float32) / 255
    gloss += (gloss > 0.03) * (1 - gloss) * (1 + facing) ** 5 * 0.8
    diffuse *= 1 - 0.5 * gloss
    room *= gloss
    linear = (np.arange(256, dtype=np.float32) / 255) ** 2
    out = np.empty((len(nz), 3), np.uint8)
    for k in range(3):
        light = linear[albedo[:, k]] * (diffuse * studio.cast[k]) + room
        out[:, k] = np.minimum(np.sqrt(light / (0.85 + 0.3 * light)) * (255 * studio.exposure), 255)
    return out


def render_scene(
    car: int, view: int = 1, *, size: tuple[int, int] = (1280, 1918), seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Render one view of one car in a photo studio, with its exact mask.

    The car's number and the seed decide body, paint, wheels, studio and light; the view turns the turntable. The
    scene is a pure function of the arguments (with the same NumPy and Pillow), and the same at every size but for
    the pixel grid and the grain. Shadows, floor and lettering are not car.

    Args:
        car: The car's number, 0 or more.
        view: 1 to 16, 22.5 degrees apart: 1 shows the front, 5 and 13 the sides, 9 the rear.
        size: Height and width in pixels; Kaggle's by default.
        seed: Another seed, 0 or more, gives other cars.

    Returns:
        The picture, uint8 (H, W, 3) RGB, and the mask, uint8 (H, W): 1 where at least half of a pixel is car, else 0.

    Raises:
        TypeError: An argument is no integer, or `size` no pair of them.
        ValueError: An argument is out of its range.

    Example:
        >>> image, mask = render_scene(7, view=4, size=(160, 240))
        >>> image.shape, mask.shape, mask.max().item()
        ((160, 240, 3), (160, 240), 1)
        >>> bool(0.05 < mask.mean() < 0.5)
        True
    """
    car, seed, view = _whole("car", car, 0), _whole("seed", seed, 0), _whole("view", view, 1, VIEWS)
    size = _check_size(size)
    spec, sheet, surfaces = _build(car, seed)
    studio = _design_studio(np.random.default_rng([2, seed, car]), size)
    rng = np.random.default_rng([3, seed, car, view])
    angle = math.pi / 2 - (view - 1) * 2 * math.pi / VIEWS + float(rng.uniform(-0.04, 0.04))
    # Lines and letters have no width under a pixel: a small studio is painted larger and reduced.
    enlarged = max(1, min(math.ceil(480 / studio.camera.unit), 4096 // max(size)))
    camera = replace(studio.camera, size=(size[0] * enlarged, size[1] * enlarged))
    image = _paint_studio(replace(studio, camera=camera), spec, angle).reduce(enlarged)
    layer, (left, top) = _paint_car(surfaces, sheet, studio, angle)
    share = layer.getchannel("A")
    image.paste(layer, (int(left), int(top)), share)
    mask = np.zeros(size, np.uint8)
    mask[top : top + layer.height, left : left + layer.width] = np.asarray(share) >= 128
    image = image.filter(ImageFilter.GaussianBlur(0.0004 * studio.camera.unit))
    grain = rng.standard_normal(size, np.float32) * np.float32(studio.noise)
    return np.clip(np.asarray(image) + grain[..., None], 0, 255).astype(np.uint8), mask


# ---- the files -------------------------------------------------------------------------------------------------------


def car_name(car: int, *, seed: int = 0) -> str:
    """Name a car as Kaggle does: 12 hexadecimal digits, the same for all its views.

    Example:
        >>> len(car_name(0)), car_name(0) == car_name(0), car_name(0) == car_name(0, seed=1)
        (12, True, False)
    """
    car, seed = _whole("car", car, 0), _whole("seed", seed, 0)
    return hashlib.sha256(f"unetlib.synthetic {seed} {car}".encode()).hexdigest()[:12]


def write_carvana(
    folder: str | os.PathLike[str],
    *,
    cars: int | Iterable[int],
    views: int | Iterable[int] = VIEWS,
    size: tuple[int, int] = (1280, 1918),
    seed: int = 0,
    split: str = "train",
) -> list[Path]:
    """Write scenes as Kaggle's Carvana challenge lays them out.

    A picture goes to `folder/<split>/<car>_<view>.jpg`, its mask to `folder/<split>_masks/<car>_<view>_mask.gif`, in
    palette mode with the values 0 and 1. `<car>` is `car_name(...)`, `<view>` two digits. Each file appears whole or
    not at all, and the same call again writes the same files. For a validation split of other cars call again with
    other numbers: `cars=range(20, 25), split="val"`.

    Args:
        folder: Made where it is missing.
        cars: How many cars, numbered from 0, or their numbers.
        views: How many views of each, from 1, or which of 1 to 16.
        size: Height and width of the pictures.
        seed: See `render_scene`.
        split: First part of the two folders' names.

    Returns:
        The pictures' paths, in the order of cars and views.

    Raises:
        FileExistsError: One of the two folders holds files that this call does not write.
        TypeError, ValueError: As `render_scene`; or there is nothing to write; or `split` is no plain name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pictures = write_carvana(folder, cars=2, views=[1, 4], size=(32, 48))
        ...     [path.relative_to(folder).as_posix() for path in pictures[:2]]
        ['train/28e13a2a217b_01.jpg', 'train/28e13a2a217b_04.jpg']
    """
    if not isinstance(cars, Iterable):
        cars = range(_whole("cars", cars, 1))
    if not isinstance(views, Iterable):
        views = range(1, _whole("views", views, 1, VIEWS) + 1)
    cars, views = [_whole("cars", car, 0) for car in cars], [_whole("views", view, 1, VIEWS) for view in views]
    size = _check_size(size)
    scenes = {f"{car_name(car, seed=seed)}_{view:02d}": (car, view) for car in cars for view in views}
    if not scenes:
        raise ValueError(f"nothing to write with cars={cars!r} and views={views!r}: give at least one of each")
    if not split.strip(".") or split != Path(split).name:
        raise ValueError(f'split={split!r} must be a plain folder name, such as "train" or "val"')
    images, masks = Path(folder) / split, Path(folder) / f"{split}_masks"
    for place, ending in ((images, ".jpg"), (masks, "_mask.gif")):
        wanted = {stem + ending for stem in scenes}
        found = {entry.name for entry in place.iterdir() if entry.name[0] != "."} if place.is_dir() else set()
        if found - wanted:
            raise FileExistsError(
                f"{place} holds other files, such as {min(found - wanted)!r}, and scenes are never mixed into them: "
                "give an empty or a new folder, or another split="
            )
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    for stem, (car, view) in scenes.items():
        picture, mask = render_scene(car, view, size=size, seed=seed)
        gif = Image.fromarray(mask)
        gif.putpalette([0, 0, 0, 255, 255, 255])
        _save(gif, masks / f"{stem}_mask.gif")
        _save(Image.fromarray(picture), images / f"{stem}.jpg", quality=92)
    logger.info("wrote %d scenes under %s", len(scenes), folder)
    return [images / f"{stem}.jpg" for stem in scenes]


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        image.save(partial, **options)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer, such as {name}={low}") from None
    if number < low or (high is not None and number > high):
        allowed = f"{low} or more" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={number} must be {allowed}")
    return number


def _check_size(size: Any) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size={size!r} must be a pair (height, width), such as size=(320, 480)")
    return _whole("size", size[0], 1), _whole("size", size[1], 1)
