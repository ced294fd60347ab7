"""Other projects' U-Net checkpoints, recognised by their keys and renamed to ours.

One `Family` for each layout: a table of key patterns, and what its project's preprocessing is. What the table does not match
exactly is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .config import Preprocessing, UNetConfig


class Converted(NamedTuple):
    """A checkpoint in unetlib's form: what builds the network, its tensors by name, and its preprocessing."""

    family: str
    config: UNetConfig
    state_dict: dict[str, Tensor]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Family:
    """One project's checkpoint layout.

    Args:
        name: what error messages call it.
        keys: (pattern, replacement) pairs; a key belongs to the first pattern that matches all of it. In a replacement,
            `{level}` is the group of that name as a number, `{half}` that number halved, and `{layer}` the group `layer` put
            through `layers`.
        layers: the family's names for the layers of a double convolution, and ours.
        preprocessing: what the project does to a picture before its network.
    """

    name: str
    keys: tuple[tuple[str, str], ...]
    layers: Mapping[str, str]
    preprocessing: Preprocessing

    def rename(self, key: str) -> str | None:
        """Our name for one of the family's keys, None for a key it does not have."""
        for pattern, replacement in self.keys:
            match = re.fullmatch(pattern, key)
            if match:
                named = match.groupdict()
                level = int(named["level"]) if "level" in named else 0
                return replacement.format(
                    level=level, half=level // 2, layer=self.layers.get(named.get("layer", ""), ""), rest=named["rest"]
                )
        return None


# The study's network, which many copies of its code share: `ups` alternates transposed and double convolutions, deepest first.
STUDY = Family(
    name="study",
    keys=(
        (r"downs\.(?P<level>\d+)\.conv\.(?P<layer>[0134])\.(?P<rest>\w+)", "encoder.{level}.{layer}.{rest}"),
        (r"bottleneck\.conv\.(?P<layer>[0134])\.(?P<rest>\w+)", "bottleneck.{layer}.{rest}"),
        (r"ups\.(?P<level>\d*[02468])\.(?P<rest>\w+)", "decoder.{half}.upsample.{rest}"),
        (r"ups\.(?P<level>\d*[13579])\.conv\.(?P<layer>[0134])\.(?P<rest>\w+)", "decoder.{half}.conv.{layer}.{rest}"),
        (r"final_conv\.(?P<rest>\w+)", "head.{rest}"),
    ),
    layers={"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"},
    preprocessing=Preprocessing(size=(160, 240)),
)

FAMILIES = (STUDY,)


def convert(checkpoint: Mapping[str, Any]) -> Converted:
    """Recognise a checkpoint and bring it into unetlib's form.

    Args:
        checkpoint: a state dict of a known family, or a dictionary that holds one under "state_dict".

    Returns:
        The converted checkpoint; its tensors are those of `checkpoint`, not copies.

    Raises:
        ValueError: for a checkpoint of no known family, naming the families tried and the first keys that did not match.

    Example:
        >>> import torch
        >>> convert({"final_conv.weight": torch.zeros(1, 64, 1, 1)})
        Traceback (most recent call last):
        ...
        ValueError: the study checkpoint lacks the 4-D tensor for encoder.0.conv1.weight, so its network cannot be told
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping) or not state:
        raise ValueError("the checkpoint holds no state dict: expected a dictionary of tensors, bare or under 'state_dict'")
    tried = []
    for family in FAMILIES:
        unknown = [key for key, value in state.items() if not isinstance(value, Tensor) or family.rename(str(key)) is None]
        if not unknown:
            tensors = {family.rename(key) or key: value for key, value in state.items()}
            return Converted(family.name, _infer_config(family, state, tensors), tensors, family.preprocessing)
        tried.append(f"{family.name} (no such key: {', '.join(map(repr, unknown[:3]))}{', ...' if len(unknown) > 3 else ''})")
    own = "bottleneck.conv1.weight" in state  # the activation cannot be told from tensors
    raise ValueError(
        f"this checkpoint of {len(state)} entries is of no known family; tried {'; '.join(tried)}"
        + ("; it looks like a unetlib UNet's: build that UNet, then call load_state_dict and save_pretrained" if own else "")
    )


def _infer_config(family: Family, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> UNetConfig:
    """The network that these tensors belong to, read off their shapes."""
    depth = len({key.split(".")[1] for key in tensors if key.startswith("encoder.")})
    needed = ["encoder.0.conv1.weight", *(f"encoder.{level}.conv2.weight" for level in range(depth))]
    for name in (*needed, "bottleneck.conv2.weight", "head.weight"):
        if name not in tensors or tensors[name].ndim != 4:
            raise ValueError(f"the {family.name} checkpoint lacks the 4-D tensor for {name}, so its network cannot be told")
    return UNetConfig(
        in_channels=tensors["encoder.0.conv1.weight"].shape[1],
        out_channels=tensors["head.weight"].shape[0],
        features=tuple(tensors[f"encoder.{level}.conv2.weight"].shape[0] for level in range(depth)),
        bottleneck=tensors["bottleneck.conv2.weight"].shape[0],
    )
