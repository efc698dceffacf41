"""The Train tab without a browser: what a step would take."""

import gradio as gr
import pytest

from cldm.training.memory import Plan, measure, table
from controlnet.app import train_tab
from controlnet.app.train_tab import TrainTab
from tests.controlnet.app.conftest import make_context


@pytest.fixture
def tab(folder):
    with gr.Blocks():
        return TrainTab(make_context(folder))


@pytest.fixture
def data(tab):
    """What a page sends that was just opened."""
    return {component: component.value for component in tab._fields()}


def test_compute_memory_tells_of_the_settings_on_the_page(tab, data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the server may run anywhere
    told = tab._memory(data | {tab.batch_size: 3, tab.others: "sd_locked=false\nprecision=bf16-mixed"})
    plan = Plan(
        config="cldm_tiny", size=64, batch_size=3, precision="bf16-mixed", frozen_precision="fp32", recompute="none", cache=False,
        sd_locked=False,
    )  # fmt: skip
    assert told.split() == table([(plan, measure(plan))]).split()


def test_what_memory_cannot_be_computed_is_a_message(tab, data, monkeypatch):
    for changes, message in (
        ({tab.others: "precision=none"}, "precision"),
        ({tab.batch_size: None}, "Batch size is empty"),
        ({tab.base: "/etc/passwd"}, "choose a base model"),
    ):
        with pytest.raises(ValueError, match=message):
            tab._memory(data | changes)
    monkeypatch.setattr(train_tab, "_MEMORY_SECONDS", 0.01)
    with pytest.raises(ValueError, match="takes longer"):
        tab._memory(data)
