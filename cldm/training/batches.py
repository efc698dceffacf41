"""Which pairs each step of a run trains on: a function of the seed, the step, the micro-batch and the rank, and of nothing else."""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import count, islice

import torch
from torch.utils.data import Sampler


def derived_seed(*parts: int | str) -> int:
    """A seed for `torch.manual_seed` that depends on all of `parts`: 0 to 2**63 - 1, equal on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class RunBatches(Sampler[list[int]]):
    """The batches of a whole run, as lists of indices, for one of several processes.

    The data set is shuffled anew for each pass over it. Passes follow each other without a break: what is left of one when a
    batch is full begins the next batch, so that all batches are full. Batches hold pictures of one size. Micro-batch i of all
    processes together is the same whether it goes to one process or is shared by several, and the pairs of a step stay the
    same when `batch_size` is halved and the number of micro-batches doubled (for data of one size).

    Args:
        sizes: (height, width) of each item, by index.
        batch_size: items of a micro-batch on each process.
        total: micro-batches of the whole run; the length, also of a run that goes on in the middle.
        seed: of the order.
        rank, world_size: which of how many processes this is.
        start: micro-batches that an earlier part of the run has used.
    """

    def __init__(
        self,
        sizes: Sequence[Hashable],
        batch_size: int,
        total: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        if not sizes:
            raise ValueError("there is nothing to make batches of: the data set is empty")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to {world_size - 1}, found {rank}")
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.total = total
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[int]]:
        share = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return (batch[share] for batch in islice(self._of_all_ranks(), self.start, self.total))

    def _of_all_ranks(self) -> Iterator[list[int]]:
        """Micro-batches of all processes together, without end."""
        full = self.batch_size * self.world_size
        begun: dict[Hashable, list[int]] = defaultdict(list)
        for number in count():
            for index in self._shuffled(number):
                batch = begun[self.sizes[index]]
                batch.append(index)
                if len(batch) == full:
                    yield begun.pop(self.sizes[index])

    def _shuffled(self, number: int) -> list[int]:
        """The order of pass `number` over the data."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", number))
        return torch.randperm(len(self.sizes), generator=generator).tolist()
