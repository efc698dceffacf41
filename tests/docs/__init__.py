"""Tests of README.md, docs/ and notebooks/."""

import importlib
import os

import pytest


def need(*modules: str) -> None:
    """Skip the module of tests where tools of the extra `docs` are missing; CI must have them."""
    for module in modules:
        if os.environ.get("CI"):
            importlib.import_module(module)
        else:
            pytest.importorskip(module, reason=f"needs {module}, of the extra docs")
