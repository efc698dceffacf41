"""tutorial_train.py, with FSDP made to work on CPUs, so that two processes without a GPU can be tested.

python -m torch.distributed.run --nproc_per_node=2 -m tests.cldm.training.fsdp_on_cpu strategy=fsdp ...
"""

import sys
from typing import Any

import torch
from pytorch_lightning.plugins.precision import FSDPPrecision
from torch.distributed.fsdp import _common_utils, _optim_utils, fully_sharded_data_parallel

import tutorial_train
from cldm.training import engine


def use_the_cpu(state: Any, *_: Any) -> Any:
    """In place of torch's choice of an accelerator, which raises an error where there is none."""
    state._device_handle = _common_utils._FSDPDeviceHandle.from_device(torch.device("cpu"))
    return state


gather = _optim_utils._unflatten_orig_param_states


def gather_copies(info: Any, states: dict[str, Any], name: str, *rest: Any) -> None:
    """As torch does it. It uses one buffer for all states, and moves each to the CPU to keep it, which copies nothing here."""
    gather(info, states, name, *rest)
    for state in states.values():
        if name in state:
            state[name] = state[name].clone()


if __name__ == "__main__":
    engine.check_sharding = lambda trainer: None
    fully_sharded_data_parallel._init_device_handle = use_the_cpu
    _optim_utils._unflatten_orig_param_states = gather_copies
    FSDPPrecision.forward_context = lambda self: torch.autocast(
        "cpu", torch.bfloat16, enabled="mixed" in self.precision
    )
    sys.exit(tutorial_train.main())
