"""Weights inside a prompt, in the notation that people know from web UIs.

`(word)` counts 1.1 times, `((word))` 1.21 times, `[word]` 1 / 1.1 times, and `(word:1.3)` 1.3 times. Brackets nest; a backslash before
a bracket makes it a plain character, and so is a bracket that has no partner.
"""

import math
import re

EMPHASIS = 1.1  # of one pair of brackets
MAX_WEIGHT = 10.0  # a larger one, either sign, leaves nothing but noise

_PIECE = re.compile(
    r"""
    \\[()\[\]\\]              # an escaped character
  | [(\[\])]                  # a bracket
  | :\s*[-+]?[\w.]+\s*\)      # the end of (words:number)
  | [^\\()\[\]:]+             # plain text
  | [\\:]                     # a colon or backslash that means nothing
    """,
    re.VERBOSE | re.DOTALL,
)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """The parts of a prompt with their weights; neighbours of the same weight are one part, and brackets are gone.

    Raises:
        ValueError: a weight beyond +-10.
    """
    parts: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # brackets without a partner so far, and the number of parts before each

    def close(bracket: str, factor: float) -> bool:
        """Weigh what follows the last open `bracket`; False if there is none. A bracket left open inside becomes text."""
        if bracket not in [kind for kind, _ in opened]:
            return False
        while True:
            kind, start = opened.pop()
            if kind == bracket:
                break
            parts.insert(start, (kind, 1.0))
        parts[start:] = [(text, weight * factor) for text, weight in parts[start:]]
        return True

    for piece in _PIECE.findall(prompt):
        number = _number(piece) if piece[0] == ":" and len(piece) > 1 else None
        if piece in ("(", "["):
            opened.append((piece, len(parts)))
        elif piece == ")" and close("(", EMPHASIS):
            pass
        elif piece == "]" and close("[", 1 / EMPHASIS):
            pass
        elif number is not None and close("(", number):
            pass
        elif piece[0] == ":" and piece[-1] == ")":  # no number: the bracket alone may still close one
            parts.append((piece[:-1], 1.0))
            if not close("(", EMPHASIS):
                parts.append((")", 1.0))
        else:
            parts.append((piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0))
    while opened:
        kind, start = opened.pop()
        parts.insert(start, (kind, 1.0))
    return _merged(parts)


def _number(piece: str) -> float | None:
    """The weight in `: 1.2 )`, or None if there is no number."""
    try:
        weight = float(piece[1:-1])
    except ValueError:
        return None
    if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
        raise ValueError(
            f"a prompt's weight must lie within -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}, found {piece[1:-1].strip()}"
        )
    return weight


def _merged(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    merged: list[tuple[str, float]] = []
    for text, weight in parts:
        if merged and math.isclose(merged[-1][1], weight):
            merged[-1] = (merged[-1][0] + text, merged[-1][1])
        elif text:
            merged.append((text, weight))
    return merged or [("", 1.0)]
