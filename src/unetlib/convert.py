"""Other projects' U-Net checkpoints, recognised by their keys and renamed to ours, and ours renamed to theirs.

One `Family` for each layout: a table of module names, and what its project does that its tensors do not tell. All the rest is
read off the tensors' shapes. What a table does not match exactly is refused, never guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check_unet
from .config import Preprocessing, UNetConfig

if TYPE_CHECKING:
    from .unet import UNet

logger = logging.getLogger("unetlib")

MAX_DEPTH = 16  # a picture of 65,536 pixels a side has one left
MAX_WRAPPERS = 3  # one inside the other
# Where training scripts put a state dict, averaged weights first, and what their wrappers put before its keys.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema", "shadow"),
    *("state_dict", "model_state_dict", "model", "network_weights", "network", "net", "params", "weights"),
)
PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.", "net.", "network.", "unet.")
NO_WEIGHTS = ("n_averaged",)  # torch.optim.swa_utils.AveragedModel counts here
OUR_KEY = "bottleneck.conv1.weight"  # each UNet has it


class Converted(NamedTuple):
    """A checkpoint in unetlib's form: what builds the network, its tensors by name, and its preprocessing."""

    family: str
    config: UNetConfig
    state_dict: dict[str, Tensor]
    preprocessing: Preprocessing

    def to_model(self) -> UNet:
        """The network with these weights and this preprocessing, in float32 and evaluation mode.

        Example:
            >>> from unetlib import UNet
            >>> state = export_state_dict(UNet(features=(4, 8)), "study")
            >>> convert(state).to_model().config.features
            (4, 8)
        """
        from .unet import UNet

        model = UNet.from_config(self.config)
        model.load_state_dict(self.state_dict)
        model.preprocessing = self.preprocessing
        return model.eval()


@dataclass(frozen=True)
class Family:
    """One project's checkpoint layout.

    The names of its modules are templates. `{level}` counts levels from 0, the full-size level first, and is the network's
    depth in `bottleneck`; `{level1}` and `{level2}` are one and two more. `{step}` counts the decoder's levels from 0, the
    deepest first; `{step1}` is one more, `{even}` and `{odd}` are `2 * step` and `2 * step + 1`. `{layer}` is one of `layers`.
    "a|b" are two names of the same tensors.

    Args:
        name: what messages call it, and `export_state_dict` takes.
        encoder: layers of an encoder level.
        decoder: layers of a decoder level.
        head: the last convolution.
        layers: our names for the layers of a double convolution, and the family's.
        stem: layers of the first encoder level, where they are named by another template than the others.
        bottleneck: likewise, layers of the deepest block.
        upsample: what follows our `upsample` ("" for a transposed convolution), and the family's name; empty without weights.
        norms: the norms that the layout stands for, told apart by their tensors.
        options: fields of `UNetConfig` that the project fixes and its tensors do not tell.
        weightless: those for a checkpoint without weights for upsampling; empty where it must have them.
        open: fields that the project leaves open and its tensors do not tell; `options`, else the defaults, are assumed.
        ignored: keys that hold no weights.
        preprocessing: what the project does to a picture before its network.
        unknown: what remains unknown to who loads a checkpoint; a warning says it.
        assumed: instead, what is not in the file, thing by thing, and what stands for it; a field of `UNetConfig` may be told.
    """

    name: str
    encoder: str
    decoder: str
    head: str
    layers: Mapping[str, str]
    stem: str = ""
    bottleneck: str = ""
    upsample: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[str, ...] = ("batch",)
    options: Mapping[str, Any] = field(default_factory=dict)
    weightless: Mapping[str, Any] = field(default_factory=dict)
    open: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    unknown: str = ""
    assumed: Mapping[str, str] = field(default_factory=dict)

    def warning(self, told: Mapping[str, Any]) -> str:
        """What remains unknown where these fields of `UNetConfig` are told.

        Example:
            >>> MONAI.warning({"activation": "elu"})
            'its pictures are not in the file; assumed are pixels in [0, 1]'
        """
        if not self.assumed:
            return self.unknown
        left = {thing: stand_in for thing, stand_in in self.assumed.items() if thing not in told}
        more = "" if "activation" in told else f". {ANOTHER_ACTIVATION}"
        return f"its {_and(left)} are not in the file; assumed are {_and(left.values())}{more}"

    def modules(self, depth: int) -> dict[str, str]:
        """The family's module names and ours, for a network of `depth` levels.

        Example:
            >>> STUDY.modules(4)["ups.0"], STUDY.modules(4)["downs.3.conv.1"]
            ('decoder.0.upsample', 'encoder.3.norm1')
        """
        table = dict.fromkeys(self.head.split("|"), "head")
        for level in range(depth + 1):
            step = depth - 1 - level
            number = {"level": level, "level1": level + 1, "level2": level + 2}
            number |= {"step": step, "step1": step + 1, "even": 2 * step, "odd": 2 * step + 1}
            if level == depth:
                blocks = {"bottleneck": self.bottleneck or self.encoder}
            else:
                encoder = self.encoder if level else self.stem or self.encoder
                blocks = {f"encoder.{level}": encoder, f"decoder.{step}.conv": self.decoder}
                table |= {name.format(**number): f"decoder.{step}.upsample{part}" for part, name in self.upsample.items()}
            for block, template in blocks.items():
                for layer, names in self.layers.items():
                    table |= {template.format(layer=name, **number): f"{block}.{layer}" for name in names.split("|")}
        return table


# Names of a Sequential's convolutions and norms: (conv, norm, activation) twice, and (conv, activation) twice.
NORMED = {"conv1": "0", "norm1": "1", "conv2": "3", "norm2": "4"}
BARE = {"conv1": "0", "conv2": "2"}

BILINEAR = {"upsample": "bilinear", "align_corners": True}

PICTURES_UNKNOWN = "the size and scaling of its pictures are not in the file; pictures keep their size, pixels lie in [0, 1]"
ANOTHER_ACTIVATION = (
    "For another activation: unetlib.convert.convert(torch.load(path, weights_only=True), activation='elu').to_model()"
)

# The study's network, which it shares with Aladdin Persson's tutorial and many copies.
STUDY = Family(
    name="study",
    encoder="downs.{level}.conv.{layer}",
    bottleneck="bottleneck.conv.{layer}",
    decoder="ups.{odd}.conv.{layer}",
    upsample={"": "ups.{even}"},
    head="final_conv",
    layers=NORMED,
    options={"match": "resize"},
    preprocessing=Preprocessing(size=(160, 240)),
)

# milesial/Pytorch-UNet: convolutions with biases in versions 1 and 2, without from 3 on; `bilinear` at will in all of them.
MILESIAL = Family(
    name="milesial",
    stem="inc.double_conv.{layer}",
    encoder="down{level}.maxpool_conv.1.double_conv.{layer}",
    decoder="up{step1}.conv.double_conv.{layer}",
    upsample={"": "up{step1}.up"},
    head="outc.conv",
    layers=NORMED,
    options={"match": "zeros"},
    weightless=BILINEAR,
    ignored=("mask_values",),  # a list of grey values or colours, in the state dict since version 4
    preprocessing=Preprocessing(scale=0.5),
    unknown="its scale is not in the file; assumed is 0.5, the default of its script. For one trained at full size give "
    "model.preprocessing = Preprocessing(scale=1)",
)

# mateuszbuda/brain-segmentation-pytorch, also on torch.hub; its sigmoid is ours to apply.
MATEUSZBUDA = Family(
    name="mateuszbuda",
    encoder="encoder{level1}.enc{level1}{layer}",
    bottleneck="bottleneck.bottleneck{layer}",
    decoder="decoder{level1}.dec{level1}{layer}",
    upsample={"": "upconv{level1}"},
    head="conv",
    layers={"conv1": "conv1", "norm1": "norm1", "conv2": "conv2", "norm2": "norm2"},
    options={"skip_first": False},
    open=("match",),
    preprocessing=Preprocessing(size=(256, 256)),
    unknown="its pictures were normalised by the statistics of their own MRI volume, so normalise yours before predict",
)

# fepegar/unet in two dimensions; its blocks register each layer twice.
FEPEGAR = Family(
    name="fepegar",
    encoder="encoder.encoding_blocks.{level}.{layer}",
    bottleneck="bottom_block.{layer}",
    decoder="decoder.decoding_blocks.{step}.{layer}",
    upsample={"": "decoder.decoding_blocks.{step}.upsample"},
    head="classifier.conv_layer|classifier.block.0",
    layers={
        "conv1": "conv1.conv_layer|conv1.block.0",
        "norm1": "conv1.norm_layer|conv1.block.1",
        "conv2": "conv2.conv_layer|conv2.block.0",
        "norm2": "conv2.norm_layer|conv2.block.1",
    },
    norms=("batch", "none"),
    open=("match", "activation", "negative_slope", "upsample", "align_corners", "affine"),
    assumed={"padding": "padding=1", "pooling": "max pooling", "activation": "ReLU", "pictures": "pixels in [0, 1]"},
)

# MONAI BasicUNet in two dimensions, with its default `upsample="deconv"`.
MONAI = Family(
    name="monai",
    stem="conv_0.{layer}",
    encoder="down_{level}.convs.{layer}",
    decoder="upcat_{level1}.convs.{layer}",
    upsample={"": "upcat_{level1}.upsample.deconv"},
    head="final_conv",
    layers={"conv1": "conv_0.conv", "norm1": "conv_0.adn.N", "conv2": "conv_1.conv", "norm2": "conv_1.adn.N"},
    norms=("batch", "instance"),
    options={"match": "replicate", "activation": "leaky_relu", "negative_slope": 0.1},
    open=("norm", "affine", "activation", "negative_slope"),
    assumed={"activation": "the default LeakyReLU(0.1)", "pictures": "pixels in [0, 1]"},
)

# U_Net of LeeJunHyun/Image_Segmentation.
LEEJUNHYUN = Family(
    name="leejunhyun",
    encoder="Conv{level1}.conv.{layer}",
    decoder="Up_conv{level2}.conv.{layer}",
    upsample={".conv": "Up{level2}.up.1", ".norm": "Up{level2}.up.2"},
    head="Conv_1x1",
    layers=NORMED,
    options={"upsample": "nearest_conv"},
    open=("match",),
    preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    unknown="the size of its pictures is not in the file (its own script made them 256 wide); pictures keep their size",
)

# UNet of 4uiiurz1/pytorch-nested-unet.
NESTED = Family(
    name="4uiiurz1",
    encoder="conv{level}_0.{layer}",
    decoder="conv{level}_{step1}.{layer}",
    head="final",
    layers={"conv1": "conv1", "norm1": "bn1", "conv2": "conv2", "norm2": "bn2"},
    weightless=BILINEAR,
    open=("match",),
    unknown=PICTURES_UNKNOWN,
)

# usuyama/pytorch-unet.
USUYAMA = Family(
    name="usuyama",
    encoder="dconv_down{level1}.{layer}",
    decoder="dconv_up{level1}.{layer}",
    head="conv_last",
    layers=BARE,
    norms=("none",),
    options={"skip_first": False},
    weightless=BILINEAR,
    open=("match",),
    unknown=PICTURES_UNKNOWN,
)

# jaxony/unet-pytorch, with its defaults `up_mode="transpose"` and `merge_mode="concat"`.
JAXONY = Family(
    name="jaxony",
    encoder="down_convs.{level}.{layer}",
    decoder="up_convs.{step}.{layer}",
    upsample={"": "up_convs.{step}.upconv"},
    head="conv_final",
    layers={"conv1": "conv1", "conv2": "conv2"},
    norms=("none",),
    options={"skip_first": False},
    open=("match",),
    unknown=PICTURES_UNKNOWN,
)

FAMILIES = (STUDY, MILESIAL, MATEUSZBUDA, FEPEGAR, MONAI, LEEJUNHYUN, NESTED, USUYAMA, JAXONY)


def convert(checkpoint: Mapping[str, Any], **options: Any) -> Converted:
    """Recognise a checkpoint and bring it into unetlib's form.

    Args:
        checkpoint: a state dict of a known family; or a dictionary that holds one under "state_dict", "model",
            "model_state_dict", "network_weights" and the like (averaged weights, under "ema" or "state_dict_ema", come first).
            Prefixes of data parallel, compiled and Lightning models are taken off.
        options: fields of `UNetConfig` that you know and the tensors do not tell, as `activation="elu"` of a MONAI network.

    Returns:
        The converted checkpoint, which loads strictly; its tensors are those of `checkpoint`, not copies.

    Raises:
        ValueError: for a checkpoint of no known family, naming the families tried and the first keys that did not match; for
            one whose tensors do not make a network of its family.

    Example:
        >>> from unetlib import UNet
        >>> state = {f"module.{key}": value for key, value in export_state_dict(UNet(features=(4, 8)), "study").items()}
        >>> found = convert({"model_state_dict": state, "epoch": 3})
        >>> found.family, found.config.features, found.preprocessing.size
        ('study', (4, 8), (160, 240))
        >>> convert({"features.0.weight": torch.zeros(64, 3, 11, 11)})
        Traceback (most recent call last):
        ...
        ValueError: this checkpoint of 1 entries is of no known family; tried study, milesial, mateuszbuda, fepegar, monai,
        leejunhyun, 4uiiurz1, usuyama, jaxony; none has any of its keys: 'features.0.weight'; networks with pretrained
        encoders (segmentation_models.pytorch), nnU-Net's, residual, attention and 3-D ones run in their own library
    """
    return converted(checkpoint, "checkpoint", options)


def converted(checkpoint: Mapping[str, Any], source: str, options: Mapping[str, Any]) -> Converted:
    """As `convert`, with an expression for the checkpoint, `source`, that advice in errors is written with.

    Example:
        >>> converted({"ema": {"bottleneck.conv1.weight": torch.zeros(1)}}, "torch.load('unet.pt')", {})
        Traceback (most recent call last):
        ...
        ValueError: this checkpoint of 1 entries is of no known family; tried study, milesial, mateuszbuda, fepegar, monai,
        leejunhyun, 4uiiurz1, usuyama, jaxony; it looks like a unetlib UNet's, without its config: build that network as
        model = UNet(...), then type model.load_state_dict(torch.load('unet.pt')['ema']) and model.save_pretrained('folder'),
        which from_pretrained reads
    """
    state, inside = _peel(checkpoint, source)
    for family in FAMILIES:
        entries = {key: value for key, value in state.items() if key not in family.ignored}
        modules = _modules_of(family, entries)
        if modules is not None and all(isinstance(value, Tensor) for value in entries.values()):
            break
    else:
        raise ValueError(_unknown_message(state, inside))
    for key in state.keys() & set(family.ignored):
        logger.info("%s=%.80r of the %s checkpoint is left out: masks here are class indices", key, state[key], family.name)
    tensors = _rename(family, entries, modules)
    config = _infer_config(family, tensors, options, source)
    tensors = _strict(family, config, tensors)
    logger.info("recognised a checkpoint of the family %s: %s", family.name, config)
    if warning := family.warning(options):
        logger.warning("checkpoint of the family %s: %s", family.name, warning)
    return Converted(family.name, config, tensors, family.preprocessing)


def export_state_dict(model: UNet, family: str, *, any_size: bool = True) -> dict[str, Tensor]:
    """A network's tensors under another project's names, for that project's own `load_state_dict`.

    Whether that project's constructor offers these widths and this depth is for you to see to. milesial's, for one, is written
    for widths 64, 128, 256 and 512 and a bottleneck of 1024 (512 with bilinear upsampling).

    Args:
        model: the network.
        family: "study", "milesial", "mateuszbuda", "fepegar", "monai", "leejunhyun", "4uiiurz1", "usuyama" or "jaxony".
        any_size: the exported network must give equal outputs at every size that the family takes. With False its `match` may
            be another, so that outputs are equal for heights and widths that can be halved at every level.

    Returns:
        The tensors, detached and not copied, in the order of the model's own. `convert` takes them back to exactly this model,
        if it is told what the tensors do not tell: dropout, and the options that the family leaves open.

    Raises:
        TypeError: for a network in a wrapper, such as `DataParallel`.
        ValueError: for an unknown family, or a network that the family cannot express, naming the options.

    Example:
        >>> from unetlib import UNet
        >>> state = export_state_dict(UNet(match="zeros"), "milesial")  # torch.save(state, "unet.pth")
        >>> len(state), state["inc.double_conv.0.weight"].shape
        (118, torch.Size([64, 3, 3, 3]))
    """
    check_unet(model)
    table = {known.name: known for known in FAMILIES}
    if family not in table:
        raise ValueError(f"no family is called {family!r}; known are {', '.join(table)}")
    known, config = table[family], model.config
    names: dict[str, list[str]] = {}
    for theirs, ours in known.modules(config.depth).items():
        names.setdefault(ours, []).append(theirs)
    tensors = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    homeless = [key for key in tensors if key.rpartition(".")[0] not in names]
    if homeless:
        raise ValueError(f"a checkpoint of the family {family} has no place for {_list(homeless)} of this network: {config}")
    told = ["dropout", *known.open, *(() if any_size else ("match",))]
    if "affine" in known.open and not config.affine:
        told.append("norm")  # an instance norm without tensors tells nothing of itself
    try:
        theirs_config = _infer_config(known, tensors, {name: getattr(config, name) for name in told})
    except ValueError as error:
        raise ValueError(
            f"the family {family} cannot express this network: it has norm={config.norm!r} and upsample={config.upsample!r}, "
            f"the family norm {' or '.join(known.norms)} and upsample {_upsamplings(known)}"
        ) from error
    differing = [f.name for f in fields(config) if getattr(config, f.name) != getattr(theirs_config, f.name)]
    if differing:
        raise ValueError(
            f"the family {family} cannot express this network: it has "
            + ", ".join(f"{name}={getattr(config, name)!r} (there {getattr(theirs_config, name)!r})" for name in differing)
            + (
                f"; sizes that are multiples of {2**config.depth} need no match rule: for these alone, pass any_size=False"
                if differing == ["match"]
                else ""
            )
        )
    exported: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        exported |= {f"{theirs}.{leaf}": tensor for theirs in names[module]}
    return exported


def _peel(checkpoint: Mapping[str, Any], source: str) -> tuple[dict[str, Any], str]:
    """The state dict inside a checkpoint, without the prefixes of wrapped models, and what to type for it."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"expected a state dict, got a {type(checkpoint).__name__}; of a model it is model.state_dict(), and "
            "UNet.from_pretrained reads a file"
        )
    found = _inside(checkpoint, source)
    if found is None:
        raise ValueError(
            "the checkpoint holds no state dict: expected a dictionary of tensors, bare or under one of "
            + ", ".join(map(repr, WRAPPERS))
        )
    inside, source = found
    state = {str(key): value for key, value in inside.items() if key not in NO_WEIGHTS}
    peeled = ""
    for _ in range(MAX_WRAPPERS):
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        peeled += prefix
    if peeled:
        source = _peeled(source, peeled)
    return state, source


def _peeled(source: str, prefix: str) -> str:
    """What to type for what is under a prefix."""
    return f"{{key[{len(prefix)}:]: value for key, value in {source}.items() if key.startswith({prefix!r})}}"


def _inside(checkpoint: Mapping[str, Any], source: str, wrappers: int = MAX_WRAPPERS) -> tuple[Mapping[str, Any], str] | None:
    """The first dictionary of tensors under the names of `WRAPPERS`, or the checkpoint itself, and its place; None without."""
    for name in WRAPPERS if wrappers else ():
        inner = checkpoint.get(name)
        found = _inside(inner, f"{source}[{name!r}]", wrappers - 1) if isinstance(inner, Mapping) else None
        if found is not None:
            logger.info("of the checkpoint, %r is taken", name)
            return found
    # Averages keep their count of steps beside the weights, some of them as a tensor without dimensions.
    return (checkpoint, source) if any(isinstance(value, Tensor) and value.ndim for value in checkpoint.values()) else None


def _modules_of(family: Family, entries: Mapping[str, Any]) -> dict[str, str] | None:
    """The family's table at the depth that has all these keys, None where no depth has."""
    needed = {key.rpartition(".")[0] for key in entries}
    tables = (family.modules(depth) for depth in range(1, MAX_DEPTH + 1))
    return next((modules for modules in tables if needed <= modules.keys()), None)


def _unknown_message(state: Mapping[str, Any], source: str) -> str:
    unmatched = {}
    for family in FAMILIES:
        known = {name for depth in range(1, MAX_DEPTH + 1) for name in family.modules(depth)}
        unmatched[family.name] = [
            key
            for key, value in state.items()
            if key not in family.ignored and (key.rpartition(".")[0] not in known or not isinstance(value, Tensor))
        ]
    nearest = min(unmatched, key=lambda name: len(unmatched[name]))
    keys = unmatched[nearest] or list(state)  # each key is of some depth, but no depth has them all
    message = f"this checkpoint of {len(state)} entries is of no known family; tried {', '.join(unmatched)}; "
    if ours := next((key for key in state if f".{key}".endswith(f".{OUR_KEY}")), None):  # its config is not in the tensors
        if prefix := ours.removesuffix(OUR_KEY):  # of a training module, under whatever name it has the network
            source = _peeled(source, prefix)
        return (
            f"{message}it looks like a unetlib UNet's, without its config: build that network as model = UNet(...), then type "
            f"model.load_state_dict({source}) and model.save_pretrained('folder'), which from_pretrained reads"
        )
    for prefix in PREFIXES:  # of a training module that has more than the network, such as the weights of its loss
        others = [key for key in state if not key.startswith(prefix)]
        if 0 < len(others) < len(state) / 2:
            return f"{message}{_list(others)} are not under {prefix!r}: call convert on the rest, {_peeled(source, prefix)}"
    if len(unmatched[nearest]) < len(state):
        return message + f"the nearest, {nearest}, has no {_list(keys)}"
    return (
        f"{message}none has any of its keys: {_list(keys)}; networks with pretrained encoders "
        "(segmentation_models.pytorch), nnU-Net's, residual, attention and 3-D ones run in their own library"
    )


def _rename(family: Family, entries: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, tensor in entries.items():
        module, _, leaf = key.rpartition(".")
        first = tensors.setdefault(f"{modules[module]}.{leaf}", tensor)
        if first is tensor:
            continue
        alike = first.dtype == tensor.dtype and first.shape == tensor.shape
        if not alike or not (tensor.is_meta or torch.equal(first, tensor)):  # a meta tensor has no values
            raise ValueError(f"the {family.name} checkpoint holds {key} under another name too, and the two differ")
    return tensors


def _infer_config(
    family: Family, tensors: Mapping[str, Tensor], options: Mapping[str, Any], source: str = "checkpoint"
) -> UNetConfig:
    """The network that these tensors, under our names, belong to: read off their shapes; `options` come first."""

    def shape(name: str) -> torch.Size:
        dimensions = tensors[name].ndim if name in tensors else None
        if dimensions == 5:
            raise ValueError(f"the {family.name} checkpoint is of a 3-D network; 3-D networks are not supported")
        if dimensions != 4:
            raise ValueError(
                f"the {family.name} checkpoint lacks the 4-D tensor for {name}, so its network cannot be told"
                + (f"; the one it has is {dimensions}-D" if dimensions is not None else "")
            )
        return tensors[name].shape

    def widths(name: str, dimension: int = 0) -> tuple[int, ...]:
        return tuple(shape(name.format(level=level, step=depth - 1 - level))[dimension] for level in range(depth))

    depth = len({key.split(".")[1] for key in tensors if key.startswith("encoder.")})
    inferred = {
        "in_channels": shape("encoder.0.conv1.weight")[1],
        "out_channels": shape("head.weight")[0],
        "features": widths("encoder.{level}.conv2.weight"),
        "bottleneck": shape("bottleneck.conv2.weight")[0],
        "decoder_features": widths("decoder.{step}.conv.conv2.weight"),
        "mid_features": widths("decoder.{step}.conv.conv1.weight"),
        "conv_bias": "encoder.0.conv2.bias" in tensors,
        "norm": "none",
        **family.options,
    }
    if "encoder.0.norm2.weight" in tensors:
        inferred["norm"] = "batch" if "encoder.0.norm2.running_mean" in tensors else "instance"
        inferred["first_norm"] = "encoder.0.norm1.weight" in tensors
    else:  # no norm, or one without tensors
        inferred["first_norm"] = ("encoder.0.conv1.bias" in tensors) == inferred["conv_bias"]
    unlikely = inferred["norm"] == "none" and not inferred["conv_bias"]
    if "norm" not in options and (unlikely or inferred["norm"] not in family.norms):
        raise ValueError(
            f"the {family.name} checkpoint has no tensors of norm {' or '.join(family.norms)}; if you know its norm, tell it: "
            f"convert({source}, norm='none'), or norm='group', or norm='instance', affine=False"
        )
    if "decoder.0.upsample.weight" in tensors:
        inferred |= {"upsample": "transpose", "up_features": widths("decoder.{step}.upsample.weight", dimension=1)}
    elif "decoder.0.upsample.conv.weight" in tensors:
        inferred |= {"upsample": "nearest_conv", "up_features": widths("decoder.{step}.upsample.conv.weight")}
    elif family.weightless:
        inferred.update(family.weightless)
    elif "upsample" not in options:
        raise ValueError(
            f"the {family.name} checkpoint has no weights for upsampling; if you know how it upsamples, tell it: "
            f"convert({source}, upsample='nearest') or upsample='bilinear'"
        )
    try:
        return UNetConfig.from_dict({**inferred, **options})
    except ValueError as error:
        raise ValueError(f"the {family.name} checkpoint tells no network: {error}") from error


def _strict(family: Family, config: UNetConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the network's own order, names and shapes checked."""
    from .unet import UNet

    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in UNet.from_config(config).state_dict().items()}
    # Files older than PyTorch 0.4.1 do not count batches.
    counters = {key: torch.tensor(0) for key in shapes if key.endswith("num_batches_tracked")}
    tensors = {**counters, **tensors}
    wrong = [f"{key} is missing" for key in shapes if key not in tensors]
    wrong += [f"{key} has no place" for key in tensors if key not in shapes]
    wrong += [
        f"{key} has shape {tuple(tensors[key].shape)}, not {tuple(shape)}"
        for key, shape in shapes.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"the {family.name} checkpoint does not make a network: {'; '.join(wrong[:3])}"
            + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    return {key: tensors[key] for key in shapes}


def _upsamplings(family: Family) -> str:
    with_weights = {"": "transpose", ".conv": "nearest_conv"}
    names = [name for part, name in with_weights.items() if part in family.upsample]
    return " or ".join([*names, *filter(None, [family.weightless.get("upsample")])])


def _and(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
