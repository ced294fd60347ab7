"""A copy of a network that only predicts, and does it fast.

One planner picks for each level of the network the way in which the device runs it fastest. Each way is a small class with the
same calls, tested against the plain module. `optimize_for_inference` is public in `unetlib.inference`.

| room | |
|---|---|
| `network` | the copy: the U-Net's forward pass over its levels |
| `planner` | which way suits a level, on a CPU by a short trial |
| `folding` | what a level computes: tensors, with batch norm folded into them |
| `levels` | what every way offers, and the plain one: PyTorch's own operations |
| `onednn` | direct convolutions of oneDNN, on CPUs |
| `nnpack`, `nnpack_kernels` | Winograd's method by NNPACK, on CPUs |
| `native`, `native_kernels` | Winograd's method by this library's own code, on CPUs |
| `native_library` | that code, `native_kernels.cpp`, compiled and loaded |
| `cuda`, `cuda_kernels` | half precision on GPUs, by cuDNN and by kernels in Triton |
| `openvino` | the whole network by another engine |
| `replays`, `native_replay` | small batches: the work of a pass recorded once, and made again without Python |
| `pool` | memory for maps that is used again |
| `cached` | the copy that `predict` makes and keeps by itself |
"""

from .network import FastUNet as FastUNet, optimize_for_inference as optimize_for_inference
