"""Settings by the memory of a GPU, for SD 1.5 at 512 pixels; `python -m cldm.training.memory` computes what they take.

Each entry names settings of `tutorial_train.py`. Computed memory must be at least 10% below the preset's name, which leaves room
for what the GPU's driver and libraries take; the command fails where it is not.
"""

from typing import Any

# Pictures of 512 pixels are dear: few, seldom, and none before the first step. Data are loaded beside the training.
_ALL = dict(
    precision="bf16-mixed", frozen_precision="bf16", cache=True, workers=4,
    log_every=500, pictures=4, pictures_before=False,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "8gb": _ALL | dict(batch_size=1, accumulate=4, recompute="all", optimizer="adamw8bit", pictures_at_once=1),
    "12gb": _ALL | dict(batch_size=4, recompute="all", pictures_at_once=1),
    "16gb": _ALL | dict(batch_size=4, recompute="trained", pictures_at_once=2),
    "24gb": _ALL | dict(batch_size=8, recompute="none", pictures_at_once=4),
    "80gb": _ALL | dict(batch_size=32, recompute="none", pictures_at_once=4),
}
