"""Pictures: checking and converting arrays, fitting their size, reading and writing files. Knows no detector.

A picture is an array (H, W), (H, W, 3) or (H, W, 4), uint8, in grey, RGB or RGBA.
"""

import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)

SIZE_STEP = 64
SETTINGS = ".annotator.json"  # in a folder of maps: what they were made with
MAX_PIXELS = 2**27  # what `resize_image` agrees to make: 11,585 pixels a side
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Pictures too, which the owner of a folder may expect to be read.
UNREAD_SUFFIXES = (".gif", ".avif", ".heic", ".heif", ".jxl")

Picture = np.ndarray | Image.Image | str | os.PathLike


def as_array(picture: Picture) -> np.ndarray:
    """A uint8 array, a PIL picture, or the path of a file, as the uint8 array of it.

    Raises:
        ValueError: if it is no picture, or a file that cannot be read.
    """
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture)
    return check_image(_from_pil(picture) if isinstance(picture, Image.Image) else picture)


def check_image(image: Any) -> np.ndarray:
    """`image` itself, if it is a uint8 picture: (H, W), or (H, W, C) with 1, 3 or 4 channels, and not empty.

    Raises:
        ValueError: saying what was given instead.
    """
    if not isinstance(image, np.ndarray):
        kinds = "a numpy array (height, width, channels), a PIL picture or a path"
        raise ValueError(f"an image must be {kinds}, not {type(image).__name__}")
    if image.dtype != np.uint8:
        raise ValueError(f"an image must be uint8 with values 0 to 255, not {image.dtype}; convert it first")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ValueError(f"an image must have shape (H, W) or (H, W, 1, 3 or 4), not {image.shape}")
    if 0 in image.shape:
        raise ValueError(f"the image is empty: shape {image.shape}")
    return image


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Numbers of any kind as uint8: clipped to 0..255, the fraction cut off, NaN as 0."""
    return np.nan_to_num(np.asarray(x), nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).astype(np.uint8)


def HWC3(x: np.ndarray) -> np.ndarray:
    """A uint8 picture with three channels: grey is repeated, RGBA is laid over white, RGB comes back as it is.

    Args:
        x: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8.

    Returns:
        (H, W, 3), uint8.
    """
    x = np.atleast_3d(check_image(x))
    if x.shape[2] == 3:
        return x
    if x.shape[2] == 1:
        return np.repeat(x, 3, axis=2)
    alpha = x[:, :, 3:].astype(np.float32) / 255.0
    return to_uint8(x[:, :, :3].astype(np.float32) * alpha + 255.0 * (1.0 - alpha))


def without_alpha(x: np.ndarray) -> np.ndarray:
    """A uint8 picture as (H, W, 3), the colours of RGBA whether they are seen or not."""
    return HWC3(check_image(x)[:, :, :3] if x.ndim == 3 else x)


def resized_shape(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Height and width that `resize_image` gives: the shorter side near `resolution`, both multiples of 64.

    Raises:
        ValueError: if a side would vanish or the picture would have more than 2**27 pixels.
    """
    scale = float(resolution) / min(height, width)
    if not np.isfinite(scale):
        raise ValueError(f"resolution must be a number of pixels, got {resolution}")
    new_height, new_width = (round(side * scale / SIZE_STEP) * SIZE_STEP for side in (height, width))
    if new_height < SIZE_STEP or new_width < SIZE_STEP:
        raise ValueError(f"resolution {resolution} is too small: sides are rounded to multiples of {SIZE_STEP}")
    if new_height * new_width > MAX_PIXELS:
        raise ValueError(
            f"a picture of {height}x{width} (height x width) at resolution {resolution} would have "
            f"{new_height}x{new_width} pixels; crop it to a less extreme shape or ask for a lower resolution"
        )
    return new_height, new_width


def resize_image(image: np.ndarray, resolution: int) -> np.ndarray:
    """Scale so that the shorter side is about `resolution`, each side rounded to a multiple of 64.

    Lanczos when enlarging, area averaging when shrinking. A side may come out longer than asked (100 gives 128). The colours
    of transparent pixels do not spread into those that are seen.

    Args:
        image: (H, W) or (H, W, C), uint8.
        resolution: pixels of the shorter side.
    """
    height, width = check_image(image).shape[:2]
    size = resized_shape(height, width, resolution)
    return resize(image, size, cv2.INTER_LANCZOS4 if float(resolution) / min(height, width) > 1 else cv2.INTER_AREA)


def resize(image: np.ndarray, size: tuple[int, int], interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    """`image` at `size` (height, width) by one of OpenCV's interpolations; RGBA with its colours weighted by alpha."""
    resized = cv2.resize(image, size[::-1], interpolation=interpolation)
    if image.ndim == 2 or image.shape[2] != 4 or image[:, :, 3].min() == 255:
        return resized
    alpha = image[:, :, 3:].astype(np.float32)
    weighted = cv2.resize(image[:, :, :3] * alpha, size[::-1], interpolation=interpolation)
    weight = cv2.resize(alpha, size[::-1], interpolation=interpolation)[:, :, None]
    colours = np.rint(weighted / np.maximum(weight, 1.0)).clip(0, 255).astype(np.uint8)
    return np.dstack([np.where(weight < 1.0, resized[:, :, :3], colours), resized[:, :, 3]])


def pad_to_multiple(image: np.ndarray, multiple: int) -> np.ndarray:
    """`image` (H, W[, C]) with its last row and column repeated until both sides are multiples of `multiple`."""
    height, width = image.shape[:2]
    bottom, right = -height % multiple, -width % multiple
    if not bottom and not right:
        return image
    return np.pad(image, [(0, bottom), (0, right)] + [(0, 0)] * (image.ndim - 2), mode="edge")


def read_image(path: str | os.PathLike | BinaryIO) -> np.ndarray:
    """A picture, a file or its bytes, as uint8: (H, W) if grey, (H, W, 4) if it has transparency, else (H, W, 3) in RGB.

    Turned upright as its EXIF data say; 16-bit grey is reduced to 8 bits.

    Raises:
        ValueError: naming the file, if it is missing, broken, cut off, or of floats or larger numbers.
    """
    name = path if isinstance(path, (str, os.PathLike)) else "it"
    try:
        with Image.open(path) as opened:
            return _from_pil(ImageOps.exif_transpose(opened))
    except FileNotFoundError as err:
        raise ValueError(f"{name} is missing") from err
    except Image.DecompressionBombError as err:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(f"{name} has more than {limit} pixels; make it smaller first") from err
    except (OSError, SyntaxError, ValueError) as err:
        reason = (getattr(err, "strerror", None) or str(err) or type(err).__name__).splitlines()[0]
        raise ValueError(f"{name} does not decode as a picture: {reason}") from err


def _from_pil(picture: Image.Image) -> np.ndarray:
    """Not turned by its EXIF data, as a file is: whoever hands over a PIL picture has decided on that."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        lowest, highest = values.min(initial=0), values.max(initial=0)
        if lowest < 0 or highest >= 2**16:
            raise ValueError(f"it holds numbers from {lowest} to {highest}; 0 to 255 or 0 to 65535 are known")
        # Mode I alone does not tell how many of its 32 bits are used.
        is_8_bit = picture.mode == "I" and highest < 2**8
        return (values if is_8_bit else values // 257).astype(np.uint8)
    if picture.mode == "F":
        raise ValueError("it holds floating-point numbers, whose range is unknown")
    if picture.has_transparency_data:
        return np.array(picture.convert("RGBA"))
    return np.array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write a uint8 picture (grey, RGB or RGBA) as PNG, whole or not at all; folders are made.

    Raises:
        ValueError: a picture that PNG cannot hold.
    """
    if image.ndim == 3 and image.shape[2] != 1:
        image = cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    written, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    if not written:
        raise ValueError(f"{path}: a picture of shape {image.shape} cannot be written as PNG")
    write_whole(path, data.tobytes())


@contextmanager
def whole_file(path: str | os.PathLike, replace: bool = True) -> Iterator[BinaryIO]:
    """A file to write beside `path`, which takes its place, flushed to the disk, at the end: nobody ever sees half a file.

    Without `replace` a file that is there stays, which is a FileExistsError: of several processes one succeeds.

    Folders are made. The temporary name is unique, so that two processes that write the same file do not disturb each other; the
    last one wins. After an error nothing is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # without the name, which may be as long as a name can be
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace or not _link(temporary, path):
            os.replace(temporary, path)
    except OSError as err:
        if err.errno and not err.filename:  # of a full disk the system names none
            err.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name, FileExistsError if that is taken; whether the file system can do so."""
    try:
        os.link(source, target)
        return True
    except FileExistsError:
        raise
    except OSError:
        if target.exists():
            raise FileExistsError(target) from None
        return False


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write a file whole or not at all; see `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


def changed_at(path: Path) -> int:
    """When a file came to be what it is here, in nanoseconds: it changed, or took the place of another with its old date.

    A date in the future, of a camera's clock say, does not count.
    """
    found, now = path.stat(), time.time_ns()
    return max((date for date in (found.st_mtime_ns, found.st_ctime_ns) if date <= now), default=0)


def find_pictures(source: Path, target: Path | None = None, maps: bool = False) -> list[Path]:
    """The pictures in a folder and its sub-folders, sorted, but for hidden files and folders and what lies in `target`.

    Args:
        maps: also those in sub-folders that the command `annotator` has made, and in training sets.

    Raises:
        ValueError: if there are none.
    """
    # Not `resolve`, which fails at a link to itself.
    goal = Path(os.path.realpath(target)) if target else None
    own = goal if goal and goal.is_relative_to(os.path.realpath(source)) else None
    found, unread = [], []

    def warn(err: OSError) -> None:
        logger.warning("left out the folder %r, which cannot be read (%s)", err.filename, err.strerror)

    for folder, folders, files in os.walk(source, onerror=warn):
        here = Path(folder)
        is_training_set = {"source", "target"} <= set(folders) and any(name.endswith(".json") for name in files)
        if not maps and here != source and (SETTINGS in files or is_training_set):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (here / name for name in files if not name.startswith(".")):
            if path.suffix.lower() in UNREAD_SUFFIXES:
                unread.append(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                if own is None or not path.resolve().is_relative_to(own):
                    found.append(path)
    if unread:
        kinds = f"pictures of kinds that are not read ({len(unread)}, such as {str(unread[0])!r})"
        logger.warning("left out %s; save them as PNG or JPEG", kinds)
    if not found:
        raise ValueError(f"no pictures in {source} (looked for {' '.join(IMAGE_SUFFIXES)})")
    return sorted(found)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove what killed processes have left of `whole_file` in a folder into which nobody is writing now."""
    for path in Path(folder).glob(f".{'[0-9a-f]' * 32}.tmp"):
        path.unlink(missing_ok=True)
