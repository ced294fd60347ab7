"""Weights by name: finding, reading and writing a model folder.

A model folder holds `config.json`, `model.safetensors` and `README.md` (the model card). The config is repeated in the
safetensors header, so that the weights file alone is enough. Nothing is ever unpickled into code: safetensors, or `torch.load`
with `weights_only=True`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import Preprocessing, UNetConfig
from .convert import convert

if TYPE_CHECKING:
    from .unet import UNet

ZOO = Path(__file__).parent / "zoo"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".tar", ".ckpt", ".bin")


class Pretrained(NamedTuple):
    """What a name stands for: a network's config, its tensors by name as they are stored, and its preprocessing."""

    config: UNetConfig
    state_dict: dict[str, Tensor]
    preprocessing: Preprocessing


def list_pretrained() -> list[str]:
    """Names of the models that come with the library, for `UNet.from_pretrained`.

    Example:
        >>> "carvana" in list_pretrained()
        True
    """
    return sorted(config.parent.name for config in ZOO.glob(f"*/{CONFIG}"))


def load_pretrained(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Pretrained:
    """Find and read a model; `UNet.from_pretrained` builds the network from it.

    The form of `name` decides where it is looked for, so that a folder called `carvana` in the working directory never stands
    in for the zoo's model: a bare word is a zoo name; a path object, or a string with a separator or the suffix of a weights
    file, is a path; `owner/name` that is no such folder is a Hugging Face Hub repository.

    Args:
        name: zoo name, path or Hub repository.
        revision: branch, tag or commit of a Hub repository.
        cache_dir: folder of the Hub's cache.
        token: Hub token; None takes the one that is logged in.
        local_files_only: do not use the network.
        force_download: download again what the cache has.

    Raises:
        FileNotFoundError: for a path that does not exist.
        ValueError: for an unknown name, or a file that is not a U-Net's weights.
        OSError: for a Hub repository that cannot be reached.
    """
    if not isinstance(name, str):
        return _load_path(Path(name))
    if name in list_pretrained():
        return _load_path(ZOO / name)
    if _is_repository(name) and not Path(name).exists():
        return _load_hub(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    if "/" in name or os.sep in name or _is_file_name(name):
        return _load_path(Path(name))
    near = difflib.get_close_matches(name, list_pretrained(), n=1)
    raise ValueError(
        f"no model is called {name!r}; the zoo has: {', '.join(list_pretrained()) or 'no models'}."
        + (f" Did you mean {near[0]!r}?" if near else "")
        + f" For a folder of yours type './{name}', for a Hugging Face Hub repository 'owner/name'."
    )


def save_pretrained(
    model: UNet, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, card: str | None = None
) -> Path:
    """Write a model folder: `config.json`, `model.safetensors` and `README.md`.

    All files are written before the first takes its name, so that a call that fails leaves the folder as it was.

    Args:
        model: the network to save.
        folder: where to; made where it does not exist.
        dtype: type in which convolution weights are stored (`torch.float16` halves the file); None keeps theirs. Everything of
            one dimension (biases, norms) keeps its type. Loading gives float32 again.
        card: text of the model card; None writes a short one, unless the folder has a card already.

    Returns:
        The folder.

    Raises:
        ValueError: for a `dtype` that is no floating point type.
        OSError: where the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from unetlib import UNet
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in UNet(features=(8,)).save_pretrained(folder).iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating point type such as torch.float16, got {dtype!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {
            "unetlib": version("unetlib"),
            "model": model.config.to_dict(),
            "preprocessing": model.preprocessing.to_dict(),
        },
        indent=2,
    )
    tensors = {
        key: (value.to(dtype) if dtype is not None and value.ndim > 1 else value).detach().cpu().contiguous()
        for key, value in model.state_dict().items()
    }
    if card is None and not (folder / CARD).exists():
        card = _default_card(model, folder.resolve().name)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        made = Path(name)
        (made / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt", "unetlib": text}))
        (made / CONFIG).write_text(text + "\n", encoding="utf-8")
        shutil.copymode(made / CONFIG, made / WEIGHTS)  # safetensors lets nobody but the owner read
        if card is not None:
            (made / CARD).write_text(card, encoding="utf-8")
        for file in made.iterdir():
            file.replace(folder / file.name)
    return folder


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not _is_file_name(name)


def _is_file_name(name: str) -> bool:
    return name.endswith((".safetensors", *CHECKPOINT_SUFFIXES))


def _load_path(path: Path) -> Pretrained:
    path = path.expanduser()
    if path.is_dir():
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{path} is no model folder: it lacks {' and '.join(missing)}")
        return _load_safetensors(path / WEIGHTS, (path / CONFIG).read_bytes())
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}; the zoo's models are: {', '.join(list_pretrained())}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(
            f"{path} is no weights file by its name; expected .safetensors, or a checkpoint ending in "
            + ", ".join(CHECKPOINT_SUFFIXES)
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, for code in a pickle as for a damaged file
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values: "
            + (
                f"it asks for the code {code[1]}, and code in a checkpoint is never run; "
                "save its state dict alone with torch.save(model.state_dict(), path)"
                if code
                else f"it is damaged, or something else ({type(error).__name__})"
            )
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a state dict or a dictionary that has one")
    return _convert(checkpoint, path)


def _load_safetensors(path: Path, config: str | bytes | None = None) -> Pretrained:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dictionary
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from error
    if config is None:
        config = header.get("unetlib")
    if config is None:
        return _convert(tensors, path)
    try:
        values = json.loads(config)
        if not isinstance(values, dict) or "model" not in values:
            raise ValueError("expected a JSON object with 'model' and 'preprocessing'")
        model = UNetConfig.from_dict(values["model"])
        preprocessing = Preprocessing.from_dict(values.get("preprocessing", {}))
        preprocessing.check_channels(model.in_channels, model.out_channels)
    except ValueError as error:
        raise ValueError(f"the config of {path} is not one of a U-Net: {error}") from error
    return Pretrained(model, tensors, preprocessing)


def _convert(checkpoint: Mapping[str, Any], path: Path) -> Pretrained:
    try:
        converted = convert(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Pretrained(converted.config, converted.state_dict, converted.preprocessing)


def _load_hub(repo: str, **options: Any) -> Pretrained:
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(repo, CONFIG, **options)
        weights = hf_hub_download(repo, WEIGHTS, **options)
    except Exception as error:  # the client raises its own kinds and those of the HTTP library under it
        raise OSError(
            f"there is no folder {repo!r}, and the Hugging Face Hub gave no {CONFIG} and {WEIGHTS} of that name: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]} "
            f"Without a network, name a model of the zoo ({', '.join(list_pretrained())}) or a local folder."
        ) from error
    return _load_safetensors(Path(weights), Path(config).read_bytes())


def _default_card(model: UNet, name: str) -> str:
    config, preprocessing = model.config, model.preprocessing
    if preprocessing.size is not None:
        size = "at {}x{}".format(*preprocessing.size)
    else:
        size = "at its own size" if preprocessing.scale is None else f"at {preprocessing.scale} times its size"
    return f"""---
library_name: unetlib
pipeline_tag: image-segmentation
tags:
- unet
---

# {name}

A U-Net of {sum(p.numel() for p in model.parameters()):,} parameters: widths {config.features}, bottleneck {config.bottleneck},
{config.in_channels} channels in, {config.out_channels} out. It sees a picture {size}.

```python
from unetlib import UNet

mask = UNet.from_pretrained("path/to/{name}").predict("picture.jpg")
```
"""
