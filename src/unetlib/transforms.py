"""Presets for training and evaluation over `torchvision.transforms.v2`: a picture and its mask move together.

They take what `ImageMaskDataset` gives a v2 transform, `tv_tensors.Image` and `tv_tensors.Mask`, or plain tensors, on any
device; `PerPicture` takes whole batches through them. The mean and standard deviation of a model belong to its
`Preprocessing`; set them here only where no model does it.

torchvision calls a transform's `make_params` once for a picture and its mask, and its `transform` for each of them.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .arguments import at_least, check_range, height_and_width, is_number, rising, whole


def train_transform(
    size: Sequence[int] | None = (160, 240),
    *,
    rotation: float = 35.0,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.1,
    color_jitter: float = 0.0,
    grayscale: float = 0.0,
    invert: float = 0.0,
    crop: Sequence[float] | None = None,
    scale: Sequence[float] | None = None,
    elastic: float = 0.0,
    quarter_turns: bool = False,
    reflect: bool = False,
    outside: int = 0,
    low_resolution: float = 0.0,
    least_resolution: float = 0.2,
    jpeg: float = 0.0,
    noise: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> v2.Compose:
    """Random augmentation for training; the defaults are those of the study.

    Args:
        size: (H, W) of the result, or `None` to keep each picture's size.
        rotation: Turn by up to this many degrees either way; corners become black, and `outside` in the mask.
        horizontal_flip: Probability of a left-right flip.
        vertical_flip: Probability of an upside-down flip.
        color_jitter: Strength of random brightness, contrast and saturation, 0 to 1 (0.2: factors between 0.8 and 1.2), of
            pictures of 1 or 3 channels.
        grayscale: Probability of losing colour, of pictures of 1 or 3 channels.
        invert: Probability of the negative, dark for light: microscopes show the same things either way.
        crop: Least and largest share of the picture's area that a random part covers, which `size` then gets: (0.25, 1.0).
        scale: Least and largest factor of a random zoom about the middle: (0.8, 1.25). The size stays.
        elastic: Strength of random bends in pixels of the result, as in `RandomElastic`; 10 in the U-Net paper.
        quarter_turns: Turn by 0, 90, 180 or 270 degrees too, as in `RandomQuarterTurn`.
        reflect: Let rotation, zoom and bends bring in the mirror image of picture and mask instead of black and background,
            as in `Mirrored`: for textures, such as microscopy. The grid of bends spans the mirror image too: they are wider.
        outside: Class that rotation, zoom and bends bring into a mask of integers from outside the picture, 0 to 255, such as
            the `ignore_index` of a loss; bool and floating-point masks always get 0, background.
        low_resolution: Probability of losing detail, as in `RandomLowResolution`.
        least_resolution: Least share of its height and width that a picture is then reduced to, above 0 and up to 1.
        jpeg: Probability that such a picture is a small JPEG, as in `RandomLowResolution`; of 1 or 3 channels.
        noise: Standard deviation of Gaussian noise on the scale of 0 to 1, added to a picture with probability 0.5.
        mean: Subtracted from each channel, on the scale of 0 to 1; goes with `std`.
        std: Divides each channel after that.

    Returns:
        A transform from a picture CxHxW, uint8 (or uint16, or floats in [0, 1]), and its mask HxW, as plain tensors or
        `tv_tensors`, to tensors: float32 CxHxW in [0, 1], to 1e-6, before `mean` and `std`, and the mask HxW in its own
        dtype, or float32 where a bool one is resized.

    Raises:
        TypeError: `size` is no pair of integers, or `outside` no integer; when called, for what is no tensor, and for a
            picture of other integers, whose range is unknown.
        ValueError: Only one of `mean` and `std` is given, `crop` without `size`, `jpeg` without `low_resolution`, or a number
            is out of its range; when called, for floats outside [0, 1], for a mask of another size than the picture, or whose
            integers do not reach `outside`, and for a picture of neither 1 nor 3 channels with `color_jitter`, `grayscale` or
            `jpeg`.

    Example:
        >>> transform = train_transform((16, 24), rotation=10, color_jitter=0.2)
        >>> image = tv_tensors.Image(torch.zeros(3, 32, 48, dtype=torch.uint8))
        >>> image, mask = transform(image, tv_tensors.Mask(torch.ones(32, 48)))
        >>> image.shape, image.dtype, mask.shape
        (torch.Size([3, 16, 24]), torch.float32, torch.Size([16, 24]))
    """
    if crop is not None and size is None:
        raise ValueError("crop needs the size that the cut out part is to have; got size=None")
    if jpeg and not low_resolution:
        raise ValueError(f"jpeg={jpeg!r} is a share of the pictures that low_resolution reduces, and that is 0; give both")
    shares = {"horizontal_flip": horizontal_flip, "vertical_flip": vertical_flip, "color_jitter": color_jitter}
    shares |= {"grayscale": grayscale, "invert": invert, "low_resolution": low_resolution, "jpeg": jpeg}
    for name, value in shares.items():
        at_least(name, value, 0, 1)
    for name, value in {"rotation": rotation, "elastic": elastic, "noise": noise}.items():
        at_least(name, value, 0)
    whole("outside", outside, 0, 255)
    if not is_number(least_resolution) or not 0 < least_resolution <= 1:
        raise ValueError(f"least_resolution must be above 0 and up to 1, not {least_resolution!r}")
    colour = [name for name in ("color_jitter", "grayscale", "jpeg") if shares[name]]
    steps: list[torch.nn.Module] = [_PictureAndMask(colour)]
    if size is not None:
        steps.append(Resize(size) if crop is None else RandomCrop(size, rising("crop", crop, 0, 1)))
    if quarter_turns:
        steps.append(RandomQuarterTurn())
    # Flips come first, on bytes: since pictures are turned either way as often, the order is the same to chance. What
    # interpolates comes after, on floats, so that nothing is rounded in between.
    if horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(horizontal_flip))
    if vertical_flip:
        steps.append(v2.RandomVerticalFlip(vertical_flip))
    steps.append(v2.ToDtype(torch.float32, scale=True))
    warps: list[torch.nn.Module] = []
    if rotation or scale is not None:
        warps.append(RandomAffine(rotation, scale, outside=outside))
    if elastic:
        warps.append(RandomElastic(elastic, outside=outside))
    if warps and reflect:
        warps = [Mirrored(v2.Compose(warps), rotation=rotation, zoom=scale[0] if scale else 1.0, shift=3 * elastic)]
    steps += warps
    if color_jitter:
        steps.append(v2.ColorJitter(*[float(color_jitter)] * 3))  # it takes no number of NumPy's or PyTorch's
    if grayscale:
        steps.append(v2.RandomGrayscale(grayscale))
    if invert:
        steps.append(v2.RandomInvert(invert))
    if low_resolution:
        steps.append(RandomLowResolution(low_resolution, (least_resolution, 1.0), jpeg))
    if noise:
        steps.append(v2.RandomApply([v2.GaussianNoise(sigma=noise)]))
    return v2.Compose([*steps, *_normalized(mean, std)])


def eval_transform(
    size: Sequence[int] | None = (160, 240), *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> v2.Compose:
    """Resize and scale to [0, 1], without chance.

    Args:
        size: (H, W) of the result, or `None` to keep each picture's size.
        mean: Subtracted from each channel, on the scale of 0 to 1; goes with `std`.
        std: Divides each channel after that.

    Returns:
        A transform as `train_transform` gives.

    Raises:
        TypeError: `size` is no pair of integers; when called, as that of `train_transform`.
        ValueError: Only one of `mean` and `std` is given, or a number is out of its range; when called, for floats outside
            [0, 1].

    Example:
        >>> image = tv_tensors.Image(torch.full((3, 32, 48), 255, dtype=torch.uint8))
        >>> image, mask = eval_transform((16, 24))(image, tv_tensors.Mask(torch.ones(32, 48)))
        >>> image.shape, image.max(), mask.shape
        (torch.Size([3, 16, 24]), tensor(1.), torch.Size([16, 24]))
    """
    steps: list[v2.Transform] = [] if size is None else [Resize(size)]
    return v2.Compose([_PictureAndMask(), *steps, v2.ToDtype(torch.float32, scale=True), *_normalized(mean, std)])


class _PictureAndMask(torch.nn.Module):
    """What a preset begins with: plain tensors beside the picture become masks, which torchvision would leave as they are.

    What it would pass through untouched, or scale by a range that pictures do not fill, is refused.
    """

    def __init__(self, colour: Sequence[str] = ()) -> None:
        super().__init__()
        self.colour = colour  # options that torchvision has for grey and RGB alone

    def forward(self, image: Any, *masks: Any) -> Any:
        for part in (image, *masks):
            if not isinstance(part, torch.Tensor):
                raise TypeError(
                    f"a preset takes a picture (C, H, W) and its mask (H, W) as two tensors, not a {type(part).__name__}; of "
                    "arrays: transform(unetlib.imaging.to_tensor(picture), torch.from_numpy(mask))"
                )
        if image.is_floating_point():
            check_range(image)
        elif image.dtype not in (torch.uint8, torch.uint16):
            raise TypeError(
                f"a picture of {image.dtype} has no known range; give a preset uint8, uint16 or floats in [0, 1], such as "
                "picture / 10000 where 10000 is white"
            )
        if self.colour and (channels := F.get_num_channels(image)) not in (1, 3):
            raise ValueError(
                f"{self.colour[0]} is for pictures of 1 or 3 channels, got {channels}; leave it out of train_transform"
            )
        for mask in masks:
            if mask.shape[-2:] != image.shape[-2:]:
                raise ValueError(
                    f"a preset takes a picture (C, H, W) and a mask (H, W) of one size, not {tuple(image.shape)} and "
                    f"{tuple(mask.shape)}; put channels first, or resize the mask"
                )
        typed = (part if isinstance(part, tv_tensors.TVTensor) else tv_tensors.Mask(part, device=part.device) for part in masks)
        return (image, *typed) if masks else image


def _normalized(mean: Sequence[float] | None, std: Sequence[float] | None) -> list[v2.Transform]:
    """What a preset ends with."""
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std go together, but mean={mean!r} and std={std!r}")
    if mean is None or std is None:
        return [v2.ToPureTensor()]
    try:
        means, stds = [*map(float, mean)], [*map(float, std)]
    except (TypeError, ValueError):
        means, stds = [], []
    if not means or len(means) != len(stds) or not all(0 < value < math.inf for value in stds):
        raise ValueError(
            "mean and std must each be one number for each channel, and std finite and above 0, not "
            f"mean={mean!r} and std={std!r}"
        )
    if not all(0 <= value <= 1 for value in means):
        raise ValueError(f"mean and std are on the scale of 0 to 1, but mean={mean!r}; divide both by 255, say")
    return [v2.Normalize(means, stds), v2.ToPureTensor()]


class Resize(v2.Transform):  # type: ignore[misc]
    """Resize a picture and its mask to one size, so that the mask stays where the picture is.

    torchvision's own `Resize` takes masks by the `nearest` rule, which reads the upper left pixel of each cell instead
    of the middle one: reduced k times, a mask lies up to (k - 1) / 2 pixels of the large picture off. Here a bool or
    floating-point mask becomes the covered part of each pixel (antialiased bilinear, soft edges within the range of the
    input), and a mask of integers takes the middle pixel (`nearest-exact`); where k is even, one of the four there, which is
    half a pixel of the large picture off.

    Args:
        size: (H, W) of the result.

    Raises:
        TypeError: `size` is no pair of integers.
        ValueError: One of them is below 1.

    Example:
        >>> image = tv_tensors.Image(torch.zeros(3, 8, 8, dtype=torch.uint8))
        >>> mask = tv_tensors.Mask(torch.eye(8))
        >>> image, mask = Resize((4, 4))(image, mask)
        >>> image.shape, mask.shape, mask.dtype
        (torch.Size([3, 4, 4]), torch.Size([4, 4]), torch.float32)
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = [*height_and_width(size)]

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one picture or mask."""
        if not isinstance(inpt, tv_tensors.Mask):
            return _resize_picture(inpt, self.size)
        # As a picture of one channel, since torchvision resizes masks by `nearest` alone.
        mask = inpt.as_subclass(torch.Tensor)[None]
        bits = mask.dtype == torch.bool
        if bits:
            mask = mask.view(torch.uint8).float()  # a third of the time of mask.float()
        if mask.is_floating_point():
            resized = _resize_picture(_with_fewer_rows(mask, self.size[0]), self.size)
            resized = resized.clamp(0, 1) if bits else resized.clamp(*mask.aminmax())  # rounding leaves the range by 1e-7
        else:
            resized = F.resize_image(mask, self.size, interpolation=v2.InterpolationMode.NEAREST_EXACT)
        return tv_tensors.wrap(resized[0], like=inpt)


def _with_fewer_rows(mask: torch.Tensor, height: int) -> torch.Tensor:
    """A large mask (1, H, W) of a CPU resized to half as many rows or fewer, antialiased bilinear; others as they are.

    PyTorch's kernel for floats shortens rows first, pixel by pixel. Sums of whole rows are far quicker, and leave it little to
    do; they differ from its own by rounding, some 1e-7.
    """
    rows = mask.shape[-2]
    slow = mask.ndim == 3 and mask.dtype == torch.float32 and mask.device.type == "cpu" and mask.numel() >= 2**17
    if not slow or rows < 2 * height:
        return mask
    reach = rows / height  # of a new row, up and down from its middle
    middle = (torch.arange(height, dtype=mask.dtype, device="cpu")[:, None] + 0.5) * reach
    summed = middle.long() + torch.arange(-math.ceil(reach), math.ceil(reach) + 1, device="cpu")
    inside = summed.clamp(0, rows - 1)
    weights = (1 - (summed - middle + 0.5).abs() / reach).clamp(min=0) * (summed == inside)
    weights /= weights.sum(1, keepdim=True)
    return torch.nn.functional.embedding_bag(inside, mask[0], mode="sum", per_sample_weights=weights)[None]


class RandomCrop(v2.Transform):  # type: ignore[misc]
    """Cut out a random part of a picture, of the shape of the result, and resize it: objects at many scales.

    torchvision's `RandomResizedCrop` with the `Resize` above, and without a change of aspect ratio. Where a share asks for
    more than the picture has in that shape, the largest part is taken, at a random place; torchvision's is then the middle.

    Args:
        size: (H, W) of the result.
        area: Least and largest share of the picture's area, each in (0, 1].

    Raises:
        TypeError: `size` is no pair of integers.
        ValueError: One of them is below 1, or `area` is no range within (0, 1].

    Example:
        >>> image = tv_tensors.Image(torch.zeros(3, 32, 48, dtype=torch.uint8))
        >>> RandomCrop((16, 24), area=(0.25, 1.0))(image).shape
        torch.Size([3, 16, 24])
    """

    def __init__(self, size: Sequence[int], area: Sequence[float]) -> None:
        super().__init__()
        self.resize, self.area = Resize(size), rising("area", area, 0, 1)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the part."""
        height, width = F.get_size(flat_inputs[0])
        ratio = self.resize.size[1] / self.resize.size[0]
        tall = math.sqrt(torch.empty((), device="cpu").uniform_(*self.area).item() * height * width / ratio)
        tall = min(tall, height, width / ratio)
        part = {"height": max(1, round(tall)), "width": max(1, round(tall * ratio))}
        free = {"top": height - part["height"], "left": width - part["width"]}
        return part | {name: int(torch.randint(pixels + 1, (), device="cpu")) for name, pixels in free.items()}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut and resize one picture or mask."""
        return self.resize.transform(F.crop(inpt, **params), {})


class RandomLowResolution(v2.Transform):  # type: ignore[misc]
    """Reduce a picture by a random factor and enlarge it again: details lost, size kept. Masks stay.

    The low-resolution simulation of nnU-Net (Isensee et al. 2021, https://doi.org/10.1038/s41592-020-01008-z), antialiased.

    Args:
        p: Probability.
        factor: Least and largest factor; drawn uniformly on a logarithmic scale, so that each halving is as likely.
        jpeg: Probability that a reduced picture is one as websites keep them: reduced by the sharper bicubic rule, and
            stored as a JPEG of a quality from 50 to 95, on the CPU. For pictures of 1 or 3 channels, uint8 or floats in [0, 1].

    Raises:
        ValueError: `p` or `jpeg` is outside [0, 1], or `factor` no range within (0, 1].

    Example:
        >>> image = tv_tensors.Image(torch.randint(256, (3, 32, 48), dtype=torch.uint8))
        >>> RandomLowResolution(p=1.0, jpeg=0.5)(image).shape
        torch.Size([3, 32, 48])
    """

    def __init__(self, p: float, factor: tuple[float, float] = (0.2, 1.0), jpeg: float = 0.0) -> None:
        super().__init__()
        at_least("p", p, 0, 1)
        at_least("jpeg", jpeg, 0, 1)
        self.p, self.factor, self.jpeg = p, rising("factor", factor, 0, 1), jpeg

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw factor and quality."""
        skip = torch.rand((), device="cpu") >= self.p
        least, largest = map(math.log, self.factor)
        factor = 1.0 if skip else math.exp(torch.empty((), device="cpu").uniform_(least, largest).item())
        stored = self.jpeg and not skip and torch.rand((), device="cpu") < self.jpeg
        return {"factor": factor, "quality": int(torch.randint(50, 96, (), device="cpu")) if stored else None}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Reduce and enlarge a picture."""
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        height, width = inpt.shape[-2:]
        reduced = [max(1, round(params["factor"] * side)) for side in (height, width)]
        if params["quality"]:
            # As floats, since the bicubic rule overshoots, which integers of more than 8 bits take for the other end.
            small = _resize_picture(F.to_dtype(inpt, torch.float32, scale=True), reduced, v2.InterpolationMode.BICUBIC)
            small = F.to_dtype(_as_jpeg(small.clamp(0, 1), params["quality"]), inpt.dtype, scale=True)
        else:
            small = _resize_picture(inpt, reduced)
        return tv_tensors.wrap(_resize_picture(small, [height, width]), like=inpt)


def _resize_picture(
    picture: torch.Tensor, size: list[int], rule: v2.InterpolationMode = v2.InterpolationMode.BILINEAR
) -> torch.Tensor:
    if size[1] == 1:  # PyTorch's kernels mix up the rows of a single column, but no columns of a single row
        floats = picture if picture.is_floating_point() else picture.float()
        column = F.resize(floats.mT, size[::-1], rule, antialias=True).mT
        resized = column if picture.is_floating_point() else column.round().to(picture.dtype)
    else:
        resized = F.resize(picture, size, rule, antialias=True)
    same_kind: torch.Tensor = tv_tensors.wrap(resized, like=picture)
    return same_kind


def _as_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Floats in [0, 1] of shape (C, H, W), stored as a JPEG and read again: uint8. torchvision's `F.jpeg` is on its way out."""
    file = io.BytesIO()
    F.to_pil_image((255 * image).round().to(torch.uint8).cpu()).save(file, "JPEG", quality=quality)
    stored: torch.Tensor = F.pil_to_tensor(PIL.Image.open(file))
    return stored.to(image.device)


class RandomAffine(v2.RandomAffine):  # type: ignore[misc]
    """Turn and zoom a picture and its mask about the middle, interpolated once for both; what comes from outside is black.

    It draws the same numbers as torchvision's `RandomAffine(fill=None)` and gives the same, in a third to a half of its time
    on a CPU: the places that pixels come from are found once for picture and mask, without a matrix product, and a pixel's
    channels lie side by side when they are read.

    Args:
        rotation: Largest angle either way, in degrees.
        scale: Least and largest factor of the zoom, or `None` for none.
        outside: Class that comes from outside into a mask of integers, 0 to 255, such as the `ignore_index` of a loss; bool
            and floating-point masks always get 0, background.

    Raises:
        TypeError: `outside` is no integer.
        ValueError: `rotation` is negative, `scale` no range of factors above 0, or `outside` not from 0 to 255.

    Example:
        >>> image, mask = tv_tensors.Image(torch.ones(3, 32, 48)), tv_tensors.Mask(torch.ones(32, 48))
        >>> image, mask = RandomAffine(35.0, scale=(0.8, 1.25))(image, mask)
        >>> image.shape, mask.shape
        (torch.Size([3, 32, 48]), torch.Size([32, 48]))
    """

    def __init__(self, rotation: float, scale: Sequence[float] | None = None, *, outside: int = 0) -> None:
        at_least("rotation", rotation, 0)
        scale = None if scale is None else rising("scale", scale, 0)
        super().__init__(float(rotation), scale=scale, interpolation=v2.InterpolationMode.BILINEAR)
        self.outside = whole("outside", outside, 0, 255)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw angle and zoom."""
        drawn = super().make_params(flat_inputs)
        return {"grid": _pixel_grid(flat_inputs[0], drawn["angle"], drawn["scale"])}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Turn one picture or mask."""
        return _sample(inpt, params["grid"], self.outside)


class RandomElastic(v2.Transform):  # type: ignore[misc]
    """Bend a picture and its mask smoothly: random displacements on a coarse grid, bicubic between them.

    The deformation of the U-Net paper (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597), which drew it on a 3x3
    grid with a standard deviation of 10 pixels. torchvision's `ElasticTransform` blurs noise at full size instead, which
    takes minutes for bends as wide as these. What comes from outside the picture is black, and background or `outside`.

    Args:
        sigma: Standard deviation of the displacement of a grid point along each axis, in pixels.
        grid: Points along each side.
        outside: Class that comes from outside into a mask of integers, as in `RandomAffine`.

    Raises:
        TypeError: `grid` or `outside` is no integer.
        ValueError: `sigma` is negative, `grid` below 2, or `outside` not from 0 to 255.

    Example:
        >>> image, mask = tv_tensors.Image(torch.zeros(3, 32, 48)), tv_tensors.Mask(torch.ones(32, 48))
        >>> image, mask = RandomElastic(sigma=2.0)(image, mask)
        >>> image.shape, mask.shape
        (torch.Size([3, 32, 48]), torch.Size([32, 48]))
    """

    def __init__(self, sigma: float = 10.0, grid: int = 3, *, outside: int = 0) -> None:
        super().__init__()
        at_least("sigma", sigma, 0)
        self.sigma, self.grid, self.outside = sigma, whole("grid", grid, 2), whole("outside", outside, 0, 255)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the displacements."""
        grid = _pixel_grid(flat_inputs[0])
        points = self.sigma * torch.randn(1, 2, self.grid, self.grid, device="cpu")  # x and y, in pixels
        size = grid.shape[1:3]
        pixels = torch.nn.functional.interpolate(points.to(grid.device), size, mode="bicubic", align_corners=True)
        return {"grid": grid + pixels.permute(0, 2, 3, 1) * grid.new_tensor([2 / size[1], 2 / size[0]])}  # a side counts 2

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Bend one picture or mask."""
        return _sample(inpt, params["grid"], self.outside)


def _pixel_grid(image: torch.Tensor, angle: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Where each pixel comes from when a picture is turned clockwise by `angle` degrees and enlarged by `scale`.

    Returns:
        float32 (1, H, W, 2) as `grid_sample` has it: x and y, -1 and 1 at the outer borders.
    """
    height, width = image.shape[-2:]
    cos, sin = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    grid = torch.empty(1, height, width, 2, dtype=torch.float32, device=image.device)
    x = torch.arange(width, dtype=torch.float32, device=image.device) + (1 - width) / 2  # from the middle, in pixels
    y = torch.arange(height, dtype=torch.float32, device=image.device)[:, None] + (1 - height) / 2
    torch.add(x * (2 * cos / width), y * (2 * sin / width), out=grid[0, ..., 0])
    torch.add(x * (-2 * sin / height), y * (2 * cos / height), out=grid[0, ..., 1])
    return grid


def _sample(inpt: torch.Tensor, grid: torch.Tensor, outside: int) -> Any:
    """A picture or mask (..., H, W) read at the places of a grid: bilinear, of a mask the nearest pixel.

    Outside it is 0, of a mask of integers `outside`.
    """
    pixels = inpt.as_subclass(torch.Tensor)
    if pixels.dtype == torch.bool:
        pixels = pixels.view(torch.uint8)  # a third of the time to become float
    channels = pixels.reshape(1, -1, *pixels.shape[-2:])
    dtype = torch.promote_types(pixels.dtype, torch.float32)
    channels = channels.to(dtype)
    if not isinstance(inpt, tv_tensors.Mask) or inpt.is_floating_point() or inpt.dtype == torch.bool:
        outside = 0
    elif outside > torch.iinfo(inpt.dtype).max:
        raise ValueError(f"a mask of {inpt.dtype} cannot hold outside={outside}; give a wider one, such as mask.short()")
    if outside:
        channels = channels - outside  # so that the 0 of grid_sample stands for it
    sampled = torch.nn.functional.grid_sample(
        channels.contiguous(memory_format=torch.channels_last),  # half the time: channels lie side by side
        grid.to(dtype),
        mode="nearest" if isinstance(inpt, tv_tensors.Mask) else "bilinear",
        align_corners=False,
    )
    if outside:
        sampled += outside
    if not inpt.is_floating_point():
        sampled.round_()
    return tv_tensors.wrap(sampled.reshape(pixels.shape).to(inpt.dtype), like=inpt)


class RandomQuarterTurn(v2.Transform):  # type: ignore[misc]
    """Turn by 0, 90, 180 or 270 degrees, each as likely and without interpolation; an oblong picture by 0 or 180 alone.

    Example:
        >>> RandomQuarterTurn()(tv_tensors.Image(torch.zeros(3, 32, 48))).shape
        torch.Size([3, 32, 48])
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the turn."""
        height, width = F.get_size(flat_inputs[0])
        step = 90 if height == width else 180
        return {"angle": float(step * torch.randint(360 // step, (), device="cpu").item())}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Turn one picture or mask."""
        return F.rotate(inpt, **params)


class Mirrored(torch.nn.Module):
    """Let a transform that keeps sizes see a picture with its mirror image around it, and cut out the middle again.

    What a rotation, a zoom or a bend brings in from outside is then more of the same texture, with its mask, instead of
    black that the mask calls background.

    Args:
        transform: What runs on the larger picture.
        rotation: Largest rotation in it, in degrees; `rotation`, `zoom` and `shift` say how much of the mirror image is seen.
        zoom: Least factor of size in it.
        shift: Farthest that it moves a pixel otherwise, in pixels.

    The mirror image reaches one side's length at most; beyond that there is nothing.

    Example:
        >>> turn = v2.RandomRotation((45, 45))
        >>> image = tv_tensors.Image(torch.full((3, 32, 48), 9, dtype=torch.uint8))
        >>> turn(image).min().item(), Mirrored(turn, rotation=45)(image).min().item()
        (0, 9)
    """

    def __init__(self, transform: torch.nn.Module, *, rotation: float = 0.0, zoom: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.transform, self.rotation, self.zoom, self.shift = transform, rotation, zoom, shift

    def forward(self, *inputs: Any) -> Any:
        """Enlarge, transform and cut."""
        height, width = F.get_size(inputs[0])
        x, y = self._margin(width, height), self._margin(height, width)
        steps = [v2.Pad([x, y], padding_mode="reflect"), self.transform, v2.CenterCrop([height, width])]
        return v2.Compose(steps)(*inputs)

    def _margin(self, side: int, other: int) -> int:
        """Pixels beyond each end of a side: half of what the turned rectangle is longer, and the shift."""
        angle = min(math.radians(abs(self.rotation)), math.atan2(other, side))  # at which the rectangle reaches farthest
        reach = (side * math.cos(angle) + other * math.sin(angle)) / self.zoom
        return min(side - 1, max(0, math.ceil((reach - side) / 2 + self.shift / self.zoom)))


class PerPicture(torch.nn.Module):
    """Run a transform on each picture of a batch, with new random numbers for each, on whatever device the batch is.

    torchvision's transforms draw once a call: a whole batch would be turned by the same angle. With this, pictures go to the
    GPU as uint8, a quarter of the bytes of float32, and the presets run there.

    Args:
        transform: Takes (`tv_tensors.Image`, `tv_tensors.Mask`) and gives a picture and a mask, of one size for all.

    Raises:
        TypeError: `transform` is no `nn.Module`.
        ValueError: The batch is empty or not (N, C, H, W), there are not as many masks, or seeds, as pictures, or the
            transform gives pictures of several sizes.

    Example:
        >>> augment = PerPicture(train_transform(size=None))
        >>> images, masks = augment(torch.zeros(4, 3, 32, 48, dtype=torch.uint8), torch.ones(4, 32, 48))
        >>> images.shape, images.dtype, masks.shape
        (torch.Size([4, 3, 32, 48]), torch.float32, torch.Size([4, 32, 48]))
    """

    def __init__(self, transform: torch.nn.Module) -> None:
        super().__init__()
        if not isinstance(transform, torch.nn.Module):
            raise TypeError(
                f"transform must be a torch.nn.Module, such as train_transform(size=None), not a {type(transform).__name__}"
            )
        self.transform = transform

    @torch.no_grad()
    def forward(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        masks: torch.Tensor | Sequence[torch.Tensor],
        seeds: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform (N, C, H, W) pictures and (N, H, W) or (N, 1, H, W) masks; the results are stacked again.

        Lists of pictures and masks may be of several sizes. With `seeds`, one for each picture, the chance comes from them
        alone, as in `unetlib.loading.Augmented`.
        """
        if (isinstance(images, torch.Tensor) and images.ndim != 4) or len(images) != len(masks):
            raise ValueError(
                f"a batch must be pictures (N, C, H, W) and as many masks (N, H, W), not {_shapes(images)} and {_shapes(masks)}"
            )
        if seeds is not None and len(seeds) != len(images):
            raise ValueError(f"seeds must be one for each of the {len(images)} pictures, not {len(seeds)}")
        if not len(images):
            raise ValueError("a batch must hold one picture or more, not none")
        pairs = []
        for number, (image, mask) in enumerate(zip(images, masks)):
            with contextlib.nullcontext() if seeds is None else seeded(seeds[number], image.device):
                pair = tv_tensors.Image(image, device=image.device), tv_tensors.Mask(mask, device=mask.device)
                pairs.append(self.transform(*pair))
        new_images, new_masks = zip(*pairs)
        check_one_size(new_images)
        return torch.stack(new_images), torch.stack(new_masks)


def _shapes(batch: torch.Tensor | Sequence[torch.Tensor]) -> str:
    return str(tuple(batch.shape)) if isinstance(batch, torch.Tensor) else f"{len(batch)} in a list"


def check_one_size(images: Sequence[torch.Tensor]) -> None:
    """Refuse pictures that cannot be one batch.

    Raises:
        ValueError: naming two of their sizes.

    Example:
        >>> check_one_size([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)])
    """
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) > 1:
        one, other = sorted(sizes)[:2]
        raise ValueError(
            f"a batch needs pictures of one size, and their transform gives {one} and {other}; give it a size, as in "
            "train_transform(size=(160, 240))"
        )


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw torch's random numbers from a seed, on the CPU and on a GPU; the random states outside stay as they were.

    Args:
        seed: 0 to 2**63 - 1.
        device: A GPU, of CUDA or MPS, that transforms draw on too; None or a CPU: none.

    Example:
        >>> with seeded(7):
        ...     first = torch.rand(1)
        >>> with seeded(7):
        ...     torch.equal(torch.rand(1), first)
        True
    """
    gpu = device if device is not None and device.type in ("cuda", "mps") else None
    with torch.random.fork_rng(devices=[gpu] if gpu else [], device_type=gpu.type if gpu else "cuda"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change every GPU's state, which none gives back
        if gpu and gpu.type == "mps":
            torch.mps.manual_seed(seed)
        elif gpu:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield
