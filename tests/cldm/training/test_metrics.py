"""One file of numbers for a whole run."""

import csv

import pytest
from pytorch_lightning.loggers import TensorBoardLogger

from cldm.training.metrics import MetricsFile, read_metrics, run_loggers
from ldm.util import ConfigError


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_the_disk_at_once_and_columns_may_come_later(tmp_path):
    log = MetricsFile(tmp_path)
    log.log_metrics({"a": 1.0}, step=0)
    assert rows_of(log.path) == [{"step": "0", "a": "1.0"}]
    log.log_metrics({"a": 0.1 + 0.2}, step=10)
    log.log_metrics({"b": float("nan")}, step=10)
    log.log_metrics({"b": 5}, step=20)
    log.log_metrics({"a": 2}, step=20)
    assert rows_of(log.path) == [
        {"step": "0", "a": "1.0", "b": ""},
        {"step": "10", "a": repr(0.1 + 0.2), "b": "nan"},
        {"step": "20", "a": "2.0", "b": "5.0"},
    ]
    log.log_metrics({"b": 7}, step=10)  # late news of an earlier step, as a metric of an epoch is
    log.log_metrics({"a": 8}, step=5)
    log.log_metrics({"a": 9}, step=30)
    assert [(row["step"], row["a"], row["b"]) for row in rows_of(log.path)] == [
        ("0", "1.0", ""), ("5", "8.0", ""), ("10", repr(0.1 + 0.2), "7.0"), ("20", "2.0", "5.0"), ("30", "9.0", ""),
    ]  # fmt: skip
    assert read_metrics(log.path)[-1] == {"step": 30, "a": 9.0}


@pytest.mark.parametrize("torn", ["", "30,1", "30,1.0,2.0", "30,1.0,"])
def test_a_run_that_goes_on_has_each_step_once(tmp_path, torn):
    log = MetricsFile(tmp_path)
    for step in (0, 10, 20):
        log.log_metrics({"a": step, "b": -step}, step=step)
    with open(log.path, "a") as file:
        file.write(torn)  # killed while it wrote a row
    resumed = MetricsFile(tmp_path)
    resumed.drop_after(10)
    assert [row["step"] for row in rows_of(log.path)] == ["0", "10"]
    resumed.log_metrics({"a": 21, "c": 1}, step=20)
    resumed.log_metrics({"a": 31}, step=30)
    assert [(row["step"], row["a"], row["b"], row["c"]) for row in rows_of(log.path)] == [
        ("0", "0.0", "0.0", ""), ("10", "10.0", "-10.0", ""), ("20", "21.0", "", "1.0"), ("30", "31.0", "", ""),
    ]  # fmt: skip


def test_without_dropping_a_torn_row_goes_too(tmp_path):
    log = MetricsFile(tmp_path)
    log.log_metrics({"a": 1, "b": 1}, step=1)
    with open(log.path, "a") as file:
        file.write("2,5")
    resumed = MetricsFile(tmp_path)
    resumed.log_metrics({"a": 3}, step=3)
    assert [row["step"] for row in rows_of(log.path)] == ["1", "3"]


@pytest.mark.parametrize("content", ["name,size\na,1\n", "step,a\nmany,1\n", "step,a\n1,2,3\n4,5\n", "\xff\xfe"])
def test_a_file_of_somebody_else_stays(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="not the metrics of a run"):
        MetricsFile(tmp_path)
    assert (tmp_path / "metrics.csv").read_bytes() == content.encode("latin-1")


def test_an_empty_file_is_begun(tmp_path):
    (tmp_path / "metrics.csv").write_text("")
    MetricsFile(tmp_path).log_metrics({"a": 1}, step=1)
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 1, "a": 1.0}]


def test_loggers_of_a_run(tmp_path):
    file, *others = run_loggers(tmp_path)
    assert isinstance(file, MetricsFile) and all(isinstance(logger, TensorBoardLogger) for logger in others)
    assert file.save_dir == str(tmp_path)
