"""The studio painted, with the car's shadow but without the car.

What is smooth is made on a coarse grid and enlarged; what is sharp is drawn at the full size.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .camera import Camera
from .car import Car
from .geometry import Array, turn
from .studio import Studio

COARSE = 240  # pixels of the coarse grids


def paint_studio(studio: Studio, car: Car, angle: float) -> Image.Image:
    """Paint the studio around a car that the turntable has turned by an angle."""
    camera, (height, width) = studio.camera, studio.camera.size
    # Lines and letters have no width under a pixel: a small studio is painted larger and reduced.
    factor = max(1, min(math.ceil(480 / camera.unit), 4096 // max(height, width)))
    studio = replace(studio, camera=replace(camera, size=(height * factor, width * factor)))
    image = paint_wall(studio)
    if studio.sign:
        draw_sign(image, studio)
    lay_floor(image, studio)
    draw_turntable(image, studio, angle)
    cast_shadow(image, studio, car, angle)
    return image.reduce(factor)


def paint_wall(studio: Studio) -> Image.Image:
    """Paint the wall with its seams, over the whole picture."""
    camera, (height, width) = studio.camera, studio.camera.size
    _, v, fade = coarse_grid(camera)
    image = enlarge(studio.wall * (1.02 - 0.1 * np.abs(v + 0.25)) * fade, studio)
    draw = ImageDraw.Draw(image, "RGBA")
    for seam in (-0.31, -0.02, 0.27):
        x = width / 2 + (seam + studio.bow / 5) * camera.unit
        draw.line([(x, 0), (x, height)], (90, 90, 95, 26), thickness(camera, 900))
    return image


def draw_sign(image: Image.Image, studio: Studio) -> None:
    """Letter the wall above its foot, every other letter bold."""
    (height, width), unit = studio.camera.size, studio.camera.unit
    draw = ImageDraw.Draw(image, "RGBA")
    font = ImageFont.load_default(max(1.0, studio.sign_size * unit))
    length = font.getlength(studio.sign)
    spread = min(1.5, 0.94 * unit / length)
    foot = height / 2 + studio.horizon * unit
    ink = (studio.sign_tone, studio.sign_tone, studio.sign_tone + 5, 235)
    for k, letter in enumerate(studio.sign):
        x = width / 2 + (font.getlength(studio.sign[:k]) - length / 2) * spread
        bold = round(0.004 * unit * (k % 2))
        draw.text((x, foot - 0.004 * unit), letter, ink, font, anchor="ls", stroke_width=bold)


def lay_floor(image: Image.Image, studio: Studio) -> None:
    """Paint the floor over the lower part of a wall. It rises into the wall: a soft edge."""
    (height, width), unit = studio.camera.size, studio.camera.unit
    u, v, fade = coarse_grid(studio.camera)
    pool = 0.1 * np.exp(-((u * 2) ** 2) - (v * 5) ** 2)  # of light, about the middle
    floor = studio.floor * (1 - 0.25 * (v - studio.horizon)) * fade + pool
    aside = (np.arange(width) + 0.5 - width / 2) / unit
    edge = height / 2 + studio.horizon * unit + studio.bow * aside**2 * unit
    below = (np.arange(height, dtype=np.float32)[:, None] + 0.5 - edge.astype(np.float32)) / (0.008 * unit) + 0.5
    image.paste(enlarge(floor, studio), mask=Image.fromarray((np.clip(below, 0, 1) * 255).astype(np.uint8)))


def draw_turntable(image: Image.Image, studio: Studio, angle: float) -> None:
    """Draw the turntable, its rim and its joints, on the floor."""
    camera, draw = studio.camera, ImageDraw.Draw(image, "RGBA")
    around = np.linspace(0, 2 * math.pi, 121)
    ring = np.stack([np.cos(around), np.sin(around), 0 * around], -1)
    table, rim = outline(ring * studio.table, camera), outline(ring * (studio.table + 0.04), camera)
    tone = 255 if studio.table_tone > 0 else 0
    draw.polygon(table, (tone, tone, tone, int(255 * abs(studio.table_tone))))
    draw.line(table, (50, 50, 50, 110), thickness(camera, 500))
    draw.line(rim, (240, 240, 240, 120), thickness(camera, 700))
    for k in range(8):
        joint = turn(np.array([[0.3, 0, 0], [studio.table, 0, 0]]), angle + k * math.pi / 4)
        draw.line(outline(joint, camera), (40, 40, 40, 20), thickness(camera, 900))


def cast_shadow(image: Image.Image, studio: Studio, car: Car, angle: float) -> None:
    """Darken the floor under the car: dark under the sills, a wide soft skirt away from the main lamp."""
    height, width = studio.camera.size
    unit = max(studio.camera.unit, max(height, width) / 16)  # in thin pictures one would make the grid huge
    coarse = max(2, round(COARSE * width / unit)), max(2, round(COARSE * height / unit))
    light = np.ones((coarse[1], coarse[0]))
    for grow, blur, strength in ((-0.05, 0.009, 0.75), (0.12, 0.022, 0.45), (0.5, 0.05, 0.3)):
        front, rear, side = car.front - grow, car.rear + grow, car.half_width + grow
        foot = turn(np.array([[front, -side, 0], [rear, -side, 0], [rear, side, 0], [front, side, 0]]), angle)
        foot -= np.array([*studio.key[:2], 0]) * max(grow, 0) * 0.6
        shade = Image.new("L", coarse, 0)
        shape = np.array(outline(foot, studio.camera)) * coarse[0] / width
        ImageDraw.Draw(shade).polygon(shape.tolist(), int(255 * strength * studio.shadow))
        light *= 1 - np.asarray(shade.filter(ImageFilter.GaussianBlur(blur * COARSE))) / 255
    dark = Image.fromarray(((1 - light) * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((18, 18, 20), mask=dark)


def coarse_grid(camera: Camera) -> tuple[Array, Array, Array]:
    """The pixels of a coarse grid.

    Returns:
        Units right of the picture's middle, (columns,), and below it, (rows, 1), and how the light falls off towards
        the corners, (rows, columns).
    """
    rows, columns = (max(2, round(side * COARSE / max(camera.size))) for side in camera.size)
    v = ((np.arange(rows) + 0.5) / rows - 0.5)[:, None] * camera.size[0] / camera.unit
    u = ((np.arange(columns) + 0.5) / columns - 0.5) * camera.size[1] / camera.unit
    return u, v, 1 - 0.12 * (u**2 + v**2) / 0.36


def enlarge(tones: Array, studio: Studio) -> Image.Image:
    """Tones on a coarse grid -> a picture in the studio's light, at the full size."""
    height, width = studio.camera.size
    colors = np.clip(tones[..., None] * np.array(studio.cast) * studio.exposure, 0, 1) * 255
    return Image.fromarray(colors.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def outline(points: Array, camera: Camera) -> list[float]:
    """World points (n, 3) -> column, row, column, row, ... as Pillow's pen takes them."""
    places: list[float] = camera.project(points)[0].ravel().tolist()
    return places


def thickness(camera: Camera, part: int) -> int:
    """A line's thickness in pixels: a part of a unit, such as its 900th, and no less than a pixel."""
    return max(1, round(camera.unit / part))
