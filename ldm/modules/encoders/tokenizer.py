"""Prompts to token ids. The byte-pair vocabulary is the one inside open_clip, so nothing is downloaded."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ldm.modules.encoders.prompt_weights import parse_weights

BEGIN, END = 49406, 49407
MAX_CHARACTERS = 20_000  # some 4,000 words; a longer text is a mistake, such as a file read as one prompt


@lru_cache(maxsize=1)
def _byte_pair_encoder() -> Any:
    from open_clip.tokenizer import SimpleTokenizer  # reads the vocabulary, which takes a while

    return SimpleTokenizer()


def encode(text: str) -> list[int]:
    """The ids of a prompt without begin and end.

    Raises:
        TypeError: not a string.
        ValueError: more than 20,000 characters.
    """
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a string, found {type(text).__name__}: {text!r}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a prompt of {len(text)} characters is too long; at most {MAX_CHARACTERS} are read")
    return _byte_pair_encoder().encode(text)


def encode_weighted(text: str) -> tuple[list[int], list[float]]:
    """The ids of a prompt whose brackets are weights, and the weight of each id."""
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        encode(text)  # raises
    ids: list[int] = []
    weights: list[float] = []
    for part, weight in parse_weights(text):
        found = encode(part)
        ids += found
        weights += [weight] * len(found)
    return ids, weights


def window(ids: Sequence[int], length: int = 77, pad: int = END) -> list[int]:
    """Begin, the ids, end, padding: `length` ids. The ids must leave room for begin and end."""
    return [BEGIN, *ids, END] + [pad] * (length - 2 - len(ids))


def tokenize(texts: str | Sequence[str], length: int = 77, pad: int = END) -> Tensor:
    """One window a prompt: (B, length) int64. What does not fit is cut off before the end token."""
    texts = [texts] if isinstance(texts, str) else texts
    rows = [window(encode(text)[: length - 2], length, pad) for text in texts]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)
