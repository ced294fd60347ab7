"""A copy of a network that only predicts, and does it fast.

`optimize_for_inference` is public in `unetlib.inference`; it folds batch norm (`folding`) and picks for each level of the
network (`levels`) the way in which the device at hand runs it fastest (`network`).
"""

from .network import FastUNet as FastUNet, optimize_for_inference as optimize_for_inference
