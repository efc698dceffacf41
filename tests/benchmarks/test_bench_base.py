"""The comparison of bases, as short as it can be."""

from tests.benchmarks.bench_base import main


def test_each_base_is_trained_on_each_task_and_scored(tmp_path, capsys):
    short = ["batch_size=2", "held_out=2", "pictures=1", "pictures_at_once=2", "sample_steps=2", "accelerator=cpu"]
    arguments = [
        "cldm_tiny.safetensors",
        "--tasks",
        "shapes",
        "depth",
        "--steps",
        "1",
        "--pairs",
        "6",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--settings", *short]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("shapes ", "depth "))]
    assert [(task, when) for task, _, when, *_ in lines] == [
        (t, w) for t in ("shapes", "depth") for w in ("before", "after")
    ]
    assert all(0 <= float(line[4].strip(",")) <= 1 and line[3] == "scenes/iou" for line in lines)
