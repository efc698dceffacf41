"""Which models can be chosen, which are in memory, and who uses them."""

import shutil
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cldm.checkpoint.converting import convert
from cldm.pipeline import is_untrained
from controlnet.app.files import TINY, Folders
from controlnet.app.models import OWN, UNTRAINED, Catalogue, Models, untrained_controls
from controlnet.app.sampling import Begun, Step, Stopped, Stops, sample

STEERED = "models/steered.safetensors"


@pytest.fixture
def models(folder) -> Models:
    folders = Folders((folder / "models",), (folder / "data",), folder / "no-runs", folder / "no-outputs")
    return Models(Catalogue(folders), torch.device("cpu"))


def test_lists(models, folder):
    catalogue, tiny = models.catalogue, models.catalogue.bases()[TINY]
    assert list(catalogue.bases()) == [TINY, STEERED] and list(catalogue.controls(tiny)) == [STEERED]
    assert catalogue.has_control(catalogue.bases()[STEERED]) and not catalogue.has_control(tiny)
    assert catalogue.side(tiny) == 64 and catalogue.default_base() == TINY
    broken = folder / "models" / "broken.safetensors"
    broken.write_bytes(b"broken")
    other = folder / "models" / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    try:
        assert list(catalogue.bases()) == [TINY, STEERED]
    finally:
        broken.unlink()
        other.unlink()


def test_a_file_that_cannot_be_read_is_named_once_until_it_changes(models, folder, caplog):
    broken = folder / "models" / "broken.safetensors"
    broken.write_bytes(b"broken")
    pipeline = folder / "models" / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{")
    try:
        for _ in range(3):
            assert list(models.catalogue.bases()) == [TINY, STEERED]
        assert caplog.text.count("broken.safetensors is left out") == caplog.text.count("pipeline is left out") == 1
        broken.write_bytes((folder / "models" / "steered.safetensors").read_bytes())
        (pipeline / "unet" / "config.json").write_text("{")
        assert "models/broken.safetensors" in models.catalogue.bases()
        assert caplog.text.count("pipeline is left out") == 2  # it is being copied: what lies deeper counts, too
    finally:
        broken.unlink()
        shutil.rmtree(pipeline)


def test_one_model_is_in_memory_and_the_one_used_longest_ago_goes(models):
    with models.use(TINY, [UNTRAINED]) as tiny:
        assert untrained_controls(tiny) == [1]
    with models.use(TINY, [UNTRAINED]) as again:
        assert again is tiny
    with models.use(STEERED, [OWN]) as steered:
        assert untrained_controls(steered) == [] and models.loaded == [STEERED]
    models.most = 2
    with models.use(TINY, [STEERED]) as pipeline:  # the control of a whole model, on another base
        assert untrained_controls(pipeline) == [] and models.loaded == [STEERED, TINY]
    with models.use(STEERED, [OWN]) as kept:
        assert kept is steered
    with models.use(TINY, []):
        assert models.loaded == [STEERED, TINY]
    models.clear()
    assert models.loaded == []


def test_a_file_that_is_written_anew_is_read_anew(models, folder):
    with models.use(STEERED, [OWN]) as before:
        pass
    (folder / "models" / "steered.safetensors").touch()
    with models.use(STEERED, [OWN]) as after:
        assert after is not before


def test_a_folder_of_diffusers_in_which_a_file_is_written_anew_is_read_anew(models, folder):
    made = folder / "models" / "made"
    try:
        convert(folder / "models" / "steered.safetensors", made, "diffusers-pipeline", progress=False)
        with models.use("models/made") as before:
            pass
        (made / "unet" / "diffusion_pytorch_model.safetensors").touch()
        with models.use("models/made") as after:
            assert after is not before
    finally:
        shutil.rmtree(made, ignore_errors=True)


def test_several_controls(models):
    with models.use(STEERED, [OWN, OWN, OWN]) as pipeline:
        networks = pipeline.model.control_networks()
        assert len(networks) == 3 and not any(map(is_untrained, networks))
        hints = [np.zeros((64, 64, 3), np.uint8), None, np.full((64, 64, 3), 255, np.uint8)]
        assert pipeline(hints, "a circle", steps=1, seed=0).shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("base", "controls"),
    [
        ("/etc/passwd", []),
        (TINY, [OWN]),
        (STEERED, [UNTRAINED]),
        (TINY, [STEERED, UNTRAINED]),
        (TINY, ["../x"]),
        (TINY, [None]),
    ],
)
def test_choices_that_the_lists_do_not_have(models, base, controls):
    with pytest.raises(ValueError, match="from the list"), models.use(base, controls):
        pass


def test_a_run_tells_its_steps_and_can_be_stopped(models):
    hint = np.zeros((64, 64, 3), np.uint8)
    arguments = {"hint": hint, "prompt": "", "steps": 4, "seed": 1}
    events = list(sample(models.use(STEERED, [OWN]), arguments, threading.Event()))
    assert isinstance(events[0], Begun) and [event.number for event in events[1:-1]] == [1, 2, 3, 4]
    assert isinstance(events[1], Step) and events[1].preview.shape == (1, 8, 8, 3)
    with models.use(STEERED, [OWN]) as pipeline:
        assert np.array_equal(events[-1], pipeline(**arguments))
    stop = threading.Event()
    with pytest.raises(Stopped):
        for event in sample(models.use(STEERED, [OWN]), {**arguments, "steps": 500}, stop):
            if isinstance(event, Step):
                stop.set()
    with pytest.raises(ValueError, match="steps must be"):
        list(sample(models.use(STEERED, [OWN]), {**arguments, "steps": 0}, threading.Event()))


def test_stop_does_not_wait_for_a_model_that_is_being_loaded():
    loaded, stop = threading.Event(), threading.Event()

    @contextmanager
    def loading():
        loaded.wait(60)
        yield None

    timer = threading.Timer(0.1, stop.set)
    timer.start()
    try:
        with pytest.raises(Stopped):
            next(sample(loading(), {}, stop))
        assert not loaded.is_set()
    finally:
        loaded.set()
        timer.join()


def test_low_memory_gives_the_same_picture(models, folder):
    careful = Models(models.catalogue, torch.device("cpu"), low_memory=True)
    hint = np.kron(np.eye(8, dtype=np.uint8)[:, :, None] * 255, np.ones((8, 8, 3), np.uint8))
    pictures = []
    for one in (models, careful):
        with one.use(STEERED, [OWN, OWN]) as pipeline:
            pictures.append(pipeline([hint, hint], "a circle", steps=2, seed=3)[0].astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_run_that_nobody_looks_at_any_more_frees_the_model(models):
    forgotten = sample(models.use(STEERED, [OWN]), {"hint": None, "prompt": "", "steps": 900}, threading.Event())
    next(forgotten)
    forgotten.close()
    taken = threading.Event()

    def take():
        with models.use(STEERED, [OWN]):
            taken.set()

    threading.Thread(target=take, daemon=True).start()
    assert taken.wait(20)


def test_stops_belong_to_a_session():
    stops = Stops()
    mine, other = stops.new("mine"), stops.new("other")
    assert stops.set("mine") and mine.is_set() and not other.is_set()
    assert not stops.set("mine") and not stops.set("nobody")
    stops.done("other", other)
    assert not stops.set("other")
