"""Latents and text embeddings on disk, so that neither autoencoder nor text encoder runs, or is in memory, while training.

Of a target the mean and log-variance of its latent are stored, not a sample, so that training draws the same samples as
without the cache. A cache folder holds a sub-folder for each encoder, named after the hash of its weights, its settings and the
precision: other weights never meet. In it are safetensors files of many entries each, written whole; what was made before a
process was killed stays, and data that are added later only add files. Entries belong to a target's name, size and time of
change, or to the text of a prompt, which is encoded once however many pairs share it.

The folder can be deleted at any time; it is then made again.
"""

import hashlib
import json
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from cldm.data.checking import hint_item_of, name_of
from cldm.data.pairs import DataError, Items, SizedItems
from cldm.files import locked, remove_unfinished, write_whole
from cldm.model import load_weights
from cldm.training.precision import forward_context
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import ConfigError, images_to_nchw

logger = logging.getLogger(__name__)

# A file is written when so much was encoded since the last one: this is what a killed process loses.
_PART_BYTES = 64 * 2**20
_PART_SECONDS = 30.0
_READERS = 4  # threads that decode pictures ahead of the encoder
_TEXTS = 32  # prompts that are encoded at once


class _Store:
    """Tensors by key in the safetensors files of one folder.

    Can be sent to other processes, each of which opens the files by itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, Path] = {}
        self._read: set[Path] = set()
        self._open: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "places": self._places, "read": self._read}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self._places, self._read = state["folder"], state["places"], state["read"]
        self._open = {}

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Tensor:
        path = self._places[key]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_tensor(key)

    def refresh(self) -> None:
        """Find what is in the folder now. Files that cannot be read, which no process of ours leaves behind, are removed."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._read:
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    self._places |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                logger.warning("%s cannot be read (%s); its entries are made again", path, error)
                path.unlink(missing_ok=True)
                continue
            self._read.add(path)

    @contextmanager
    def being_made(self) -> Iterator[None]:
        """Hold the folder for writing; another process that holds it is waited for. Its entries are known afterwards."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder, wait=False))
            except BlockingIOError:
                logger.info("another process is filling %s; waiting for it", self.folder)
                stack.enter_context(locked(self.folder))
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder)
            self.refresh()
            yield

    def write(self, entries: Iterable[tuple[str, Tensor]]) -> None:
        """Store entries as they come, in files of moderate size."""
        part: dict[str, Tensor] = {}
        held, since = 0, time.monotonic()
        try:
            for key, value in entries:
                part[key] = value.detach().cpu().contiguous()
                held += part[key].nbytes
                if held > _PART_BYTES or time.monotonic() - since > _PART_SECONDS:
                    self._write_part(part)
                    part, held, since = {}, 0, time.monotonic()
        finally:  # also what was made before an interruption
            if part:
                self._write_part(part)

    def _write_part(self, part: dict[str, Tensor]) -> None:
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        write_whole(path, safetensors.torch.save(part))
        self._read.add(path)
        self._places |= dict.fromkeys(part, path)


class TrainingCache:
    """What the encoders of one model made of one data set; see `make_cache`.

    Attributes:
        empty_context: the empty prompt's embedding (M, D), for prompt dropout.
    """

    def __init__(self, latents: _Store, texts: _Store) -> None:
        self._latents = latents
        self._texts = texts
        self.empty_context = texts[_text_key("")]

    def moments(self, fingerprint: str) -> Tensor:
        """Mean and log-variance of a target's latent, (8, h, w); KeyError if there is none."""
        return self._latents[fingerprint]

    def context(self, prompt: str) -> Tensor:
        """A prompt's embedding (M, D); KeyError if there is none."""
        return self._texts[_text_key(prompt)]


class CachedPairs(Dataset):
    """A data set whose items hold what the encoders made: `{"moments", "context", "txt", "hint"}`.

    `moments` (8, h, w) and `context` (M, D) have the dtype in which the encoders computed them; `txt` and `hint` are those of the
    data set behind. Targets are not read.

    Args:
        dataset: the one that the cache was made for.
        cache: what `make_cache` returned.
    """

    def __init__(self, dataset: SizedItems, cache: TrainingCache) -> None:
        self.dataset = dataset
        self.cache = cache
        self._fingerprints = [_fingerprint(dataset, i) for i in range(len(dataset))]

    def __len__(self) -> int:
        return len(self._fingerprints)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = hint_item_of(self.dataset, index)
        try:
            moments = self.cache.moments(self._fingerprints[index] or "")
            context = self.cache.context(item["txt"])
        except KeyError as error:
            raise DataError(
                f"{name_of(self.dataset, index)} is not in the cache: its target or prompt has changed"
            ) from error
        return {**item, "moments": moments, "context": context}

    def sizes(self) -> list[tuple[int, int]]:
        return self.dataset.sizes()

    def __getattr__(self, name: str) -> Any:
        # Names and prompts are those of the data set behind.
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def make_cache(
    model: LatentDiffusion,
    dataset: Items,
    folder: str | Path,
    precision: str = "32-true",
    batch_size: int = 4,
    progress: bool = True,
) -> TrainingCache:
    """Encode what of `dataset` is not in the cache folder yet.

    Several processes may call this for one folder, those of one run or of different ones: one makes the cache while the others
    wait, and find it done. Interrupted by whatever, the next call goes on.

    Args:
        model: a LatentDiffusion with its encoders filled, on the device that is to encode.
        dataset: items `{"jpg": (H, W, 3) in [-1, 1], "txt": str, ...}` by index. If it has `fingerprint(i)`, a text that changes
            whenever the target does, pictures are read only where they are encoded; else they are all read and hashed.
        folder: for any number of data sets and models.
        precision: of training, as Lightning names it: encoders run in the same autocast context as they would in a step.
        batch_size: pictures encoded at once. Of float32 numbers the last bit may depend on it.
        progress: show progress bars.

    Raises:
        ConfigError: the text encoder is trained, or an encoder is none that can be cached.
        DataError: nothing could be encoded. Single items that do not decode are left out with a warning.
    """
    if getattr(model, "cond_stage_trainable", False):
        raise ConfigError("the text encoder is trained, so its embeddings cannot be cached; set cache=false")
    folder = Path(folder)
    context = lambda: forward_context(precision, model.device)  # noqa: E731
    latents = _Store(folder / f"latents-{encoder_hash(model.first_stage_model, precision)}")
    texts = _Store(folder / f"texts-{encoder_hash(model.cond_stage_model, precision)}")

    with torch.no_grad(), latents.being_made():
        _note(latents.folder, model.first_stage_model, precision)
        todo = _missing_targets(dataset, latents)
        with _bar(todo, "latents", "picture", progress) as bar:
            latents.write(_encode_targets(model, dataset, todo, batch_size, context, bar))
        if todo and not any(key in latents for key in todo):
            raise DataError("none of the targets could be encoded; `controlnet data --check FOLDER` says why")
    with torch.no_grad(), texts.being_made():
        _note(texts.folder, model.cond_stage_model, precision)
        prompts = {_text_key(p): p for p in ["", *_prompts(dataset)]}
        wanted = {key: prompt for key, prompt in prompts.items() if key not in texts}
        with _bar(wanted, "text embeddings", "prompt", progress) as bar:
            texts.write(_encode_texts(model, wanted, context, bar))
    return TrainingCache(latents, texts)


def _bar(todo: Sequence[Any] | dict[str, Any], what: str, unit: str, progress: bool) -> tqdm:
    return tqdm(total=len(todo), desc=f"caching {what}", unit=unit, disable=None if progress and todo else True)


def _missing_targets(dataset: Items, latents: _Store) -> dict[str, int]:
    """Index of an item for each target that is not stored."""
    return {
        key: index
        for index in range(len(dataset))
        if (key := _fingerprint(dataset, index, broken_is=None)) is not None and key not in latents
    }


def _encode_targets(
    model: LatentDiffusion, dataset: Items, todo: dict[str, int], batch_size: int, context: Callable, bar: tqdm
) -> Iterator[tuple[str, Tensor]]:
    """(key, moments (8, h, w)) of each target; those of one size go through the encoder together."""
    begun: dict[Hashable, list[tuple[str, Tensor]]] = defaultdict(list)

    def encode(batch: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        pictures = images_to_nchw(torch.stack([picture for _, picture in batch])).to(model.device)
        with context():
            posterior = model.encode_first_stage(pictures)
        if not isinstance(posterior, DiagonalGaussianDistribution):
            raise ConfigError(
                f"{type(model.first_stage_model).__name__} gives no mean and variance to cache; set cache=false"
            )
        bar.update(len(batch))
        yield from zip([key for key, _ in batch], posterior.parameters, strict=True)

    with ThreadPoolExecutor(_READERS) as pool:
        for key, picture in _ahead(pool, lambda index: _target(dataset, index), todo.items()):
            if picture is None:
                bar.update()
                continue
            batch = begun[picture.shape]
            batch.append((key, picture))
            if len(batch) == batch_size:
                yield from encode(begun.pop(picture.shape))
        for batch in begun.values():
            yield from encode(batch)


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[tuple[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """(key, work(value)) in order; only a few results wait to be taken."""
    waiting = []
    for key, value in items:
        waiting.append((key, pool.submit(work, value)))
        if len(waiting) > 4 * _READERS:
            done, result = waiting.pop(0)
            yield done, result.result()
    for done, result in waiting:
        yield done, result.result()


def _target(dataset: Items, index: int) -> Tensor | None:
    try:
        return torch.as_tensor(dataset[index]["jpg"])
    except DataError as error:
        logger.warning("left out of the cache: %s", error)
        return None


def _encode_texts(
    model: LatentDiffusion, wanted: dict[str, str], context: Callable, bar: tqdm
) -> Iterator[tuple[str, Tensor]]:
    keys = list(wanted)
    for start in range(0, len(keys), _TEXTS):
        some = keys[start : start + _TEXTS]
        with context():
            encoded = model.get_learned_conditioning([wanted[key] for key in some])
        if not isinstance(encoded, Tensor) or encoded.dim() != 3:
            raise ConfigError(
                f"{type(model.cond_stage_model).__name__} gives no text embedding to cache; set cache=false"
            )
        bar.update(len(some))
        yield from zip(some, encoded, strict=True)


# -- what entries belong to -----------------------------------------------------------------------------------


def _text_key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def _fingerprint(dataset: Items, index: int, broken_is: str | None = "") -> str | None:
    """A key that changes with the target of an item, `broken_is` if it cannot be read."""
    told = getattr(dataset, "fingerprint", None)
    try:
        known = told(index) if told is not None else None
        if known is None:  # the picture may not be what a file holds: it decides itself
            picture = torch.as_tensor(dataset[index]["jpg"]).contiguous()
            digest = hashlib.sha256(picture.view(torch.uint8).numpy().data).hexdigest()
            known = f"{tuple(picture.shape)} {digest}"
    except DataError:
        return broken_is
    return hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()


def _prompts(dataset: Items) -> list[str]:
    if hasattr(dataset, "prompts"):
        return list(dataset.prompts())
    return [dataset[index]["txt"] for index in range(len(dataset))]


def encoder_hash(encoder: nn.Module, precision: str) -> str:
    """16 hexadecimal digits that change with an encoder's weights, its settings, and the precision in which it runs."""
    digest = hashlib.sha256(json.dumps(_settings(encoder, precision), sort_keys=True).encode())
    for name, value in encoder.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _settings(encoder: nn.Module, precision: str) -> dict[str, Any]:
    plain = {
        name: value
        for name, value in vars(encoder).items()
        if isinstance(value, (int, float, str)) and name not in ("training", "frozen") and not name.startswith("_")
    }
    return {"encoder": repr(encoder), "settings": plain, "precision": precision}


def _note(folder: Path, encoder: nn.Module, precision: str) -> None:
    """For people who wonder what a sub-folder is of."""
    path = folder / "about.json"
    if not path.exists():
        about = {"encoder": f"{type(encoder).__module__}.{type(encoder).__qualname__}", "precision": precision}
        write_whole(path, (json.dumps(about, indent=1) + "\n").encode())


# -- the encoders themselves ----------------------------------------------------------------------------------


class ReleasedEncoder(nn.Module):
    """Stands for an encoder whose weights are not in memory. It has no parameters, so a trainer moves and saves nothing."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        for module in encoder.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:  # buffers stay: they are small, and not all of them are in weights files
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        self._encoder = [encoder]  # in a list, so that it is no submodule

    def take_back(self) -> nn.Module:
        """The encoder, its parameters still on the meta device."""
        return self._encoder[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            f"{type(self._encoder[0]).__name__} is not in memory: latents and text come from the cache; "
            "`with cldm.training.cache.encoders(model, weights):` brings it back"
        )

    encode = decode = forward


_ENCODERS = ("first_stage_model", "cond_stage_model")


def release_encoders(model: nn.Module) -> None:
    """Free the memory of the autoencoder and the text encoder; using them is an error until `encoders` brings them back."""
    for name in _ENCODERS:
        encoder = getattr(model, name)
        if not isinstance(encoder, ReleasedEncoder):
            setattr(model, name, ReleasedEncoder(encoder))


def restore_encoders(model: LatentDiffusion, weights: str | Path) -> None:
    """Bring released encoders back, on the model's device and in the dtype that they had, from the file they were filled from.

    Raises:
        CheckpointError: the file cannot be read, or has not all of their weights.
    """
    device = model.device
    found = nn.Module()
    for name in _ENCODERS:
        encoder = getattr(model, name)
        if isinstance(encoder, ReleasedEncoder):
            found.add_module(name, encoder.take_back())
    if any(True for _ in found.children()):
        load_weights(found, weights)
        for name, encoder in found.named_children():
            setattr(model, name, encoder.to(device).requires_grad_(False).eval())


@contextmanager
def encoders(model: LatentDiffusion, weights: str | Path) -> Iterator[None]:
    """Inside it the encoders are in memory, for pictures; released ones are released again afterwards.

    Args:
        weights: the file that the model was filled from; not read if nothing is released.
    """
    released = any(isinstance(getattr(model, name), ReleasedEncoder) for name in _ENCODERS)
    restore_encoders(model, weights)
    try:
        yield
    finally:
        if released:
            release_encoders(model)
