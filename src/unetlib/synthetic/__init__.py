"""Studio-car scenes with exact masks, in the layout of Kaggle's Carvana Image Masking Challenge.

No photograph is involved: a car is a side profile swept into a mesh, its paintwork a flat drawing wrapped round the
mesh, and picture and mask come from the same projected triangles. The same seed, car and view give the same scene at
any size. The scenes serve tests, first steps and documentation; they are no substitute for photographs.

The rooms, in the order in which a scene is made; each knows only rooms above it:

- `geometry`: lines and turns.
- `car`: what a car is, and how a seed draws one.
- `sheet`: the flat sheet that takes a car's drawing: its panels and its pen.
- `drawing`: the drawing of a car on its sheet.
- `surfaces`: the mesh of a car, each point with its place on the sheet.
- `camera`: points to pixels and back.
- `studio`: wall, floor and light, and how a seed draws them.
- `backdrop`: the studio painted, with the car's shadow.
- `light`: what a sample of the car looks like in the studio.
- `painting`: the car painted, with the share of each pixel that it covers.
- `scene`: all of it together, `render_scene`.
- `carvana`: the files, `write_carvana`.

NumPy and Pillow are all that it needs.
"""

from __future__ import annotations

from .carvana import car_name, write_carvana
from .scene import VIEWS, render_scene

__all__ = ["VIEWS", "car_name", "render_scene", "write_carvana"]
