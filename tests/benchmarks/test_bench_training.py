"""The training benchmarks run, at tiny size, and compare what they say that they compare."""

import re

import pytest

from tests.benchmarks import bench_training

pytest.importorskip("diffusers")


@pytest.mark.parametrize("what", bench_training.COMPARISONS)
def test_comparisons(what, capsys):
    bench_training.main([what, "--size", "tiny", "--pairs", "1"])
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.match(rf"{what}: [\d.]+ s (\w+), [\d.]+ s (\w+), ratio ([\d.]+) ", line)
    assert found and found.groups()[:2] == bench_training.COMPARISONS[what] and float(found[3]) > 0
    if what == "step":  # the same weights, the same draws
        assert float(line.split("differ by ")[1]) < 1e-5


def test_throughput(capsys):
    bench_training.main(["throughput", "--size", "tiny", "--steps", "1", "--batches", "1", "2"])
    lines = capsys.readouterr().out.splitlines()
    rates, operations = (
        [float(re.search(rf"([\d.]+) {unit}", line)[1]) for line in lines] for unit in ("images/s", "TFLOP an image")
    )
    assert len(lines) == 2 and min(rates) > 0
    assert operations[0] == pytest.approx(operations[1], rel=0.1)


def test_sides_apart(capsys):
    bench_training.main(["base", "--size", "tiny", "--pairs", "1", "--apart"])
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.match(r"base: [\d.]+ s control, .*; peak memory ([\d.]+) and ([\d.]+) GiB", line)
    assert all(0.1 < float(peak) < 10 for peak in found.groups())
    control, base = (float(x) for x in re.search(r"computed, ([\d.]+) and ([\d.]+) GiB", line).groups())
    assert 0 < control < base < 1
