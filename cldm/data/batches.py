"""Batches of pictures of one size, from a data set that has several."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence

from torch.utils.data import BatchSampler, Sampler


class SameSizeBatches(BatchSampler):
    """Joins the indices that a sampler gives, in its order, into batches whose items have equal sizes.

    What is left of each size when the sampler is through makes a smaller batch, at the end, so that each item is seen once an
    epoch. Order and seed are the sampler's, as in a plain DataLoader.

    Args:
        sampler: gives each index of the data set once, e.g. torch's RandomSampler.
        batch_size: items in a full batch.
        drop_last: leave the smaller batches out.
        sizes: (height, width) by index.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, sizes: Sequence[Hashable]) -> None:
        super().__init__(sampler, batch_size, drop_last)
        if len(sampler) != len(sizes):
            raise ValueError(f"there are {len(sizes)} sizes for the {len(sampler)} items of the sampler")
        self.sizes = list(sizes)

    def __iter__(self) -> Iterator[list[int]]:
        begun: dict[Hashable, list[int]] = defaultdict(list)
        for index in self.sampler:
            batch = begun[self.sizes[index]]
            batch.append(index)
            if len(batch) == self.batch_size:
                yield begun.pop(self.sizes[index])
        if not self.drop_last:
            yield from begun.values()

    def __len__(self) -> int:
        counts = Counter(self.sizes).values()
        return sum(n // self.batch_size if self.drop_last else -(-n // self.batch_size) for n in counts)
