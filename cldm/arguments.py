"""Checks of what the pipeline's call is given: ranges, counts that must agree, and one value for each of several ControlNets."""

import math
import secrets
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from cldm import inputs
from ldm.models.diffusion.noise import picture_generators

# The least and the greatest value of each number, both included.
LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, 1000),
    "num_samples": (1, math.inf),
    "guidance_scale": (-100, 100),
    "eta": (0, 1),
    "denoise": (0, 1),
    "strength": (0, 10),
    "scales": (-10, 10),
    "start": (0, 1),
    "end": (0, 1),
}
_WHOLE = ("steps", "num_samples")


def check_numbers(**given: Any) -> None:
    """Raise ValueError for a number that is none, or out of its range (`LIMITS`); None is not looked at."""
    for name, value in given.items():
        if value is None:
            continue
        low, high = LIMITS[name]
        is_number = isinstance(value, Integral if name in _WHOLE else Real) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            kind = "a whole number" if name in _WHOLE else "a number"
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name} must be {kind} {bounds}, found {value!r}")
    if given.get("denoise") == 0:
        raise ValueError("denoise must be above 0; at 0 nothing would be changed")


def check_texts(**given: Any) -> None:
    """Raise ValueError for what is neither a text, nor a list of texts, nor a tensor of encoded ones."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            continue
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{name} must be a text, a list of texts, or a tensor of encoded ones, found {value!r:.100}"
            )
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{name} has a character that is no text, at position {error.start}: {text!r:.100}"
                ) from error


def check_yes_or_no(**given: Any) -> None:
    """Raise ValueError for what is neither True nor False."""
    for name, value in given.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} must be True or False, found {value!r}")


def one_for_each(value: Any, count: int, name: str) -> list[Any]:
    """One value for each of `count` ControlNets."""
    if name == "hint" and count == 1:
        return [value]
    if not isinstance(value, (list, tuple)):
        if name == "hint" and value is not None and count > 1:
            raise ValueError(
                f"this model has {count} ControlNets: give a list of {count} hints, with None for one that is off"
            )
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} ControlNets")
    return list(value)


def mask_for(mask: Any, image: Any, size: tuple[int, int]) -> Tensor:
    """The mask (1 or N, 1, H, W) at `size`, if it belongs to the image."""
    found, wanted = inputs.size_of(mask), inputs.size_of(image)
    if found != wanted:
        raise ValueError(
            f"a mask of {found[0]} x {found[1]} does not fit an image of {wanted[0]} x {wanted[1]} (height x width): "
            "draw it on the image itself, or resize it"
        )
    paint = inputs.mask_tensor(mask, size)
    if not bool(paint.any()):
        raise ValueError("the mask is all black: nothing would be painted; it must be white where to paint")
    return paint


def count_pictures(prompt: Any, negative: Any, hints: Sequence[Tensor | None], picture: Tensor | None, paint: Tensor | None, seed: Any,
           x_T: Tensor | None, num_samples: int) -> int:  # fmt: skip
    """N, if all that says how many pictures there are agrees."""
    given = {
        "prompts": 1 if isinstance(prompt, str) else len(prompt),
        "negative prompts": 1 if isinstance(negative, str) else len(negative),
        **{
            f"hints{f' of ControlNet {i}' if len(hints) > 1 else ''}": len(h)
            for i, h in enumerate(hints)
            if h is not None
        },
        "images": 1 if picture is None else len(picture),
        "masks": 1 if paint is None else len(paint),
        "seeds": 1 if isinstance(seed, int) else len(seed),
        "entries of x_T": 1 if x_T is None else len(x_T),
        "num_samples": num_samples,
    }
    count = max(given.values())
    if any(n not in (1, count) for n in given.values()):
        raise ValueError(f"counts do not fit together: {', '.join(f'{n} {what}' for what, n in given.items())}")
    return count


def read_seed(seed: Any) -> int | list[int]:
    """A seed as a number, drawn where none is given, or a list of numbers.

    Raises:
        ValueError: neither a whole number nor a list of some.
    """
    if seed is None:
        return secrets.randbelow(2**32)
    numbers = [seed] if isinstance(seed, (int, np.integer)) else seed
    known = isinstance(numbers, (list, tuple, range)) or (isinstance(numbers, np.ndarray) and numbers.ndim == 1)
    if (
        not known
        or not len(numbers)
        or not all(isinstance(number, (int, np.integer)) and not isinstance(number, bool) for number in numbers)
    ):
        raise ValueError(f"seed must be a whole number, or a list with one for each picture, found {seed!r}")
    return int(seed) if isinstance(seed, (int, np.integer)) else [int(number) for number in numbers]


def list_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """A seed for each of `count` pictures: counted up from a number, or as in the list."""
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    picture_generators(seeds, count)  # checks them
    return seeds
