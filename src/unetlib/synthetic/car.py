"""What a car is, and how a seed draws one.

Lengths are in metres. A car stands with x to the rear, y across and z up, its middle at x = y = 0 and the ground at
z = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .geometry import Array, smooth

Color = tuple[int, int, int, int]  # red, green, blue and gloss, the reflectance at normal incidence; 0 to 255


class Body(NamedTuple):
    """A kind of car."""

    weight: int  # how often it is seen
    size: tuple[float, float, float]  # length, width, height
    roof: float  # the share of its width that the roof keeps
    top: list[tuple[float, float]]  # front lip to rear lip: x in half lengths (-1 is the front), z in heights


BODIES = {
    "sedan": Body(9, (4.75, 1.84, 1.45), 0.68, [
        (-1, 0.2), (-1, 0.36), (-0.985, 0.47), (-0.93, 0.54), (-0.42, 0.68), (-0.1, 0.97), (0.08, 1), (0.3, 0.985),
        (0.66, 0.76), (0.94, 0.73), (0.985, 0.62), (1, 0.4), (0.985, 0.22)]),
    "hatchback": Body(4, (4.15, 1.76, 1.5), 0.7, [
        (-1, 0.2), (-1, 0.36), (-0.98, 0.47), (-0.91, 0.55), (-0.5, 0.67), (-0.12, 0.965), (0.1, 1), (0.74, 0.95),
        (0.93, 0.68), (0.975, 0.6), (1, 0.4), (0.985, 0.22)]),
    "wagon": Body(2, (4.8, 1.84, 1.48), 0.7, [
        (-1, 0.2), (-1, 0.36), (-0.985, 0.47), (-0.93, 0.54), (-0.44, 0.67), (-0.12, 0.965), (0.08, 1), (0.72, 0.96),
        (0.93, 0.69), (0.975, 0.62), (1, 0.4), (0.985, 0.22)]),
    "suv": Body(7, (4.7, 1.9, 1.76), 0.72, [
        (-1, 0.22), (-1, 0.4), (-0.99, 0.52), (-0.94, 0.58), (-0.46, 0.65), (-0.18, 0.965), (0.05, 1), (0.8, 0.965),
        (0.945, 0.67), (0.98, 0.6), (1, 0.4), (0.985, 0.24)]),
    "coupe": Body(3, (4.5, 1.86, 1.33), 0.66, [
        (-1, 0.2), (-1, 0.36), (-0.985, 0.47), (-0.92, 0.54), (-0.3, 0.7), (0.02, 0.975), (0.14, 1), (0.36, 0.96),
        (0.8, 0.77), (0.95, 0.74), (0.985, 0.6), (1, 0.4), (0.98, 0.22)]),
    "pickup": Body(3, (5.5, 1.98, 1.85), 0.76, [
        (-1, 0.24), (-1, 0.42), (-0.99, 0.54), (-0.95, 0.59), (-0.45, 0.65), (-0.27, 0.97), (-0.1, 1), (0.18, 0.98),
        (0.255, 0.66), (0.3, 0.645), (0.96, 0.645), (1, 0.63), (1, 0.42), (0.99, 0.26)]),
    "van": Body(2, (5.0, 1.96, 1.9), 0.78, [
        (-1, 0.18), (-1, 0.34), (-0.98, 0.44), (-0.92, 0.49), (-0.66, 0.58), (-0.28, 0.95), (-0.05, 1), (0.86, 0.97),
        (0.965, 0.62), (0.985, 0.5), (1, 0.34), (0.985, 0.2)]),
}  # fmt: skip
COWL, HEADER, REAR_HEADER, DECK = 4, 5, 7, 8  # points of every top line: the windows' edges, front to rear
PAINTS = [  # how often it is seen; red, green, blue
    (12, (236, 237, 236)), (5, (228, 227, 220)), (12, (196, 199, 202)), (6, (168, 171, 174)), (9, (120, 123, 127)),
    (8, (74, 77, 82)), (10, (34, 35, 38)), (9, (22, 22, 24)), (5, (28, 38, 66)), (5, (38, 66, 122)),
    (3, (92, 122, 158)), (7, (142, 22, 28)), (3, (98, 16, 24)), (3, (104, 86, 68)), (4, (178, 164, 138)),
    (2, (38, 62, 50)), (1, (196, 92, 28)), (1, (206, 176, 44)),
]  # fmt: skip
METALS: list[Color] = [(176, 178, 181, 40), (196, 198, 201, 60), (52, 53, 56, 40)]
BLACK: Color = (26, 26, 28, 7)
CHROME: Color = (200, 202, 205, 110)


def dim(color: Color, factor: float) -> Color:
    """A darker tone, of the same gloss."""
    red, green, blue, gloss = color
    return int(red * factor), int(green * factor), int(blue * factor), gloss


@dataclass(frozen=True)
class Wheel:
    """A wheel, all four the same."""

    radius: float  # of the tyre
    rim: float  # radius
    metal: Color
    spokes: int
    spoke: float  # half a spoke's thickness, radians


@dataclass(frozen=True, eq=False)
class Car:
    """One car."""

    body: str
    top: Array  # (n, 2): x and z along the top line, front lip to rear lip
    cowl: Array  # (2,): x and z of the windscreen's lower edge
    header: Array  # of its upper edge
    rear_header: Array  # of the rear window's upper edge
    deck: Array  # of its lower edge
    half_width: float
    roof: float  # the share of the width that the roof keeps
    belt: float  # height of the lower edge of the side windows at their front
    rise: float  # of that edge towards the rear
    sill: float  # height of the body's lower edge
    axles: tuple[float, float]  # x
    paint: Color
    tint: int  # grey of the glass
    trim: Color
    cladding: bool  # black plastic along the sills and the wheel arches
    tail_light: Color
    grille: float  # half its width
    sunroof: bool
    high_plate: bool  # the rear plate, between the tail lights
    plate: Color
    wheel: Wheel

    @property
    def front(self) -> float:
        """The foremost x."""
        return float(self.top[:, 0].min())

    @property
    def rear(self) -> float:
        """The rearmost x."""
        return float(self.top[:, 0].max())

    @property
    def tail(self) -> float:
        """Height of the lower edge of the tail lights."""
        return 0.8 if self.body == "van" else 0.44 * float(self.deck[1]) + 0.32

    @property
    def seam(self) -> Color:
        """The gaps between the panels."""
        return (8, 8, 9, 10) if self._dark else dim(self.paint, 0.55)

    @property
    def shade(self) -> Color:
        """The creases in the panels."""
        return dim(self.paint, 0.7 if self._dark else 0.8)

    @property
    def glass(self) -> Color:
        """The windows."""
        return self.tint, self.tint + 2, self.tint + 4, 34

    @property
    def inside(self) -> Color:
        """The seats behind the windows."""
        return int(self.tint * 0.7), int(self.tint * 0.7), int(self.tint * 0.72), 30

    @property
    def _dark(self) -> bool:
        return sum(self.paint[:3]) < 150


# The order of the draws is part of what a seed means: add new ones at the end.


def design_car(rng: np.random.Generator) -> Car:
    """Draw a car by lot."""
    weights = np.array([body.weight for body in BODIES.values()], float)
    name = str(rng.choice(list(BODIES), p=weights / weights.sum()))
    body, tall = BODIES[name], name in ("suv", "pickup")
    length, width, height = body.size
    half_length = length / 2 * rng.uniform(0.94, 1.06)
    height *= rng.uniform(0.96, 1.04)
    top = np.array(body.top, float)
    top[2:-2] += rng.uniform(-0.012, 0.012, top[2:-2].shape)
    top *= half_length, height
    paint = design_paint(rng)
    radius = rng.uniform(0.36, 0.41) if tall else rng.uniform(0.31, 0.35)
    half_width = width / 2 * rng.uniform(0.97, 1.03)
    roof = body.roof * rng.uniform(0.97, 1.05)
    belt = top[COWL, 1] * rng.uniform(0.965, 1.0)
    sill = rng.uniform(0.26, 0.33) if tall else rng.uniform(0.17, 0.22)
    axles = -half_length * rng.uniform(0.6, 0.65), half_length * rng.uniform(0.58, 0.63)
    gloss = int(rng.choice([11, 18, 28]))
    rng = np.random.default_rng(int(rng.integers(2**31)))
    return Car(
        body=name,
        top=smooth(top, 96),
        cowl=top[COWL],
        header=top[HEADER],
        rear_header=top[REAR_HEADER],
        deck=top[DECK],
        half_width=half_width,
        roof=roof,
        belt=belt,
        sill=sill,
        axles=axles,
        paint=(*paint, gloss),
        tint=int(rng.integers(18, 70)),
        trim=CHROME if rng.random() < 0.45 else BLACK,
        cladding=tall and rng.random() < 0.6,
        tail_light=(int(rng.integers(140, 190)), 18, 24, 36),
        rise=rng.uniform(0.0, 0.06),
        grille=rng.uniform(0.3, 0.55),
        sunroof=rng.random() < 0.4,
        high_plate=rng.random() < 0.5,
        plate=(225, 228, int(rng.integers(150, 240)), 20),
        wheel=design_wheel(rng, radius),
    )


def design_paint(rng: np.random.Generator) -> tuple[int, int, int]:
    """Draw a paint by lot: red, green, blue."""
    weights = np.array([weight for weight, _ in PAINTS], float)
    _, paint = PAINTS[rng.choice(len(PAINTS), p=weights / weights.sum())]
    red, green, blue = np.clip(paint + rng.integers(-9, 10, 3), 8, 245).tolist()
    return red, green, blue


def design_wheel(rng: np.random.Generator, radius: float) -> Wheel:
    """Draw a wheel by lot."""
    spokes = int(rng.choice([5, 6, 7, 10, 12]))
    return Wheel(
        radius=radius,
        spokes=spokes,
        metal=METALS[int(rng.choice(3, p=[0.5, 0.35, 0.15]))],
        rim=radius * rng.uniform(0.64, 0.76),
        spoke=rng.uniform(0.4, 0.62) / spokes,
    )
