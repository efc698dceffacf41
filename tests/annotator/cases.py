"""The annotators' parity cases: weights by rule, files as published, and comparisons that say how far off they are.

`tests/data/annotator/NAME.npz` holds what the public reference gave; `NAME.json` the keys of a published weight file.
"""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from numpy.lib.npyio import NpzFile

from tests.parity import value

DATA = Path(__file__).parent.parent / "data" / "annotator"


def open_cases(name: str) -> tuple[NpzFile, dict]:
    """Arrays (named `case/array`) and meta data of `NAME.npz`; `meta["cases"][case]` holds a case's parameters."""
    arrays = np.load(DATA / f"{name}.npz", allow_pickle=False)
    return arrays, json.loads(str(arrays["meta"]))


def open_manifest(name: str) -> dict[str, tuple[list[int], str]]:
    """Keys of a published file with shapes and dtypes, in its order; `name` with or without `.json`."""
    return json.loads((DATA / f"{name.removesuffix('.json')}.json").read_text())


@functools.lru_cache(maxsize=1)
def _filled(name: str, recipe: str) -> dict[str, torch.Tensor]:
    case = json.loads(recipe)
    state_dict = {}
    for key, (shape, dtype) in open_manifest(name).items():
        dtype = getattr(torch, dtype.removeprefix("torch."))
        if dtype.is_floating_point and "." in key:
            numbers = np.asarray(value(key, tuple(shape), case["gain"]), dtype=np.float32).reshape(shape)
        else:
            numbers = np.zeros(shape, dtype=np.float32)
        if key in case["adjust"]:
            factor, offset = np.float32(case["adjust"][key])
            numbers = numbers * factor + offset
        if key in case["set"]:
            numbers = np.asarray(case["set"][key], dtype=np.float32).reshape(shape)
        state_dict[key] = torch.from_numpy(np.array(numbers)).to(dtype)
    return state_dict


def case_state_dict(manifest_name: str, case_meta: dict) -> dict[str, torch.Tensor]:
    """Weights of a case under the published file's keys, filled by the rule of the parity data.

    Args:
        manifest_name: e.g. `ControlNetHED`.
        case_meta: `meta["cases"][case]`, of which `gain`, `adjust` and `set` count.
    """
    recipe = {"gain": 1.0, "adjust": {}, "set": {}}
    recipe = {name: case_meta.get(name, default) for name, default in recipe.items()}
    return dict(_filled(manifest_name.removesuffix(".json"), json.dumps(recipe, sort_keys=True)))


class Given:
    """Stands for a detector: gives `result`, or what it makes of the picture, and remembers what it was called with."""

    def __init__(self, result) -> None:
        self.result = result

    def detect(self, image, **parameters):
        self.seen, self.parameters = image, parameters
        return self.result(image) if callable(self.result) else self.result


def assert_close(got: np.ndarray | torch.Tensor, want: np.ndarray, tolerance: float) -> None:
    """Same shape, and nowhere further apart than `tolerance`."""
    got = got.detach().cpu().numpy() if torch.is_tensor(got) else np.asarray(got)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    worst = np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0.0)
    assert worst <= tolerance, f"off by {worst:.3g}, allowed {tolerance:.3g}"


def assert_map(got: np.ndarray, want: np.ndarray, levels: int = 1, share: float = 0.01) -> None:
    """uint8 maps of the same shape, off by at most `levels` on at most `share` of the values."""
    assert got.dtype == want.dtype == np.uint8 and got.shape == want.shape, (got.dtype, got.shape, want.shape)
    off = np.abs(got.astype(int) - want.astype(int))
    assert off.max() <= levels, f"off by {off.max()} levels, allowed {levels}"
    assert (off > 0).mean() <= share, f"{(off > 0).mean():.3%} of the values differ, allowed {share:.3%}"
