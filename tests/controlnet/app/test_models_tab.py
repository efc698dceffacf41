"""The Models tab without a browser: a model is loaded before it is needed."""

import gradio as gr
import pytest

from controlnet.app.files import TINY
from controlnet.app.models import OWN
from controlnet.app.models_tab import ModelsTab
from tests.controlnet.app.conftest import make_context

STEERED = "models/steered.safetensors"


@pytest.fixture
def tab(folder):
    with gr.Blocks():
        return ModelsTab(make_context(folder))


def test_load_it_loads_what_generate_then_uses(tab, monkeypatch):
    models = tab.context.models
    told = tab._load(STEERED)
    with models.use(STEERED, [OWN]) as pipeline:
        size = sum(parameter.nbytes for parameter in pipeline.model.parameters())
    assert f"**{STEERED}** is loaded on `cpu` with the ControlNet {OWN}: {size / 1e9:.2f} GB" in told
    assert models.loaded == [STEERED]
    assert f"with the ControlNet {STEERED}" in tab._load(TINY) and models.loaded == [TINY]
    monkeypatch.setattr(models, "_load", lambda *files: pytest.fail("the model was loaded again"))
    with models.use(TINY, [STEERED]):  # the first of the list in Generate
        pass
    assert f"**{TINY}** is loaded" in tab._load(TINY)


def test_a_link_that_leads_nowhere_is_not_written_through(tab, folder):
    link = folder / "models" / "link.safetensors"
    link.symlink_to(folder / "elsewhere.safetensors")
    try:
        with pytest.raises(ValueError, match=r"link.safetensors exists already; choose another name"):
            tab._target(link.name)
    finally:
        link.unlink()


@pytest.mark.parametrize("name", ["/etc/passwd", "models", None, "", ["models"]])
def test_what_is_no_model_is_not_loaded(tab, name):
    with pytest.raises(ValueError, match="choose a base model"):
        tab._load(name)
    assert tab.context.models.loaded == []
