"""The Generate tab without a browser: each condition that needs no weights from a picture to a picture, and what is refused."""

from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch

import annotator
from cldm import inputs
from cldm.prompts import DEFAULT_PROMPT, NEGATIVE_PROMPT
from cldm.results import read_png_text
from controlnet.app import conditions
from controlnet.app.conditions import READY, Detectors
from controlnet.app.context import Context
from controlnet.app.files import TINY, Folders
from controlnet.app.gallery import visitor_key
from controlnet.app.generate_tab import AUTOMATIC, DEFAULT, EMPTY, INPAINTING, GenerateTab
from controlnet.app.models import OWN, Catalogue, Models
from controlnet.app.training import Runs

STEERED = "models/steered.safetensors"
PIXEL_CONDITIONS = [name for name in annotator.list_annotators() if not annotator.describe(name).network]
SESSION = SimpleNamespace(session_hash="session")


@pytest.fixture(scope="module")
def tab(folder, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs")
    folders = Folders((folder / "models",), (folder / "data",), outputs / "runs", outputs / "pictures")
    catalogue = Catalogue(folders)
    context = Context(folders, catalogue, Models(catalogue, torch.device("cpu")), Detectors("cpu"), Runs(folders.runs))
    with gr.Blocks():
        return GenerateTab(context, gr.BrowserState(storage_key="visitor"))


@pytest.fixture
def data(tab):
    """What a page sends, with a base whose control has an effect."""
    values = {component: component.value for component in tab._settings()}
    return values | {
        tab.visitor: visitor_key(None),
        tab.base: STEERED,
        tab.steps: 2,
        tab.seed: 4,
        tab.units[0].network: OWN,
    }


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((20, 20, 1), np.uint8))


def run(tab, data):
    """The last state of the page, and the text of the newest picture's file."""
    *_, last = tab._generate(data, SESSION)
    newest = (tab.context.folders.outputs / data[tab.visitor]) / last[tab.files][0]
    return last, read_png_text(newest)


def editor(background, *strokes):
    layers = [np.dstack([np.full((*stroke.shape, 3), 255, np.uint8), stroke]) for stroke in strokes]
    return {"background": background, "layers": layers, "composite": background}


@pytest.mark.parametrize("name", PIXEL_CONDITIONS)
def test_each_condition_of_the_pixel_kind_from_a_picture_to_a_picture(tab, data, photo, name):
    unit = tab.units[0]
    updates = unit.settings_for(name, OWN)
    data |= {component: updates[component].get("value") for component in unit.parameters.components}
    data |= {unit.condition: name, unit.picture: photo}
    if name == "inpaint":
        hole = np.zeros(photo.shape[:2], np.uint8)
        hole[40:90, 30:100] = 255
        data |= {tab.start_editor: editor(photo, hole), tab.use: INPAINTING, tab.denoise: 1.0}
    if name == "shuffle":
        data[unit.parameters.slots["number"][0]] = 3
    last, text = run(tab, data)
    assert " seconds." in last[tab.status] and "untrained" not in last[tab.status]
    assert text["page"]["controls"][0]["condition"] == name and text["settings"]["size"] == [64, 64]
    if name not in (
        "inpaint",
        "shuffle",
    ):  # what the pipeline itself makes of the picture is what came through the page
        expected = annotator.load(name).make_hint(photo, 64).hint
        assert text["inputs"]["hint"] == [inputs.fingerprint(inputs.hint_tensor(expected, size=(64, 64)))]


def test_an_untrained_control_is_named(tab, data, photo):
    unit = tab.units[0]
    network = tab._on_base({**data, tab.base: TINY})[unit.network]["value"]
    last, _ = run(tab, data | {tab.base: TINY, unit.network: network, unit.picture: photo})
    assert "untrained" not in last[tab.status] and network == STEERED  # a trained one of its family comes first
    last, _ = run(tab, data | {tab.base: TINY, unit.network: "a new one, untrained", unit.picture: photo})
    assert "The control is untrained: the hint changes nothing" in last[tab.status]


def test_the_prompt_settings_of_the_paper(tab, data, photo):
    data |= {tab.units[0].picture: photo, tab.prompt: "my text"}
    assert run(tab, data)[1]["settings"]["prompt"] == "my text"
    assert run(tab, data | {tab.prompt_setting: EMPTY})[1]["settings"]["prompt"] == ""
    text = run(tab, data | {tab.prompt_setting: DEFAULT, tab.add_words: True})[1]
    assert text["settings"]["prompt"].startswith(DEFAULT_PROMPT + ", best quality")
    assert text["settings"]["negative_prompt"] == NEGATIVE_PROMPT
    with pytest.raises(
        ValueError, match="Salesforce/blip-image-captioning-base.* into models/blip-image-captioning-base"
    ):
        run(tab, data | {tab.prompt_setting: AUTOMATIC})
    tab.context._captioner = lambda picture: f"a picture of {picture.shape[0]} pixels"
    try:
        assert run(tab, data | {tab.prompt_setting: AUTOMATIC})[1]["settings"]["prompt"] == "a picture of 64 pixels"
    finally:
        tab.context._captioner = None


def test_several_controls_with_strengths_of_their_own(tab, data, photo):
    for number, unit in enumerate(tab.units):
        data |= {unit.on: True, unit.network: OWN, unit.picture: photo, unit.strength: 0.5 * number, unit.end: 0.9}
    _, text = run(tab, data)
    assert text["settings"]["strength"] == [0.0, 0.5, 1.0] and text["settings"]["end"] == [0.9] * 3
    assert len(text["inputs"]["hint"]) == 3


def test_pictures_of_a_shape_that_is_not_square_and_several_at_once(tab, data, photo):
    last, text = run(tab, data | {tab.units[0].picture: np.tile(photo, (1, 2, 1)), tab.count: 3})
    assert text["settings"]["size"] == [64, 192] and "3 pictures" in last[tab.status]
    assert len(last[tab.files]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units.0.picture": None}, "has no picture"),
        ({"units.0.network": None}, "has no ControlNet"),
        ({"units.0.start": 0.8, "units.0.end": 0.2}, "start must be below end"),
        ({"units.0.condition": "inpaint"}, "picture with a painted hole"),
        ({"start_editor": editor(np.zeros((64, 64, 3), np.uint8)), "use": INPAINTING}, "paint over what shall be new"),
        ({"count": 8, "resolution": 1024, "units.0.picture": np.zeros((64, 640, 3), np.uint8)}, "too many at once"),
        ({"base": "/etc/passwd"}, "choose a base model from the list"),
        ({"units.0.condition": "nonsense"}, "no annotator 'nonsense'"),
        ({"visitor": "../x"}, "this browser's key is not known"),
    ],
)
def test_what_cannot_work_is_a_message(tab, data, photo, changes, message):
    data[tab.units[0].picture] = photo
    for name, value in changes.items():
        owner = tab.units[0] if name.startswith("units.0.") else tab
        data[getattr(owner, name.split(".")[-1])] = value
    if data[tab.units[0].condition] == "inpaint":
        updates = tab.units[0].settings_for("inpaint", OWN)
        data |= {component: updates[component].get("value") for component in tab.units[0].parameters.components}
    with pytest.raises(ValueError, match=message):
        run(tab, data)


def test_settings_of_a_picture_set_the_page_up_again(tab, data, photo):
    unit = tab.units[1]
    shown = unit.settings_for("threshold", OWN)
    data |= {component: shown[component].get("value") for component in unit.parameters.components}
    data |= {unit.on: True, unit.network: OWN, unit.condition: "threshold", unit.picture: photo, unit.strength: 0.3}
    data |= {
        tab.units[0].on: False,
        tab.prompt: "text",
        tab.guidance: 7.0,
        unit.parameters.slots["slider"][0]: 99,
        unit.guess_mode: True,
    }
    last, _ = run(tab, data)
    updates = tab._load_selected(last[tab.files], 0, data[tab.visitor])
    first = tab.units[0]  # a picture's controls are numbered anew
    assert (
        updates[tab.prompt] == "text"
        and updates[tab.guidance] == 7.0
        and updates[tab.seed] == 4
        and updates[tab.steps] == 2
    )
    assert updates[first.on] and not updates[unit.on] and updates[first.condition] == "threshold"
    assert (
        updates[first.strength] == 0.3 and updates[first.guess_mode] is True and updates[tab.base]["value"] == STEERED
    )
    assert updates[first.parameters.slots["slider"][0]]["value"] == 99
    with pytest.raises(ValueError, match="select a picture"):
        tab._load_selected(last[tab.files], 5, data[tab.visitor])
    with pytest.raises(ValueError, match="from the list"):
        tab._load_selected(["../../secret.png"], 0, data[tab.visitor])


def told(condition, **parameters):
    """A control as a picture's file tells of it."""
    return {"condition": condition, "network": 5, "parameters": parameters, "version": 1, "detect_resolution": 1}


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ({"steps": "many"}, {}),
        ({"size": [9**9, 1]}, {}),
        ({}, {"base": STEERED, "controls": [3]}),
        ({}, {"base": STEERED, "controls": [{"condition": "x"}]}),
        ({"strength": 99}, {"base": STEERED, "controls": [told(READY)]}),
        ({}, {"base": STEERED, "controls": [told("canny", x=1)]}),
    ],
)  # fmt: skip
def test_settings_that_somebody_made_up_are_refused(tab, settings, notes):
    with pytest.raises(ValueError):
        tab._restored(settings, notes)


def test_numbers_out_of_the_sliders_ranges_are_brought_into_them(tab):
    updates = tab._restored(
        {"steps": 900, "guidance_scale": 99, "prompt": ["several"], "seed": 1.5, "sampler": "none"}, {}
    )
    assert updates[tab.steps] == 150 and updates[tab.guidance] == 30 and updates[tab.prompt] == ""
    assert tab.seed not in updates and tab.sampler not in updates


def test_conditions_listed_on_the_page():
    names = [name for _, name in conditions.choices(ready=True)]
    assert names[0] == READY and sorted(names[1:]) == annotator.list_annotators()
