"""The Generate tab without a browser: each condition that needs no weights from a picture to a picture, and what is refused."""

import errno
import re
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from PIL import Image

import annotator
from cldm import inputs
from cldm.prompts import DEFAULT_PROMPT, NEGATIVE_PROMPT
from cldm.results import Pictures, read_png_text
from controlnet.app import conditions
from controlnet.app.conditions import READY
from controlnet.app.files import TINY
from controlnet.app.gallery import visitor_key
from controlnet.app.generate_tab import AUTOMATIC, DEFAULT, EMPTY, IMAGE_TO_IMAGE, INPAINTING, GenerateTab
from controlnet.app.models import OWN
from tests.controlnet.app.conftest import make_context

STEERED = "models/steered.safetensors"
PIXEL_CONDITIONS = [name for name in annotator.list_annotators() if not annotator.describe(name).network]
SESSION = SimpleNamespace(session_hash="session")


@pytest.fixture(scope="module")
def tab(folder, tmp_path_factory):
    with gr.Blocks():
        return GenerateTab(
            make_context(folder, tmp_path_factory.mktemp("written")), gr.BrowserState(storage_key="visitor")
        )


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
    return last, read_png_text(newest(tab, data))


def newest(tab, data):
    """The file of the newest picture."""
    return max((tab.context.folders.outputs / data[tab.visitor]).glob("[!.]*.png"))


def chosen(unit, name, **parameters):
    """What a page sends of a condition and its parameters."""
    updates = unit.settings_for(name, OWN, None, parameters)
    return {unit.condition: name} | {part: updates[part].get("value") for part in unit.parameters.components}


def hint_of(name, picture, resolution=64, **parameters):
    """The hint of a picture without the page, as a picture's file tells of it."""
    made, size = annotator.load(name).make_hint(picture, resolution, **parameters), (resolution, resolution)
    return [inputs.fingerprint(inputs.hint_tensor(made.hint, size=size))]


def editor(background, *strokes):
    layers = [np.dstack([np.full((*stroke.shape, 3), 255, np.uint8), stroke]) for stroke in strokes]
    return {"background": background, "layers": layers, "composite": background}


@pytest.mark.parametrize("name", PIXEL_CONDITIONS)
def test_each_condition_of_the_pixel_kind_from_a_picture_to_a_picture(tab, data, photo, name):
    unit = tab.units[0]
    data |= chosen(unit, name) | {unit.picture: photo}
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
        assert text["inputs"]["hint"] == hint_of(name, photo)


def test_the_map_is_of_the_settings_that_are_chosen(tab, data, photo):
    """Whatever map a browser sends: it may be ahead of what it shows, or be given a map late."""
    unit, size = tab.units[0], (tab.resolution, tab.start_editor)
    data |= chosen(unit, "threshold") | {unit.picture: photo}
    data[unit.map] = editor(unit.make_map(data, *size))

    def made(**changes):
        states = list(tab._generate(data | changes.pop("sent", {}), SESSION))
        text = read_png_text(newest(tab, data))
        told = text["page"]["controls"][0]
        anew = [state[unit.map] for state in states if unit.map in state]
        return text["inputs"]["hint"], told["condition"], told["parameters"], bool(anew)

    defaults = annotator.describe("threshold").defaults
    (slider,) = (name for name in defaults)
    other = {slider: 60}
    assert hint_of("threshold", photo) != hint_of("threshold", photo, **other) != hint_of("canny", photo)
    assert made() == (hint_of("threshold", photo), "threshold", defaults, False)
    sent = chosen(unit, "threshold", **other)  # a slider was moved
    assert made(sent=sent) == (hint_of("threshold", photo, **other), "threshold", other, True)
    turned = np.ascontiguousarray(photo[::-1])
    assert made(sent={unit.picture: turned}) == (hint_of("threshold", turned), "threshold", defaults, True)
    assert made(sent={tab.resolution: 128})[3]
    sent = chosen(unit, "canny")
    assert made(sent=sent) == (hint_of("canny", photo), "canny", annotator.describe("canny").defaults, True)
    # The list of conditions alone has changed so far: its sliders are still those of the one before.
    sent = {unit.condition: "canny"}
    assert made(sent=sent) == (hint_of("canny", photo), "canny", annotator.describe("canny").defaults, True)
    assert made() == (hint_of("threshold", photo), "threshold", defaults, False)


def test_what_people_have_drawn_stays(tab, data, photo):
    unit, size = tab.units[0], (tab.resolution, tab.start_editor)
    data |= chosen(unit, "threshold") | {unit.picture: photo}
    ground = unit.make_map(data, *size)
    stroke = np.zeros(ground.shape[:2], np.uint8)
    stroke[100:200, 50:90] = 255
    drawn_on = {**editor(ground, stroke), "composite": np.maximum(ground, stroke[:, :, None])}

    def made(**changes):
        sent = data | {getattr(unit, name): value for name, value in changes.items() if name != "resolution"}
        sent[tab.resolution] = changes.get("resolution", 64)
        return run(tab, sent)[1]["inputs"]["hint"]

    def scaled(map, name, resolution=64):
        hint = conditions.Chosen(name).hint_of(map, resolution)
        return [inputs.fingerprint(inputs.hint_tensor(hint, size=(resolution, resolution)))]

    composite = drawn_on["composite"]
    assert made(map=drawn_on) == scaled(composite, "threshold") != hint_of("threshold", photo)
    assert made(map=drawn_on, resolution=128) == scaled(composite, "threshold", 128)
    assert made(map=drawn_on, condition="canny") == hint_of("canny", photo)  # a map of something else does not
    assert made(map=editor(255 - ground)) == scaled(255 - ground, "threshold")  # uploaded into the editor
    assert made(map=editor(ground), picture=None, condition="canny") == scaled(ground, "canny")


def test_image_to_image(tab, data, photo):
    stroke = np.full(photo.shape[:2], 255, np.uint8)
    data |= {
        tab.units[0].on: False,
        tab.start_editor: editor(photo, stroke),
        tab.use: IMAGE_TO_IMAGE,
        tab.denoise: 0.5,
        tab.steps: 8,
    }
    text = run(tab, data)[1]
    assert text["settings"]["denoise"] == 0.5 and "mask" not in text["inputs"]  # a brush mask is for inpainting
    assert text["inputs"]["image"] == inputs.fingerprint(inputs.picture_tensor(photo, (64, 64)))
    with tab.context.models.use(STEERED) as pipeline:
        expected = pipeline(
            None, "", image=photo, denoise=0.5, steps=8, seed=4, size=(64, 64), guidance_scale=data[tab.guidance]
        )
    result = newest(tab, data)
    assert np.array_equal(np.asarray(Image.open(result)), expected[0])
    assert run(tab, data | {tab.denoise: 1.0})[1]["inputs"]["image"] == text["inputs"]["image"]
    assert not np.array_equal(np.asarray(Image.open(newest(tab, data))), expected[0])
    with pytest.raises(ValueError, match="denoise 0.05 leaves none of 8 steps"):
        run(tab, data | {tab.denoise: 0.05})
    # "Start from it": the selected picture itself, to the last pixel, is what the next one is made of.
    files = [result.name]
    image, use, denoise = tab._start_from(files, 0, data[tab.visitor])
    assert (use, denoise) == (IMAGE_TO_IMAGE, 0.75)
    again = run(tab, data | {tab.start_editor: editor(image), tab.use: use, tab.denoise: denoise})[1]
    assert again["inputs"]["image"] == inputs.fingerprint(inputs.picture_tensor(expected[0]))


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
        ({"visitor": ["x"]}, "this browser's key is not known"),
        ({"base": None}, "choose a base model from the list"),
        ({"base": [STEERED]}, "choose a base model from the list"),
    ],
)
def test_what_cannot_work_is_a_message(tab, data, photo, changes, message):
    data[tab.units[0].picture] = photo
    for name, value in changes.items():
        owner = tab.units[0] if name.startswith("units.0.") else tab
        data[getattr(owner, name.split(".")[-1])] = value
    with pytest.raises(ValueError, match=message):
        run(tab, data)


def test_settings_of_a_picture_set_the_page_up_again(tab, data, photo):
    unit = tab.units[1]
    data |= chosen(unit, "threshold")
    data |= {unit.on: True, unit.network: OWN, unit.picture: photo, unit.strength: 0.3}
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
    settings = {"steps": 900, "guidance_scale": 99, "prompt": ["several"], "seed": 1.5, "sampler": "none"}
    with pytest.warns(UserWarning) as warned:
        updates = tab._restored(settings, {})
    (text,) = (str(warning.message) for warning in warned)
    assert text == (
        "Not everything could be taken over as it is in the picture: "
        "prompt: ['several'], steps: 900, guidance_scale: 99, seed: 1.5, sampler: none"
    )
    assert updates[tab.steps] == 150 and updates[tab.guidance] == 30 and updates[tab.prompt] == ""
    assert tab.seed not in updates and tab.sampler not in updates


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"seed": 2**53}, "seed: 9007199254740992"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": True}, "seed: True"),
        ({"guidance_scale": 0.5}, "guidance_scale: 0.5"),
        ({"size": [200, 264]}, "size: 264 x 200"),
        ({"size": [32, 64]}, "size: 64 x 32"),
        ({"seed": "<b>" * 99}, "seed: " + "&lt;b&gt;" * 26 + "&lt;b"),
    ],
)
def test_what_the_page_cannot_hold_is_named(tab, settings, told):
    with pytest.warns(UserWarning, match=f"{re.escape('as it is in the picture: ' + told)}$"):
        updates = tab._restored(settings, {})
    assert tab.seed not in updates
    assert updates.get(tab.guidance, 1) == 1 and updates.get(tab.resolution, 64) in (64, 192)


def test_what_the_page_can_hold_is_taken_over_without_a_word(tab, recwarn):
    settings = {
        "seed": 2**53 - 1,
        "steps": 150,
        "guidance_scale": 7.3,
        "size": [192, 256],
        "strength": 0.5,
        "guess_mode": True,
    }
    control = told("canny") | {"network": OWN, "version": "1.0", "detect_resolution": None}
    updates = tab._restored(settings, {"base": STEERED, "controls": [control]})
    assert (updates[tab.seed], updates[tab.steps], updates[tab.guidance]) == (2**53 - 1, 150, 7.3)
    assert updates[tab.resolution] == 192 and updates[tab.units[0].guess_mode] is True
    assert not [warning for warning in recwarn if "taken over" in str(warning.message)]


def test_controls_that_cannot_be_taken_over_are_named(tab):
    controls = [told("canny") | {"version": "1.0"}] * 4
    with pytest.warns(UserWarning) as warned:
        updates = tab._restored({"strength": 5}, {"base": STEERED, "controls": controls})
    (text,) = (str(warning.message) for warning in warned)
    assert "number of controls: 4, ControlNet of control 1: 5, detect_resolution of control 1: 1" in text
    assert "strength of control 3: 5" in text and updates[tab.units[2].strength] == 2
    assert updates[tab.units[0].parameters.detect_resolution]["value"] == 64
    with pytest.warns(UserWarning, match="base model: gone$"):
        tab._restored({}, {"base": "gone"})


def test_a_nested_value_that_is_too_deep_is_damage(tab):
    deep = []
    for _ in range(50_000):
        deep = [deep]
    with pytest.raises(ValueError, match="the settings in this picture are damaged"):
        tab._restored({"seed": deep}, {})


def test_a_picture_that_cannot_be_saved_is_shown(tab, data, photo, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.EACCES, "Permission denied", "/outputs/x.png")

    monkeypatch.setattr(Pictures, "save", full)
    states = tab._generate(data | {tab.units[0].picture: photo, tab.steps: 1}, SESSION)
    seen = []
    with pytest.raises(OSError, match="Permission denied"):
        for state in states:
            seen.append(state)
    assert list(seen[-1]) == [tab.result] and min(seen[-1][tab.result].shape[:2]) == 320


def test_conditions_listed_on_the_page():
    names = [name for _, name in conditions.choices(ready=True)]
    assert names[0] == READY and sorted(names[1:]) == annotator.list_annotators()
