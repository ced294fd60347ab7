"""The mesh of a car: its body, four wheels and two mirrors, each point with its place on the sheet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .car import Car
from .geometry import Array, arc_length
from .sheet import SWATCHES, on_side, on_strip, on_wheel


@dataclass(frozen=True, eq=False)
class Surface:
    """A grid of quads: (n, m, 3) points and normals that point out, (n, m, 2) places on the sheet."""

    points: Array
    normals: Array
    places: Array
    kind: Literal["body", "disc", "tread", "mirror"]  # a disc is a wheel's outer face
    side: int = 0  # of the car: -1 or 1


def build_surfaces(car: Car) -> list[Surface]:
    """Build all surfaces of a car."""
    return body(car) + [part for side in (-1, 1) for part in (*wheels(car, side), mirror(car, side))]


# Points of a section through the body: on the floor, up the side, round the corner, across the top to the middle.
FLOOR, SIDE, CORNER, TOP = 2, 14, 6, 6


def body(car: Car) -> list[Surface]:
    """Build the body: both sides and the strip between them, each with its panel of the drawing."""
    y, z = sections(car)
    x = np.repeat(car.top[:, :1], y.shape[1], 1)
    # Seen from above nose and tail are round: their corners are pulled back and in.
    pull = np.clip((np.abs(x) / np.abs(x).max() - 0.45) / 0.55, 0, 1) ** 2
    bent = x - np.sign(x) * 0.3 * pull * np.abs(y / car.half_width) ** 3
    points = np.stack([bent, y * (1 - 0.07 * pull), z], -1)
    normals = np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1))
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9)
    z[:, [0, 1, -2, -1]] = car.sill - 0.05  # on the drawing the floor takes the black of the sills
    side, strip = on_side(x, z), on_strip(arc_length(car.top)[:, None], y)
    edge = FLOOR + SIDE + CORNER // 2  # columns up to the middle of the corner, where the two panels meet
    cuts = ((slice(edge), side), (slice(edge - 1, 1 - edge), strip), (slice(-edge, None), side))
    return [Surface(points[:, cut], normals[:, cut], panel[:, cut], "body") for cut, panel in cuts]


def sections(car: Car) -> tuple[Array, Array]:
    """Cut the body across at every point of the top line: y and z, (sections, points from side to side)."""
    x, z_top = car.top.T
    ends = np.clip((np.abs(x) / np.abs(x).max() - 0.72) / 0.28, 0, 1)
    z_low = np.minimum(car.sill + 0.1 * ends**2, z_top)
    z_low[[0, -1]] = z_top[[0, -1]]  # the first and the last section have no height: they close the body
    z_low, z_top = z_low[:, None], z_top[:, None]
    tall = z_top - z_low
    corner = np.minimum(0.1, 0.45 * tall)  # radius
    heights = np.array([0, 0.2, 0.32, 0.55, 0.78 * car.belt, car.belt, z_top.max()])
    widths = car.half_width * np.array([0.9, 0.93, 0.975, 1.0, 0.985, 0.95, car.roof + 0.06])
    z_side = z_low + np.linspace(0, 1, SIDE) * (tall - corner)
    y_side = np.interp(z_side, heights, widths)
    y_corner, z_corner = y_side[:, -1:] - corner, z_top - corner  # its centre
    around = np.linspace(0, math.pi / 2, CORNER + 1)[1:]
    inward = np.linspace(1, 0, TOP + 1)[1:]
    crown = z_top + 0.045 * np.minimum(1, 3 * tall) * (1 - inward**2)
    y = [y_side[:, :1] * [0.0, 0.9], y_side, y_corner + corner * np.cos(around), y_corner * inward]
    z = [z_low.repeat(FLOOR, 1), z_side, z_corner + corner * np.sin(around), crown]
    left_y, left_z = np.concatenate(y, 1), np.concatenate(z, 1)
    return np.concatenate([-left_y, left_y[:, -2::-1]], 1), np.concatenate([left_z, left_z[:, -2::-1]], 1)


def wheels(car: Car, side: int) -> list[Surface]:
    """Build the two wheels of a side: a dished disc and a tread each."""
    angle = np.linspace(0, 2 * math.pi, 41)[::-side]
    cos, sin = np.cos(angle), np.sin(angle)
    outside, radius = side * (car.half_width + 0.012), car.wheel.radius
    reach = np.array([[0.0], [0.7], [0.93], [1.0]]) * radius
    dish = outside - side * np.array([[0.03], [0.03], [0.0], [0.015]])
    across = outside - side * np.array([[0.015], [0.25]])
    black = np.broadcast_to(SWATCHES["black"], (2, 41, 2))
    parts = []
    for axle in car.axles:
        disc = np.stack(np.broadcast_arrays(axle + reach * cos, dish, radius + reach * sin), -1)
        face = np.broadcast_to([0.0, side, 0.0], disc.shape)
        parts.append(Surface(disc, face, on_wheel(reach * cos, reach * sin), "disc", side))
        tread = np.stack(np.broadcast_arrays(axle + radius * cos, across, radius + radius * sin), -1)
        around = np.stack(np.broadcast_arrays(cos, 0 * across, sin), -1)
        parts.append(Surface(tread, around, black, "tread", side))
    return parts


def mirror(car: Car, side: int) -> Surface:
    """Build a mirror: a ball with flattened sides, in paint above and black below."""
    polar, around = np.meshgrid(np.linspace(0, math.pi, 9), np.linspace(0, 2 * math.pi, 17), indexing="ij")
    ball = np.stack([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], -1)
    centre = np.array([car.cowl[0] + 0.42, side * (car.half_width + 0.09), car.belt + 0.1])
    shell = centre + np.sign(ball) * np.abs(ball) ** 0.6 * (0.06, 0.12, 0.07)
    places = np.where(ball[..., 2:] < -0.3, SWATCHES["black"], SWATCHES["paint"])
    return Surface(shell, ball, places, "mirror", side)
