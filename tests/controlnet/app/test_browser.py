"""The page in a real browser: what people do on it, and what goes wrong for them."""

import json
import re
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import annotator
from cldm import inputs
from cldm.data.fill import draw_fill
from cldm.results import read_png_text
from cldm.training.metrics import read_metrics
from tests.controlnet.app.conftest import wait_until

STEERED = "models/steered.safetensors"
UNDO = 'button[aria-label="Undo"]'  # of an editor


class Page:
    """A tab of the browser on the page, and what people do there."""

    def __init__(self, context, url: str) -> None:
        self.tab = context.new_page()
        self.tab.set_default_timeout(60_000)
        self.foreign: list[str] = []
        self.tab.on("request", lambda request: self._note(request.url, url))
        self.tab.goto(url)
        self.ready()

    def _note(self, address: str, url: str) -> None:
        if not address.startswith((url, "data:", "blob:")):
            self.foreign.append(address)

    def ready(self) -> None:
        self.tab.wait_for_selector("#generate")
        self.wait("#status", "Ready.")

    def open(self, tab: str) -> None:
        self.tab.get_by_role("tab", name=tab, exact=True).click()

    def choose(self, label: str, text: str) -> None:
        self.tab.locator(f'input[aria-label="{label}"]:visible').first.click()
        self.tab.locator('[role="option"]:visible').filter(has_text=text).first.click()

    def slide(self, label: str, value: float) -> None:
        field = self.tab.locator(f'input[aria-label="number input for {label}"]:visible').first
        field.fill(str(value))
        field.press("Tab")

    def number(self, label: str, value: int) -> None:
        field = self.tab.get_by_label(label).first
        field.fill(str(value))
        field.press("Tab")

    def click(self, name: str) -> None:
        self.tab.locator(f'button:has-text("{name}"):visible').first.click()

    def upload(self, where: str, file: Path) -> None:
        """Choose a file, and wait until it is there."""
        self.tab.locator(f"{where} input[type=file]").first.set_input_files(str(file))
        if self.tab.locator(f"{where} {UNDO}").count():
            self.wait_filled(where)
        else:
            self.tab.wait_for_selector(f'{where} img[src*="{file.name}"]', state="attached")

    def show_example(self) -> None:
        self.click("Example picture")
        self.tab.wait_for_selector("#picture-1 img", state="attached")

    def wait_filled(self, where: str) -> None:
        """Wait until an editor shows a picture: that can be undone."""
        self.tab.wait_for_selector(f"{where} {UNDO}:not([disabled])")

    def wait_empty(self, where: str) -> None:
        self.tab.wait_for_selector(f"{where} {UNDO}[disabled]")

    def text(self, where: str) -> str:
        return self.tab.inner_text(where)

    def wait(self, where: str, text: str, seconds: float = 60) -> None:
        try:
            self.tab.wait_for_function(
                "([where, text]) => document.querySelector(where)?.innerText.includes(text)",
                arg=[where, text],
                timeout=seconds * 1000,
            )
        except Exception:
            raise AssertionError(f"{where} says {self.text(where)!r}, not {text!r}; {self.messages()}") from None

    def messages(self) -> str:
        return " ".join(self.tab.locator(".toast-body").all_inner_texts())

    def wait_message(self, pattern: str) -> str:
        wait_until(lambda: re.search(pattern, self.messages()), 60)
        return self.messages()

    def stroke(self, where: str, *points: tuple[float, float]) -> None:
        """Draw a line in an editor that shows something; points are parts of its canvas."""
        self.wait_filled(where)
        canvas = self.tab.locator(f"{where} canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        self.tab.mouse.move(*places[0])
        self.tab.mouse.down()
        for place in places[1:]:
            self.tab.mouse.move(*place, steps=8)
        self.tab.mouse.up()
        # The editor has taken the line in when it has drawn what follows.
        self.tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def generate(self, seconds: float = 60) -> None:
        self.tab.evaluate("document.querySelector('#status span').innerText = ''")
        self.tab.click("#generate")
        self.wait("#status", " seconds.", seconds)

    def press_again(self) -> None:
        """Press Generate until it begins: Gradio takes no second press before it knows that the first one's run has ended."""

        def begins() -> bool:
            self.tab.click("#generate")
            self.tab.wait_for_timeout(100)
            return "Stopped." not in self.text("#status")

        wait_until(begins)

    def upload_by(self, button: str, file: Path) -> None:
        with self.tab.expect_file_chooser() as chooser:
            self.tab.click(button)
        chooser.value.set_files(str(file))

    def close(self) -> None:
        self.tab.close()


@pytest.fixture
def page(browser, site):
    context = browser.new_context(viewport={"width": 1440, "height": 1000})
    opened = Page(context, site.url)
    yield opened
    assert opened.foreign == []
    context.close()


def made(site, before=()) -> list[Path]:
    """The pictures on the server that were not there before, the oldest first."""
    files = {path for path in site.outputs.rglob("*.png") if not path.name.startswith(".")} - set(before)
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture
def picture(tmp_path) -> Path:
    file = tmp_path / "circle.png"
    cv2.imwrite(str(file), draw_fill(1, 256, 5).target[:, :, ::-1])
    return file


def set_up(page: Page, steps: int = 3, seed: int = 5) -> None:
    """A base whose control has an effect, and few steps."""
    page.choose("Base model", STEERED)
    page.slide("Steps", steps)
    page.number("Seed", seed)


def test_an_untrained_control_is_said_to_be_one_and_an_upload_becomes_a_picture(page, site, picture):
    before = made(site)
    page.choose("ControlNet", "a new one")
    page.wait(".gradio-container", "This control is untrained: its hints change nothing")
    page.upload("#picture-1", picture)
    page.tab.get_by_label("Prompt", exact=True).first.fill("red circle with white background")
    page.number("Seed", 7)
    page.slide("Steps", 3)
    page.generate()
    assert "is untrained: the hint changes nothing" in page.text("#status")
    (file,) = made(site, before)
    text = read_png_text(file)
    assert text["settings"]["seed"] == 7 and text["settings"]["steps"] == 3
    assert text["page"]["base"] == "cldm_tiny" and text["page"]["controls"][0]["condition"] == "canny"
    assert str(site.root) not in json.dumps(text) and str(site.root) not in page.tab.content()


def test_several_conditions_make_maps_that_can_be_seen_before_sampling(page, site, picture):
    set_up(page)
    page.upload("#picture-1", picture)
    before = made(site)
    for condition in ("threshold", "tile", "canny"):
        page.choose("Condition", condition)
        page.wait_empty("#map-1")  # that of another condition has gone
        page.click("Make the map")
        page.wait_filled("#map-1")
        page.generate()
    # A visitor who is quicker than the page: the map of canny is still there when the next condition is generated with.
    held = []
    page.tab.route("**/run/predict*", lambda route: held.append(route))
    page.choose("Condition", "threshold")
    page.generate()
    assert held
    page.wait_filled("#map-1")
    for route in held:
        route.continue_()
    page.wait_empty("#map-1")  # the answers have come, which also set the parameters
    page.tab.unroute("**/run/predict*")
    page.click("How the map is made")
    page.slide("threshold", 40)
    page.generate()
    found = [read_png_text(file) for file in made(site, before)]
    told = [text["page"]["controls"][0] for text in found]
    assert [one["condition"] for one in told] == ["threshold", "tile", "canny", "threshold", "threshold"]
    assert told[4]["parameters"] == {"threshold": 40} != told[3]["parameters"] == told[0]["parameters"]
    # What the browser has shown and sent back is the map itself, to the last pixel, by the usual conventions of its condition.
    photo = np.asarray(Image.open(picture))
    for text, one in zip(found, told, strict=True):
        expected = annotator.load(one["condition"]).make_hint(photo, resolution=64, **one["parameters"]).hint
        assert text["inputs"]["hint"] == [inputs.fingerprint(inputs.hint_tensor(expected))], one
    assert "untrained" not in page.text("#status")


def test_lists_that_were_only_looked_at_change_nothing(page, site, picture):
    before = made(site)
    set_up(page)
    page.upload("#picture-1", picture)
    page.choose("Condition", "threshold")
    page.click("How the map is made")
    page.slide("threshold", 40)
    page.slide("Guidance", 3)
    page.slide("Shorter side in pixels", 128)
    page.click("Make the map")
    page.wait_filled("#map-1")
    asked = []
    page.tab.on("request", lambda request: asked.append(request.url) if "/run/predict" in request.url else None)
    for label in ("Condition", "ControlNet", "Base model"):
        page.tab.locator(f'input[aria-label="{label}"]:visible').first.click()
        page.tab.wait_for_selector('[role="option"]:visible')
        page.tab.keyboard.press("Escape")
        page.tab.keyboard.press("Tab")
    page.generate()
    assert asked == []
    (file,) = made(site, before)
    told = read_png_text(file)
    assert told["page"]["controls"][0]["parameters"] == {"threshold": 40}
    assert told["settings"]["guidance_scale"] == 3 and told["settings"]["size"] == [128, 128]


def test_a_drawn_scribble_steers(page, site):
    set_up(page)
    before = made(site)
    page.click("Empty drawing")
    page.wait_filled("#map-1")
    page.generate()
    page.stroke("#map-1", (0.3, 0.3), (0.7, 0.3), (0.7, 0.7), (0.3, 0.7), (0.3, 0.3))
    page.generate()
    empty, drawn = made(site, before)
    hints = [read_png_text(file)["inputs"]["hint"] for file in (empty, drawn)]
    assert hints[0] == [inputs.fingerprint(inputs.hint_tensor(np.zeros((64, 64, 3), np.uint8)))] != hints[1]
    assert not np.array_equal(np.asarray(Image.open(empty)), np.asarray(Image.open(drawn)))


def test_a_picture_is_made_anew_or_what_is_painted_over_while_the_rest_stays(page, site, tmp_path):
    start = draw_fill(3, 512, 5).target
    cv2.imwrite(str(tmp_path / "start.png"), start[:, :, ::-1])
    set_up(page)
    before = made(site)
    page.tab.get_by_label("Use it", exact=True).first.uncheck()  # without a control
    page.click("Start from a picture")
    page.upload("#start-editor", tmp_path / "start.png")
    page.generate()
    (file,) = made(site, before)
    text = read_png_text(file)
    assert text["settings"]["denoise"] == 0.75 and "mask" not in text["inputs"]
    assert text["inputs"]["image"] == inputs.fingerprint(inputs.picture_tensor(start, (64, 64)))
    before = made(site)
    page.tab.get_by_role("radio", name="inpainting").check()
    page.tab.click("#generate")
    page.wait_message("Paint over what shall be new")
    page.stroke("#start-editor", (0.45, 0.5), (0.55, 0.5))
    page.generate()
    (file,) = made(site, before)
    result, text = np.asarray(Image.open(file)).astype(int), read_png_text(file)
    assert text["inputs"].keys() >= {"image", "mask"} and text["settings"]["denoise"] == 1.0
    changed = (result != inputs.to_array(inputs.picture_tensor(start, (64, 64)))[0]).any(axis=2)
    assert changed[24:40, 24:40].any() and not changed[:12].any() and not changed[-12:].any() and changed.mean() < 0.4


def test_two_controls_and_the_settings_of_a_picture_come_back(page, site, picture):
    set_up(page, seed=11)
    before = made(site)
    page.tab.get_by_label("Prompt", exact=True).first.fill("a <b>bold</b> circle")
    page.upload("#picture-1", picture)
    page.slide("Strength", 0.5)
    page.open("Control 2")
    page.tab.get_by_label("Use it", exact=True).locator("visible=true").first.check()
    page.choose("Condition", "invert")
    page.upload("#picture-2", picture)
    page.generate()
    (file,) = made(site, before)
    text = read_png_text(file)
    assert [control["condition"] for control in text["page"]["controls"]] == ["canny", "invert"]
    assert text["settings"]["strength"] == [0.5, 1] and len(text["inputs"]["hint"]) == 2
    # Another visitor, with a page as it opens, is given the file.
    other = Page(page.tab.context.browser.new_context(viewport={"width": 1440, "height": 1000}), site.url)
    other.upload_by("#load-file", file)
    wait_until(lambda: other.tab.get_by_label("Prompt", exact=True).first.input_value() == "a <b>bold</b> circle")
    assert other.tab.get_by_label("Seed").first.input_value() == "11"
    assert other.tab.locator('input[aria-label="Base model"]').input_value() == STEERED
    assert other.tab.locator('input[aria-label="number input for Strength"]:visible').input_value() == "0.5"
    other.open("Control 2")
    assert other.tab.locator('input[aria-label="Condition"]:visible').input_value().startswith("invert")
    other.tab.context.close()


def test_stop_and_reload_while_sampling_leave_a_page_that_works(page, site, picture):
    set_up(page, steps=150)
    page.upload("#picture-1", picture)
    before = made(site)
    page.tab.click("#generate")
    page.wait("#status", "Step 2")
    held = []  # the server's answer comes later than the end of the run, as it may
    page.tab.route("**/run/predict*", lambda route: held.append((route, route.fetch())))
    page.tab.click("#stop")
    page.wait("#status", "Stopped.")
    wait_until(lambda: held or page.tab.wait_for_timeout(50))
    for route, answer in held:
        route.fulfill(response=answer)
    page.tab.unroute("**/run/predict*")
    page.tab.wait_for_timeout(300)
    assert "Stopped." in page.text("#status")
    page.press_again()
    page.wait("#status", "Step 2")
    page.tab.reload()
    page.ready()
    assert made(site, before) == []
    begun = time.monotonic()
    set_up(page, steps=2)
    page.upload("#picture-1", picture)
    page.generate()  # nobody samples the 150 steps to their end first
    assert time.monotonic() - begun < 40
    assert len(made(site, before)) == 1  # nothing came of the runs that were stopped and left
    page.tab.reload()
    page.ready()
    wait_until(lambda: page.tab.locator("#gallery img").count() >= 1)  # the visitor's pictures are still there


def test_stop_takes_a_run_out_of_the_queue(page, browser, site):
    context = browser.new_context(viewport={"width": 1440, "height": 1000})
    other = Page(context, site.url)
    before = made(site)
    for visitor, seed in ((page, 303), (other, 404)):
        set_up(visitor, steps=150 if visitor is other else 2, seed=seed)
        visitor.click("Empty drawing")
        visitor.wait_filled("#map-1")
    other.slide("Pictures", 8)
    other.tab.click("#generate")
    other.wait("#status", "Step 2")
    page.tab.click("#generate")
    page.wait("#status", "queue: 1/1")
    page.tab.click("#stop")
    page.wait("#status", "Stopped.")
    assert "Step" in other.text("#status")  # other visitors' runs go on
    other.tab.click("#stop")
    other.wait("#status", "Stopped.")
    page.generate()
    (file,) = made(site, before)  # and no second one: what was taken out has never begun
    assert read_png_text(file)["settings"]["seed"] == 303
    context.close()


def test_two_visitors_at_once_get_their_own_pictures(page, browser, site):
    context = browser.new_context(viewport={"width": 1440, "height": 1000})
    other = Page(context, site.url)
    before = made(site)
    for visitor, seed in ((page, 101), (other, 202)):
        set_up(visitor, steps=10, seed=seed)
        visitor.click("Empty drawing")
        visitor.wait_filled("#map-1")
    for visitor in (page, other):
        visitor.tab.click("#generate")
    for visitor in (page, other):
        visitor.wait("#status", " seconds.")
    files = made(site, before)
    assert sorted(read_png_text(file)["settings"]["seed"] for file in files) == [101, 202]
    assert files[0].parent != files[1].parent  # each visitor has a folder of his own
    for visitor, seed in ((page, 101), (other, 202)):
        assert visitor.tab.locator("#gallery img").count() == 1
        visitor.tab.locator("#gallery button img, #gallery button").first.click()
        wait_until(lambda visitor=visitor, seed=seed: str(seed) in visitor.tab.inner_text(".gradio-container"))
    context.close()


def test_broken_and_absurd_uploads_are_messages(page, site, tmp_path):
    set_up(page)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"nothing" * 20)
    huge = tmp_path / "huge.png"
    Image.new("1", (4200, 4200)).save(huge)
    for file, message in ((broken, "broken, or no picture"), (huge, "4200 x 4200 pixels")):
        page.upload("#picture-1", file)
        page.tab.click("#generate")
        said = page.wait_message(message)
        assert "Traceback" not in said and "/" not in said.replace("PNG, JPEG", "")
    page.tab.reload()
    page.ready()
    set_up(page)
    page.show_example()
    page.generate()


def test_a_condition_without_weights_says_what_is_missing_and_where_it_belongs(page, picture):
    page.upload("#picture-1", picture)
    page.choose("Condition", "hed: soft")
    page.wait(".gradio-container", "ControlNetHED.pth")
    page.click("Make the map")
    said = page.wait_message("ControlNetHED.pth")
    assert "annotator/ckpts" in said and "huggingface.co/lllyasviel/Annotators" in said


def test_detect_shows_a_map_and_makes_those_of_a_folder(page, site, picture):
    page.open("Detect")
    page.upload("#detect-picture", picture)
    page.slide("low_threshold", 50)
    page.tab.click("#detect")
    page.tab.wait_for_selector("#detect-map img")
    page.open("A folder")
    page.choose("Folder of pictures", "data/photos")
    page.tab.get_by_label("Name of the new folder").fill("photos-canny")
    page.click("Make them")
    wait_until(lambda: "3 of 3 pictures are in photos-canny" in page.text(".gradio-container"), 60)
    assert sorted(path.name for path in (site.root / "data" / "photos-canny").glob("[!.]*")) == [
        "0.png",
        "1.png",
        "2.png",
    ]


def test_models_tells_loads_adds_and_converts(page, site):
    page.open("Models")
    page.tab.click("#what-is-it")
    page.wait("#report", "base model without a ControlNet")
    page.click("Add a ControlNet to it")
    page.tab.get_by_label("New file in models").first.fill("../evil.safetensors")
    page.tab.click("#add-control")
    page.wait_message("needs a name of letters")
    page.tab.get_by_label("New file in models").first.fill("control_ini.safetensors")
    page.tab.click("#add-control")
    page.wait("#models-done", "wrote models/control_ini.safetensors")
    page.tab.click("#add-control")
    page.wait_message("exists")  # nothing is overwritten
    page.choose("File or folder", STEERED)
    page.click("Convert it")
    page.tab.get_by_label("New file or folder in models").fill("alone.safetensors")
    page.tab.click("#convert")
    wait_until(lambda: (site.root / "models" / "alone.safetensors").is_file())
    assert str(site.root) not in page.text(".gradio-container")
    for name in ("control_ini", "alone"):
        (site.root / "models" / f"{name}.safetensors").unlink()


def test_training_is_watched_stopped_and_gone_on_with(page, site):
    page.open("Train")
    page.choose("Data", "data/circles")
    page.tab.click("#check-data")
    page.wait("#data-checked", "All 24 pairs can be used")
    page.tab.get_by_label("Name of the run").fill("first")
    page.tab.get_by_label("Steps", exact=True).locator("visible=true").first.fill("2000")
    page.tab.get_by_label("Batch size").fill("2")
    page.tab.get_by_label("Pictures every").fill("2")
    page.click("Other settings")
    page.tab.locator("#other-settings textarea").fill("out=/tmp/elsewhere")
    page.tab.click("#start-training")
    page.wait_message("has a field of its own")
    page.tab.locator("#other-settings textarea").fill(
        "accelerator=cpu\npictures=2\nsample_steps=2\nheld_out=4\nsave_every=1000"
    )
    page.tab.click("#start-training")
    page.wait("#run-state", "Training, step", 120)
    page.tab.wait_for_selector("#run-curves img")
    # A page that is opened anew finds the run going on.
    page.tab.reload()
    page.ready()
    page.open("Train")
    page.wait("#run-state", "Training, step")
    page.tab.click("#stop-training")
    page.wait("#run-state", "Stopped; it can go on, step", 120)
    run = site.root / "runs" / "first"
    stopped_at = max(int(path.stem.split("-")[-1]) for path in (run / "checkpoints").glob("step-*"))
    page.tab.click("#go-on")
    page.wait("#run-state", "raining", 120)
    wait_until(lambda: read_metrics(run / "metrics.csv")[-1]["step"] > stopped_at, 120)
    # It is going on when the server ends, which stops it in order: see the fixture of the server and the last test.


def test_the_page_is_whole_without_any_other_server(page):
    """What the page asks for is its own server's; see also the check at the end of each test here."""
    for tab in ("Detect", "Models", "Train", "Generate"):
        page.open(tab)
    assert page.foreign == []
