"""The drawing of a car on its sheet. Later strokes cover earlier ones."""

from __future__ import annotations

import math

import numpy as np

from .car import BLACK, Car, Color, Wheel, dim
from .geometry import Array, arc_length
from .sheet import Sheet, on_side, on_strip, on_wheel

HEADLAMP: Color = (205, 210, 214, 60)


def draw_car(car: Car) -> Array:
    """Draw a car flat: (rows, columns, 4) uint8, red, green, blue and gloss."""
    sheet = Sheet(car.paint)
    draw_side(sheet, car)
    draw_strip(sheet, car)
    draw_wheel(sheet, car.wheel)
    return np.asarray(sheet.image)


# ---- the side ----


def draw_side(sheet: Sheet, car: Car) -> None:
    """Draw sills, wheel arches, windows, doors and lamps as seen from the side."""
    belt, sill, radius = car.belt, car.sill, car.wheel.radius
    sheet.box(on_side, car.front, sill - 0.1, car.rear, sill + (0.16 if car.cladding else 0.06), BLACK)
    sheet.stroke(on_side([car.front + 0.3, car.rear - 0.2], [0.64 * belt, 0.7 * belt]), car.shade, 0.03)
    for axle in car.axles:
        sheet.circle(on_side, axle, radius, radius * 1.3, BLACK if car.cladding else car.shade)
        sheet.circle(on_side, axle, radius, radius * 1.17, (10, 10, 11, 0))
    x, upper, lower = side_window(car)
    left, span = float(x[0]), float(x[-1] - x[0])
    posts = [left + share * span for share in {"coupe": [0.66], "van": [0.36, 0.68]}.get(car.body, [0.48, 0.82])]
    window = on_side(np.concatenate([x, x[::-1], x[:1]]), np.concatenate([upper, lower[::-1], upper[:1]]))
    sheet.fill(window, car.glass)
    for share in (0.34, 0.62):
        seat = left + share * span
        sheet.box(on_side, seat, belt + car.rise + 0.02, seat + 0.2, belt + 0.27, car.inside, 0.05)
    for post in posts:
        sheet.fill(on_side([post - 0.04, post + 0.04, post + 0.02, post - 0.06], [belt, belt, 2.2, 2.2]), BLACK)
    # The posts reach past the windows: the paint above comes back over them.
    sheet.fill(on_side([*x, x[-1], x[0]], [*upper, 2.25, 2.25]), car.paint)
    sheet.stroke(window, car.trim, 0.025)
    for edge in (left + 0.06 * span, *posts):
        foot = min(edge, car.axles[1] - radius * 1.2)  # the rear door's gap gives way to the wheel arch
        sheet.stroke(on_side([edge, edge, foot], [belt, belt * 0.72, sill + 0.1]), car.seam, 0.012)
    for post in posts:
        handle = car.shade if car.trim == BLACK else car.trim
        sheet.box(on_side, post - 0.3, belt - 0.16, post - 0.1, belt - 0.125, handle, 0.01)
    lamp = car.front + np.array([0, 0.12, 0.42, 0.3, 0])
    sheet.fill(on_side(lamp, np.array([0.64, 0.64, 0.8, 0.815, 0.8]) * belt), HEADLAMP)
    sheet.box(on_side, car.rear - 0.26, car.tail, car.rear + 0.05, car.tail + 0.17, car.tail_light, 0.02)


def side_window(car: Car) -> tuple[Array, Array, Array]:
    """All windows of a side as one: x, and the heights of the upper and the lower edge there.

    They lie between the belt line and a line a little under the top line.
    """
    first, back, last = car.cowl[0], car.rear_header[0], car.deck[0]
    x = np.linspace(first, last, 120)
    upper = np.interp(x, *car.top.T) - 0.12
    lower = car.belt + car.rise * (x - first) / (last - first)
    end = back - 0.08 if car.body == "pickup" else back + 0.45 * (last - back)
    there = (upper > lower + 0.03) & (x > first + 0.25) & (x < end)
    return x[there], upper[there], lower[there]


# ---- the strip ----


class TopLine:
    """Where things lie along a car's top line, in metres from the front lip."""

    def __init__(self, car: Car) -> None:
        self.points, self.arc = car.top, arc_length(car.top)

    def at(self, point: Array) -> float:
        """The nearest to a point."""
        return float(self.arc[np.hypot(*(self.points - point).T).argmin()])

    def front(self, z: float) -> float:
        """Where the front, the first quarter, reaches a height."""
        return float(np.interp(z, np.maximum.accumulate(self.points[:24, 1]), self.arc[:24]))

    def rear(self, z: float) -> float:
        """Where the rear, the last quarter, reaches a height."""
        return float(np.interp(z, np.maximum.accumulate(self.points[:-25:-1, 1]), self.arc[:-25:-1]))


def draw_strip(sheet: Sheet, car: Car) -> None:
    """Draw what is seen from the front, from above and from the rear."""
    line = TopLine(car)
    draw_nose(sheet, car, line)
    draw_roof(sheet, car, line)
    draw_tail(sheet, car, line)


def draw_nose(sheet: Sheet, car: Car, line: TopLine) -> None:
    """Draw air intake, grille, lamps, the creases of the bonnet and the front plate."""
    low, mid, high = car.belt * 0.36, car.belt * 0.55, car.belt * 0.8
    sheet.box(on_strip, -0.1, -1.15, line.front(car.sill + 0.1), 1.15, BLACK)
    sheet.box(on_strip, line.front(low), -0.62, line.front(mid * 0.92), 0.62, (14, 14, 15, 12), 0.05)
    bottom, top = line.front(mid * 1.08), line.front(high)
    sheet.box(on_strip, bottom, -car.grille, top, car.grille, (18, 18, 19, 16), 0.04)
    for k in (1, 2, 3):
        bar = bottom + (top - bottom) * k / 4
        sheet.stroke(on_strip([bar, bar], [-car.grille, car.grille]), car.trim, 0.014)
    for side in (-1, 1):
        a, b = sorted((side * 0.5, side * 1.0))
        sheet.box(on_strip, line.front(car.belt * 0.64), a, top, b, HEADLAMP, 0.05)
        sheet.circle(on_strip, line.front(car.belt * 0.72), side * 0.64, 0.055, (90, 94, 98, 90))
        sheet.circle(on_strip, line.front(low * 1.2), side * 0.74, 0.06, (150, 152, 155, 60))
        sheet.stroke(on_strip([top + 0.15, line.at(car.cowl) - 0.1], [side * 0.34, side * 0.56]), car.shade, 0.02)
    draw_plate(sheet, car, line.front(mid * 0.92))


def draw_roof(sheet: Sheet, car: Car, line: TopLine) -> None:
    """Draw windscreen and rear window, and a sunroof or a pickup's bed."""
    width, roof = car.half_width, car.half_width * car.roof
    cowl, header, rear_header, deck = (line.at(edge) for edge in (car.cowl, car.header, car.rear_header, car.deck))
    sheet.stroke(on_strip([cowl - 0.06, cowl - 0.06], [-width, width]), BLACK, 0.08)
    windscreen = cowl, header, width - 0.14, roof - 0.06
    rear_window = deck, rear_header, 0.86 * width - 0.06, roof - 0.09
    for low, high, wide, narrow in (windscreen, rear_window):
        sheet.fill(on_strip([low, high, high, low], [-wide, -narrow, narrow, wide]), car.glass)
        for seat in (-0.38, 0.38):
            a, b = sorted((low, low + 0.35 * (high - low)))
            sheet.box(on_strip, a, seat - 0.2, b, seat + 0.2, car.inside, 0.05)
        sheet.stroke(on_strip([low, high, high, low, low], [-wide, -narrow, narrow, wide, -wide]), BLACK, 0.03)
    if car.body == "pickup":
        end = line.rear(float(car.deck[1]) * 0.9) - 0.12
        sheet.box(on_strip, deck + 0.05, -width * 0.82, end, width * 0.82, (24, 24, 26, 4))
    elif car.sunroof:
        sheet.box(on_strip, header + 0.15, -roof * 0.6, header + 0.8, roof * 0.6, car.glass, 0.06)


def draw_tail(sheet: Sheet, car: Car, line: TopLine) -> None:
    """Draw tail lights, the gap under the tailgate, the rear apron and the rear plate."""
    width, mid = car.half_width, car.belt * 0.55
    for side in (-1, 1):
        a, b = sorted((side * (width - 0.36), side * 1.15))
        sheet.box(on_strip, line.rear(car.tail + 0.17), a, line.rear(car.tail), b, car.tail_light, 0.03)
        sheet.circle(on_strip, line.rear(car.tail + 0.06), side * (width - 0.24), 0.04, (220, 190, 180, 50))
    sheet.stroke(on_strip([line.rear(mid), line.rear(mid)], [-width, width]), car.seam, 0.014)
    sheet.box(on_strip, line.rear(car.sill + 0.14), -1.15, float(line.arc[-1]) + 0.2, 1.15, BLACK)
    draw_plate(sheet, car, line.rear(car.tail - 0.05 if car.high_plate else mid * 0.9))


def draw_plate(sheet: Sheet, car: Car, s: float) -> None:
    """Draw a number plate, `s` metres along the top line; its signs spell nothing."""
    sheet.box(on_strip, s - 0.075, -0.24, s + 0.075, 0.24, car.plate)
    for k in range(6):
        y = -0.17 + 0.06 * k
        sheet.stroke(on_strip([s - 0.03, s + 0.035], [y, y + 0.02]), (40, 60, 110, 20), 0.018)


# ---- the wheel ----


def draw_wheel(sheet: Sheet, wheel: Wheel) -> None:
    """Draw tyre, rim, brake, spokes and hub."""
    for share, color in ((1.2, (24, 24, 26, 4)), (0.97, (34, 34, 36, 6)), (0.9, (22, 22, 24, 6))):
        sheet.circle(on_wheel, 0, 0, wheel.radius * share, color)
    for share, color in ((1.0, wheel.metal), (0.92, (30, 30, 32, 10)), (0.55, (74, 74, 76, 20))):
        sheet.circle(on_wheel, 0, 0, wheel.rim * share, color)
    reach = np.array([0.22, 0.95, 0.95, 0.22]) * wheel.rim
    for k in range(wheel.spokes):
        angle = 2 * math.pi * k / wheel.spokes + wheel.spoke * np.array([-2.6, -1, 1, 2.6])
        sheet.fill(on_wheel(reach * np.cos(angle), reach * np.sin(angle)), wheel.metal)
    sheet.circle(on_wheel, 0, 0, wheel.rim * 0.24, wheel.metal)
    sheet.circle(on_wheel, 0, 0, wheel.rim * 0.13, dim(wheel.metal, 0.6))
