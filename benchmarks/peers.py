"""Who takes part in forward.py: one network's weights in each way to run it, as functions from a batch to logits.

All are handed the same float32 pictures (N, 3, H, W), contiguous, on the device, and turn them into the precision and layout
they like themselves, so that this is timed for all.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import LAYOUTS, PRECISIONS, file_part, is_cuda, sizes
from study import DoubleConv, StudyUNet, randomize
from torch import Tensor, nn

import unetlib.inference
from unetlib import UNet
from unetlib.convert import convert, export_state_dict

Forward = Callable[[Tensor], Tensor]
STUDY = "study"  # the network of that name, and the contestant that all others are held against
NARROW = "narrow"  # the same network with a quarter of its widths


class Case(NamedTuple):
    """What a pass is timed with; the shape is BATCHxHEIGHTxWIDTH."""

    network: str
    shape: str
    precision: str


class NotHere(Exception):
    """A contestant that cannot show a case, and why."""


class Network(NamedTuple):
    """One network's weights in the study's module and in ours; float32, on the CPU, in evaluation mode.

    Where the study's module cannot hold them, as those of a network of patches, `UNet` itself stands in its place.
    """

    study: nn.Module
    ours: UNet


def load_network(name: str) -> Network:
    """The study's network with random weights for "study" and "narrow"; else what `UNet.from_pretrained` finds by the name."""
    if name in (STUDY, NARROW):
        widths: dict[str, Any] = {"features": (16, 32, 64, 128)} if name == NARROW else {}
        network = Network(randomize(StudyUNet(**widths)), UNet(**widths).eval())
        network.ours.load_state_dict(convert(network.study.state_dict()).state_dict)
        return network
    model = UNet.from_pretrained(name)
    try:
        state = export_state_dict(model, "study")
    except ValueError:
        return Network(copy.deepcopy(model), model)
    module = StudyUNet(3, model.config.out_channels, model.config.features, model.config.bottleneck).eval()
    module.load_state_dict(state)
    return Network(module, model)


# ---- modules -----------------------------------------------------------------------------------------------------------


class MilesialUNet(nn.Module):
    """milesial's layout (Pytorch-UNet) in its form with transposed convolutions, written again from its description.

    It computes what the study's module does, with the widths of any such network: its own are 64 to 1024. A map that is smaller
    than its skip is padded with zeros around it, at every level and always.
    """

    def __init__(self, features: tuple[int, ...], bottleneck: int, out_channels: int) -> None:
        super().__init__()
        widths = (*features, bottleneck)
        self.inc = self.block(3, widths[0])
        for level, (before, width) in enumerate(pairwise(widths), start=1):
            down = nn.Module()
            down.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), self.block(before, width))
            setattr(self, f"down{level}", down)
        for level, (below, width) in enumerate(zip(widths[:0:-1], widths[-2::-1]), start=1):
            up = nn.Module()
            up.up = nn.ConvTranspose2d(below, width, kernel_size=2, stride=2)
            up.conv = self.block(2 * width, width)
            setattr(self, f"up{level}", up)
        self.outc: Any = nn.Module()
        self.outc.conv = nn.Conv2d(widths[0], out_channels, kernel_size=1)
        self.depth = len(features)

    @staticmethod
    def block(before: int, width: int) -> Any:
        """Two convolutions under the name that they have there."""
        block = nn.Module()
        block.double_conv = DoubleConv(before, width).conv
        return block

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, out_channels, H, W) for pictures (N, 3, H, W)."""
        skips = [self.inc.double_conv(x)]
        for level in range(1, self.depth + 1):
            pool, block = getattr(self, f"down{level}").maxpool_conv
            skips.append(block.double_conv(pool(skips[-1])))
        x = skips.pop()
        for level, skip in enumerate(reversed(skips), start=1):
            up = getattr(self, f"up{level}")
            x = up.up(x)
            rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
            x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            x = up.conv.double_conv(torch.cat([skip, x], dim=1))
        return self.outc.conv(x)


def milesial_module(network: Network) -> MilesialUNet:
    config = network.ours.config
    if config.patch_size > 1:
        raise NotHere("milesial's layout has no patches")
    module = MilesialUNet(config.features, config.bottleneck, config.out_channels)
    module.load_state_dict(export_state_dict(network.ours, "milesial", any_size=False))
    return module.eval()


def monai_module(network: Network) -> nn.Module:
    """MONAI's BasicUNet in its nearest form: its convolutions have biases, and its last upsampling keeps its channels."""
    config = network.ours.config
    if config.depth != 4:
        raise NotHere(f"MONAI's BasicUNet has four levels below the first, this network {config.depth}")
    try:
        from monai.networks.nets import BasicUNet
    except ModuleNotFoundError as error:
        raise NotHere("MONAI is not installed") from error
    widths = (*config.features, config.bottleneck, config.features[0])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        return randomize(BasicUNet(2, 3, config.out_channels, widths, act=("relu", {"inplace": True}), norm="batch"))


# ---- ways to run them --------------------------------------------------------------------------------------------------


def run(module: nn.Module, precision: str, device: str, layout: str = "contiguous") -> Forward:
    """Weights and pictures in the precision and layout, without autocast."""
    to: dict[str, Any] = {"dtype": PRECISIONS[precision], "memory_format": LAYOUTS[layout]}
    module = copy.deepcopy(module).to(device, **to)
    return lambda x: module(x.to(**to))


def study(network: Network, case: Case, device: str, folder: Path) -> Forward:
    return run(network.study, case.precision, device)


def channels_last(network: Network, case: Case, device: str, folder: Path) -> Forward:
    return run(network.study, case.precision, device, "channels_last")


def autocast(network: Network, case: Case, device: str, folder: Path) -> Forward:
    dtype = PRECISIONS[case.precision]
    if dtype == torch.float32:
        raise NotHere(f"autocast has no {case.precision}")
    module = copy.deepcopy(network.study).to(device)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return module(x)

    return forward


def compiled(network: Network, case: Case, device: str, folder: Path) -> Forward:
    """Each in the way that is known to be its fastest; Triton's own convolutions were wrong in torch 2.11."""
    options: dict[str, Any] = {"freezing": True}
    if is_cuda(device):
        from torch._inductor import list_mode_options

        options = {**list_mode_options("max-autotune"), "max_autotune_conv_backends": "ATEN"}
    to: dict[str, Any] = {"dtype": PRECISIONS[case.precision], "memory_format": torch.channels_last}
    module = torch.compile(copy.deepcopy(network.study).to(device, **to), dynamic=False, options=options)
    return lambda x: module(x.to(**to))


def milesial(network: Network, case: Case, device: str, folder: Path) -> Forward:
    multiple = network.ours.config.stride
    if any(size % multiple for size in sizes(case.shape)[1:]):
        raise NotHere(f"milesial's layout pads where a side is no multiple of {multiple}: another function than the study's")
    return run(milesial_module(network), case.precision, device)


def monai(network: Network, case: Case, device: str, folder: Path) -> Forward:
    return run(monai_module(network), case.precision, device)


def onnxruntime(network: Network, case: Case, device: str, folder: Path) -> Forward:
    if is_cuda(device) or case.precision != "float32":
        raise NotHere("ONNX Runtime is measured on CPUs, in float32")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx.export needs it
    except ModuleNotFoundError as error:
        raise NotHere(f"{error.name} is not installed") from error
    file = export_file(folder, case, "onnx")
    if not file.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(network.ours, (example(case),), input_names=["x"], dynamo=True, verbose=False)
        assert program is not None  # as `dynamo` is asked for
        program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def openvino(network: Network, case: Case, device: str, folder: Path) -> Forward:
    hints = {"float32": "f32", "bfloat16": "bf16"}
    if is_cuda(device) or case.precision not in hints:
        raise NotHere("OpenVINO is measured on CPUs, in float32 and bfloat16")
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise NotHere("openvino is not installed") from error
    file = export_file(folder, case, "xml")
    if not file.exists():
        x = example(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing the study's `if` is meant: the shape is fixed
            model = openvino.convert_model(copy.deepcopy(network.study), example_input=x, input=[tuple(x.shape)])
        openvino.save_model(model, file, compress_to_fp16=False)
    options = {"INFERENCE_PRECISION_HINT": hints[case.precision], "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    infer = openvino.Core().compile_model(file, "CPU", options)
    return lambda x: torch.from_numpy(infer(x.numpy())[0].copy())


def ours(network: Network, case: Case, device: str, folder: Path) -> Forward:
    return run(network.ours, case.precision, device)


def optimized(network: Network, case: Case, device: str, folder: Path, **options: Any) -> Forward:
    dtype = None if PRECISIONS[case.precision] == torch.float32 else PRECISIONS[case.precision]
    model = copy.deepcopy(network.ours).to(device)
    return unetlib.inference.optimize_for_inference(model, dtype=dtype, **options)


def optimized_compiled(network: Network, case: Case, device: str, folder: Path) -> Forward:
    return optimized(network, case, device, folder, compile=True)


def optimized_openvino(network: Network, case: Case, device: str, folder: Path) -> Forward:
    try:
        return optimized(network, case, device, folder, backend="openvino")
    except (ImportError, ValueError) as reason:
        raise NotHere(str(reason)) from reason


def export_file(folder: Path, case: Case, suffix: str) -> Path:
    """Where the network lies for this shape, whatever the precision, for this process and those that measure memory."""
    return folder / f"{file_part(case.network)}-{case.shape}.{suffix}"


def example(case: Case) -> Tensor:
    """A batch of noise in the case's shape, always the same."""
    batch, height, width = sizes(case.shape)
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


OTHERS: dict[str, Callable[[Network, Case, str, Path], Forward]] = {
    STUDY: study,
    "channels_last": channels_last,
    "autocast": autocast,
    "compiled": compiled,
    "milesial": milesial,
    "monai": monai,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
OURS = {
    "unetlib": ours,
    "optimized": optimized,
    "optimized_compiled": optimized_compiled,
    "optimized_openvino": optimized_openvino,
}
PEERS = OTHERS | OURS
OTHER_FUNCTION = {"monai": monai_module}  # another network, with weights of its own: its logits are not compared
