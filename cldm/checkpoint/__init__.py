"""What knows models about weight files: recognised, brought under this library's names, converted and written.

    identify(path)            what is this file? -> `Report`                         recognising
    open_model(path)          the one way in: its weights under our names, lazy      opening; names holds both naming schemes
    convert(...)              the one way out: written in any layout of `TARGETS`    converting, with diffusers_config
    add_control(...), transfer_control(...)                                          control

What files leave out (the noise schedule) is filled in by `schedule`; what a configuration's model holds is in `expected`.

Reading and writing the files themselves is `ldm.files`; filling a model is `cldm.model`. On the command line:
`python -m cldm.checkpoint FILE` and the `tool_*_control.py` scripts.
"""

from cldm.checkpoint.control import AddedControl, add_control, transfer_control
from cldm.checkpoint.converting import TARGETS, convert
from cldm.checkpoint.opening import ModelWeights, identify, open_model
from cldm.checkpoint.recognising import Report
from ldm.files import CheckpointError

__all__ = [
    "TARGETS",
    "AddedControl",
    "CheckpointError",
    "ModelWeights",
    "Report",
    "add_control",
    "convert",
    "identify",
    "open_model",
    "transfer_control",
]
