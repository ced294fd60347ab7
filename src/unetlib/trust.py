"""What is asked of files from others before they are believed.

Weights are data and never code: safetensors, or `torch.load` with `weights_only=True`. What a file says of itself is held
against what it holds, before memory is asked for. Every refusal is a ValueError that names the file and what is wrong with it.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import Preprocessing, UNetConfig
from .version import installed_version

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".bin")

TEXT_LIMIT = 2**20  # bytes of a config, a card or a safetensors header; those of a U-Net have some thousands
DEPTH_LIMIT = 30  # levels: such a network needs pictures of 2**30 pixels a side
PIXEL_LIMIT = 2**28  # of a picture after resizing: 16384 x 16384
SCALE_LIMIT = 16.0

DTYPES = {  # what safetensors calls them, and PyTorch
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Weights(NamedTuple):
    """What a weights file holds: its tensors by name, and the strings in its header."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def is_weights_name(name: str) -> bool:
    """Whether a string ends like the name of a weights file.

    Example:
        >>> is_weights_name("model.safetensors"), is_weights_name("runs/my_checkpoint.pth.tar"), is_weights_name("carvana")
        (True, True, False)
    """
    return name.endswith((".safetensors", *CHECKPOINT_SUFFIXES))


def read_small(path: Path) -> bytes:
    """The bytes of a small file; one of more than `TEXT_LIMIT` is not read to its end.

    Raises:
        ValueError: for a larger file.
    """
    with path.open("rb") as file:
        data = file.read(TEXT_LIMIT + 1)
    if len(data) > TEXT_LIMIT:
        raise ValueError(f"{path} has more than {TEXT_LIMIT:,} bytes")
    return data


def read_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object from a stranger.

    Args:
        text: JSON, of at most `TEXT_LIMIT` bytes.

    Raises:
        ValueError: for anything but an object, a name that occurs twice in one object, and nesting too deep to read.

    Example:
        >>> read_json('{"size": 3, "size": 4}')
        Traceback (most recent call last):
        ...
        ValueError: 'size' occurs twice
    """
    if len(text) > TEXT_LIMIT:
        raise ValueError(f"it has more than {TEXT_LIMIT:,} bytes")
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} occurs twice")
        values[name] = value
    return values


def read_config(values: Mapping[str, Any]) -> tuple[UNetConfig, Preprocessing]:
    """The network and preprocessing of a `config.json` of ours.

    Args:
        values: a JSON object with "model", and perhaps "preprocessing" and "unetlib", the version that wrote it.

    Raises:
        ValueError: for a config of a newer version, fields that are not known or not possible, a network deeper than
            `DEPTH_LIMIT`, or pictures larger than `PIXEL_LIMIT`.

    Example:
        >>> config, preprocessing = read_config({"unetlib": "0.1.0", "model": {"features": [8, 16]}})
        >>> config.features
        (8, 16)
    """
    check_version(values.get("unetlib", installed_version()))
    try:
        config = UNetConfig.from_dict(values.get("model"))  # type: ignore[arg-type]  # refuses None
        preprocessing = Preprocessing.from_dict(values.get("preprocessing", {}))
        preprocessing.check_channels(config.in_channels, config.out_channels)
    except (TypeError, OverflowError) as error:  # numbers beyond what floats hold, lists where numbers are expected
        raise ValueError(f"a value is not possible ({error})") from error
    if config.depth > DEPTH_LIMIT:
        raise ValueError(f"features has {config.depth} levels; more than {DEPTH_LIMIT} fit no picture")
    if math.prod(preprocessing.size or ()) > PIXEL_LIMIT or (preprocessing.scale or 1.0) > SCALE_LIMIT:
        raise ValueError(
            f"pictures are enlarged too far (size={preprocessing.size}, scale={preprocessing.scale}); "
            f"the limits are {PIXEL_LIMIT:,} pixels and a scale of {SCALE_LIMIT:g}"
        )
    return config, preprocessing


def check_version(written: object) -> None:
    """Refuse what a newer minor version has written; its fields may mean something else.

    Args:
        written: the version that wrote a config, such as "0.1.0".

    Raises:
        ValueError: for a newer one, and for what is no string.
    """
    if not isinstance(written, str):
        raise ValueError(f"'unetlib' must be the version that wrote it, such as '0.1.0', got {written!r}")
    theirs, ours = (re.match(r"(\d{1,6})\.(\d{1,6})", text) for text in (written, installed_version()))
    if theirs and ours and tuple(map(int, theirs.groups())) > tuple(map(int, ours.groups())):
        raise ValueError(f"unetlib {written[:20]} wrote it, and this is {installed_version()}; install a newer version")


def read_safetensors(path: Path, *, header_only: bool = False) -> Weights:
    """The tensors of a safetensors file, mapped from the file where the platform can.

    Args:
        path: the file.
        header_only: read the header alone, and give tensors on the "meta" device: shapes and types without data.

    Raises:
        ValueError: for a damaged file, a header of more than `TEXT_LIMIT` bytes, or a key that occurs twice.
    """
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            if header_only:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it is no dictionary
                described = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
                return Weights(on_meta(described), file.metadata() or {})
            return Weights({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def on_meta(described: Mapping[str, tuple[str, list[int]]]) -> dict[str, Tensor]:
    """Tensors without data for (safetensors' name of the type, shape).

    Example:
        >>> on_meta({"bias": ("F32", [4])})["bias"].shape
        torch.Size([4])
    """
    return {key: torch.empty(shape, dtype=_dtype(name), device="meta") for key, (name, shape) in described.items()}


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"tensors of type {name} are not known; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_header(path: Path) -> None:
    """A small header with no key twice; safetensors checks the rest, offsets against the file's length among it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(TEXT_LIMIT, os.fstat(file.fileno()).st_size):
            raise ValueError(f"its header claims {length:,} bytes")
        for name, entry in read_json(file.read(length)).items():
            if name != "__metadata__":
                _dtype(entry["dtype"] if isinstance(entry, dict) and isinstance(entry.get("dtype"), str) else "?")


def read_checkpoint(path: Path, *, header_only: bool = False) -> Mapping[str, Any]:
    """The dictionary that `torch.save` wrote, without running code; NumPy's numbers in it become Python's.

    Args:
        path: the file.
        header_only: give tensors on the "meta" device.

    Raises:
        ValueError: for code in the pickle, a damaged file, one whose parts unpack to more than its size, or no dictionary.
    """
    zipped, device = zipfile.is_zipfile(path), "meta" if header_only else "cpu"
    try:
        if zipped:
            _check_archive(path)
        checkpoint = _load(path, device, mmap=zipped and not header_only)
    except Exception as error:  # torch.load raises many kinds, for code in a pickle as for a damaged file
        why = f"it is damaged, or something else ({type(error).__name__})"
        if code := code_asked_for(error):
            why = (
                f"it asks for the code {code}, and code in a checkpoint is never run; save its state dict alone, once, if you "
                f"trust the file: torch.save(torch.load({str(path)!r}, map_location='cpu', weights_only=False)['state_dict'], "
                "'weights.pth'), with its own key for 'state_dict', or with .state_dict() instead where it holds a whole model"
            )
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors and plain values: {why}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a state dict or a dictionary that has one")
    _check_plain(checkpoint, path, device)
    return checkpoint


def _load(path: Path, device: str, *, mmap: bool) -> Any:
    load = partial(torch.load, path, map_location=device, weights_only=True, mmap=mmap)
    try:
        return load()
    except UnpicklingError as error:
        if code_asked_for(error) not in _NUMPY:
            raise
    # Only stand-ins go by these names: NumPy's own would believe a dtype of which a stranger says that it holds pointers.
    # The names are the whole process's, so that another thread would lose them in the middle.
    with _ONE_AT_A_TIME, torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _NUMPY.items()]):
        return load()


class _NumberType:
    """The `numpy.dtype` of a plain number, as a pickle writes it."""

    def __init__(self, name: str, *_: object) -> None:
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", name):
            raise UnpicklingError(f"GLOBAL numpy.dtype is allowed for numbers alone, not for {name!r}")
        self.type = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.type = self.type.newbyteorder(state[1])


def _number(kind: Any, data: bytes) -> Any:
    if type(kind) is not _NumberType:
        raise UnpicklingError("GLOBAL numpy.dtype is allowed for numbers alone")
    return np.frombuffer(data, kind.type, count=1)[0].item()


_ONE_AT_A_TIME = threading.Lock()
_NUMPY: dict[str, Any] = {  # what a pickled scalar asks for, under NumPy 1 and 2
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "numpy.dtype": _NumberType,
}


def code_asked_for(error: Exception) -> str | None:
    """The name of what a pickle wants to run, of which `torch.load` speaks in its error; None where that is another.

    Example:
        >>> code_asked_for(ValueError("Unsupported global: GLOBAL os.system was not an allowed global by default."))
        'os.system'
    """
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found and found[1]


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError(f"its parts unpack to {unpacked:,} bytes")


def _check_plain(checkpoint: Mapping[str, Any], path: Path, device: str, levels: int = 3) -> None:
    """Every tensor is dense, real, has its data in the file, and none of it twice."""
    for key, value in checkpoint.items():
        if isinstance(value, Mapping) and levels:
            _check_plain(value, path, device, levels - 1)
        elif isinstance(value, Tensor):
            plain = value.layout is torch.strided and value.device.type == device and not value.is_complex()
            if not plain or value.is_quantized or value.is_nested:
                raise ValueError(f"{path}: {key!r} is not a plain tensor of real numbers")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"{path}: {key!r} claims the shape {tuple(value.shape)}, and has less data than that")


def check_size(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors of more bytes than their file, such as many that share their data.

    Raises:
        ValueError: for such tensors.
    """
    described, size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), path.stat().st_size
    if described > size:
        raise ValueError(f"{path} describes tensors of {described:,} bytes, and has {size:,}")


def check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str) -> None:
    """Every tensor that the network has is there, with its shape, and no other.

    Args:
        expected: the network's state dict, on any device.
        found: the tensors of a file.
        name: what error messages call the weights.

    Raises:
        ValueError: naming the first keys that are missing, left over, or of another shape or kind.
    """
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    other = [
        f"{key} {_form(found[key])} where the config asks for {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and not _fits(tensor, found[key])
    ]
    wrong = [
        f"{kind} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for kind, keys in (("missing", missing), ("unexpected", unknown), ("of another shape or type:", other))
        if keys
    ]
    if wrong:
        numbers = [sum(tensor.numel() for tensor in tensors.values()) for tensors in (expected, found)]
        raise ValueError(
            f"the weights of {name!r} do not fit their config, which asks for {numbers[0]:,} numbers where there are "
            f"{numbers[1]:,}: {'; '.join(wrong)}"
        )


def _fits(expected: Tensor, found: Tensor) -> bool:
    return found.shape == expected.shape and found.is_floating_point() >= expected.is_floating_point()


def _form(tensor: Tensor) -> str:
    return f"is {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def check_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights with NaN or infinity, which make every mask wrong without a word.

    Raises:
        ValueError: naming the first tensors that have them.
    """
    bad = [key for key, tensor in tensors.items() if tensor.numel() and not _is_finite(tensor)]
    if bad:
        raise ValueError(
            f"the weights of {name!r} hold NaN or infinity in {', '.join(bad[:3])}"
            + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
            + "; the training that made them has failed. To load them all the same pass allow_nonfinite=True"
        )


def _is_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # both are NaN where any number is; no temporary as large as the tensor
    return math.isfinite(low) and math.isfinite(high)
