"""Settings by the memory of a GPU, for SD 1.5 at 512 pixels; `python -m cldm.training.memory` computes what they take.

Each entry names settings of `tutorial_train.py`. Computed memory must be at least 10% below the preset's name, which leaves room
for what the GPU's driver and libraries take; the command fails where it is not.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "8gb": dict(
        batch_size=1, accumulate=4, precision="bf16-mixed", frozen_precision="bf16", recompute="all", cache=True,
        optimizer="adamw8bit", pictures_at_once=1,
    ),
    "12gb": dict(
        batch_size=4, accumulate=1, precision="bf16-mixed", frozen_precision="bf16", recompute="all", cache=True,
        optimizer="adamw", pictures_at_once=1,
    ),
    "16gb": dict(
        batch_size=4, accumulate=1, precision="bf16-mixed", frozen_precision="bf16", recompute="trained", cache=True,
        optimizer="adamw", pictures_at_once=2,
    ),
    "24gb": dict(
        batch_size=8, accumulate=1, precision="bf16-mixed", frozen_precision="bf16", recompute="none", cache=True,
        optimizer="adamw", pictures_at_once=4,
    ),
    "80gb": dict(
        batch_size=32, accumulate=1, precision="bf16-mixed", frozen_precision="bf16", recompute="none", cache=True,
        optimizer="adamw", pictures_at_once=8,
    ),
}  # fmt: skip
