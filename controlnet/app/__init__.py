"""The web page: generate, detect, look at models and train, in a browser. `controlnet app`, or `python -m controlnet.app`.

command      options, and starting and ending the server (the only module that does not need Gradio)
page         the tabs together; generate_tab (with control_unit), detect_tab, models_tab, train_tab
files        what may be chosen; uploads, errors: what comes in and what goes wrong
models, conditions, captions, sampling, training, gallery      what the tabs call, thin over cldm and annotator
"""

from controlnet.app.command import main

__all__ = ["main"]
