"""`python -m cldm.generate`: one hint, a folder, a file of prompts; going on; mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from annotator.__main__ import main as annotate
from cldm import generate
from cldm.config import resolve
from cldm.model import create_model
from cldm.pipeline import ControlPipeline
from cldm.results import read_png_text, read_settings, write_settings_png
from tests.parity import fill_

LOADED: dict = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hints, and weights of the tiny model: whole, and as base and ControlNet apart."""
    folder = tmp_path_factory.mktemp("generate")
    model = create_model("cldm_tiny")
    model.load_state_dict(load_file("models/cldm_tiny.safetensors"), strict=False)
    fill_(model.control_model)
    weights = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_file(weights, folder / "whole.safetensors")
    control = {key: value for key, value in weights.items() if key.startswith("control_model.")}
    save_file({key: value for key, value in weights.items() if key not in control}, folder / "base.safetensors")
    save_file(
        {key.removeprefix("control_model."): value for key, value in control.items()}, folder / "control.safetensors"
    )
    (folder / "hints" / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "sub/b.png")):
        picture = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "hints" / name)
    return folder


@pytest.fixture(autouse=True)
def one_model(folder, monkeypatch):
    """Reading and building the model once is enough."""
    load = generate.load_model

    def remembered(*args):
        key = str(args)
        if key not in LOADED:
            LOADED[key] = load(*args)
        return LOADED[key]

    monkeypatch.setattr(generate, "load_model", remembered)


def run(folder, source, out, *options, weights="whole.safetensors"):
    arguments = [
        str(folder / source),
        str(out),
        "--weights",
        str(folder / weights),
        "--device",
        "cpu",
        "--steps",
        "1",
        *options,
    ]
    return generate.main(arguments)


def test_one_hint_is_what_the_pipeline_makes(folder, tmp_path, capsys):
    assert (
        run(folder, "hints/a.png", tmp_path, "--prompt", "red", "--samples", "2", "--seed", "4", "--strength", "0.5")
        == 0
    )
    assert capsys.readouterr().out.startswith("2 written to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_4.png", "a_5.png"]
    model = create_model("cldm_tiny", weights=folder / "whole.safetensors").eval()
    want = ControlPipeline(model)(folder / "hints" / "a.png", "red", steps=1, seed=[4, 5], strength=0.5)
    got = [np.asarray(Image.open(tmp_path / name)) for name in ("a_4.png", "a_5.png")]
    assert np.abs(np.stack(got).astype(int) - want).max() <= 1
    assert read_settings(tmp_path / "a_5.png")["seed"] == 5
    apart = run(folder, "hints/a.png", tmp_path / "apart", "--prompt", "red", "--seed", "4", "--strength", "0.5",
                "--control", str(folder / "control.safetensors"), weights="base.safetensors")  # fmt: skip
    assert apart == 0 and np.abs(np.asarray(Image.open(tmp_path / "apart" / "a_4.png")).astype(int) - got[0]).max() <= 1


def test_a_folder_goes_on_where_it_stopped(folder, tmp_path, capsys):
    (folder / "hints" / "broken.png").write_bytes(b"no picture")
    try:
        assert run(folder, "hints", tmp_path, "--prompt", "red") == 1
    finally:
        (folder / "hints" / "broken.png").unlink()
    captured = capsys.readouterr()
    assert "2 written to" in captured.out and "1 failed" in captured.out and "broken.png" in captured.err
    first, second = tmp_path / "a_0.png", tmp_path / "sub" / "b_0.png"
    before = first.stat().st_mtime_ns
    second.unlink()
    assert run(folder, "hints", tmp_path, "--prompt", "red") == 0
    assert first.stat().st_mtime_ns == before and second.exists()
    assert "1 written to" in (out := capsys.readouterr().out) and "1 were there already" in out
    assert run(folder, "hints", tmp_path, "--prompt", "blue") == 2
    assert "made in another way" in capsys.readouterr().err and first.stat().st_mtime_ns == before
    assert run(folder, "hints", tmp_path, "--prompt", "blue", "--force") == 0
    assert read_settings(first)["prompt"] == "blue"


def test_a_hint_that_cannot_be_used_is_left_out(folder, tmp_path, capsys):
    hints = tmp_path / "hints"
    shutil.copytree(folder / "hints", hints)
    Image.new("RGB", (4, 4)).save(hints / "0 small.png")  # the first one, before any picture was made
    assert run(folder, hints, tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "2 written to" in printed.out and "1 failed" in printed.out
    assert (
        printed.err
        == f"{generate.PROGRAM}: 0 small: sides must be from 8 to 8192 pixels, found 4 x 4 (height x width)\n"
    )
    lines = [{"source": "a.png", "prompt": "red", "seed": seed} for seed in (-5, 3)]
    (hints / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(folder, hints / "prompts.jsonl", tmp_path / "lines") == 1
    assert f"{generate.PROGRAM}: 1: a seed must be" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "lines").iterdir()] == ["2_3.png"]


def test_maps_are_hints_and_no_photographs(folder, tmp_path, capsys):
    """What the command annotator made inside the folder of the photographs."""
    photos = shutil.copytree(folder / "hints", tmp_path / "photos")
    assert annotate(["canny", str(photos), str(tmp_path / "photos" / "maps")]) == 0
    assert annotate(["tile", str(photos), str(tmp_path / "tiles")]) == 0
    assert "2 written to" in capsys.readouterr().out.splitlines()[-1]
    assert run(folder, photos, tmp_path / "out", "--annotator", "canny") == 0
    assert "2 written to" in capsys.readouterr().out
    assert run(folder, photos, tmp_path / "of hints") == 0
    assert "4 written to" in capsys.readouterr().out
    assert run(folder, photos, photos) == 2
    assert f"HINT and OUT are the same: {photos}" in capsys.readouterr().err


def test_pictures_of_other_weights_do_not_mix(folder, tmp_path, capsys):
    """Not even if these were put in the place of those before, under the same name and of the same size."""
    weights, copy = (tmp_path / name / "model.safetensors" for name in ("run", "copy"))
    for path in (weights, copy):
        path.parent.mkdir()
        shutil.copy(folder / "whole.safetensors", path)
    config = tmp_path / "own.yaml"
    config.write_text(resolve("cldm_tiny", ".yaml").read_text())
    command = [folder, "hints/a.png", tmp_path / "out", "--config", str(config)]
    assert run(*command, weights=weights) == 0
    capsys.readouterr()
    assert run(*command, weights=copy) == 0  # the same content
    assert "1 were there already" in capsys.readouterr().out
    state_dict = load_file(weights)
    state_dict["control_model.zero_convs.0.0.bias"] += 1
    save_file(state_dict, weights)
    assert weights.stat().st_size == copy.stat().st_size
    assert run(*command, weights=weights) == 2
    assert "made in another way" in capsys.readouterr().err
    config.write_text(config.read_text() + "# changed\n")
    assert run(*command, weights=copy) == 2


def test_pictures_of_an_older_version_are_told_apart(folder, tmp_path, capsys):
    assert run(folder, "hints/a.png", tmp_path) == 0
    noted = read_png_text(tmp_path / "a_0.png")
    del noted["command"]["files"]
    noted["command"]["weights"] = ["whole.safetensors"]
    write_settings_png(tmp_path / "a_0.png", np.zeros((64, 64, 3), np.uint8), noted)
    assert run(folder, "hints/a.png", tmp_path) == 2
    assert "made by an older version, which noted the names of weights" in capsys.readouterr().err


def test_a_killed_run_loses_only_what_was_not_written(folder, tmp_path, capsys, monkeypatch):
    made = ControlPipeline.__call__
    calls = []

    def stop_at_second(self, *args, **options):
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(self, *args, **options)

    monkeypatch.setattr(ControlPipeline, "__call__", stop_at_second)
    assert run(folder, "hints/a.png", tmp_path, "--samples", "3") == 130
    assert "start it again to go on" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["a_0.png"]
    assert run(folder, "hints/a.png", tmp_path, "--samples", "3") == 0
    assert calls == [0, 1, 1, 2]


def test_files_of_prompts(folder, tmp_path):
    (folder / "prompts.txt").write_text("red circle\n\nß (blue:1.2) circle\n", encoding="utf-8")
    assert run(folder, "prompts.txt", tmp_path / "txt", "--hint", str(folder / "hints/a.png")) == 0
    assert read_settings(tmp_path / "txt" / "3_0.png")["prompt"] == "ß (blue:1.2) circle"
    lines = [
        {"source": "hints/a.png", "target": "x.png", "prompt": "red"},
        {"prompt": "no hint", "seed": 7, "negative_prompt": "n"},
    ]
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, lines)))
    assert run(folder, "prompt.json", tmp_path / "json", "--size", "64x64") == 0
    assert sorted(p.name for p in (tmp_path / "json").iterdir()) == ["1_0.png", "2_7.png"]
    second = read_png_text(tmp_path / "json" / "2_7.png")
    assert second["settings"]["negative_prompt"] == "n" and "hint" not in second["inputs"]
    # A line ends where training ends it, too: other characters that Python takes for ends of lines belong to a prompt.
    lines = [json.dumps({"prompt": f"a\u2028b\x85c {i}"}, ensure_ascii=False) for i in range(9)]
    (folder / "prompt.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    jobs = generate.read_jobs(
        generate.build_parser().parse_args([str(folder / "prompt.json"), "out", "--weights", "w"])
    )
    assert [job.name for job in jobs] == list("123456789") and jobs[0].prompt == "a\u2028b\x85c 0"


def test_options_reach_the_pipeline(folder, tmp_path, monkeypatch):
    seen = {}

    def spy(self, hint, prompt, **options):
        seen.update(options, hint=hint, memory=self.low_memory)
        raise FloatingPointError("enough")

    monkeypatch.setattr(ControlPipeline, "__call__", spy)
    mask = folder / "hints" / "a.png"
    options = ["--annotator", "canny", "--image", str(mask), "--mask", str(mask), "--denoise", "0.5", "--guess-mode", "--end", "0.5",
               "--sampler", "plms", "--clip-skip", "2", "--long-prompts", "--plain-prompts", "--size", "64x128", "--vae-tiles",
               "--dtype", "bfloat16", "--guidance-scale", "3"]  # fmt: skip
    assert run(folder, "hints/a.png", tmp_path, *options) == 1
    wanted = {"annotator": "canny", "denoise": 0.5, "guess_mode": True, "end": 0.5, "sampler": "plms", "clip_skip": 2, "steps": 1,
              "long_prompts": True, "prompt_weights": False, "size": (64, 128), "guidance_scale": 3.0, "seed": 0}  # fmt: skip
    assert {key: seen[key] for key in wanted} == wanted and seen["memory"].vae_tiles
    assert seen["image"].shape == seen["mask"].shape == (64, 64, 3)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried"),
        RuntimeError("can't allocate memory: 9"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_helps(folder, tmp_path, capsys, monkeypatch, error):
    def fail(self, *args, **options):
        raise error

    monkeypatch.setattr(ControlPipeline, "__call__", fail)
    assert run(folder, "hints/a.png", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(option in line for option in ("--size", "--vae-tiles", "--sliced-attention", "--offload"))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", [], "there is no"),
        ("whole.safetensors", [], "is no picture"),
        ("hints/a.png", ["--steps", "0"], "steps must be"),
        ("hints/a.png", ["--steps", "x"], "--steps"),
        ("hints/a.png", ["--strenght", "1"], "--strenght"),
        ("hints/a.png", ["--size", "64"], "HEIGHTxWIDTH"),
        ("hints/a.png", ["--samples", "0"], "--samples must be"),
        ("hints/a.png", ["--mask", "m.png"], "--mask needs --image"),
        ("hints/a.png", ["--image", "m.png"], "m.png"),
        ("hints/a.png", ["--sampler", "eular"], "unknown sampler 'eular'"),
        ("hints/a.png", ["--device", "gpu"], "gpu"),
        *(
            ("hints/a.png", [option, ""], f"{option}: it is empty")
            for option in ("--hint", "--image", "--mask", "--weights", "--control", "--config")
        ),
        ("hints/a.png", ["--weights", "none.safetensors"], "none.safetensors"),
        ("hints/a.png", ["--strength", "1", "--strength", "1"], "strength has 2 entries"),
        ("hints", ["--start", "0.8", "--end", "0.5"], "start must be below end"),
        ("hints", ["--image", "HINT", "--denoise", "1"], "denoise 1 leaves none of 1 steps; take more steps\n"),
        ("hints/a.png", ["--control", "CONTROL", "--control", "CONTROL"], "2 ControlNets and 1 hints"),
        ("hints", ["--annotator", "inpaint"], "inpainting needs a mask"),
        ("hints", ["--seed", "-1"], "a seed must be a whole number"),
        ("hints", ["--image", "BROKEN"], "broken.png does not decode as a picture"),
        ("prompts.json", [], "line 1 should be like"),
        ("empty.txt", [], "holds no prompt"),
        ("empty.txt", ["--prompt", "a"], "leave out --prompt"),
    ],
)
def test_mistakes_are_one_line_and_status_2(folder, tmp_path, capsys, source, options, message):
    (folder / "prompts.json").write_text("red\n")
    (folder / "empty.txt").write_text("\n")
    (tmp_path / "broken.png").touch()
    files = {
        "BROKEN": tmp_path / "broken.png",
        "HINT": folder / "hints" / "a.png",
        "CONTROL": folder / "control.safetensors",
    }
    options = [str(files.get(option, option)) for option in options]
    assert run(folder, source, tmp_path / "out", *options) == 2
    captured = capsys.readouterr()
    assert (
        message in captured.err
        and len(captured.err.strip().splitlines()) == 1
        and captured.err.startswith(generate.PROGRAM)
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["", "out"], ["hints", ""]])
def test_empty_places_are_refused(arguments, capsys):
    assert generate.main([*arguments, "--weights", "w"]) == 2
    assert "it is empty; give a file or a folder" in capsys.readouterr().err


def test_a_model_without_a_control_is_refused_in_words(folder, tmp_path, capsys):
    assert run(folder, "hints/a.png", tmp_path, weights="base.safetensors") == 2
    assert "--control" in capsys.readouterr().err
    assert torch.get_default_dtype() == torch.float32
