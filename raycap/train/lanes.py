"""Pieces of one step side by side: on a CPU, threads with a part of the work each, instead of more cores an operation.

A pack's operations are small: shared between cores one by one they wait for each other at every end. A lane takes its
part through all of them with the cores that are its own, and meets the other lanes once. In a training step that part
is some of the slots, those of like rank, which share nothing that is trained; where there are fewer slots than lanes,
and in validation, it is some of the rows, and gradients are added up in the lanes' order. Either way the result depends
on how many lanes there are, not on which one is done first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

MIN_ROWS = 16
"""Rows that a lane must have to be worth it: below, what an operation costs whatever its size is most of it.

(One trial of 16 rows of the tiny GIT alone on two cores: 39 ms a step in two lanes, 49 in one. Inside a sweep 56 and 51:
each lane slept a sixth of its time until Python was free, and waited an eighth for a core that Ray's processes had.)"""
MAX_LANES = 4
"""Python runs one lane at a time between two operations, and each lane holds gradients of all slots."""

SMALL_PRODUCTS = 1 << 20
"""Multiply-adds that a linear does for one position of all rows, below which cores wait for each other longer than they
work. (One trial of 16 rows on a width of 128 has half of it: 51 ms a step on one thread, 57 on two that share their
cores with Ray's processes; a width of 768 has nine times of it.)"""

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """`count` lanes of `threads_each` threads; pieces of fewer than `min_rows` rows are not cut any smaller."""

    def __init__(self, count: int = 1, threads_each: int = 1, *, min_rows: int = MIN_ROWS):
        self.count, self.threads_each, self.min_rows = count, threads_each, min_rows
        self._pool: ThreadPoolExecutor | None = None

    def worth(self, rows: int) -> int:
        """How many lanes to spread `rows` rows over."""
        return max(1, min(self.count, rows // self.min_rows))

    def of_slots(self, rows: int, slots: int) -> int:
        """How many lanes to spread `slots` slots of `rows` rows over, whole ones; 1 where they are not enough."""
        lanes = self.worth(rows * slots)
        return lanes if slots >= lanes else 1

    def run(self, work: Callable[[int, T], R], items: Sequence[T]) -> list[R]:
        """`work(lane, item)` of every item, in order. One item is done in this thread, with all of its cores.

        An exception is raised when all items have come to their end, the first item's first.
        """
        if len(items) <= 1 or self.count == 1:
            return [work(0, item) for item in items]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, "lane")
        found: list[R] = []
        for first in range(0, len(items), self.count):
            wave = items[first : first + self.count]
            threads = self.count * self.threads_each // len(wave)
            futures = [self._pool.submit(self._with, threads, work, lane, item) for lane, item in enumerate(wave)]
            wait(futures)
            found += [future.result() for future in futures]
        return found

    @staticmethod
    def _with(threads: int, work: Callable[[int, T], R], lane: int, item: T) -> R:
        """`work` in a lane's thread, whose number of threads is its own; cores of lanes without work are shared out."""
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return work(lane, item)

    @contextmanager
    def threads(self, products: float) -> Iterator[None]:
        """For the block: this thread alone where there are lanes, but too little to do for two of them or for two cores.

        Goes by the work and not by the clock, since the number of threads may change the last bits of a sum.
        """
        before = torch.get_num_threads()
        alone = self.count > 1 and products < SMALL_PRODUCTS
        if alone:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if alone:
                torch.set_num_threads(before)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


RANK_COST = 1 / 160
"""What one more of rank costs a slot, in its other work. (A width of 128: rank 32 is a fifth more than rank 2.)"""


def like_ranks(ranks: Sequence[int], groups: int) -> list[list[int]]:
    """Indices of `ranks` in `groups` groups (or fewer slots) whose dearest is as cheap as can be, highest ranks first.

    A group computes with the widest rank in it, so neighbours in rank go together: of a group of n that is a cost of
    n (1 + RANK_COST r_max). Equal ranks stay in their order.
    """
    order = sorted(range(len(ranks)), key=lambda i: -ranks[i])

    @lru_cache(None)
    def best(begin: int, left: int) -> tuple[float, tuple[int, ...]]:
        """(cost of the dearest group, ends of the groups) of what is left from `begin` on."""
        most = 1 + RANK_COST * ranks[order[begin]]
        if left == 1:
            return (len(order) - begin) * most, (len(order),)
        found = []
        for end in range(begin + 1, len(order) - left + 2):
            cost, ends = best(end, left - 1)
            found.append((max(cost, (end - begin) * most), (end, *ends)))
        return min(found)

    ends = best(0, groups)[1]
    return [order[begin:end] for begin, end in zip((0, *ends), ends)]


def lanes_for(device: torch.device) -> Lanes:
    """Lanes for what this process may use of a CPU; one for a GPU, which runs a whole step at once."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2:
        return Lanes()
    count = min(MAX_LANES, threads)
    return Lanes(count, threads // count)
