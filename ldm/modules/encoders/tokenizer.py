"""Prompts to token ids. The byte-pair vocabulary is the one inside open_clip, so nothing is downloaded."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BEGIN, END = 49406, 49407


@lru_cache(maxsize=1)
def _byte_pair_encoder() -> Any:
    from open_clip.tokenizer import SimpleTokenizer  # reads the vocabulary, which takes a while

    return SimpleTokenizer()


def encode(text: str) -> list[int]:
    """The ids of a prompt without begin and end.

    Raises:
        TypeError: not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"a prompt must be a string, found {type(text).__name__}: {text!r}")
    return _byte_pair_encoder().encode(text)


def tokenize(texts: str | Sequence[str], length: int = 77, pad: int = END) -> Tensor:
    """Begin, the ids, end, padding: (B, length) int64. What does not fit is cut off before the end token."""
    if isinstance(texts, str):
        texts = [texts]
    rows = torch.full((len(texts), length), pad, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        ids = [BEGIN, *encode(text)[: length - 2], END]
        row[: len(ids)] = torch.tensor(ids)
    return rows
