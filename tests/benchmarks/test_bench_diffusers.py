"""The sampling benchmark runs, at tiny size, and both of its sides make the same."""

import re

import pytest

from tests.benchmarks import bench_diffusers

pytest.importorskip("diffusers")


@pytest.mark.parametrize("settings", [[], ["--guess"], ["--image"], ["--precision", "bf16", "--versus", "fp32"]])
def test_sides_agree(settings, capsys, monkeypatch):
    monkeypatch.setattr(bench_diffusers, "peak_of", lambda side, argv: 0.0)  # two more processes
    bench_diffusers.main(["--size", "tiny", "--pairs", "1", "--steps", "2", *settings])
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.search(r"ratio ([\d.]+) .* differ by ([\d.e+-]+) of their size", line)
    assert float(found[1]) > 0 and float(found[2]) < (0.1 if "bf16" in settings else 1e-4)
