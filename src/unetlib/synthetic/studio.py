"""What a studio is, and how a seed draws one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .camera import Camera

SIGNS = ("STUDIO", "MOTORS", "AUTO HALL", "GARAGE", "CITY CARS", "UNETLIB", "SHOWROOM", "DRIVE")


@dataclass(frozen=True)
class Studio:
    """Camera, wall, floor and light, the same for all views of a car. Tones are shares of white."""

    camera: Camera
    wall: float  # tone
    floor: float  # tone
    cast: tuple[float, float, float]  # the light's colour
    horizon: float  # where the wall meets the floor: units below the picture's middle
    bow: float  # how far that line sinks towards the picture's sides
    table: float  # radius of the turntable, metres
    table_tone: float  # lighter than the floor, or darker where negative
    sign: str  # lettering on the wall
    sign_size: float  # units
    sign_tone: int  # grey, 0 to 255
    key: tuple[float, float, float]  # direction of the main lamp
    exposure: float
    shadow: float  # the car's, its strength
    noise: float  # standard deviation of the grain, in grey values


def design_studio(rng: np.random.Generator, size: tuple[int, int]) -> Studio:
    """Draw a studio by lot, for pictures of a size. The order of the draws is part of what a seed means."""

    def pick(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    far = pick(7.8, 9.6)
    camera = Camera(far, pick(1.9, 2.8), pick(0.142, 0.165) * far, (pick(-0.02, 0.02), pick(-0.01, 0.06)), size)
    azimuth = pick(-2.6, -0.5)
    return Studio(
        camera=camera,
        wall=pick(0.9, 1.04),
        floor=pick(0.62, 0.86),
        cast=(pick(0.965, 1.0), pick(0.98, 1.0), pick(0.955, 1.02)),
        horizon=pick(-0.16, -0.04),
        bow=pick(-0.12, 0.12),
        table=pick(2.9, 3.6),
        table_tone=pick(-0.08, 0.08),
        sign=str(rng.choice(SIGNS)) if rng.random() < 0.75 else "",
        sign_size=pick(0.11, 0.19),
        sign_tone=int(rng.integers(60, 170)),
        key=(math.cos(azimuth) * 0.6, math.sin(azimuth) * 0.6, 0.8),
        exposure=pick(0.92, 1.12),
        shadow=pick(0.5, 0.85),
        noise=pick(1.0, 4.0),
    )
