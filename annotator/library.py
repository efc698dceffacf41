"""Detectors around networks of libraries, which take whole pictures and resize them themselves."""

import json
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
from annotator.weights import Hub, WeightsError, find_weights, refuse_unsafe_pickle, search_folders

EXTRA = "detectors"
CONFIG = "config.json"
FILES = ["*.json", "*.txt", "*.safetensors"]
OLDER_FILES = ["*.json", "*.txt", "*.bin"]
# Nothing is fetched unseen, and no code of a model is run.
LOCAL = {"local_files_only": True, "trust_remote_code": False}
ONLY_FOR_TRAINING = ("criterion", "auxiliary_head")  # parts of networks that published files may lack
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

    A subclass names `model` and `auto_class`; and where there is a published file of another layout, `network`, with the file's
    name, and `load_published`.

    Args:
        weights: a model's id on the Hugging Face hub, a folder that `save_pretrained` has written, or the published file or its
            folder. If not given: the published file, or a folder with the name of `model`, in one of the places for weights, else
            the hub.

    Attributes:
        model: id of the model that is used if none is named.
        auto_class: the class of transformers that loads the network.
        processor: the image processor that belongs to the network.
    """

    model: ClassVar[str]
    auto_class: ClassVar[str]

    def find_file(self, name: str, filenames: tuple[str, ...]) -> Path:
        import_extra("transformers", EXTRA)  # rather now than after a long download
        if isinstance(self.weights, Hub):
            published = bool(self.filenames) or (bool(filenames) and self.weights.repository == self.repository)
        else:
            places = search_folders() if self.weights is None else [Path(self.weights).expanduser()]
            files = [place / file for place in places for file in filenames]
            published = any(file.is_file() for file in files) or (bool(filenames) and places[0].is_file())
        return find_weights(filenames, self.weights) if published else find_model(self.weights, self.model)

    def load_network(self, name: str, path: Path) -> nn.Module:
        try:
            if path.is_file():
                network, missing = self.load_published(path)
            else:
                network, missing = self.load_model(path)
        except (ImportError, WeightsError):
            raise
        except Exception as err:  # errors of several libraries, all about what the path holds
            reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
            raise WeightsError(f"{path} holds no model that {type(self).__name__} can use: {reason}") from err
        check_parts(network, missing, path)
        return network.float()

    def load_model(self, path: Path) -> tuple[nn.Module, Iterable[str]]:
        """The network of a model's folder, and its entries that no file there holds; sets `processor`."""
        transformers = import_extra("transformers", EXTRA)
        if not any(path.glob("*.safetensors")):
            for pickle in path.glob("*.bin"):
                refuse_unsafe_pickle(pickle)
        self.processor = transformers.AutoImageProcessor.from_pretrained(path, **self.processor_options(path))
        network, report = self.network_class(path).from_pretrained(path, output_loading_info=True, **LOCAL)
        return network, report["missing_keys"]

    def load_published(self, path: Path) -> tuple[nn.Module, Iterable[str]]:
        """The same for the published file of another layout."""
        raise WeightsError(f"{path} is a file; {type(self).__name__} takes a model's id or folder")

    def network_class(self, path: Path) -> Any:
        """The class of transformers that loads the network of a folder."""
        return getattr(import_extra("transformers", EXTRA), self.auto_class)

    def processor_options(self, path: Path) -> dict[str, Any]:
        """How the image processor of a folder is loaded."""
        return dict(LOCAL)

    def inputs(self, images: list[np.ndarray], **options: Any) -> dict[str, Any]:
        """What the network takes for pictures of one size, on its device."""
        batch = self.processor(images=images, return_tensors="pt", input_data_format="channels_last", **options)
        return {key: value.to(self.device) if torch.is_tensor(value) else value for key, value in batch.items()}


def check_parts(network: nn.Module, missing: Iterable[str], path: Path) -> None:
    """WeightsError if a whole part of a network, such as its head, is missing in the file and would stay random."""
    missing = set(missing)
    for part, module in network.named_children():
        keys = {f"{part}.{key}" for key in module.state_dict()}
        if keys and keys <= missing and part not in ONLY_FOR_TRAINING:
            raise WeightsError(f"the weights in {path} have no {part}, which {type(network).__name__} needs")


def load_entries(
    network_class: Any, config: Any, entries: dict[str, Tensor], path: Path
) -> tuple[nn.Module, list[str]]:
    """A network of transformers with entries under the hub's names, all of which must be there.

    Raises:
        WeightsError: naming an entry that is missing.
    """
    network, report = network_class.from_pretrained(None, config=config, state_dict=entries, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise WeightsError(
            f"{path} does not fit {network_class.__name__}: {len(missing)} entries are missing, such as {missing[0]}"
        )
    return network, missing


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

    def snapshot(files: list[str], local_files_only: bool = hub.local_files_only) -> Path:
        options = {"cache_dir": hub.cache_dir, "local_files_only": local_files_only}
        return Path(snapshot_download(hub.repository, allow_patterns=files, **options))

    try:
        cached = snapshot(FILES, local_files_only=True)
    except OSError:
        cached = None
    if cached is not None and _is_complete(cached):
        return cached
    find_weights((CONFIG,), hub)  # fails at once, with the reason, where there is no way to the hub
    try:
        folder = snapshot(FILES)
        folder = folder if _is_complete(folder) else snapshot(OLDER_FILES)
    except Exception as err:  # the client raises errors of several libraries, all with the same meaning here
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise WeightsError(f"cannot get the model {hub.repository} from the hub: {reason}") from err
    if not _is_complete(folder):
        raise WeightsError(
            f"cannot get the model {hub.repository} from the hub: its weights are not there, or not all of them"
        )
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether a model's folder has weights, and where they are in several files, all of them."""
    parts = {
        part for index in folder.glob("*.index.json") for part in json.loads(index.read_text())["weight_map"].values()
    }
    for kind in (".safetensors", ".bin"):
        files = {file.name for file in folder.glob(f"*{kind}")}
        if files and {part for part in parts if part.endswith(kind)} <= files:
            return True
    return False
