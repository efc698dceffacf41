"""Instruments on two processes: one of them measures, neither waits for ever, and the weights stay the same on both."""

import math

from cldm.training.metrics import read_metrics
from tests.scripts.test_examples import run


def test_one_process_measures(tmp_path):
    done = run("instruments_on_two_processes.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    totals = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert totals[0] == totals[1]
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(math.isfinite(row[name]) for row in rows[1:] for name in ("train/loss", "gain/mean", "norm/hint"))
    assert (tmp_path / "curves.png").is_file()
    assert len(list(tmp_path.rglob("noise_gs-*.png"))) == 3
