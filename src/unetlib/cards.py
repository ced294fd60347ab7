"""Model cards: a README.md with data about the model in its front matter, as the Hugging Face Hub reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .trust import installed_version, read_text

if TYPE_CHECKING:
    from .unet import UNet

FRONT_MATTER_LIMIT = 2**16  # characters; reading YAML takes its time

_FRONT_MATTER = re.compile(r"\A\ufeff?---\r?\n(.*?)\r?\n---\r?(?:\n|\Z)", re.DOTALL)


def model_card(model: UNet, title: str, source: str) -> str:
    """A short card, filled from the model.

    Args:
        model: the network.
        title: the card's heading.
        source: what `from_pretrained` takes for it, in the card's example.

    Returns:
        Markdown with YAML front matter.

    Example:
        >>> from unetlib import UNet
        >>> print(model_card(UNet(features=(8,)), "cars", "someone/cars").splitlines()[1])
        library_name: unetlib
    """
    config, preprocessing = model.config, model.preprocessing
    if preprocessing.size is not None:
        size = "at {}x{}".format(*preprocessing.size)
    else:
        size = "at its own size" if preprocessing.scale is None else f"at {preprocessing.scale} times its size"
    classes = ", ".join(preprocessing.class_names or ()) or "not named"
    return f"""---
library_name: unetlib
pipeline_tag: image-segmentation
tags:
- unet
- image-segmentation
---

# {title}

A U-Net of {sum(p.numel() for p in model.parameters()):,} parameters: widths {config.features}, bottleneck {config.bottleneck},
{config.in_channels} channels in, {config.out_channels} out. It sees a picture {size}. Its classes: {classes}.

```python
from unetlib import UNet

mask = UNet.from_pretrained("{source}").predict("picture.jpg")
```

Written by unetlib {installed_version()}. `config.json` has the network's options and the preprocessing; `predict` applies it.
"""


def read_card(path: Path) -> dict[str, Any]:
    """The data in a card's front matter, {} where there is none.

    Raises:
        ValueError: for front matter that is no YAML mapping, is too large, or has aliases, by which a few lines can stand for
            gigabytes.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        block = _FRONT_MATTER.match(read_text(path).decode("utf-8"))
        if block is None:
            return {}
        if len(block[1]) > FRONT_MATTER_LIMIT or block[1].count("[") + block[1].count("{") > 1000:
            raise ValueError(f"it has more than {FRONT_MATTER_LIMIT:,} characters, or too many brackets")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(block[1])):
            raise ValueError("aliases are not read")
        data = yaml.safe_load(block[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"the front matter of {path} cannot be read: {' '.join(str(error).split())}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"the front matter of {path} must be a mapping, got a {type(data).__name__}")
    return data or {}
