"""Prompts: the paper's settings (section 4.1), and the texts that the published apps add."""

from collections.abc import Callable

import numpy as np

# "None" and "default" of the paper's four settings. The user's prompt is any other text, and an automatic one is a captioner.
NO_PROMPT = ""
DEFAULT_PROMPT = "a professional, detailed, high-quality image"
ADDED_PROMPT = "best quality, extremely detailed"
NEGATIVE_PROMPT = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality"
)

Captioner = Callable[[np.ndarray], str]  # a uint8 RGB picture (H, W, 3) -> what is seen in it
