"""Weights by name: finding, reading and writing a model folder.

A model folder holds `config.json`, `model.safetensors` and `README.md` (the model card), the files of a model repository on the
Hugging Face Hub. The config is repeated in the safetensors header, so that the weights file alone is enough.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from . import hub, trust
from .adapt import FIRST, adapt
from .arguments import check_device, check_unet
from .cards import model_card, read_card
from .config import Preprocessing, UNetConfig
from .convert import converted
from .structure import changed_module, parts_of
from .version import installed_version

if TYPE_CHECKING:
    from .unet import UNet

    Model = TypeVar("Model", bound=UNet)

logger = logging.getLogger("unetlib")

ZOO = Path(__file__).parent / "zoo"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class Pretrained(NamedTuple):
    """What a name stands for: a network's config, its tensors by name as they are stored, and its preprocessing."""

    config: UNetConfig
    state_dict: dict[str, Tensor]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model without loading its tensors.

    Args:
        name: as it was asked for.
        config: of the network.
        preprocessing: of its pictures.
        parameters: numbers that training changes; the running statistics of norms are not among them.
        file_size: bytes of the weights file.
        dtypes: types in which the tensors are stored, such as ("float16", "float32").
        card: data in the model card's front matter, {} where there is none.
    """

    name: str
    config: UNetConfig
    preprocessing: Preprocessing
    parameters: int
    file_size: int
    dtypes: tuple[str, ...]
    card: dict[str, Any]


def list_pretrained(pattern: str = "*") -> list[str]:
    """Names of the models that come with the library, for `UNet.from_pretrained`.

    Args:
        pattern: which names, with the wildcards of `fnmatch`: `*`, `?` and `[...]`.

    Example:
        >>> "carvana" in list_pretrained()
        True
        >>> list_pretrained("no-such-*")
        []
    """
    return sorted(fnmatch.filter((config.parent.name for config in ZOO.glob(f"*/{CONFIG}")), pattern))


def model_info(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> ModelInfo:
    """What a model is, from its config, its card, and the header of its weights file; no tensor is loaded.

    Args:
        name: as for `UNet.from_pretrained`. Of a Hub repository only the small files and the header are fetched.
        revision: branch, tag or commit of a Hub repository.
        cache_dir: folder of the Hub's cache.
        token: Hub token; None takes the one that is logged in.
        local_files_only: do not use the network.

    Raises:
        OSError: as `from_pretrained`.
        ValueError: as `from_pretrained`.

    Example:
        >>> info = model_info("carvana")
        >>> info.parameters, info.card["library_name"]
        (3955380, 'unetlib')
    """
    where = _locate(name, revision)
    if isinstance(where, Path):
        found, size = _read(where, header_only=True)
        card = where / CARD
    else:
        options: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        folder = _fetch(where, (CONFIG,), revision=revision, **options)
        at_commit: dict[str, Any] = {"revision": folder.name, **options}
        try:
            card = hub.fetch(where, (CARD,), **at_commit) / CARD
        except (FileNotFoundError, ConnectionError):
            card = folder / CARD  # it is not there, or the Hub is not, and a card need not be
        if (folder / WEIGHTS).is_file() or local_files_only:
            found, size = _read(hub.fetch(where, (CONFIG, WEIGHTS), **at_commit), header_only=True)
        else:
            weights, size = hub.describe(where, WEIGHTS, revision=folder.name, token=token)
            found = _interpret(weights, where, folder / CONFIG)
    tensors = found.state_dict
    learned = (
        tensor for key, tensor in tensors.items() if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    return ModelInfo(
        name=str(name),
        config=found.config,
        preprocessing=found.preprocessing,
        parameters=sum(tensor.numel() for tensor in learned),
        file_size=size,
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        card=read_card(card) if card.is_file() else {},
    )


def from_pretrained(
    cls: type[Model],
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    device: str | torch.device = "cpu",
    in_channels: int | None = None,
    out_channels: int | None = None,
    allow_nonfinite: bool = False,
) -> Model:
    """Build a network of `cls` with the weights that `name` stands for; see `UNet.from_pretrained`.

    The form of `name` decides where it is looked for, never what lies in the working directory: a bare word is a zoo name;
    `owner/name` is a repository on the Hugging Face Hub; a path object is a path, and so is a string that starts with `./`,
    `../`, `~` or `/`, ends with `/` or the suffix of a weights file, or has more than one separator.

    Args:
        cls: `UNet`, or a class with its `from_config`.
        name: zoo name, path or Hub repository.
        revision: branch, tag or commit, for a Hub repository only.
        cache_dir: folder of the Hub's cache.
        token: Hub token; None takes the one that is logged in.
        local_files_only: do not use the network.
        force_download: download again what the cache has.
        device: where the weights go.
        in_channels: another number of input channels, see `unetlib.adapt`.
        out_channels: another number of output channels, see `unetlib.adapt`.
        allow_nonfinite: load weights that hold NaN or infinity.

    Raises:
        FileNotFoundError: for a path, repository or revision that does not exist.
        PermissionError: for a Hub repository that wants another token.
        ConnectionError: for a Hub that cannot be reached.
        OSError: for what the Hub sends if it is not what it said.
        ValueError: for a `device` that is not here, an unknown name, a `revision` of something that has none, a file that is
            not a U-Net's weights, or weights that do not fit their config or are not finite.
    """
    check_device(device)
    where = _locate(name, revision)
    if not isinstance(where, Path):
        options = {"token": token, "local_files_only": local_files_only, "force_download": force_download}
        where = _fetch(where, (WEIGHTS, CONFIG), revision=revision, cache_dir=cache_dir, **options)
    found, _ = _read(where)
    model = _skeleton(cls, found.config, str(name))
    trust.check_fit(model.state_dict(), found.state_dict, str(name))
    if in_channels is not None or out_channels is not None:
        found = Pretrained(*adapt(*found, in_channels=in_channels, out_channels=out_channels))
        model = _skeleton(cls, found.config, str(name))
    # In memory of its own, since the file's may change or go while the network lives; and in float32, since half precision is
    # a way of storing.
    tensors = {
        key: tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for key, tensor in found.state_dict.items()
    }
    model.load_state_dict(tensors, assign=True)
    if not allow_nonfinite:
        trust.check_finite(model.state_dict(), str(name))
    model.preprocessing = found.preprocessing
    return model.to(device).eval()


def save_pretrained(
    model: UNet, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, card: str | None = None
) -> Path:
    """Write a model folder: `config.json`, `model.safetensors` and `README.md`.

    All files are written before the first takes its name, so that a call that fails leaves the folder as it was. Nothing is
    written that `from_pretrained` would refuse, but for weights that are not finite, for which it has `allow_nonfinite=True`.

    Args:
        model: the network to save.
        folder: where to; made where it does not exist.
        dtype: type in which convolution weights are stored (`torch.float16` halves the file); None keeps theirs. Everything of
            one dimension (biases, norms) keeps its type. Loading gives float32 again.
        card: text of the model card; None writes a short one, unless the folder has a card that somebody else wrote.

    Returns:
        The folder.

    Raises:
        ValueError: for a `dtype` that is no floating point type or too small for a weight; for a network that is no longer the
            one of its config, as after replacing a layer; for an empty name. Hooks are not seen, and not saved.
        OSError: where the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from unetlib import UNet
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in UNet(features=(8,)).save_pretrained(folder).iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    if dtype is not None and not (dtype in trust.DTYPES.values() and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating point type such as torch.float16, got {dtype!r}")
    tensors = _stored(model, dtype)
    config = {
        "unetlib": installed_version(),
        "model": model.config.to_dict(),
        "preprocessing": model.preprocessing.to_dict(),
    }
    text = json.dumps(config, indent=2)
    trust.read_config(json.loads(text))
    if not os.fspath(folder):
        raise ValueError("the folder's name is empty; for the working directory give '.'")
    folder = hub.local_path(folder)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file, and a model is saved as a folder; give another name")
    folder.mkdir(parents=True, exist_ok=True)
    if card is None and not _keeps_card(folder, type(model)):
        card = _short_card(model, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        made = Path(name)
        (made / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt", "unetlib": text}))
        (made / CONFIG).write_text(text + "\n", encoding="utf-8")
        if card is not None:
            (made / CARD).write_text(card, encoding="utf-8")
        for file in made.iterdir():
            file.replace(folder / file.name)
    return folder


def push_to_hub(model: UNet, repo_id: str, *, dtype: torch.dtype | None = None, card: str | None = None, **options: Any) -> str:
    """Upload a model to the Hugging Face Hub in one commit, and make the repository where there is none.

    Args:
        model: the network.
        repo_id: `owner/name`.
        dtype: type in which convolution weights are stored, as in `save_pretrained`.
        card: text of the model card; None writes a short one, unless the repository has a card already.
        options: as for `unetlib.hub.push`, which has the errors too.

    Returns:
        The address of the commit or pull request.
    """
    with tempfile.TemporaryDirectory() as folder:
        text = model_card(model, repo_id.rpartition("/")[2], repo_id) if card is None else card
        keep = (CARD,) if card is None else ()
        return hub.push(save_pretrained(model, folder, dtype=dtype, card=text), repo_id, keep=keep, **options)


def _locate(name: str | os.PathLike[str], revision: str | None) -> Path | str:
    """The path, or the Hub repository as a string, that a name stands for by its form."""
    if isinstance(name, str):
        if re.match(r"[a-z-]{2,}:", name):
            raise ValueError(
                f"{name!r} is an address, which is not downloaded: fetch the file and give its path, or type 'owner/name' for "
                "a Hugging Face Hub repository"
            )
        if hub.is_repository(name):
            return name
    if revision is not None:
        raise ValueError(f"revision= is for a Hub repository 'owner/name'; {str(name)!r} is none")
    if not isinstance(name, str) or "/" in name or os.sep in name or name.startswith("~") or trust.is_weights_name(name):
        return hub.local_path(name)
    if name in list_pretrained():
        return ZOO / name
    near = difflib.get_close_matches(name, list_pretrained(), n=1)
    raise ValueError(
        f"no model is called {name!r}; the zoo has: {_zoo_names()}."
        + (f" Did you mean {near[0]!r}?" if near else "")
        + f" For a folder of yours type './{name}', for a Hugging Face Hub repository 'owner/name'."
    )


def _zoo_names() -> str:
    return ", ".join(list_pretrained()) or "no models"


def _fetch(repo: str, files: tuple[str, ...], **options: Any) -> Path:
    try:
        return hub.fetch(repo, files, **options)
    except OSError as error:
        here = f" A folder of that name lies here: type './{repo}' for it." if Path(repo).exists() else ""
        zoo = f" Without a network there are the zoo ({_zoo_names()}), what the cache has, and paths such as './{repo}'."
        raise type(error)(f"{error}.{here}{zoo}") from error


def _read(path: Path, *, header_only: bool = False) -> tuple[Pretrained, int]:
    """What a folder or file holds, and the size of its weights in bytes."""
    config = None
    if path.is_dir():
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        if missing:  # weights alone are what accelerate and transformers write, too
            alone = f"; its weights may be enough: give {path / WEIGHTS}" if missing == [CONFIG] else ""
            raise FileNotFoundError(f"{path} is no model folder: it lacks {' and '.join(missing)}{alone}{_model_of_run(path)}")
        path, config = path / WEIGHTS, path / CONFIG
    if not path.is_file():
        repo, _, revision = path.as_posix().partition("@")
        is_meant = hub.is_repository(repo) and revision
        typed = f"; for a revision of a repository type {repo!r}, revision={revision!r}" if is_meant else ""
        raise FileNotFoundError(f"no file or folder {path}{typed}; the zoo's models are: {_zoo_names()}")
    if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, and the file itself is not here: type `git lfs pull` in its folder")
    if path.suffix == ".safetensors":
        found = _interpret(trust.read_safetensors(path, header_only=header_only), path, config)
    elif path.suffix in trust.CHECKPOINT_SUFFIXES:
        found = _convert(trust.read_checkpoint(path, header_only=header_only), path)
    else:
        raise ValueError(
            f"{path} is no weights file by its name; expected .safetensors, or a checkpoint ending in "
            + ", ".join(trust.CHECKPOINT_SUFFIXES)
        )
    trust.check_size(found.state_dict, path)
    return found, path.stat().st_size


def _interpret(weights: trust.Weights, source: Path | str, config: Path | None) -> Pretrained:
    """A weights file by `config.json`, or by its header, or as a checkpoint of another project."""
    tensors = weights.tensors
    try:
        values = trust.read_json(trust.read_small(config) if config else weights.metadata.get("unetlib") or "{}")
        if values and "model" not in values and FIRST in tensors:  # a mixin's: the constructor's arguments
            known = {field.name for field in dataclasses.fields(UNetConfig)}
            values = {"model": {name: value for name, value in values.items() if name in known}}
        if "model" in values:
            network, preprocessing = trust.read_config(values)
            return Pretrained(network, tensors, preprocessing)
    except ValueError as error:
        raise ValueError(f"the config of {source} is not one of a U-Net: {error}") from error
    return _convert(tensors, source)


def _convert(checkpoint: Mapping[str, Any], source: Path | str) -> Pretrained:
    typed = "checkpoint"
    if isinstance(source, Path):
        load = (
            "safetensors.torch.load_file({!r})" if source.suffix == ".safetensors" else "torch.load({!r}, map_location='cpu')"
        )
        typed = load.format(str(source))
    try:
        found = converted(checkpoint, typed, {})
    except ValueError as error:
        beside = _model_of_run(source.parent) if isinstance(source, Path) else ""
        raise ValueError(f"{source}: {error}{beside}") from error
    return Pretrained(found.config, found.state_dict, found.preprocessing)


def _model_of_run(folder: Path) -> str:
    """What to say of a training run's folder, or of its checkpoint."""
    return f"; {folder / 'model'} is a model folder" if (folder / "model" / CONFIG).is_file() else ""


def _short_card(model: UNet, folder: Path) -> str:
    title = folder.resolve().name
    return model_card(model, title, f"path/to/{title}")


def _keeps_card(folder: Path, cls: type[UNet]) -> bool:
    """Whether there is a card that is not just what a network of that class was given with the config that is there."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        config, preprocessing = trust.read_config(trust.read_json(trust.read_small(folder / CONFIG)))
        before = _skeleton(cls, config, str(folder))
    except (ValueError, OSError):
        return (folder / CARD).exists()
    before.preprocessing = preprocessing
    upto_version = "\nWritten by unetlib"
    return text.partition(upto_version)[0] != _short_card(before, folder).partition(upto_version)[0]


def _stored(model: UNet, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors as `save_pretrained` writes them."""
    check_unet(model)
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    # A subclass may have more layers, or a constructor of another kind, of which a UNet reads what it has in common.
    base: Any = next(cls for cls in type(model).__mro__ if "from_config" in vars(cls))
    problems = [_misfit(cls, model, tensors) for cls in dict.fromkeys((type(model), base))]
    name, own_forward = type(model).__name__, type(model).forward is not base.forward
    own = type(model).__init__ is not base.__init__
    alone = f". A {name} is built from its config alone, without arguments of its own" if own else ""
    if all(problems):
        raise ValueError(
            f"{problems[-1]}. A layer was replaced, or wraps another: build a UNet with the options that it has now, as with "
            f"out_channels=5, or undo that before saving{alone}"
        )
    if problems[0] and own_forward:
        raise ValueError(f"{problems[0]}{alone}, and a {base.__name__} has another forward")
    if problems[-1] or own_forward:
        logger.warning(
            "a %s is more than its config says: load it by %s.from_pretrained, not by %s's", name, name, base.__name__
        )
    stored = {
        key: (value.to(dtype) if dtype is not None and value.ndim > 1 else value).cpu().contiguous()
        for key, value in tensors.items()
    }
    changed = (key for key in stored if stored[key].dtype != tensors[key].dtype)
    if beyond := [key for key in changed if tensors[key].isfinite().all() and not stored[key].float().isfinite().all()]:
        raise ValueError(f"{dtype} is too small for the weights in {', '.join(beyond[:3])}; give dtype=torch.bfloat16, or none")
    return stored


def _misfit(cls: type[Model], model: UNet, tensors: Mapping[str, Tensor]) -> str | None:
    """Why a network of that class with these tensors would not be the model."""
    try:
        skeleton = _skeleton(cls, model.config, "this model")
        trust.check_fit(skeleton.state_dict(), tensors, "this model")
    except ValueError as error:
        return str(error)
    return changed_module(model, parts_of(skeleton))


def _skeleton(cls: type[Model], config: UNetConfig, name: str) -> Model:
    """The network without memory and without random numbers: every tensor is assigned later."""
    try:
        with torch.device("meta"):
            return cls.from_config(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # what torch says of numbers beyond 2**63
        needs = (
            f"; {cls.__name__}.from_pretrained needs a constructor that takes what UNet's takes, UNet.from_pretrained does not"
        )
        hint = "" if "from_config" in vars(cls) else needs
        raise ValueError(f"the config of {name!r} asks for a network that cannot be ({error}){hint}") from error
