"""WebDataset shards: one order whatever the workers, going on at any batch, and samples that break."""

import gzip
import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

import tutorial_dataset
from cldm.data.pairs import DataError
from cldm.data.shards import ShardStream, check_shards, find_shards

pytest.importorskip("webdataset")


def png(value, size=(64, 64)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Three shards of seven samples; the prompt is the number, a third of them are wide."""
    for shard in range(3):
        samples = []
        for i in range(7 * shard, 7 * shard + 7):
            size = (128, 64) if i % 3 == 0 else (64, 64)
            samples += [(f"{i:03}.jpg", png(i, size)), (f"{i:03}.source.png", png(255, size))]
            samples += (
                [(f"{i:03}.txt", str(i).encode())]
                if i % 2
                else [(f"{i:03}.json", json.dumps({"prompt": str(i)}).encode())]
            )
        write_shard(tmp_path / f"{shard}.tar", [*samples, ("._junk.jpg", b"hidden")])
    return tmp_path


def stream(shards, count, workers=0, **options):
    """Prompts of the first batches."""
    data = ShardStream(find_shards(shards), **{"batch_size": 3, "seed": 1, "shuffle": 8, **options})
    loader = DataLoader(data, batch_size=None, num_workers=workers)
    batches = list(itertools.islice(loader, count))
    for batch in batches:
        assert batch["jpg"].shape == batch["hint"].shape and batch["hint"].max() == 1.0
        for text, picture in zip(batch["txt"], batch["jpg"], strict=True):
            assert np.isclose(picture[0, 0, 0].item(), int(text) / 127.5 - 1)
    return [batch["txt"] for batch in batches], data


def test_an_epoch_holds_everything_and_each_is_shuffled_anew(shards):
    texts, data = stream(shards, 14)
    found = [int(text) for batch in texts for text in batch]
    assert sorted(found)[:2] == [0, 0] and set(found) == set(range(21))
    assert found[:21] != found[21:] and data.replaced == 0
    assert all(len({int(t) % 3 == 0 for t in batch}) == 1 for batch in texts)  # one size
    assert stream(shards, 5, seed=2)[0] != texts[:5]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_and_go_on_anywhere(shards, workers):
    texts, _ = stream(shards, 16)
    assert stream(shards, 6, workers)[0] == texts[:6]
    for start in (1, 9):
        assert stream(shards, 6, workers, start_batch=start)[0] == texts[start : start + 6]


@pytest.mark.parametrize("world_size", [2, 4])  # fewer and more ranks than shards
def test_ranks_share_the_shards(shards, world_size):
    parts = [
        stream(shards, 20, batch_size=1, rank=rank, world_size=world_size, shuffle=1)[0] for rank in range(world_size)
    ]
    firsts = [{text for batch in part[:5] for text in batch} for part in parts]
    assert all(not a & b for a, b in itertools.combinations(firsts, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_replaced_alike_and_counted(shards, workers):
    write_shard(shards / "3.tar", [
        ("a.jpg", png(99)[:-30]), ("a.source.png", png(255)), ("a.txt", b"99"),  # cut off: found in decoding
        ("b.jpg", b"nothing"), ("b.source.png", png(255)), ("b.txt", b"2"),  # not even a header
        ("c.jpg", png(1)), ("c.txt", b"3"),  # no hint
        ("d.jpg", png(1)), ("d.source.png", png(255)),  # no prompt
        ("e.jpg", png(1, (80, 80))), ("e.source.png", png(255, (80, 80))), ("e.txt", b"4"),  # of no use as training wants it
    ])  # fmt: skip
    (shards / "4.tar").write_bytes((shards / "0.tar").read_bytes()[:3000])  # cut off
    options = {"batch_size": 2, "shuffle": 1}
    texts, data = stream(shards, 30, workers, **options)
    assert "1" in {text for batch in texts for text in batch}  # of the sound samples none is lost
    assert texts == stream(shards, 30, **options)[0]
    assert data.replaced > 3
    count, problems = check_shards(find_shards(shards), progress=False)
    assert {p.name[0] for p in problems} >= set("abcde") and count > 21
    assert tutorial_dataset.main(["--check", str(shards)]) == 1


@pytest.mark.parametrize("compressed", [False, True])
def test_shards_that_lack_samples_are_named(shards, tmp_path, capsys, compressed):
    folder = tmp_path / "odd"
    folder.mkdir()
    whole = (shards / "0.tar").read_bytes()
    with tarfile.open(shards / "0.tar") as tar:
        third = tar.getmembers()[3 * 3].offset
    cut = gzip.compress(whole[:third]) if compressed else whole[:third]  # between two samples
    (folder / "cut.tar").write_bytes(cut)
    write_shard(folder / "empty.tar", [])
    (folder / "nothing.tar").write_bytes(b"")
    (folder / "sound.tar").write_bytes(gzip.compress(whole) if compressed else whole)
    assert tutorial_dataset.main(["--check", str(folder)]) == 1
    captured = capsys.readouterr()
    said = {line.split("/")[-1].split(":")[0]: line for line in captured.err.splitlines() if ".tar" in line}
    assert said.keys() == {"cut.tar", "empty.tar", "nothing.tar"} and "10 of 10 pairs" in captured.out
    assert (
        "end is missing" in said["cut.tar"] and "no sample" in said["empty.tar"] and "empty file" in said["nothing.tar"]
    )
    for command, status in ((f"cat {folder}/sound.tar", 0), ("true", 1), (f"head -c {third} {shards}/0.tar", 1)):
        assert tutorial_dataset.main(["--check", f"pipe:{command}"]) == status, command


def test_a_process_whose_shards_are_empty_in_one_epoch_waits_for_the_next(shards, tmp_path):
    write_shard(tmp_path / "empty.tar", [])
    for rank in range(2):
        data = ShardStream([str(shards / "0.tar"), str(tmp_path / "empty.tar")], 2, rank=rank, world_size=2)
        assert len(list(itertools.islice(data, 12))) == 12


def test_a_folder_may_hold_compressed_shards(shards):
    (shards / "1.tar.gz").write_bytes(gzip.compress((shards / "1.tar").read_bytes()))
    (shards / "1.tar").unlink()
    (shards / "2.tar").rename(shards / "2.tgz")
    assert [path.rsplit("/")[-1] for path in find_shards(shards)] == ["0.tar", "1.tar.gz", "2.tgz"]
    assert check_shards(find_shards(shards), progress=False) == (21, [])


def test_names_with_dots_and_parts_that_lie_apart_are_explained_in_a_short_line(tmp_path):
    parts = {"jpg": png(1), "source.png": png(255), "txt": b"a"}
    write_shard(tmp_path / "dots.tar", [(f"photo.{i}.{part}", data) for i in range(90) for part, data in parts.items()])
    write_shard(tmp_path / "apart.tar", [(f"{i}.{part}", data) for part, data in parts.items() for i in range(2)])
    _, problems = check_shards(find_shards(tmp_path), progress=False)
    assert len(problems) == 7
    assert all("first dot" in p.message and "--sort=name" in p.message and len(p.message) < 400 for p in problems
               if "target" in p.message)  # fmt: skip


def test_shards_are_told_from_other_data(shards, tmp_path, capsys):
    assert [path[-5:] for path in find_shards(f"{shards}/{{0..2}}.tar")] == ["0.tar", "1.tar", "2.tar"]
    assert find_shards(shards / "1.tar") == [str(shards / "1.tar")]
    assert find_shards("training/fill50k") == []
    with pytest.raises(DataError, match="there is no shard .*3.tar, nor 6 more; the name of a folder"):
        find_shards(f"{shards}/{{0..9}}.tar")
    assert tutorial_dataset.main(["--check", str(shards)]) == 0
    assert "all 21 pairs are fine" in capsys.readouterr().out
    write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match="no sample"):
        next(iter(ShardStream([str(tmp_path / "empty.tar")], 1)))
