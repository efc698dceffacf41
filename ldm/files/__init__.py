"""Weight files, whatever wrote them: read without executing anything, tensor by tensor, and written whole or not at all.

    open_weights(path)      a file, a diffusers folder, packaged weights or hf://owner/name -> `WeightsFile`, a mapping
                            from key to `LazyTensor`, whose `read()` gives the values
    read_state_dict(path)   the same, all read
    read_checkpoint(path)   of a training run: optimizer and everything else, too
    write_weights, write_folder

This package knows no model: keys are those of the file. Read it in this order: `tensors` (the lazy tensor, and the open
file), `opening` (which container is it), `safetensors_files`, `torch_files` and `pickles` (the containers), `locating`
(what a path may name), `writing`. What a file is and how its entries are called in this library: `cldm.checkpoint`.
"""

from ldm.files.errors import CheckpointError, MissingFileError
from ldm.files.opening import open_weights, read_checkpoint, read_state_dict
from ldm.files.tensors import LazyTensor, WeightsFile
from ldm.files.writing import check_output, remove_unfinished_weights, write_folder, write_weights

__all__ = [
    "CheckpointError",
    "LazyTensor",
    "MissingFileError",
    "WeightsFile",
    "check_output",
    "open_weights",
    "read_checkpoint",
    "read_state_dict",
    "remove_unfinished_weights",
    "write_folder",
    "write_weights",
]
