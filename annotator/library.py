"""Detectors around networks of libraries, which take whole pictures and resize them themselves."""

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from annotator.detector import import_extra
from annotator.network import NetworkDetector, to_tensor
from annotator.weights import Hub, WeightsError, find_weights, search_folders

EXTRA = "detectors"
CONFIG = "config.json"
FILES = ["*.json", "*.txt", "*.safetensors"]
OLDER_FILES = ["*.json", "*.txt", "*.bin"]
MODEL_ID = r"[\w.-]+/[\w.-]+"  # owner/name


class LibraryDetector(NetworkDetector):
    """A detector whose network does all between picture and result: a subclass gives `predict` and `decode`.

    Pictures with a side below 32 pixels, where libraries fail, are padded.
    """

    min_side = 32

    def encode(self, image: np.ndarray) -> Tensor:
        return to_tensor(image)

    def forward(self, x: Tensor, **parameters: Any) -> np.ndarray:
        """What `predict` finds in a batch (B, 3, H, W), 0 to 255, as an array of B objects."""
        images = list(x.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy())
        results = np.empty(len(images), dtype=object)
        for index, result in enumerate(self.predict(images, **self.arguments() | parameters)):
            results[index] = result
        return results

    @abstractmethod
    def predict(self, images: list[np.ndarray], **parameters: Any) -> Sequence[Any]:
        """What `decode` needs of each picture (H, W, 3), uint8, RGB, all of one size; `parameters` are those of the call."""


class HubModelDetector(LibraryDetector):
    """A detector around a model of transformers for one task.

    Args:
        weights: a model's id on the Hugging Face hub, or a folder that `save_pretrained` has written. If not given: the folder
            with the name of `model` in one of the places for weights, else the hub.

    Attributes:
        model: id of the model that is used if none is named.
        processor: the image processor that belongs to the network.
    """

    model: ClassVar[str]
    auto_class: ClassVar[str]

    def find_file(self, name: str, filenames: tuple[str, ...]) -> Path:
        import_extra("transformers", EXTRA)  # rather now than after a long download
        return find_model(self.weights, self.model)

    def load_network(self, name: str, path: Path) -> nn.Module:
        transformers = import_extra("transformers", EXTRA)
        try:
            self.processor = transformers.AutoImageProcessor.from_pretrained(path, **self.processor_options(path))
            network, report = self.network_class(path).from_pretrained(
                path, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
        except ImportError:
            raise
        except Exception as err:  # errors of several libraries, all about the folder's content
            reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
            raise WeightsError(f"{path} holds no model that {type(self).__name__} can use: {reason}") from err
        check_parts(network, report["missing_keys"], path)
        return network.float()

    def network_class(self, path: Path) -> Any:
        """The class of transformers that loads the network of a folder."""
        return getattr(import_extra("transformers", EXTRA), self.auto_class)

    def processor_options(self, path: Path) -> dict[str, Any]:
        """How the image processor of a folder is loaded."""
        return {"local_files_only": True, "trust_remote_code": False}

    def inputs(self, images: list[np.ndarray], **options: Any) -> dict[str, Any]:
        """What the network takes for pictures of one size, on its device."""
        batch = self.processor(images=images, return_tensors="pt", input_data_format="channels_last", **options)
        return {key: value.to(self.device) if torch.is_tensor(value) else value for key, value in batch.items()}


def check_parts(network: nn.Module, missing: Iterable[str], path: Path) -> None:
    """WeightsError if a whole part of a network, such as its head, is missing in the file and would stay random."""
    missing = set(missing)
    for part, module in network.named_children():
        keys = {f"{part}.{key}" for key in module.state_dict()}
        if keys and keys <= missing:
            raise WeightsError(f"the weights in {path} have no {part}, which {type(network).__name__} needs")


def find_model(weights: Any, model: str) -> Path:
    """The folder of a model on this machine, fetched once from the hub if it is nowhere; see `HubModelDetector`.

    Raises:
        WeightsError: saying where it was looked for.
    """
    if isinstance(weights, Hub):
        return _fetch(weights)
    name = model.split("/")[-1]
    if weights is None:
        for place in search_folders():
            if (place / name / CONFIG).is_file():
                return place / name
        return _fetch(Hub(model))
    place = Path(weights).expanduser()
    for folder in (place, place / name):
        if (folder / CONFIG).is_file():
            return folder
    if place.exists():
        raise WeightsError(f"{place} is no folder of a model of transformers: it holds no {CONFIG}")
    if re.fullmatch(MODEL_ID, str(weights)):
        return _fetch(Hub(str(weights)))
    raise WeightsError(f"there is no folder {place}, and it is no model's id either (such as {model})")


def _fetch(hub: Hub) -> Path:
    """A model's folder in the hub client's cache, where it is put if it is not there yet."""
    from huggingface_hub import snapshot_download

    def snapshot(files: list[str], local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                hub.repository, cache_dir=hub.cache_dir, allow_patterns=files, local_files_only=local_files_only
            )
        )

    def complete(folder: Path) -> bool:
        return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))

    try:
        cached = snapshot(FILES, local_files_only=True)
    except OSError:
        cached = None
    if cached is not None and (complete(cached) or hub.local_files_only):
        return cached
    find_weights((CONFIG,), hub)  # fails at once, with the reason, where there is no way to the hub
    try:
        folder = snapshot(FILES, hub.local_files_only)
        return folder if complete(folder) else snapshot(OLDER_FILES, hub.local_files_only)
    except Exception as err:  # the client raises errors of several libraries, all with the same meaning here
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise WeightsError(f"cannot get the model {hub.repository} from the hub: {reason}") from err
