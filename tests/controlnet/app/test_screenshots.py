"""The pictures in docs/app.md, made on request: CONTROLNET_SCREENSHOTS names the folder of a run that has trained the tiny model."""

import math
import os
import shutil
from pathlib import Path

import cv2
import pytest

from cldm.data.fill import PALETTES, draw_fill
from tests.controlnet.app.conftest import ROOT, site_in
from tests.controlnet.app.test_browser import Page

VARIABLE = "CONTROLNET_SCREENSHOTS"
TARGET = ROOT / "docs" / "app"

pytestmark = pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no trained run")


@pytest.fixture(scope="module")
def page(browser, folder):
    """A page whose server has the trained run."""
    run = Path(os.environ[VARIABLE]).absolute()
    shutil.copytree(run, folder / "runs" / "tutorial", ignore=shutil.ignore_patterns("tensorboard", ".*"))
    with site_in(folder) as site:
        context = browser.new_context(viewport={"width": 1400, "height": 900})
        opened = Page(context, site.url)
        yield opened
        context.close()


def save(page: Page, name: str) -> None:
    page.tab.wait_for_timeout(1500)  # what fades in and out
    TARGET.mkdir(exist_ok=True)
    page.tab.screenshot(path=TARGET / f"{name}.png", full_page=True)


def test_generate(page):
    page.show_example()
    prompt = page.tab.get_by_label("Prompt", exact=True).first
    for text in (
        "lime circle with purple background",
        "red circle with teal background",
        "gold circle with navy background",
    ):
        prompt.fill(text)
        page.generate()
    prompt.fill("turquoise circle with orange background")
    page.number("Seed", 4)
    page.generate()
    page.tab.mouse.move(5, 5)
    save(page, "generate")


def test_draw(page):
    circle = [(math.cos(turn * math.tau / 24), math.sin(turn * math.tau / 24)) for turn in range(25)]
    page.click("Empty drawing")
    page.tab.wait_for_timeout(1000)
    page.stroke("#map-1", *[(0.65 + 0.18 * x, 0.6 + 0.18 * y) for x, y in circle])
    prompt = page.tab.get_by_label("Prompt", exact=True).first
    prompt.fill("yellow circle with blue background")
    page.generate()
    save(page, "draw")


def test_detect(page, tmp_path):
    cv2.imwrite(str(tmp_path / "circle.png"), draw_fill(7, 512, 3, PALETTES["clear"]).target[:, :, ::-1])
    page.open("Detect")
    page.upload("#detect-picture", tmp_path / "circle.png")
    page.tab.click("#detect")
    page.tab.wait_for_selector("#detect-map img")
    save(page, "detect")


def test_models(page):
    page.open("Models")
    page.choose("File or folder", "runs/tutorial")
    page.tab.click("#what-is-it")
    page.wait("#report", "base model and ControlNet in one file")
    save(page, "models")


def test_train(page):
    page.open("Train")
    page.choose("Data", "data/circles")
    page.tab.click("#check-data")
    page.wait("#data-checked", "can be used")
    page.choose("Run", "tutorial")
    page.wait("#run-state", "Finished")
    page.tab.wait_for_selector("#run-curves img")
    save(page, "train")
