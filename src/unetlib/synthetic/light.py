"""What a sample of the car looks like in the studio."""

from __future__ import annotations

import numpy as np

from .geometry import Array
from .studio import Studio


def shade(normal: list[Array], ray: Array, albedo: Array, studio: Studio) -> Array:
    """Light samples: (n, 3) uint8.

    Diffuse light comes from above and from the main lamp; the glossy share mirrors floor, wall and lamps, more at a
    grazing view (Schlick 1994).

    Args:
        normal: x, y and z, float32 (n,), of any length.
        ray: From the camera, unit vectors, float32 (3, n).
        albedo: uint8 (n, 4): red, green, blue and gloss.
        studio: Its light.
    """
    nx, ny, nz = normal
    length = np.maximum(np.sqrt(nx * nx + ny * ny + nz * nz), 1e-6)
    nx, ny, nz = nx / length, ny / length, nz / length
    kx, ky, kz = studio.key
    to_key = nx * kx + ny * ky + nz * kz
    facing = np.minimum(nx * ray[0] + ny * ray[1] + nz * ray[2], -0.02)
    diffuse = 0.56 + 0.26 * nz + 0.42 * np.maximum(to_key, 0)

    # The mirrored ray: how far up it goes, and how close to the main lamp.
    up = ray[2] - 2 * facing * nz
    glare = ray[0] * kx + ray[1] * ky + ray[2] * kz - 2 * facing * to_key
    wall = np.clip((up + 0.05) * 8, 0, 1)
    room = 0.7 * studio.floor**2 * (1 - wall) + studio.wall**2 * wall
    room *= 1 - 0.6 * np.exp(-(((up - 0.03) * 12) ** 2))  # the dark line where floor and wall meet
    room += 2.0 * np.clip((glare - 0.86) * 9, 0, 1) + 0.8 * np.clip((up - 0.85) * 10, 0, 1)

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
