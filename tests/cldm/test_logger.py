"""Pictures while training: the logger, what it asks the model for, and pictures on the disk."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from cldm.data.pairs import read_rgb
from cldm.logger import ImageLogger
from cldm.pictures import grid, save_png
from ldm.util import instantiate_from_config
from tests.cldm.tiny import tiny_config
from tests.parity import fill_

SMALL_TEXT = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {"width": 48, "layers": 1, "heads": 4},
}


@pytest.fixture(scope="module")
def model():
    return fill_(instantiate_from_config(tiny_config("sd1", cond_stage_config=SMALL_TEXT))).eval()


def hint(seed=0, size=64):
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)


def test_image_logger_saves_each_kind_and_an_overview(model, tmp_path):
    images = {kind: torch.rand(2, 3, 64, 64) * 2 - 1 for kind in ("control", "samples")}
    ImageLogger(max_images=2).log_local(tmp_path, "train", images, global_step=7, current_epoch=1, batch_idx=3)
    assert {p.name for p in (tmp_path / "image_log" / "train").iterdir()} == {
        f"{kind}_gs-000007_e-000001_b-000003.png" for kind in ("control", "samples", "overview")
    }

    class Module(torch.nn.Module):
        device = torch.device("cpu")
        global_rank, global_step, current_epoch, logger = 0, 0, 0, None
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, default_root_dir=tmp_path / "rows", enable_checkpointing=False
        )

        def log_images(self, batch, **options):
            return images | {"diffusion_row": torch.zeros(3, 64, 256)}

    ImageLogger(batch_frequency=1, max_images=2, log_first_step=True, at_once=2).log_img(
        Module(), {"x": torch.zeros(2)}, 0
    )
    pictures = {p.name.split("_gs")[0]: p for p in (tmp_path / "rows").rglob("*.png")}
    assert set(pictures) == {"control", "samples", "diffusion_row", "overview"}
    assert read_rgb(pictures["diffusion_row"]).shape == (64 + 2 * 4, 256 + 2 * 4, 3)
    assert read_rgb(pictures["overview"]).shape == (2 * 68 + 4, 2 * 68 + 4, 3)
    due = ImageLogger(batch_frequency=5)
    assert [i for i in range(11) if due.check_frequency(i)] == [0, 5, 10]


def test_log_images_of_a_control_model(model):
    batch = {"jpg": torch.rand(2, 64, 64, 3) * 2 - 1, "hint": torch.rand(2, 64, 64, 3), "txt": ["a", "b"]}
    images = model.log_images(batch, N=2, sample=True, ddim_steps=2)
    assert set(images) == {"reconstruction", "control", "conditioning", "samples", "samples_cfg_scale_9.00"}
    assert all(picture.shape == (2, 3, 64, 64) for picture in images.values())
    torch.testing.assert_close(images["control"], batch["hint"].permute(0, 3, 1, 2) * 2 - 1)
    rows = {"plot_denoise_rows": True, "plot_diffusion_rows": True}
    images = model.log_images(batch, N=2, n_row=1, sample=True, ddim_steps=2, unconditional_guidance_label="b", **rows)
    assert images["diffusion_row"].shape == (3, 64, 6 * 64) and images["denoise_row"].shape[1] == 2 * 64
    assert set(model.log_images(batch, ddim_steps=2, return_keys=["control"])) == {"control"}


def test_log_images_where_the_text_encoder_is_trained():
    config = tiny_config("sd1", cond_stage_config=SMALL_TEXT, cond_stage_trainable=True)
    model = fill_(instantiate_from_config(config)).eval()
    batch = {"jpg": torch.rand(1, 64, 64, 3) * 2 - 1, "hint": torch.rand(1, 64, 64, 3), "txt": ["a"]}
    assert model.log_images(batch, ddim_steps=2)["samples_cfg_scale_9.00"].shape == (1, 3, 64, 64)


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    picture = grid([[hint(), hint(1)], [hint(2)]], gap=4, scale=2)
    assert picture.shape == (4 + 2 * 132, 4 + 2 * 132, 3)
    save_png(tmp_path / "a" / "x.png", picture)
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "a" / "y.png", picture)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]
