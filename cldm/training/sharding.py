"""Training with the weights, gradients and optimizer state of the model shared out over the processes (FSDP)."""

import os
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from cldm.training.checkpoints import WholeFiles, names_in_optimizer
from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


class ShardedStrategy(FSDPStrategy):
    """Lightning's FSDP with the checkpoints of this library: the same as of one process, so that either goes on from the other's.

    The units are the blocks of the UNet and the ControlNet, and not their layers: FSDP puts a wrapper around each unit, which
    would hide from a block of what class its layers are.
    """

    def __init__(self) -> None:
        super().__init__(
            auto_wrap_policy=ModuleWrapPolicy({TimestepEmbedSequential}),
            # Autocast alone decides what is computed in half precision; Lightning's choice would round the noise schedule, too.
            mixed_precision=MixedPrecision(),
            use_orig_params=True,
            state_dict_type="full",
        )

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        model: Any = self.model
        plugin: Any = self.precision_plugin
        # The gradient's norm needs all parts of it, which the model has and Lightning's plugin, that refuses, has not.
        plugin.clip_grad_by_norm = lambda optimizer, most: model.clip_grad_norm_(most)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        if self.is_global_zero:
            WholeFiles().save_checkpoint(checkpoint, filepath)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | os.PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        return WholeFiles().load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=_WHOLE)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole state as the optimizer itself gives it in one process: by number of the parameter; empty but on rank 0."""
        assert self.model is not None and self.lightning_module is not None
        optimizer = getattr(optimizer, "optimizer", optimizer)  # of Lightning's wrapper
        named: Any = get_optimizer_state_dict(self.model, optimizer, options=_WHOLE)
        if not self.is_global_zero:
            return {}
        names = names_in_optimizer(self.lightning_module, optimizer)
        numbers = {name: number for number, name in enumerate(names)}
        groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]]
        return {"state": {numbers[name]: state for name, state in named["state"].items()}, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None and self.lightning_module is not None
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = names_in_optimizer(self.lightning_module, optimizer)
            groups = [group | {"params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
            state: Any = {"state": {names[i]: one for i, one in saved["state"].items()}, "param_groups": groups}
            set_optimizer_state_dict(self.model, optimizer, state, options=_WHOLE)
