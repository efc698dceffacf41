"""Models by the names that people choose: what each file is, and the few that are in memory, one user of them at a time."""

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cldm.checkpoint import CheckpointError, Report, identify
from cldm.checkpoint.recognising import CONTROL_LAYOUTS
from cldm.generate import load_model
from cldm.model import add_control
from cldm.pipeline import ControlPipeline, is_untrained
from controlnet.app.files import TINY, Folders, choose

logger = logging.getLogger(__name__)

OWN = "the one in the base file"
UNTRAINED = "a new one, untrained"
SIDES = {"tiny": 64, "sd1": 512, "sd2": 768}  # of pictures that a family was trained on, in pixels
_BASES = ("full", "base", "diffusers-pipeline")


@dataclass
class Catalogue:
    """What the weight files in the configured folders are; a file is looked at once, as long as it stays the same."""

    folders: Folders
    _reports: dict[tuple[Path, int, int], Report | None] = field(default_factory=dict)

    def report(self, path: Path) -> Report | None:
        """What a file is; None if it cannot be read."""
        key = (path, *_state(path))
        if key not in self._reports:
            try:
                self._reports[key] = identify(path)
            except (CheckpointError, OSError) as error:
                logger.warning("%s is left out of the lists: %s", path, error)
                self._reports[key] = None
        return self._reports[key]

    def bases(self) -> dict[str, Path]:
        """Base models of a known family, with a ControlNet of their own or without, by name."""
        return {name: path for name, path, report in self._known() if report.layout in _BASES}

    def controls(self, base: Path) -> dict[str, Path]:
        """Files with a ControlNet for a base, by name, beside its own."""
        family = self._family(base)
        return {
            name: path
            for name, path, report in self._known()
            if report.family == family and path != base and (report.layout in CONTROL_LAYOUTS or _has_control(report))
        }

    def has_control(self, base: Path) -> bool:
        report = self.report(base)
        return report is not None and _has_control(report)

    def side(self, base: Path) -> int:
        """Pixels of the pictures that a base was trained on."""
        return SIDES.get(self._family(base), 512)

    def default_base(self) -> str:
        """The newest result of a run that holds a whole model, else the packaged base."""
        results = [
            (path.stat().st_mtime, name)
            for name, path in self.bases().items()
            if path.is_relative_to(self.folders.runs)
        ]
        return max(results)[1] if results else TINY

    def _family(self, base: Path) -> str:
        report = self.report(base)
        return report.family if report is not None else "unknown"

    def _known(self) -> Iterator[tuple[str, Path, Report]]:
        for name, path in self.folders.weights().items():
            report = self.report(path)
            if report is not None and report.config is not None:
                yield name, path, report


def _state(path: Path) -> tuple[int, int]:
    """When a file, or anything in a folder, was changed last, its rights included, and its bytes; zeros if it is gone."""
    try:
        states = [file.stat() for file in ([path, *path.rglob("*")] if path.is_dir() else [path])]
    except OSError:
        return 0, 0
    return max(max(s.st_mtime_ns, s.st_ctime_ns) for s in states), sum(s.st_size for s in states)


def _has_control(report: Report) -> bool:
    return report.layout in _BASES and report.parts.get("control", 0) > 0


class Models:
    """The models in memory.

    Args:
        catalogue: of the files.
        device, dtype: of the models.
        most: how many stay in memory; the one that was used longest ago goes first, before the next one is loaded.
        low_memory: keep models in main memory and move each part to the device while it is used, and decode in tiles.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        most: int = 1,
        low_memory: bool = False,
    ) -> None:
        self.catalogue, self.device, self.dtype, self.most = catalogue, device, dtype, most
        self.low_memory = low_memory
        self._lock = threading.RLock()
        self._loaded: OrderedDict[Any, ControlPipeline] = OrderedDict()

    @property
    def loaded(self) -> list[str]:
        """Names of the bases in memory, the one used last at the end."""
        names = {path: name for name, path in self.catalogue.folders.weights().items()}
        return [names.get(base, base.name) for base, *_ in self._loaded]

    @contextmanager
    def use(self, base: str, controls: Sequence[str] = ()) -> Iterator[ControlPipeline]:
        """A pipeline with a base and its ControlNets, in their order; within it nobody else uses a model.

        Args:
            base: a name of `Catalogue.bases`.
            controls: `OWN`, `UNTRAINED`, or names of `Catalogue.controls`; the first two as the first one alone.

        Raises:
            ValueError: a name that the lists do not have.
            CheckpointError, ConfigError: the files cannot be read or do not fit.
        """
        with self._lock:
            path = choose(self.catalogue.bases(), base, "a base model")
            files = self._control_files(path, controls)
            key = (path, _state(path), *((file, file and _state(file)) for file in files))
            if key not in self._loaded:
                while len(self._loaded) >= self.most:
                    self._loaded.popitem(last=False)
                    _free_memory()
                self._loaded[key] = self._load(path, files)
            self._loaded.move_to_end(key)
            yield self._loaded[key]

    def clear(self) -> None:
        """Forget all models."""
        with self._lock:
            self._loaded.clear()
            _free_memory()

    def _control_files(self, base: Path, controls: Sequence[str]) -> list[Path | None]:
        """The files of the ControlNets; None for a new one."""
        listing = self.catalogue.controls(base)
        files: list[Path | None] = []
        for number, name in enumerate(controls):
            if name == UNTRAINED and number == 0 and not self.catalogue.has_control(base):
                files.append(None)
            elif name == OWN and self.catalogue.has_control(base):
                files.append(base)
            else:
                files.append(choose(listing, name, f"a ControlNet for control {number + 1}"))
        return files

    def _load(self, base: Path, controls: Sequence[Path | None]) -> ControlPipeline:
        home = torch.device("cpu") if self.low_memory else self.device
        first = [file for file in controls[:1] if file not in (None, base)]
        model = load_model(str(base), list(map(str, first)), None, home, self.dtype, steered=False)
        for file in controls[1:]:
            if file is not None:  # the first alone may be untrained
                add_control(model, file)
        options = {"offload": True, "vae_tiles": True, "vae_one_at_a_time": True} if self.low_memory else {}
        # The page says itself which ControlNet is untrained.
        return ControlPipeline(model, device=self.device, warn_untrained=False, **options)


def untrained_controls(pipeline: ControlPipeline) -> list[int]:
    """Numbers, from 1, of the ControlNets that change nothing yet."""
    return [number for number, network in enumerate(pipeline.model.control_networks(), 1) if is_untrained(network)]


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
