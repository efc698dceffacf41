"""The Detect tab without a browser: a folder of pictures, and what is not written into."""

from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest

from annotator.pictures import save_png
from controlnet.app.detect_tab import MAPS, PAIRS, DetectTab
from tests.controlnet.app.conftest import make_context

SESSION = SimpleNamespace(session_hash="session")


@pytest.fixture
def tab(tmp_path):
    for number in range(2):
        save_png(tmp_path / "data" / "photos" / f"{number}.png", np.full((70, 70, 3), 90 * number, np.uint8))
    with gr.Blocks():
        return DetectTab(make_context(tmp_path))


def last(tab, what, target):
    """The last state of the page."""
    inputs = [tab.condition, tab.folder, tab.target, tab.what, tab.size, tab.prompt, *tab.parameters.components]
    data = {component: component.value for component in inputs}
    data |= {tab.folder: "data/photos", tab.target: target, tab.what: what, tab.size: 64, tab.prompt: "x"}
    *_, state = tab._run(data, SESSION)
    return state


@pytest.mark.parametrize("what", [MAPS, PAIRS])
def test_only_what_belongs_to_the_run_is_counted(tab, tmp_path, what):
    (tmp_path / "data" / "photos" / "2.png").write_bytes(b"broken")
    assert last(tab, what, "made")[tab.progress].startswith("2 of 3 pictures are in made. Some failed: ")
    for number in (1, 2):
        (tmp_path / "data" / "photos" / f"{number}.png").unlink()
    state = last(tab, what, "made")
    assert state[tab.progress] == "1 of 1 pictures are in made." and len(state[tab.examples]) == 1
    (tmp_path / "data" / "photos" / "phone.heic").touch()
    told = last(tab, what, "made")[tab.progress]
    assert told.startswith(
        "1 of 1 pictures are in made. Note: left out pictures of kinds that are not read (1, such as"
    )
    assert str(tmp_path) not in told


@pytest.mark.parametrize("what", [MAPS, PAIRS])
def test_a_folder_of_something_else_is_not_written_into(tab, tmp_path, what):
    other = tmp_path / "letters"
    other.mkdir()
    (other / "will.txt").write_text("mine")
    (tmp_path / "data" / "made").symlink_to(other)
    (tmp_path / "data" / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="choose another (name|folder)"):
        last(tab, what, "made")
    with pytest.raises(ValueError, match="loop"):
        last(tab, what, "loop")
    assert [path.name for path in other.iterdir()] == ["will.txt"]
