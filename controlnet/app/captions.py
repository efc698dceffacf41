"""The paper's automatic prompts: a captioner, where its files are among the models."""

from pathlib import Path

import numpy as np
from PIL import Image

from annotator.detector import first_line, import_extra
from cldm.prompts import Captioner
from controlnet.app.files import Folders

REPOSITORY = "Salesforce/blip-image-captioning-base"
FOLDER = REPOSITORY.split("/")[1]
_TOKENS = 40


def find_captioner(folders: Folders) -> Path:
    """The folder of the captioner.

    Raises:
        ValueError: it is not there; the message says where it is published and belongs.
    """
    for root in folders.models:
        if (root / FOLDER / "config.json").is_file():
            return root / FOLDER
    raise ValueError(
        f"automatic prompts need the captioner BLIP: put the files of https://huggingface.co/{REPOSITORY} "
        f"(config.json, model.safetensors and the rest) into {folders.models[0].name}/{FOLDER}"
    )


def load_captioner(folder: Path) -> Captioner:
    """A function from a uint8 picture (H, W, 3) to what is seen in it; nothing is fetched and no pickle is read.

    Raises:
        ValueError: the folder holds no such model.
        ImportError: transformers is not installed.
    """
    transformers = import_extra("transformers", "detectors")
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = transformers.BlipProcessor.from_pretrained(folder, **options)
        network = transformers.BlipForConditionalGeneration.from_pretrained(folder, use_safetensors=True, **options)
    except Exception as error:  # of several libraries, all about what the folder holds
        raise ValueError(f"{folder} holds no captioner that can be used: {first_line(error)}") from error
    network.eval()

    def caption(picture: np.ndarray) -> str:
        inputs = processor(images=Image.fromarray(np.asarray(picture)), return_tensors="pt")
        tokens = network.generate(**inputs, max_new_tokens=_TOKENS)
        return processor.decode(tokens[0], skip_special_tokens=True).strip()

    return caption
