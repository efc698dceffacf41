"""`curves.png`: loss, control gain, norms and score of a run over its optimizer steps.

python -m cldm.training.curves RUN_FOLDER
"""

import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from cldm.command import Parser, run_command
from cldm.files import write_whole
from cldm.terminal import printable, show
from cldm.training.instrument import LEVELS, Instrument
from cldm.training.metrics import FILENAME, read_metrics
from ldm.util import ConfigError

PICTURE = "curves.png"
_SCORES = ("fill/", "scenes/", "fidelity/")

Rows = Sequence[dict[str, float]]


class Curves(Instrument):
    """Draws `curves.png` from a run's `metrics.csv`, every so many optimizer steps and at the end.

    Args:
        folder: of the run, where `MetricsFile` writes.
        every: optimizer steps between drawings.
    """

    def __init__(self, folder: str | Path, every: int = 100) -> None:
        super().__init__(every)
        self.folder = Path(folder)

    def measure(self, trainer: pl.Trainer, model: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and (self.folder / FILENAME).exists():
            draw_curves(self.folder)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.measure(trainer, pl_module, None, 0)


def draw_curves(folder: str | Path, title: str = "") -> Path:
    """Draw `curves.png` in a run's folder, from the `metrics.csv` there; returns its path.

    Raises:
        ConfigError: there is no such file, or it is not of a run.
    """
    path = Path(folder) / FILENAME
    if not path.is_file():
        raise ConfigError(f"{path} is missing; the folder of a run holds it from its first step on")
    from matplotlib import rc_context

    picture = Path(folder) / PICTURE
    with rc_context({"text.usetex": False}):  # whoever wants LaTeX in papers need not have it where a run is trained
        write_whole(picture, curves_png(read_metrics(path), title or Path(folder).resolve().name))
    return picture


def curves_png(rows: Rows, title: str = "") -> bytes:
    """The picture, as PNG, of rows as `read_metrics` gives them: one panel a kind of number that they hold."""
    # Figure and canvas of their own: pyplot keeps a global state, and looks for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = {name for row in rows for name in row}
    panels: list[tuple[Callable[..., None], float]] = [
        (draw, height)
        for draw, height, wanted in (
            (_draw_loss, 3.0, ("train/loss",)),
            (_draw_gain, 3.0, ("gain/",)),
            (_draw_norms, 2.4, ("norm/zero_conv",)),
            (_draw_scores, 2.4, _SCORES),
        )
        if any(name.startswith(wanted) for name in columns)
    ]
    figure = Figure(figsize=(11, 0.8 + sum([height for _, height in panels] or [2.0])), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        max(len(panels), 1), 1, sharex=True, squeeze=False, height_ratios=[height for _, height in panels] or None
    )[:, 0]
    took_hold = next((int(row["gain/took_hold"]) for row in rows if "gain/took_hold" in row), None)
    for axis, (draw, _) in zip(axes, panels, strict=False):
        draw(axis, rows)
        axis.grid(color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if took_hold is not None:
            axis.axvline(took_hold, color="0.3", linewidth=1, linestyle=(0, (4, 3)))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    if took_hold is not None and panels:
        late = took_hold > 0.6 * max(row["step"] for row in rows)  # then there is more room to its left
        axes[0].annotate(
            f"control took hold at step {took_hold}", (took_hold, 1.0), (-4 if late else 4, -3), fontsize=8, color="0.3",
            xycoords=("data", "axes fraction"), textcoords="offset points", va="top", ha="right" if late else "left",
        )  # fmt: skip
    axes[-1].set_xlabel("optimizer steps")
    axes[-1].set_xlim(left=0)
    # A folder may be called anything: between two `$` would stand a formula, and what is no text cannot be drawn.
    figure.suptitle(printable(title), fontsize=11, x=0.02, ha="left", parse_math=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of a column."""
    pairs = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [int(step) for step, _ in pairs], [value for _, value in pairs]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Exponential moving average over about `window` values, without the pull towards 0 at its beginning."""
    decay = 1 - 1 / max(window, 1)
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(average / weight)
    return result


def _draw_loss(axis: Any, rows: Rows) -> None:
    steps, values = _series(rows, "train/loss")
    window = max(len(values) // 20, 3)
    axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8, label="loss")
    axis.plot(steps, smoothed(values, window), color="tab:blue", linewidth=1.8, label="loss, smoothed")
    for level in range(LEVELS):
        steps, values = _series(rows, f"train/loss_noise_{level}")
        if values:
            axis.plot(steps, smoothed(values, window), linewidth=1, **_level_style(level))
    axis.set_ylabel("training loss")
    axis.set_yscale("log")


def _draw_gain(axis: Any, rows: Rows) -> None:
    axis.axhline(0, color="0.6", linewidth=0.8)
    for level in range(LEVELS):
        steps, values = _series(rows, f"gain/noise_{level}")
        if values:
            axis.plot(steps, values, linewidth=1, **_level_style(level))
    axis.plot(*_series(rows, "gain/mean"), color="tab:green", linewidth=1.8, label="against no hint")
    steps, values = _series(rows, "gain/over_other_hint")
    if values:
        axis.plot(steps, values, color="tab:purple", linewidth=1.8, label="against another hint")
    axis.set_ylabel("control gain")


def _draw_norms(axis: Any, rows: Rows) -> None:
    names = sorted({name for row in rows for name in row if name.startswith("norm/zero_conv")})
    for i, name in enumerate(names):
        label = {0: "zero convolution, first", len(names) - 1: "zero convolution, middle block"}.get(i)
        axis.plot(*_series(rows, name), color=_colour("viridis", i / max(len(names) - 1, 1)), linewidth=1, label=label)
    steps, values = _series(rows, "norm/hint_zero_conv")
    if values:
        axis.plot(steps, values, color="tab:red", linewidth=1.5, label="hint encoder, last convolution")
    axis.set_ylabel("norm of the weights")
    axis.set_ylim(bottom=0)


def _draw_scores(axis: Any, rows: Rows) -> None:
    for name in sorted({name for row in rows for name in row if name.startswith(_SCORES)}):
        axis.plot(*_series(rows, name), marker="o", markersize=3, linewidth=1.5, label=name)
    axis.set_ylabel("score of held-out hints")


def _level_style(level: int) -> dict[str, Any]:
    """Colour and name of a noise level's curve, from dark (little noise) to light."""
    what = {0: " (little noise)", LEVELS - 1: " (much noise)"}.get(level, "")
    shade = 0.95 - 0.65 * level / (LEVELS - 1)
    return {"color": _colour("Oranges", shade), "label": f"noise level {level + 1} of {LEVELS}{what}"}


def _colour(palette: str, place: float) -> Any:
    from matplotlib import colormaps

    return colormaps[palette](place)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the curves of runs again; 0, or 2 where a folder holds no run."""
    parser = Parser(prog="python -m cldm.training.curves", description="Draw curves.png of a run.")
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="folder that holds metrics.csv")
    arguments = parser.parse_args(argv)

    def work() -> None:
        for folder in arguments.folders:
            show(str(draw_curves(folder)))

    return run_command(parser.prog, work, interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
