"""Workers of one pack as threads of this process, connected by gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from raycap.train.group import Group


def side_by_side(size: int, work: Callable[[Group], Any], timeout_s: float = 120.0) -> list[Any]:
    """`work(group)` of each worker, by rank. Who fails leaves, so that the others fail too; the first error is raised.

    Each has one thread of torch: MKL has one number of threads for all of a process, and sums depend on it.
    """
    before = torch.get_num_threads()
    store, found, errors = distributed.HashStore(), [None] * size, []

    def one(rank: int) -> None:
        torch.set_num_threads(1)
        gloo = distributed.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))
        group = Group(rank, size, gloo)
        del gloo
        try:
            found[rank] = work(group)
        except BaseException as error:
            errors.append(error)
        finally:
            group.leave()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    torch.set_num_threads(before)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), f"workers have not ended in {timeout_s:g} s"
    return found
