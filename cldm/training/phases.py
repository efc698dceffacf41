"""What is trained from which step on: the paper's small scale (section 3.5: the middle block first, then all connections) and large
scale (the ControlNet first, then Stable Diffusion with it), in one run."""

from dataclasses import dataclass, replace
from typing import Any

from cldm.cldm import ControlLDM


@dataclass(frozen=True)
class Phase:
    """Steps of a run in which the same weights are trained.

    Attributes:
        first, last: optimizer steps done at its beginning and at its end.
        only_mid_control: only the ControlNet's middle output is connected.
        unlocked: what of Stable Diffusion is trained: `""` nothing, `"decoder"`, or `"all"` of the UNet.
    """

    first: int
    last: int
    only_mid_control: bool = False
    unlocked: str = ""

    def __str__(self) -> str:
        parts = ["the middle output alone" if self.only_mid_control else "the ControlNet"]
        if self.unlocked:
            parts.append("the UNet's decoder" if self.unlocked == "decoder" else "the whole UNet")
        return " and ".join(parts)

    def apply(self, model: ControlLDM) -> None:
        """Lock and connect the model's parts as this phase says."""
        model.only_mid_control = self.only_mid_control
        model.unlock = self.unlocked or "decoder"
        model.sd_locked = not self.unlocked


def plan_phases(
    steps: int,
    only_mid_control: bool = False,
    sd_locked: bool = True,
    reconnect_at: int = 0,
    unlock_at: int = 0,
    unlock: str = "decoder",
) -> list[Phase]:
    """The phases of a run of `steps` steps, in order.

    Args:
        only_mid_control, sd_locked: for the whole run.
        reconnect_at: begin with the middle output alone, and connect the others after so many steps; 0 for never.
        unlock_at: unlock Stable Diffusion after so many steps; 0 for never.
        unlock: what is unlocked, then or from the beginning: "decoder" or "all".
    """
    unlocked = "" if sd_locked else unlock
    phases = [Phase(0, steps, only_mid_control or reconnect_at > 0, unlocked)]
    changes: list[tuple[int, dict[str, Any]]] = [
        (reconnect_at, {"only_mid_control": False}),
        (unlock_at, {"unlocked": unlock}),
    ]
    for step, change in sorted(changes, key=lambda c: c[0]):
        if not 0 < step < steps:
            continue
        last = phases.pop()
        if step > last.first:
            phases.append(replace(last, last=step))
        phases.append(replace(last, first=step, **change))
    return phases
