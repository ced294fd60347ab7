"""The car painted, with the share of each pixel that it covers.

A pixel is made of several samples. Painter's algorithm finds the triangle that each sample shows; the triangle gives
the sample's normal and its place on the sheet, and with them its colour.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from .camera import Camera
from .geometry import Array, turn
from .light import shade
from .sheet import SCALE
from .studio import Studio
from .surfaces import Surface


def paint_car(surfaces: list[Surface], drawing: Array, studio: Studio, angle: float) -> tuple[Image.Image, tuple[int, int]]:
    """Paint the car alone: an RGBA picture, its alpha the share of each pixel that is car, and its corner (x, y)."""
    camera = studio.camera
    density = 1.5 if camera.unit > 1000 else 2.0 if camera.unit > 360 else 4.0  # samples in a pixel, each way
    corners, values = visible_triangles(surfaces, camera, angle, density)
    first = np.maximum(np.floor(corners.min((0, 1)) / density) - 2, 0)
    last = np.minimum(np.ceil(corners.max((0, 1)) / density) + 2, camera.size[::-1])
    width, height = (last - first).astype(int).tolist()
    start = first * density
    shown = draw_numbers(corners - start - 0.5, (math.ceil(width * density), math.ceil(height * density)))
    rows, columns = np.nonzero(shown >= 0)
    places = np.stack([columns + (start[0] + 0.5), rows + (start[1] + 0.5)], -1)
    *normal, u, v = interpolate(corners, values, shown[rows, columns], places)
    u, v = (np.clip(each.astype(int), 0, side - 1) for each, side in ((u, drawing.shape[1]), (v, drawing.shape[0])))
    samples = np.zeros((*shown.shape, 4), np.uint8)
    samples[rows, columns, :3] = shade(normal, camera.rays(*(places / density).T), drawing[v, u], studio)
    samples[rows, columns, 3] = 255
    image = Image.fromarray(samples).convert("RGBa")  # colours weighted by alpha, for the reduction
    image = image.resize((width, height), Image.Resampling.BOX, (0, 0, width * density, height * density))
    left, top = first.astype(int).tolist()
    return image.convert("RGBA"), (left, top)


def visible_triangles(surfaces: list[Surface], camera: Camera, angle: float, density: float) -> tuple[Array, Array]:
    """Project all triangles that the camera may see, far to near.

    Returns:
        Their corners, (n, 3, 2): column and row, in samples. And the values there, (n, 3, 5) float32: the normal, and
        the place on the sheet in its pixels.
    """
    corners, depths, values, layers, closed = [], [], [], [], []
    for surface in surfaces:
        # The camera from the car's side: parts of the near side lie over the body, those of the far side under it.
        near = -surface.side * camera.distance * math.cos(angle) > 1.0
        if surface.kind == "disc" and not near:
            continue
        places, depth = camera.project(turn(surface.points, angle))
        corners.append(triangles(places * density))
        depths.append(triangles(depth[..., None]).mean((1, 2)))
        values.append(triangles(np.concatenate([turn(surface.normals, angle), surface.places * SCALE], -1)))
        layer = 1 if surface.kind == "body" else 2 if near and surface.kind != "tread" else 0
        layers.append(np.full(len(depths[-1]), layer))
        closed.append(np.full(len(depths[-1]), surface.kind == "body"))
    corner, value = np.concatenate(corners), np.concatenate(values).astype(np.float32)
    *_, area = edges(corner)
    order = np.argsort(np.concatenate(layers) * 1000 - np.concatenate(depths), kind="stable")
    # Triangles that face away are left out, but for the body's: its far side closes gaps.
    order = order[((area < 0) | np.concatenate(closed))[order]]
    return corner[order], value[order]


def triangles(grid: Array) -> Array:
    """Values at the points of a grid of quads, (n, m, k) -> at the corners of its triangles, (2 (n-1) (m-1), 3, k)."""
    a, b, c, d = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    return np.concatenate([np.stack([a, b, c], 2), np.stack([a, c, d], 2)]).reshape(-1, 3, grid.shape[-1])


def edges(corners: Array) -> tuple[Array, Array, Array]:
    """Measure triangles (n, 3, 2).

    Returns:
        Their edges (n, 2) from the first corner to the second and to the third, and twice their areas (n,), below 0
        where they face the camera.
    """
    e1, e2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    return e1, e2, e1[:, 0] * e2[:, 1] - e1[:, 1] * e2[:, 0]


def draw_numbers(corners: Array, size: tuple[int, int]) -> Array:
    """Paint triangles over each other, each in its number, on a canvas (width, height) of -1."""
    canvas = Image.new("I", size, -1)
    draw = ImageDraw.Draw(canvas)
    for number, points in enumerate(corners.reshape(-1, 6).tolist()):
        draw.polygon(points, number)
    return np.asarray(canvas)


def interpolate(corners: Array, values: Array, number: Array, places: Array) -> list[Array]:
    """Values (n,) float32 at places (n, 2) inside the triangles of these numbers (n,), one array for each value."""
    e1, e2, area = edges(corners)
    area = np.where(np.abs(area) < 0.05, -0.05, area)  # slivers: bounded slopes
    dx, dy = (places - corners[number, 0]).T
    b1 = np.clip(dx * (e2[:, 1] / area)[number] - dy * (e2[:, 0] / area)[number], 0, 1).astype(np.float32)
    b2 = np.clip(dy * (e1[:, 0] / area)[number] - dx * (e1[:, 1] / area)[number], 0, 1).astype(np.float32)
    base, step1, step2 = values[:, 0], values[:, 1] - values[:, 0], values[:, 2] - values[:, 0]
    return [base[number, k] + b1 * step1[number, k] + b2 * step2[number, k] for k in range(values.shape[-1])]
