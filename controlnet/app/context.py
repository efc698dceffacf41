"""What the tabs of the page share: folders, models, detectors and runs, and one way to listen to events."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cldm.prompts import Captioner
from controlnet.app.captions import find_captioner, load_captioner
from controlnet.app.conditions import Detectors
from controlnet.app.errors import shown
from controlnet.app.files import Folders
from controlnet.app.models import Catalogue, Models
from controlnet.app.sampling import Stops
from controlnet.app.training import Runs

MODEL_QUEUE = "model"  # of listeners that use a model: one at a time, others wait


@dataclass
class Context:
    """See the module's text. `largest` is the longest shorter side of pictures that are made, in pixels."""

    folders: Folders
    catalogue: Catalogue
    models: Models
    detectors: Detectors
    runs: Runs
    largest: int = 1024
    stops: Stops = field(default_factory=Stops)
    _captioner: Captioner | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def listen(
        self,
        event: Callable[..., Any],
        function: Callable[..., Any],
        inputs: Any = None,
        outputs: Any = None,
        **options: Any,
    ) -> Any:
        """Let `function` answer an event of a component; its errors become messages on the page."""
        return event(shown(function, self.folders.hide_paths), inputs, outputs, api_visibility="private", **options)

    def captioner(self) -> Captioner:
        """The captioner of automatic prompts, loaded once.

        Raises:
            ValueError: its files are not here.
        """
        with self._lock:
            if self._captioner is None:
                self._captioner = load_captioner(find_captioner(self.folders))
            return self._captioner
