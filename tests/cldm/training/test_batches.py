"""Which pairs each step uses: every pair once a pass, one size a batch, the same whatever the split over processes and batches."""

from itertools import chain

import pytest

from cldm.training.batches import RunBatches, derived_seed

ONE_SIZE = [(64, 64)] * 10
SIZES = [(64, 64)] * 7 + [(64, 128)] * 4


def indices(*args, **kwargs):
    return list(RunBatches(*args, **kwargs))


def test_passes_follow_each_other_and_hold_each_pair_once():
    order = list(chain(*indices(ONE_SIZE, 4, 10)))
    assert [sorted(order[i : i + 10]) for i in range(0, 40, 10)] == [list(range(10))] * 4
    assert order[:10] != order[10:20] and order != list(chain(*indices(ONE_SIZE, 4, 10, seed=1)))


@pytest.mark.parametrize("sizes", [ONE_SIZE, SIZES])
def test_going_on_in_the_middle(sizes):
    whole = indices(sizes, 3, 20, seed=5)
    for start in (0, 1, 7, 20):
        assert indices(sizes, 3, 20, seed=5, start=start) == whole[start:]
    assert indices(sizes, 3, 30, seed=5)[:20] == whole  # a longer run begins alike
    assert len(RunBatches(sizes, 3, 20, start=7)) == 20  # Lightning counts from the beginning of the run


@pytest.mark.parametrize("sizes", [ONE_SIZE, SIZES])
def test_two_processes_share_the_batches_of_one(sizes):
    one = indices(sizes, 4, 12)
    first, second = (indices(sizes, 2, 12, rank=rank, world_size=2) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == one


def test_halved_batches_with_twice_the_accumulation_hold_the_same_pairs():
    halves = indices(ONE_SIZE, 2, 24)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == indices(ONE_SIZE, 4, 12)


def test_batches_hold_one_size_and_no_pair_is_lost():
    batches = indices(SIZES, 3, 110)
    assert all(len(batch) == 3 and len({SIZES[i] for i in batch}) == 1 for batch in batches)
    counts = [sum(batch.count(i) for batch in batches) for i in range(len(SIZES))]
    assert max(counts) - min(counts) <= 3  # what has begun a batch waits for the next pass
    assert len(indices([(64, 64)] * 2, 5, 3)[0]) == 5  # a set smaller than a batch repeats


def test_mistakes():
    with pytest.raises(ValueError, match="empty"):
        RunBatches([], 1, 1)
    with pytest.raises(ValueError, match="rank must be 0 to 1, found 2"):
        RunBatches(ONE_SIZE, 1, 1, rank=2, world_size=2)


def test_seeds_depend_on_all_their_parts():
    parts = [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4), (0, 12, 3), (0, 1, 23)]
    seeds = {derived_seed(*p) for p in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, 1, 2, 3) == 4455798303364379154  # on every machine
