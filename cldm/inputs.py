"""What people hand to the pipeline, as tensors: hints, pictures and masks in any form, brought to one size.

A form is a PIL picture, the path of a file, a numpy array (H, W), (H, W, C) or (N, H, W, C), a tensor (C, H, W) or (N, C, H, W), an
annotator's `Hint`, or a list of these. Integers are 0 to 255, floats 0 to 1.

Shapes: N pictures, C channels, H W pixels.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from annotator.pictures import as_array
from annotator.registry import Hint
from ldm.util import ConfigError

LONGEST, SHORTEST = 8192, 8  # sides of a picture, in pixels
_MOST_IN_VAIN = 16  # times the pixels that are wanted may be scaled, to cut them off afterwards
HOLE = -1.0  # a pixel of an inpainting hint that is to be painted

Picture = Image.Image | str | os.PathLike | np.ndarray | Tensor | Hint
Pictures = Picture | Sequence[Picture]


def hint_tensor(hint: Pictures, channels: int = 3, size: tuple[int, int] | None = None) -> Tensor:
    """Hints in any form -> float32 (N, channels, H, W), 0 to 1, and -1 in the hole of an inpainting hint.

    Grey is repeated for a ControlNet of three channels, and RGBA laid over white.

    Args:
        size: (H, W) to fit them to, see `fit`; by default that of the first.

    Raises:
        ValueError: no picture, another number of channels, values out of range.
    """
    return _many(
        hint,
        lambda one: _in_range(_with_channels(_tensor(one, "a hint"), channels, "a hint"), "a hint"),
        size,
        "a hint",
    )


def picture_tensor(picture: Pictures, size: tuple[int, int] | None = None) -> Tensor:
    """Pictures in any form -> float32 (N, 3, H, W), 0 to 1; errors as of `hint_tensor`."""

    def convert(one: Picture) -> Tensor:
        found = _in_range(_with_channels(_tensor(one, "a picture"), 3, "a picture"), "a picture")
        if bool((found < 0).any()):
            raise ValueError("a picture must lie in [0, 1]; only a hint may hold -1")
        return found

    return _many(picture, convert, size, "a picture")


def mask_tensor(mask: Pictures, size: tuple[int, int] | None = None) -> Tensor:
    """Masks in any form, white where to paint -> float32 (N, 1, H, W), 1 where to paint. Of several channels the first counts.

    Raises:
        ValueError: no picture, values out of range.
    """

    def convert(one: Picture) -> Tensor:
        if isinstance(one, np.ndarray) and one.dtype == bool:
            one = one.astype(np.uint8) * 255
        elif isinstance(one, Tensor) and one.dtype == torch.bool:
            one = one.float()
        found = _in_range(_tensor(one, "a mask")[:, :1], "a mask")
        if bool((found < 0).any()):
            raise ValueError("a mask must lie in [0, 1]: white, 1, is painted; only a hint may hold -1")
        return found

    return _many(mask, convert, size, "a mask")


def fit(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) at `size` (height, width): scaled until it covers that, the rest cut off evenly; as it is where it fits.

    What is scaled is smoothed, but for holes of -1, which keep their border.
    """
    height, width = size
    if tuple(x.shape[2:]) == (height, width):
        return x
    scale = max(height / x.shape[2], width / x.shape[3])
    scaled = max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale))
    if scaled[0] * scaled[1] > _MOST_IN_VAIN * height * width:
        # A very thin picture, scaled whole, would fill the memory.
        x = _middle(x, math.ceil(height / scale), math.ceil(width / scale))
        scaled = max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale))
    hole = x == HOLE
    out = F.interpolate(x.clamp(min=0), scaled, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    if bool(hole.any()):
        out = torch.where(F.interpolate(hole.float(), scaled, mode="nearest-exact") > 0.5, HOLE, out)
    return _middle(out, height, width)


def _middle(x: Tensor, height: int, width: int) -> Tensor:
    """(N, C, H, W) cut evenly to at most `height` x `width`."""
    top, left = max(0, (x.shape[2] - height) // 2), max(0, (x.shape[3] - width) // 2)
    return x[:, :, top : top + height, left : left + width]


def pad(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) with its last row and column repeated up to `size` (height, width)."""
    bottom, right = size[0] - x.shape[2], size[1] - x.shape[3]
    if not bottom and not right:
        return x
    rows = torch.arange(size[0], device=x.device).clamp(max=x.shape[2] - 1)
    columns = torch.arange(size[1], device=x.device).clamp(max=x.shape[3] - 1)
    return x[:, :, rows][:, :, :, columns]


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """(height, width) as whole numbers.

    Raises:
        ValueError: no two whole numbers from 8 to 8192.
    """
    whole = (int, np.integer)
    if (
        not isinstance(size, (list, tuple, torch.Size))
        or len(size) != 2
        or not all(isinstance(side, whole) for side in size)
    ):
        raise ValueError(f"size must be (height, width) in whole pixels, found {size!r}")
    if not all(SHORTEST <= side <= LONGEST for side in size):
        raise ValueError(
            f"sides must be from {SHORTEST} to {LONGEST} pixels, found {size[0]} x {size[1]} (height x width)"
        )
    return int(size[0]), int(size[1])


def to_array(x: Tensor) -> np.ndarray:
    """Pictures (N, C, H, W) in [0, 1] as uint8 (N, H, W, C); what came from uint8 is that again."""
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def size_of(pictures: Pictures) -> tuple[int, int]:
    """(height, width) of a form of picture, of the first of several."""
    picture: Any = pictures
    if isinstance(pictures, (list, tuple)):
        if not pictures:
            raise ValueError("pictures are missing: the list is empty")
        picture = pictures[0]
    if isinstance(picture, np.ndarray) and picture.dtype == bool:
        height, width = picture.shape[:2]
    elif isinstance(picture, Tensor):
        height, width = picture.shape[-2:]
    else:
        height, width = _tensor(picture, "a picture").shape[2:]
    return height, width


def count_of(pictures: Pictures | None) -> int:
    """How many pictures a form holds; 1 for none."""
    if pictures is None:
        return 1
    if isinstance(pictures, (list, tuple)):
        return len(pictures)
    return len(pictures) if isinstance(pictures, (np.ndarray, Tensor)) and pictures.ndim == 4 else 1


def fingerprint(x: Tensor | None) -> str | None:
    """The first 16 digits of the SHA-256 of a tensor's values and shape, by which an input is recognised."""
    if x is None:
        return None
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    digest.update(x.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _many(pictures: Pictures, convert: Any, size: tuple[int, int] | None, what: str) -> Tensor:
    """Each picture converted, fitted to one size and put into one batch."""
    found = [convert(one) for one in (pictures if isinstance(pictures, (list, tuple)) else [pictures])]
    if not found or not all(len(one) for one in found):
        raise ValueError(f"{what} is missing: the list is empty")
    size = check_size(found[0].shape[2:]) if size is None else size
    # The memory's layout would decide between kernels that differ in the last digits.
    return torch.cat([fit(one, size) for one in found]).contiguous()


def _tensor(picture: Picture, what: str) -> Tensor:
    """One form -> float32 (N, C, H, W)."""
    if isinstance(picture, Hint):
        picture = picture.hint
    if isinstance(picture, (str, os.PathLike, Image.Image)):
        picture = as_array(picture)
    if isinstance(picture, Tensor):
        if picture.dim() not in (3, 4):
            raise ValueError(f"{what} as a tensor must be (C, H, W) or (N, C, H, W), found {tuple(picture.shape)}")
        picture = picture.detach()[None] if picture.dim() == 3 else picture.detach()
        if picture.dtype == torch.uint8:
            return picture.float() / 255
        _check_floating(picture.is_floating_point(), picture.dtype, what)
        return picture.float()
    if not isinstance(picture, np.ndarray):
        raise ValueError(
            f"{what} must be a picture (PIL, path, numpy array, tensor or an annotator's Hint), found {type(picture).__name__}"
        )
    picture = np.asarray(picture)  # of a subclass, such as np.matrix, whose parts are something else
    if picture.ndim == 2:
        picture = picture[:, :, None]
    if picture.ndim not in (3, 4) or 0 in picture.shape:
        raise ValueError(f"{what} as an array must be (H, W), (H, W, C) or (N, H, W, C), found {picture.shape}")
    if picture.dtype == np.uint8:
        tensor = torch.from_numpy(picture.astype(np.float32) / 255)
    else:
        _check_floating(np.issubdtype(picture.dtype, np.floating), picture.dtype, what)
        tensor = torch.from_numpy(picture.astype(np.float32))
    return (tensor[None] if tensor.dim() == 3 else tensor).permute(0, 3, 1, 2)


def _check_floating(floating: bool, dtype: Any, what: str) -> None:
    if not floating:
        found = str(dtype).removeprefix("torch.")
        raise ValueError(f"{what} must be uint8 (0 to 255) or floats (0 to 1), found {found}")


def _with_channels(x: Tensor, channels: int, what: str) -> Tensor:
    """(N, c, H, W) -> (N, channels, H, W): grey repeated and RGBA over white for three channels, else as it must be."""
    if x.shape[1] == channels:
        return x
    if channels == 3 and x.shape[1] == 1:
        return x.expand(-1, 3, -1, -1)
    if channels == 3 and x.shape[1] == 4:
        colours, alpha = x[:, :3], x[:, 3:]
        return colours * alpha + (1 - alpha)
    raise ConfigError(f"{what} must have {channels} channels, found {x.shape[1]} in (N, C, H, W) = {tuple(x.shape)}")


def _in_range(x: Tensor, what: str) -> Tensor:
    """x, if it lies in [0, 1] or is -1 for a hole."""
    if not bool((((x >= 0) & (x <= 1)) | (x == HOLE)).all()):
        low, high = float(x.min()), float(x.max())
        raise ValueError(f"{what} must lie in [0, 1] (a hole: -1), found values from {low:g} to {high:g}")
    return x
