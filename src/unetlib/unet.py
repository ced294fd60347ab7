"""The U-Net, readable in one sitting.

Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015
(arXiv:1505.04597), with padded convolutions, batch norm, and any input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from .arguments import check_options
from .blocks import DoubleConv, Up, join_patches, split_patches
from .config import PeerOptions, Preprocessing, UNetConfig
from .recompute import recomputed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .pictures import Picture


class UNet(nn.Module):
    """U-Net: double convolutions down to a bottleneck and back up, with a skip at every level.

    The defaults are the study's network: 31,037,633 parameters.

    Args:
        in_channels: channels of the input picture, 3 for RGB.
        out_channels: channels of the logits: 1 is one sigmoid (binary), 2 and more is a softmax, background included, or a
            sigmoid for each class, as losses, metrics and `Preprocessing` are told (`multilabel=True`).
        features: width of each level, the full-size level first; any length, any widths. Each level halves height and width.
        bottleneck: width of the deepest block; None takes twice the last of `features`.
        norm: "batch", "instance", "group" or "none".
        activation: "relu", "leaky_relu", "elu", "gelu" or "silu".
        dropout: probability of dropping a channel at the end of each double convolution, while training.
        patch_size: side of the squares of pixels that are one pixel of the first level's maps, as in `UNetConfig`.
        options: what the networks of other projects need, as in `UNetConfig`: how the decoder upsamples, matches sizes and
            concatenates, its widths, convolution biases and others.

    Attributes:
        config: the `UNetConfig` that builds this network again.
        preprocessing: the `Preprocessing` that `predict` applies and `save_pretrained` writes; assign another to change it,
            anything else is a TypeError.
        checkpoint_gradients: False. Set to True, training keeps the inputs of the double convolutions alone and computes what
            is inside them again in the backward pass: a third more work for less memory, with the same gradients.

    Shape:
        (N, in_channels, H, W) float to (N, out_channels, H, W) logits, for any H and W of at least `config.stride`,
        which is `2 ** len(features)` without patches. While training, batch norm needs more than one pixel in the bottleneck:
        a larger picture, or several.

    Raises:
        TypeError: for an unknown option, or a config in place of options.
        ValueError: for one that `UNetConfig` refuses.

    Example:
        >>> model = UNet(features=(16, 32))
        >>> model(torch.zeros(1, 3, 101, 67)).shape
        torch.Size([1, 1, 101, 67])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        features: Sequence[int] = (64, 128, 256, 512),
        *,
        bottleneck: int | None = None,
        norm: str = "batch",
        activation: str = "relu",
        dropout: float = 0.0,
        patch_size: int = 1,
        **options: Unpack[PeerOptions],
    ) -> None:
        super().__init__()
        if isinstance(in_channels, UNetConfig):
            raise TypeError("UNet takes options, got a UNetConfig; write UNet.from_config(config)")
        check_options("UNet", options, (field.name for field in fields(UNetConfig)))
        self.config = UNetConfig(
            in_channels, out_channels, features, bottleneck, norm, activation, dropout, patch_size=patch_size, **options
        )
        self._preprocessing = Preprocessing()
        self.checkpoint_gradients = False
        config, widths = self.config, self.config.features
        patch = config.patch_size**2  # pixels
        layers: dict[str, Any] = {
            "norm": config.norm,
            "activation": config.activation,
            "bias": config.conv_bias,
            "affine": config.affine,
            "negative_slope": config.negative_slope,
            "dropout": config.dropout,
        }
        self.encoder = nn.ModuleList(
            DoubleConv(before, width, first_norm=config.first_norm or level > 0, **layers)
            for level, (before, width) in enumerate(pairwise((patch * config.in_channels, *widths)))
        )
        self.bottleneck = DoubleConv(widths[-1], config.bottleneck, **layers)
        deeper = (*config.decoder_features[1:], config.bottleneck)
        self.decoder = nn.ModuleList(  # the deepest level first
            Up(
                in_channels=deeper[level],
                skip_channels=widths[level],
                out_channels=config.decoder_features[level],
                mid_channels=config.mid_features[level],
                up_channels=config.up_features[level],
                upsample=config.upsample,
                align_corners=config.align_corners,
                match=config.match,
                skip_first=config.skip_first,
                **layers,
            )
            for level in reversed(range(config.depth))
        )
        self.head = nn.Conv2d(config.decoder_features[0], patch * config.out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits for a batch of pictures.

        Args:
            x: (N, in_channels, H, W), floats, outside autocast of the weights' type; H and W at least `config.stride`.

        Returns:
            (N, out_channels, H, W) logits.

        Raises:
            ValueError: for another shape, or integers.
        """
        check_input(x, self.config)
        # run(block, x) is block(x); recomputed, the maps inside the block are not kept for the backward pass.
        run = recomputed if self.checkpoint_gradients and torch.is_grad_enabled() else nn.Module.__call__
        size, skips = x.shape[-2:], []
        x = split_patches(x, self.config.patch_size)  # the same for patch_size=1, as is join_patches
        for block in self.encoder:
            x = run(block, x)  # (N, features[k - 1], h, w) -> (N, features[k], h, w)
            skips.append(x)
            x = F.max_pool2d(x, kernel_size=2)  # (h, w) -> (h // 2, w // 2)
        x = run(self.bottleneck, x)  # (N, features[-1], h, w) -> (N, bottleneck, h, w)
        for up, skip in zip(self.decoder, reversed(skips)):
            x = run(up, x, skip)  # (N, deeper, h, w) -> (N, decoder_features[k], the skip's h, w)
        x = self.head(x)  # (N, decoder_features[0], h, w) -> (N, patch_size ** 2 * out_channels, h, w)
        return join_patches(x, self.config.patch_size, size)  # -> (N, out_channels, H, W)

    if TYPE_CHECKING:  # nn.Module's gives Any

        def __call__(self, x: Tensor) -> Tensor:
            """Logits for a batch of pictures: `forward`, and hooks."""

    @classmethod
    def from_config(cls, config: UNetConfig) -> Self:
        """Build the network that `config` describes, with fresh random weights.

        Example:
            >>> UNet.from_config(UNetConfig(features=(8, 16))).config.features
            (8, 16)
        """
        if not isinstance(config, UNetConfig):
            name = type(config).__name__
            raise TypeError(f"expected a UNetConfig, got a {name}; UNetConfig.from_dict makes one of a dictionary")
        return cls(**config.to_dict())

    @property
    def preprocessing(self) -> Preprocessing:
        """How `predict` turns a picture into the network's input, and logits into a mask."""
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, preprocessing: Preprocessing) -> None:
        if not isinstance(preprocessing, Preprocessing):
            raise TypeError(
                f"preprocessing must be a Preprocessing, such as Preprocessing(size=(160, 240)), got {preprocessing!r}"
            )
        preprocessing.check_channels(self.config.in_channels, self.config.out_channels)
        stride = self.config.stride
        if min(preprocessing.size or (stride,)) < stride:
            raise ValueError(
                f"preprocessing.size={preprocessing.size} is smaller than config.stride={stride}; "
                f"give at least ({stride}, {stride})"
            )
        self._preprocessing = preprocessing

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: str | torch.device = "cpu",
        in_channels: int | None = None,
        out_channels: int | None = None,
        allow_nonfinite: bool = False,
    ) -> Self:
        """A trained network by name, in evaluation mode.

        Args:
            name: decided by its form: a name of the zoo (`list_pretrained()`); `owner/name` on the Hugging Face Hub; or a model
                folder or weights file, as a path object or a string such as "./model" or "weights.pth". A file is one of ours,
                or a checkpoint of a family that `unetlib.convert` knows.
            revision: branch, tag or commit, for a Hub repository only.
            cache_dir: folder of the Hub's cache.
            token: Hub token; None takes the one that is logged in.
            local_files_only: do not use the network.
            force_download: download again what the cache has.
            device: where the weights go.
            in_channels: another number of input channels: the first convolution's weights are summed for one channel, else
                repeated in turn and scaled by old / new (`unetlib.adapt`).
            out_channels: another number of output channels: the head is new and random, for training.
            allow_nonfinite: load weights that hold NaN or infinity.

        Raises:
            FileNotFoundError: for a path, repository or revision that does not exist.
            ValueError: for a `device` that is not here, an unknown name, or weights that do not fit their config or are not
                finite.
            OSError: for a Hub that cannot be reached or refuses.

        Example:
            >>> UNet.from_pretrained("carvana").preprocessing.class_names
            ('background', 'car')
            >>> UNet.from_pretrained("carvana", in_channels=1, out_channels=4).config.out_channels
            4
        """
        from .pretrained import from_pretrained

        return from_pretrained(
            cls,
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            device=device,
            in_channels=in_channels,
            out_channels=out_channels,
            allow_nonfinite=allow_nonfinite,
        )

    def save_pretrained(
        self, folder: str | PathLike[str], *, dtype: torch.dtype | None = None, card: str | None = None
    ) -> Path:
        """Write `config.json`, `model.safetensors` and `README.md`, for `from_pretrained`.

        Args:
            folder: where to; made where it does not exist.
            dtype: type in which convolution weights are stored (`torch.float16` halves the file); loading gives float32.
            card: text of the model card; None writes a short one, unless the folder has a card that somebody else wrote.

        Returns:
            The folder.

        Raises:
            ValueError: for a `dtype` that is no floating point type or too small for a weight, or a network that is no longer
                that of its config.
            OSError: where the folder cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as name:
            ...     folder = UNet(features=(8, 16)).save_pretrained(name, dtype=torch.float16)
            ...     sorted(file.name for file in folder.iterdir()), UNet.from_pretrained(folder).config.features
            (['README.md', 'config.json', 'model.safetensors'], (8, 16))
        """
        from .pretrained import save_pretrained

        return save_pretrained(self, folder, dtype=dtype, card=card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload a U-Net with unetlib",
        token: str | bool | None = None,
        dtype: torch.dtype | None = None,
        card: str | None = None,
    ) -> str:
        """Upload the files of `save_pretrained` to the Hugging Face Hub in one commit.

        Args:
            repo_id: `owner/name`; made where it does not exist.
            revision: branch to commit to; None is "main".
            private: whether a new repository is private; None takes the owner's default.
            create_pr: open a pull request instead of committing.
            commit_message: title of the commit.
            token: Hub token with the right to write; None takes the one that is logged in.
            dtype: as in `save_pretrained`.
            card: text of the model card; None writes a short one, unless the repository has a card already.

        Returns:
            The address of the commit or pull request.

        Raises:
            ValueError: for a `repo_id` that is not `owner/name`.
            OSError: for a Hub that cannot be reached or refuses.
        """
        from .pretrained import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            revision=revision,
            private=private,
            create_pr=create_pr,
            commit_message=commit_message,
            token=token,
            dtype=dtype,
            card=card,
        )

    @overload
    def predict(  # type: ignore[overload-overlap]  # a str is a sequence of them, too
        self, images: Picture, *, out: None = None, **options: Unpack[PredictOptions]
    ) -> NDArray[Any]: ...
    @overload
    def predict(self, images: Picture, *, out: str | PathLike[str], **options: Unpack[PredictOptions]) -> Path: ...
    @overload
    def predict(self, images: Sequence[Picture], **options: Unpack[PredictOptions]) -> list[NDArray[Any]]: ...
    def predict(
        self,
        images: Picture | Sequence[Picture],
        *,
        threshold: float | None = None,
        tile: int | tuple[int, int] | None = None,
        overlap: int | None = None,
        tta: bool | str = False,
        probabilities: bool = False,
        batch_size: int = 4,
        progress: bool = False,
        out: str | PathLike[str] | None = None,
    ) -> Any:
        """Segment one picture or a list of them; see `unetlib.inference.predict`.

        Args:
            images: a path, a PIL picture, a uint8 array (H, W) or (H, W, C), or a tensor (C, H, W), uint8 or float in [0, 1];
                or a list of these, of any sizes. Arrays may lie on disk, and be larger than memory.
            threshold: probability above which a pixel is foreground; None takes the model's own. Not for a softmax.
            tile: side, or (height, width), of what the network sees at a time; None: the whole picture where memory suffices.
            overlap: pixels that a tile sees beyond what it keeps; None: as many as it takes for the whole picture's result.
            tta: average over the picture turned and mirrored; "mirror": over it and its mirror image, left to right, alone.
            probabilities: return float32 probabilities instead of classes.
            batch_size: pictures, or tiles of a given size, in one forward pass.
            progress: show a progress bar.
            out: file to write the result of a single picture to instead of returning it: `.npy`, or for masks `.tif`.

        Returns:
            For each picture, at its own height and width: a uint8 array (H, W) of class indices, int32 beyond 256 classes; or,
            with `probabilities`, float32 (H, W) for one output channel and (C, H, W) for several. Where the `preprocessing`
            says `multilabel`, masks are uint8 (C, H, W), 0 and 1 for each class. One array for one picture, a list for a list.
            With `out` its path.

        Example:
            >>> import numpy as np
            >>> UNet(features=(8, 16)).predict(np.zeros((90, 120, 3), np.uint8)).shape
            (90, 120)
        """
        from .inference import predict

        return predict(
            self,
            images,
            threshold=threshold,
            tile=tile,
            overlap=overlap,
            tta=tta,
            probabilities=probabilities,
            batch_size=batch_size,
            progress=progress,
            out=out,
        )


class PredictOptions(TypedDict, total=False):
    """Keywords of `UNet.predict`, but for `out`, for type checkers."""

    threshold: float | None
    tile: int | tuple[int, int] | None
    overlap: int | None
    tta: bool | str
    probabilities: bool
    batch_size: int
    progress: bool


def check_input(x: Tensor, config: UNetConfig) -> None:
    """Check that a network of this config takes a batch.

    Args:
        x: to be (N, in_channels, H, W), of floats, H and W at least `config.stride`.
        config: of the network.

    Raises:
        TypeError: for something else than a tensor.
        ValueError: naming the shape, and what was expected.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a batch as a tensor, got a {type(x).__name__}; `predict` takes pictures as they are")
    if not x.is_floating_point():
        raise ValueError(
            f"expected pixels as floats, such as pixels / 255, got {x.dtype}; `predict` takes pictures as they are"
        )
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        hint = "; add the batch dimension with x[None]" if x.ndim == 3 else ""
        if x.ndim in (3, 4) and x.shape[-1] == config.in_channels != x.shape[-3]:
            hint = f"; its channels come last: give x.movedim(-1, -3){'[None]' if x.ndim == 3 else ''}"
        if x.ndim == 4 and (x.shape[1], config.in_channels) in ((1, 3), (3, 1)):
            hint = f'; read pictures with mode="{"RGB" if config.in_channels == 3 else "L"}", or take a network for these: '
            hint += f"UNet(in_channels={x.shape[1]}), or UNet.from_pretrained(..., in_channels={x.shape[1]})"
        raise ValueError(f"expected pictures of shape (N, {config.in_channels}, H, W), got {tuple(x.shape)}{hint}")
    smallest = config.stride
    if x.shape[-2] < smallest or x.shape[-1] < smallest:
        raise ValueError(
            f"a U-Net of {config.depth} levels needs pictures of at least {smallest}x{smallest} pixels, "
            f"got {x.shape[-2]}x{x.shape[-1]}; enlarge the picture or use fewer features"
        )


# Steps of torch.fx's graph, which could not follow how they ask for the kind and size of a tensor, and for being exported.
torch.fx.wrap("check_input")
torch.fx.wrap("split_patches")
torch.fx.wrap("join_patches")
