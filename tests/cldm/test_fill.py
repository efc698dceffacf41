"""The Fill generator, its score, and image pairs on disk."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from annotator.pictures import HWC3, read_image
from cldm.data.fill import COLOURS, PALETTES, colour_distances, draw_fill, generate_fill
from cldm.data.pairs import DataError, PairDataset, read_rgb
from cldm.data.score import disc, fill_geometry, parse_prompt, score_fill


def samples(count=40, size=64):
    return [draw_fill(i, size, 7, PALETTES["clear"]) for i in range(count)]


def test_a_sample_depends_on_seed_and_number_alone():
    first, again, other = draw_fill(5, 128, 1), draw_fill(5, 128, 1), draw_fill(5, 128, 2)
    assert np.array_equal(first.target, again.target) and first.prompt == again.prompt
    assert other.prompt != first.prompt or other.centre != first.centre
    small = draw_fill(5, 64, 1)
    assert small.prompt == first.prompt and small.radius == pytest.approx(first.radius / 2)


@pytest.mark.parametrize("size", [64, 512])
def test_source_and_target_show_the_same_circle(size):
    for sample in samples(10, size):
        centre, radius = fill_geometry(sample.source)
        np.testing.assert_allclose([*centre, radius], [*sample.centre, sample.radius], atol=0.1)
        inside = disc(size, size, sample.centre, sample.radius - 2)
        outside = ~disc(size, size, sample.centre, sample.radius + 2)
        assert (sample.target[inside] == COLOURS[sample.circle]).all() and (
            sample.target[outside] == COLOURS[sample.ground]
        ).all()
        assert (
            sample.source.max() == 255
            and (sample.source[inside & disc(size, size, sample.centre, sample.radius - 6)] == 0).all()
        )
        assert parse_prompt(sample.prompt) == (sample.circle, sample.ground)


def test_palettes():
    assert len(COLOURS) == len(set(COLOURS.values())) == 139 and COLOURS["burly wood"] == (222, 184, 135)
    distances = colour_distances(list(PALETTES["clear"].values()))
    assert distances[~np.eye(len(distances), dtype=bool)].min() >= 28 and "burly wood" in PALETTES["clear"]


def test_a_perfect_answer_scores_full_marks_and_wrong_ones_do_not():
    truth = samples()
    perfect = score_fill(np.stack([s.target for s in truth]), truth)
    assert perfect.iou > 0.98 and perfect.ious.min() > 0.93 and perfect.colours == 1.0
    elsewhere = score_fill(np.stack([s.target for s in truth[1:] + truth[:1]]), truth)
    assert elsewhere.iou < 0.4 and elsewhere.colours < 0.1
    swapped = [cv2.convertScaleAbs(s.target) for s in truth]
    for image, s in zip(swapped, truth, strict=True):
        inside = disc(64, 64, s.centre, s.radius)
        image[inside], image[~inside] = COLOURS[s.ground], COLOURS[s.circle]
    inverted = score_fill(np.stack(swapped), truth)
    assert inverted.iou > 0.95 and inverted.colours == 0.0
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    assert score_fill(noise, truth).iou < 0.2
    assert score_fill(np.full((40, 64, 64, 3), 90, np.uint8), truth).iou == 0.0


def test_generating_is_resumable_and_deterministic(tmp_path):
    generate_fill(tmp_path / "a", 12, 64, seed=3, progress=False)
    generate_fill(tmp_path / "b", 5, 64, seed=3, workers=1, progress=False)
    kept = (tmp_path / "b" / "target" / "2.png").stat().st_mtime_ns
    (tmp_path / "b" / "target" / "4.png").unlink()
    (tmp_path / "b" / "source" / "3.png").unlink()
    generate_fill(tmp_path / "b", 12, 64, seed=3, progress=False)
    assert (tmp_path / "b" / "target" / "2.png").stat().st_mtime_ns == kept
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="not empty"):
        generate_fill(tmp_path / "mine", 3, 64, progress=False)
    with pytest.raises(DataError, match="seed must not be negative"):
        generate_fill(tmp_path / "new", 3, 64, seed=-1, progress=False)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def folder(tmp_path):
    generate_fill(tmp_path / "set", 4, 64, palette="clear", progress=False)
    return tmp_path / "set"


def rewrite(folder, number, text):
    lines = (folder / "prompt.json").read_text().splitlines()
    lines[number - 1] = text
    (folder / "prompt.json").write_text("\n".join(lines))


def test_items_are_what_training_expects(folder):
    data = PairDataset(folder)
    assert len(data) == 4 and data.sizes() == [(64, 64)] * 4
    item, sample = data[1], draw_fill(1, 64, 0, PALETTES["clear"])
    assert item["jpg"].dtype == item["hint"].dtype == np.float32 and item["txt"] == sample.prompt
    np.testing.assert_allclose(item["jpg"], sample.target / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(item["hint"], sample.source / 255, atol=1e-6)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"source": "a.png"', "line 2 is not valid JSON"),
        ('{"source": "source/1.png", "target": "target/1.png"}', "line 2 needs a text under 'prompt', found nothing"),
        ('{"source": 3, "target": "target/1.png", "prompt": ""}', "line 2 needs a text under 'source', found int"),
        ('["source"]', "line 2 must be an object"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ('{"source": ' + "9" * 5000 + "}", "line 2 is not valid JSON"),
        (r'{"source": "a\u0000", "target": "target/1.png", "prompt": ""}', "line 2 names no file"),
        ('{"source": "../../x.png", "target": "target/1.png", "prompt": ""}', "line 2: source .* outside"),
    ],
)
def test_broken_lines_are_named(folder, line, message):
    rewrite(folder, 2, line)
    with pytest.raises(DataError, match=message):
        PairDataset(folder)


def test_listings_with_bom_blank_lines_and_windows_ends(folder):
    text = (folder / "prompt.json").read_text().replace("\n", "\r\n\r\n")
    (folder / "prompt.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(PairDataset(folder)) == 4


def test_broken_pictures_are_named(folder):
    cv2.imwrite(str(folder / "source" / "2.png"), np.zeros((64, 128, 3), np.uint8))
    with pytest.raises(DataError, match=r"source.2.png is 128x64, its target .*2.png is 64x64"):
        PairDataset(folder).sizes()
    (folder / "source" / "2.png").unlink()
    with pytest.raises(DataError, match=r"2.png is missing"):
        PairDataset(folder).sizes()
    for part in ("source", "target"):
        cv2.imwrite(str(folder / part / "2.png"), np.zeros((100, 64, 3), np.uint8))
    with pytest.raises(DataError, match="multiples of 64"):
        PairDataset(folder).sizes()
    (folder / "target" / "0.png").write_bytes((folder / "target" / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match="0.png does not decode"):
        PairDataset(folder)[0]


def test_unusual_pictures_are_read_sensibly(folder):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:32] = (255, 0, 0, 255)
    Image.fromarray(rgba).save(folder / "target" / "0.png")
    grey16 = np.full((64, 64), 0x8000, np.uint16)
    cv2.imwrite(str(folder / "source" / "0.png"), grey16)
    item = PairDataset(folder)[0]
    np.testing.assert_allclose(item["jpg"][0, 0], [1, -1, -1])
    np.testing.assert_allclose(item["jpg"][63, 0], [1, 1, 1])  # transparent lies on white
    np.testing.assert_allclose(item["hint"], 127 / 255, atol=1e-6)  # 0x8000 / 257, cut off
    assert np.array_equal(read_rgb(folder / "source" / "0.png")[..., 0], read_image(folder / "source" / "0.png"))


def test_missing_folders_and_listings(tmp_path):
    (tmp_path / "a.json").touch()
    with pytest.raises(DataError, match="a.json is a file; name the data folder"):
        PairDataset(tmp_path / "a.json")
    with pytest.raises(DataError, match="no data folder"):
        PairDataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="prompt.json is missing"):
        PairDataset(tmp_path)
    (tmp_path / "prompt.json").write_text("\n\n")
    with pytest.raises(DataError, match="lists no pairs"):
        PairDataset(tmp_path)


def test_listing_is_the_public_layout(folder):
    entry = json.loads((folder / "prompt.json").read_text().splitlines()[0])
    assert entry == {
        "source": "source/0.png",
        "target": "target/0.png",
        "prompt": draw_fill(0, 64, 0, PALETTES["clear"]).prompt,
    }


def test_transparency_lies_on_white_as_the_annotators_lay_it(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array_equal(read_rgb(tmp_path / "a.png"), HWC3(read_image(tmp_path / "a.png")))
