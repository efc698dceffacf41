"""The page: four tabs in one look."""

import gradio as gr
from gradio.themes.utils.fonts import Font

from controlnet.app.context import Context
from controlnet.app.detect_tab import DetectTab
from controlnet.app.generate_tab import GenerateTab
from controlnet.app.models_tab import ModelsTab
from controlnet.app.train_tab import TrainTab

TITLE = "ControlNet"
_CACHE = (600, 3600)  # seconds between looks for old temporary files, and the age at which they go

CSS = """
.gradio-container { max-width: 1440px !important; margin: 0 auto; }
#title { margin-bottom: 4px; }
#title h1 { margin-bottom: 0; }
.note { font-size: 0.9em; color: var(--body-text-color-subdued); }
.status { display: flex; align-items: center; gap: 12px; min-height: 28px; font-weight: 500; }
.status progress { flex: 1; height: 8px; border: 0; border-radius: 4px; overflow: hidden; background: var(--neutral-200); }
.status progress::-webkit-progress-bar { background: var(--neutral-200); }
.status progress::-webkit-progress-value { background: var(--color-accent); }
.status progress::-moz-progress-bar { background: var(--color-accent); }
.warning { margin-top: 6px; padding: 8px 12px; border-radius: 8px; background: #fef3c7; color: #78350f; }
.last-line { margin-top: 4px; font-size: 0.85em; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.report, .report tr, .report td { border: 0 !important; }
.report { width: 100%; border-collapse: collapse; }
.report td { padding: 6px 10px; vertical-align: top; overflow-wrap: anywhere; }
.report tr:not(:last-child) td { border-bottom: 1px solid var(--border-color-primary) !important; }
.report td:first-child { width: 110px; color: var(--body-text-color-subdued); }
footer { display: none !important; }
"""


def theme() -> gr.themes.Base:
    """The look, with fonts of the visitor's own system: nothing is fetched from other servers."""
    text = [Font("system-ui"), Font("sans-serif")]
    return gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=text, font_mono=[Font("ui-monospace"), Font("monospace")]
    )


def build(context: Context) -> gr.Blocks:
    """The page with all tabs."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=_CACHE) as page:
        visitor = gr.BrowserState(storage_key="controlnet-visitor")
        gr.Markdown(
            "# ControlNet\nPictures from a prompt and a map that says where things are: edges, depth, pose, a scribble, and more.",
            elem_id="title",
        )
        with gr.Tabs():
            with gr.Tab("Generate", id="generate-tab") as generate_tab:
                generate = GenerateTab(context, visitor)
            with gr.Tab("Detect", id="detect-tab") as detect_tab:
                detect = DetectTab(context)
            with gr.Tab("Models", id="models-tab") as models_tab:
                models = ModelsTab(context)
            with gr.Tab("Train", id="train-tab") as train_tab:
                train = TrainTab(context)
        generate.connect_page(page, generate_tab)
        detect.connect_page(page)
        models.connect_page(page)
        train.connect_page(page, train_tab, (generate_tab, detect_tab, models_tab))
    return page
