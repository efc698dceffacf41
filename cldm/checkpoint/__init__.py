"""Weights files: read safely and lazily, recognised, converted and written."""

from cldm.checkpoint.errors import CheckpointError
from cldm.checkpoint.layout import Report, identify
from cldm.checkpoint.reading import Checkpoint, TensorInfo, open_checkpoint, read_state_dict

__all__ = ["Checkpoint", "CheckpointError", "Report", "TensorInfo", "identify", "open_checkpoint", "read_state_dict"]
