"""ZoeDepth as ControlNet 1.1 uses it, from transformers' layout and from the published file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import annotator
from annotator.pictures import to_uint8
from annotator.weights import WeightsError
from annotator.zoe import ZoeDetector
from annotator.zoe.published import BACKBONE, CONFIG, hub_names
from tests.annotator import tiny_models
from tests.annotator.cases import DATA

transformers = tiny_models.transformers
MANIFEST = json.loads((DATA / "ZoeD_M12_N.json").read_text())  # shapes of the published file's entries
IMAGE = np.random.RandomState(0).randint(0, 256, (75, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.zoedepth(tmp_path_factory.mktemp("zoe") / "zoedepth-nyu")


def test_the_map_is_that_of_both_mirror_images_between_two_percentiles(folder):
    network = transformers.AutoModelForDepthEstimation.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    inputs = processor(IMAGE, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs, flipped = network(inputs), network(inputs.flip(3))
    depth = processor.post_process_depth_estimation(outputs, [IMAGE.shape[:2]], outputs_flipped=flipped)
    depth = depth[0]["predicted_depth"].numpy()
    near, far = np.percentile(depth, 2), np.percentile(depth, 85)
    expected = 1.0 - (depth - near) / (far - near)
    detector = ZoeDetector("cpu", folder)
    assert np.abs(detector(IMAGE).astype(int) - to_uint8(expected * 255.0)).max() <= 1
    darker = to_uint8(expected.clip(0) ** 2.2 * 255.0).astype(int)
    assert np.abs(detector(IMAGE, gamma_corrected=True) - darker).max() <= 1
    assert detector(IMAGE).max() == 255 and detector(IMAGE).min() == 0
    assert detector.decode(torch.full((4, 4), 2.0), (4, 4)).tolist() == [[255] * 4] * 4  # the same distance everywhere


def publish(hub: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entries under the hub's names as the published file has them: its own names, and one matrix for query, key and value."""
    published = {}
    for key in MANIFEST:
        names = list(hub_names({key: torch.zeros(3)}))
        if names and all(name in hub for name in names):
            published[key] = torch.cat([hub[name] for name in names])
    return published


def test_published_names_are_all_of_the_networks():
    published = {key: torch.empty(shape, device="meta") for key, shape in MANIFEST.items()}
    renamed = hub_names(published)
    config = transformers.ZoeDepthConfig(backbone_config=transformers.BeitConfig(**BACKBONE), **CONFIG)
    with torch.device("meta"):
        network = transformers.ZoeDepthForDepthEstimation(config)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert sum(tensor.numel() for tensor in renamed.values()) == parameters == 343_789_698
    first, last = "core.core.scratch.refinenet{}.out_conv.bias", "neck.fusion_stage.layers.{}.projection.bias"
    assert (
        renamed[last.format(0)] is published[first.format(4)] and renamed[last.format(3)] is published[first.format(1)]
    )
    assert renamed["neck.convs.0.weight"] is published["core.core.scratch.layer1_rn.weight"]


def test_a_published_file_gives_the_same_and_another_is_refused(folder, tmp_path, monkeypatch):
    config = transformers.ZoeDepthConfig.from_pretrained(folder)
    monkeypatch.setattr("annotator.zoe.BACKBONE", config.backbone_config.to_diff_dict())
    tiny = {name: getattr(config, name) for name in tiny_models.ZOE}
    monkeypatch.setattr("annotator.zoe.CONFIG", tiny)
    monkeypatch.setattr("annotator.zoe.PROCESSOR", tiny_models.ZOE_PROCESSOR)
    published = publish(load_file(folder / "model.safetensors"))
    (tmp_path / "ckpts").mkdir()
    torch.save({"model": published, "optimizer": None}, tmp_path / "ckpts" / "ZoeD_M12_N.pt")
    expected = ZoeDetector("cpu", folder)(IMAGE)
    assert (ZoeDetector("cpu", tmp_path / "ckpts")(IMAGE) == expected).all()
    monkeypatch.setenv("ANNOTATOR_CKPTS", str(tmp_path / "ckpts"))
    assert (ZoeDetector()(IMAGE) == expected).all()  # as ControlNet 1.1's app makes it
    del published["conv2.weight"]
    torch.save(published, tmp_path / "other.pt")
    with pytest.raises(
        WeightsError,
        match="other.pt does not fit ZoeDepthForDepthEstimation: 1 entries are missing, such as metric_head.conv2",
    ):
        ZoeDetector("cpu", tmp_path / "other.pt")


def test_a_folder_of_the_models_name_is_found_and_controlnet_aux_is_followed(folder, monkeypatch):
    monkeypatch.setenv("ANNOTATOR_CKPTS", str(folder.parent))
    expected = ZoeDetector("cpu")(IMAGE)
    made = ZoeDetector.from_pretrained(str(folder)).to("cpu")
    assert made(IMAGE, detect_resolution=64, image_resolution=64).shape == (64, 128, 3)  # array in, array out
    assert made(Image.fromarray(IMAGE), output_type="pil", gamma_corrected=True).size == (832, 512)
    assert annotator.load("depth_zoe", "cpu")(IMAGE).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="model_type must be zoedepth"):
        ZoeDetector.from_pretrained(str(folder), model_type="zoedepth_nk")


def test_a_model_that_is_not_zoedepth_is_refused(tmp_path):
    """Depth Anything's depth is inverse: it would come out with near and far exchanged."""
    with pytest.raises(WeightsError, match="a model of type depth_anything, not zoedepth; use depth_anything"):
        ZoeDetector("cpu", tiny_models.depth_anything(tmp_path / "other"))
