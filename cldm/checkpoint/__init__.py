"""Weights files: read safely and lazily, recognised, converted and written."""

from cldm.checkpoint.control import AddedControl, add_control, transfer_control
from cldm.checkpoint.converting import TARGETS, convert, open_weights
from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.layout import Report, identify
from cldm.checkpoint.opening import Model, open_model
from cldm.checkpoint.reading import Checkpoint, TensorInfo, open_checkpoint, read_state_dict
from cldm.checkpoint.writing import write_checkpoint, write_folder

__all__ = [
    "TARGETS",
    "AddedControl",
    "Checkpoint",
    "CheckpointError",
    "Model",
    "Report",
    "TensorInfo",
    "add_control",
    "convert",
    "identify",
    "open_checkpoint",
    "open_model",
    "open_weights",
    "read_state_dict",
    "transfer_control",
    "write_checkpoint",
    "write_folder",
]
