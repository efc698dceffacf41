"""Detectors around networks of libraries, which take whole pictures and resize them themselves."""

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from annotator.detector import first_line, import_extra
from annotator.network import NetworkDetector, inference
from annotator.weights import Hub, WeightsError, find_local, find_weights, refuse_unsafe_pickle, search_folders

CONFIG = "config.json"
# Nothing is fetched unseen, and no code of a model is run.
LOCAL = {"local_files_only": True, "trust_remote_code": False}
ONLY_FOR_TRAINING = ("criterion", "auxiliary_head")  # parts of networks that published files may lack
MODEL_ID = r"[\w.-]+/[\w.-]+"  # owner/name


class LibraryDetector(NetworkDetector):
    """A detector whose network does all between picture and result: a subclass gives `predict` and `decode`.

    Pictures with a side below 32 pixels, where libraries fail, are padded. `library` is imported before weights are fetched.
    """

    library: ClassVar[str]
    min_side = 32

    def find_file(self, name: str, filenames: tuple[str, ...]) -> Path:
        import_extra(self.library, self.extra)
        return super().find_file(name, filenames)

    def encode(self, image: np.ndarray) -> Tensor:
        return torch.from_numpy(np.require(image, requirements=["C", "W"]))

    def run(self, x: Tensor, **parameters: Any) -> list[Any]:
        """What `predict` finds in each picture of a batch (B, H, W, 3), uint8."""
        with inference(self.device):
            return list(self.predict(list(x.cpu().numpy()), **self.arguments() | parameters))

    @abstractmethod
    def predict(self, images: list[np.ndarray], *args: Any, **parameters: Any) -> Sequence[Any]:
        """What `decode` needs of each picture (H, W, 3), uint8, RGB, all of one size; `parameters` are those of the call."""


class HubModelDetector(LibraryDetector):
    """A detector around a model of transformers for one task.

    A subclass names `model` and `auto_class`; and where there is a published file of another layout, `network`, with the file's
    name, and `load_published`.

    Args:
        weights: a model's id on the Hugging Face hub, a folder that `save_pretrained` has written, or the published file or its
            folder. If not given: the published file, or a folder with the name of `model`, in one of the places for weights, else
            the hub.
    """

    library, extra = "transformers", "detectors"
    model: ClassVar[str]  # id of the model that is used if none is named
    auto_class: str  # of transformers, that loads the network
    processor: Any  # the image processor that belongs to the network

    @property
    def transformers(self) -> Any:
        return import_extra(self.library, self.extra)

    def find_file(self, name: str, filenames: tuple[str, ...]) -> Path:
        import_extra(self.library, self.extra)
        if isinstance(self.weights, Hub):
            published = bool(self.filenames) or (bool(filenames) and self.weights.repository == self.repository)
        else:
            published = bool(filenames) and find_local(filenames, self.weights) is not None
        return super().find_file(name, filenames) if published else find_model(self.weights, self.model)

    def load_network(self, name: str, path: Path) -> nn.Module:
        try:
            network, missing = (self.load_published(path), ()) if path.is_file() else self.load_model(path)
        except (ImportError, WeightsError):
            raise
        except Exception as err:  # errors of several libraries, all about what the path holds
            raise WeightsError(f"{path} holds no model that {type(self).__name__} can use: {first_line(err)}") from err
        for part, module in network.named_children():
            keys = {f"{part}.{key}" for key in module.state_dict()}
            if keys and keys <= set(missing) and part not in ONLY_FOR_TRAINING:  # they would stay random
                raise WeightsError(f"the weights in {path} have no {part}, which {type(network).__name__} needs")
        return network

    def load_model(self, path: Path, **processor_options: Any) -> tuple[Any, Iterable[str]]:
        """The network of a model's folder, and its entries that no file there holds; sets `processor`."""
        if not any(path.glob("*.safetensors")):
            for pickle in path.glob("*.bin"):
                refuse_unsafe_pickle(pickle)
        self.processor = self.transformers.AutoImageProcessor.from_pretrained(path, **LOCAL, **processor_options)
        network_class = getattr(self.transformers, self.auto_class)
        network, report = network_class.from_pretrained(path, output_loading_info=True, **LOCAL)
        return network, report["missing_keys"]

    def load_published(self, path: Path) -> nn.Module:
        """The same for the published file of another layout, which must hold all entries."""
        raise NotImplementedError

    def inputs(self, images: list[np.ndarray], **options: Any) -> dict[str, Any]:
        """What the network takes for pictures of one size, on its device."""
        batch = self.processor(images=images, return_tensors="pt", input_data_format="channels_last", **options)
        return {key: value.to(self.device) if torch.is_tensor(value) else value for key, value in batch.items()}


def load_entries(network_class: Any, config: Any, entries: dict[str, Tensor], path: Path) -> nn.Module:
    """A network of transformers with entries under the hub's names; WeightsError if one of them is missing."""
    network, report = network_class.from_pretrained(None, config=config, state_dict=entries, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        lack = f"{len(missing)} entries are missing, such as {missing[0]}"
        raise WeightsError(f"{path} does not fit {network_class.__name__}: {lack}")
    return network


def find_model(weights: Any, model: str) -> Path:
    """The folder of a model on this machine, fetched once from the hub if it is nowhere; see `HubModelDetector`."""
    if isinstance(weights, Hub):
        return _fetch(weights)
    name = model.split("/")[-1]
    place = Path(weights or "").expanduser()
    places = [place, place / name] if weights else [folder / name for folder in search_folders()]
    for folder in places:
        if (folder / CONFIG).is_file():
            return folder
    if weights is None:
        try:
            return _fetch(Hub(model))
        except WeightsError as err:
            raise WeightsError(
                f"cannot get the model {model}: not in {', '.join(map(str, places))}; fetching https://huggingface.co/{model} "
                f"failed ({first_line(err)}); put its folder at {places[-1]}, or name the folder around it with the "
                f"environment variable ANNOTATOR_CKPTS, or it as weights (--weights)"
            ) from err
    if place.exists():
        raise WeightsError(f"{place} is no folder of a model of transformers: it holds no {CONFIG}")
    if re.fullmatch(MODEL_ID, str(weights)):
        return _fetch(Hub(str(weights)))
    raise WeightsError(f"there is no folder {place}, and it is no model's id either (such as {model})")


def _fetch(hub: Hub) -> Path:
    """A model's folder in the cache of the hub's client, which asks the hub, where it can, for what is missing there."""
    from huggingface_hub import snapshot_download

    find_weights((CONFIG,), hub)  # fails at once, with the reason, where there is no way to the hub
    for weights in ("*.safetensors", "*.bin"):  # the second kind is for older models
        try:
            place: dict[str, Any] = {"cache_dir": hub.cache_dir, "local_files_only": hub.local_files_only}
            folder = Path(snapshot_download(hub.repository, allow_patterns=["*.json", "*.txt", weights], **place))
        except Exception as err:  # the client raises errors of several libraries, all with the same meaning here
            raise WeightsError(f"cannot get the model {hub.repository} from the hub: {first_line(err)}") from err
        if any(folder.glob(weights)):
            return folder
    raise WeightsError(f"cannot get the model {hub.repository} from the hub: its weights are not there")
