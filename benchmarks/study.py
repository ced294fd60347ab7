"""The study's U-Net, written again from its description: what unetlib's speed and outputs are held against.

Plain PyTorch and torchvision, no part of unetlib. Its parameters have the study's names (`downs`, `ups`, `bottleneck`,
`final_conv`), so that `unetlib.convert` reads its state dict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision.transforms.functional as TF
from torch import Tensor, nn


class DoubleConv(nn.Module):
    """Two 3x3 convolutions without bias, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        for width in (in_channels, out_channels):
            self.conv.extend(
                (
                    nn.Conv2d(width, out_channels, kernel_size=3, padding=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(inplace=True),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H, W) for (N, in_channels, H, W)."""
        return self.conv(x)


class StudyUNet(nn.Module):
    """The study's network: 31,037,633 parameters in 118 tensors by default.

    Args:
        in_channels: channels of the picture.
        out_channels: channels of the logits.
        features: width of each level, the full-size level first.
        bottleneck: width below the last level; None is the study's, twice the last. Others let it hold more weights.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        features: Sequence[int] = (64, 128, 256, 512),
        bottleneck: int | None = None,
    ) -> None:
        super().__init__()
        bottleneck = bottleneck or 2 * features[-1]
        self.ups = nn.ModuleList()
        self.downs = nn.ModuleList()
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        for before, width in zip((in_channels, *features), features):
            self.downs.append(DoubleConv(before, width))
        for below, width in zip((bottleneck, *reversed(features)), reversed(features)):
            self.ups.append(nn.ConvTranspose2d(below, width, kernel_size=2, stride=2))
            self.ups.append(DoubleConv(2 * width, width))
        self.bottleneck = DoubleConv(features[-1], bottleneck)
        self.final_conv = nn.Conv2d(features[0], out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, out_channels, H, W) for pictures (N, in_channels, H, W)."""
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for index, skip in enumerate(reversed(skips)):
            x = self.ups[2 * index](x)
            if x.shape[2:] != skip.shape[2:]:
                x = TF.resize(x, size=list(skip.shape[2:]))
            x = self.ups[2 * index + 1](torch.cat((skip, x), dim=1))
        return self.final_conv(x)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights and batch norm statistics, and return the network in evaluation mode.

    PyTorch's own initial weights fade the signal with depth, and with it what a comparison of outputs can see.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(seed + 7)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            else:
                fan_in = tensor[0].numel()
                tensor.normal_(0.0, (2.0 / fan_in) ** 0.5 if tensor.ndim > 1 else 0.5, generator=generator)
    return model.eval()
