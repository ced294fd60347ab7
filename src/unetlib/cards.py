"""Model cards: a README.md with data about the model in its front matter, as the Hugging Face Hub reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import printable
from .hub import is_repository
from .trust import read_small
from .version import installed_version

if TYPE_CHECKING:
    from .unet import UNet

FRONT_MATTER_LIMIT = 2**16  # characters; reading YAML takes its time

_FRONT_MATTER = re.compile(r"\A\ufeff?---\r?\n((?:.*?\r?\n)??)---\r?(?:\n|\Z)", re.DOTALL)


def model_card(model: UNet, title: str, source: str, start: str | None = None) -> str:
    """A short card, filled from the model.

    Args:
        model: the network.
        title: the card's heading.
        source: what `from_pretrained` takes for it, in the card's example.
        start: what `from_pretrained` took for the weights that training began with, of which a repository is the base model;
            None: random ones, or not known.

    Returns:
        Markdown with YAML front matter; what is no text in a file's name is escaped, here and in `training_card`.

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
    overlap = ", which may overlap" if preprocessing.multilabel else ""
    base = f"base_model: {start}\nbase_model_relation: finetune\n" if start and is_repository(start) else ""
    return printable(f"""---
library_name: unetlib
pipeline_tag: image-segmentation
{base}tags:
- unet
- image-segmentation
---

# {title}

A U-Net of {sum(p.numel() for p in model.parameters()):,} parameters: widths {config.features}, bottleneck {config.bottleneck},
{config.in_channels} channels in, {config.out_channels} out. It sees a picture {size}. Its classes{overlap}: {classes}.

```python
from unetlib import UNet

mask = UNet.from_pretrained("{source}").predict("picture.jpg")
```

Written by unetlib {installed_version()}. `config.json` has the network's options and the preprocessing; `predict` applies it.
""")


def training_card(
    model: UNet,
    name: str,
    description: str,
    scores: Mapping[str, float],
    command: str,
    pictures: tuple[int, int],
    size: Sequence[int] | None = None,
    start: str | None = None,
) -> str:
    """The card of weights that were just trained: what they are, how they came about and what they score.

    Args:
        model: the network.
        name: the card's heading.
        description: a sentence on what it does.
        scores: "dice", "iou" and "accuracy" on the validation pictures, and "epoch", after which they were counted.
        command: what was run.
        pictures: how many were trained on, and how many validated on.
        size: (H, W) at which these were scored; None: at their own size.
        start: as `model_card`; None: random weights.

    Returns:
        What `model_card` gives, then description, recipe and a table of the scores.

    Example:
        >>> from unetlib import UNet
        >>> scores = {"epoch": 3, "dice": 0.98, "iou": 0.961, "accuracy": 0.99}
        >>> card = training_card(UNet(features=(8,)), "cars", "Finds cars.", scores, "python train.py", (90, 10))
        >>> print(card.splitlines()[-1])
        | epoch 3, the best by Dice | 0.9800 | 0.9610 | 99.00% |
    """
    scored_at = "at their own size" if size is None else "at {}x{}".format(*size)
    began = "" if start is None else f", starting from `UNet.from_pretrained({start!r})`"
    return printable(f"""{model_card(model, name, f"path/to/{name}", start)}
{description}

## Recipe

{pictures[0]} pictures to train on{began}; epoch {scores["epoch"]:.0f} of

```bash
{command}
```

## Results

| {pictures[1]} validation pictures {scored_at} | Dice, mean of each | IoU, mean of each | accuracy of all pixels |
|---|---|---|---|
| epoch {scores["epoch"]:.0f}, the best by Dice | {scores["dice"]:.4f} | {scores["iou"]:.4f} | {scores["accuracy"]:.2%} |
""")


def read_card(path: Path) -> dict[str, Any]:
    r"""The data in a card's front matter, {} where there is none.

    Raises:
        ValueError: for front matter that is no YAML mapping, is too large, or has aliases, by which a few lines can stand for
            gigabytes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     card = Path(folder, "README.md")
        ...     _ = card.write_text("---\nlicense: mit\n---\n# Cars")
        ...     read_card(card)
        {'license': 'mit'}
    """
    import yaml  # type: ignore[import-untyped]

    try:
        block = _FRONT_MATTER.match(read_small(path).decode("utf-8"))
        if block is None:
            return {}
        if len(block[1]) > FRONT_MATTER_LIMIT or block[1].count("[") + block[1].count("{") > 1000:
            raise ValueError(f"it has more than {FRONT_MATTER_LIMIT:,} characters, or too many brackets")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(block[1])):
            raise ValueError("aliases are not read")
        data = yaml.safe_load(block[1])
    # Its constructors raise all of these.
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise ValueError(f"the front matter of {path} cannot be read: {' '.join(str(error).split())}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"the front matter of {path} must be a mapping, got a {type(data).__name__}")
    return data or {}
