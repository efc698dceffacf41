"""The captioner of automatic prompts, on a tiny random network with the layout of the published one."""

import numpy as np
import pytest

from controlnet.app.captions import FOLDER, find_captioner, load_captioner
from controlnet.app.files import Folders

transformers = pytest.importorskip("transformers")


def write_captioner(folder) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "circle", "picture"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(size=size), tokenizer)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 64, "bos_token_id": 5,
            "eos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}  # fmt: skip
    vision = {**shape, "image_size": 32, "patch_size": 16}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def test_a_captioner_among_the_models_is_found_and_captions(tmp_path):
    folders = Folders((tmp_path / "models", tmp_path / "more"))
    with pytest.raises(ValueError, match=f"put the files of .* into models/{FOLDER}"):
        find_captioner(folders)
    write_captioner(tmp_path / "more" / FOLDER)
    found = find_captioner(folders)
    assert found == tmp_path / "more" / FOLDER
    caption = load_captioner(found)(np.zeros((20, 30, 3), np.uint8))
    assert isinstance(caption, str) and caption == caption.strip()


def test_a_folder_with_a_pickle_or_nothing_in_it_is_refused(tmp_path):
    write_captioner(tmp_path / FOLDER)
    (tmp_path / FOLDER / "model.safetensors").rename(tmp_path / FOLDER / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no captioner that can be used"):
        load_captioner(tmp_path / FOLDER)
