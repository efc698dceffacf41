"""The parity cases: deterministic weights and inputs by name, and the values the public reference gave for them.

`data/parity/fill.py` is the rule by which both sides made their weights; the `.npz` files hold inputs and outputs only.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data" / "parity"

_spec = importlib.util.spec_from_file_location("parity_fill", DATA / "fill.py")
_fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fill)
fill_, value, noise = _fill.fill_, _fill.value, _fill.noise


def noise_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 input of a case, by its name."""
    return torch.from_numpy(noise(name, shape))


def load_cases(name: str) -> "np.lib.npyio.NpzFile":
    """Arrays of a case file below tests/data/parity, e.g. `core/tiny.npz`."""
    return np.load(DATA / name, allow_pickle=False)


def load_json(name: str) -> dict:
    """A manifest below tests/data/parity, e.g. `core/manifest_v15.json`."""
    return json.loads((DATA / name).read_text())


def relative_error(got: torch.Tensor | np.ndarray, want: torch.Tensor | np.ndarray) -> float:
    """norm(got - want) / norm(want), in float64."""
    got, want = (np.asarray(a.detach() if torch.is_tensor(a) else a, dtype=np.float64) for a in (got, want))
    if got.shape != want.shape:
        raise AssertionError(f"shape {got.shape}, expected {want.shape}")
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))
