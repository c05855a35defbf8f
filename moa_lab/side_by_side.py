"""Work on a CPU's cores side by side: a sample a thread keeps them busier than all threads in every operation of one sample."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psutil
import torch

from moa_lab import processes

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    device: torch.device,
    *,
    bytes_each: int = 0,
    after: Callable[[Result], None] | None = None,
    first_only: bool = False,
) -> list[Result]:
    """`work(item)` of every item, in their order; the processes of a run share the items out (see `moa_lab.processes`).

    On a CPU, torch's threads are dealt out among items at work at once, as many as `workers` says; each item has a thread of its own,
    to which nothing of the caller's belongs: no gradient mode, no plan that is applied. Elsewhere one item after the other.
    after: called with every result, in order, in the caller's thread. first_only: as in `processes.shared_out`. What `work` or `after`
    raises is raised here once the items under way are done; no other is begun.
    """
    if processes.sharing() == 1:
        return _here(work, items, device, bytes_each, after)
    # Each process has a share of the host's memory, and the first says how much.
    at_once = processes.from_first(lambda: workers(len(items), device, bytes_each * processes.started()))
    return processes.shared_out(
        lambda mine: _here(work, mine, device, bytes_each, None), items, at_once=at_once, after=after, first_only=first_only
    )


def _here(
    work: Callable[[Item], Result], items: Sequence[Item], device: torch.device, bytes_each: int, after: Callable[[Result], None] | None
) -> list[Result]:
    """All of them, in this process."""
    count, total = workers(len(items), device, bytes_each), torch.get_num_threads()
    results: list[Result] = []

    def take(result: Result) -> None:
        results.append(result)
        if after:
            after(result)

    if count == 1:
        for item in items:
            take(work(item))
        return results
    with _pool(count, total // count) as pool:
        for future in [pool.submit(work, item) for item in items]:
            take(future.result())
    return results


def on_one_core(work: Callable[[], Result], device: torch.device) -> Result:
    """`work()` as `side_by_side` does it while every core has an item: on a CPU in a thread of its own, with one of torch's threads."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return work()
    with _pool(1, 1) as pool:
        return pool.submit(work).result()


def workers(items: int, device: torch.device, bytes_each: int = 0) -> int:
    """Items at work at once: one elsewhere than on a CPU; there as many as torch has threads and as fit in half the free memory."""
    if device.type != "cpu":
        return 1
    fitting = free_bytes(device) // 2 // bytes_each if bytes_each else items
    return max(1, min(items, torch.get_num_threads(), fitting))


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated; on a GPU torch's own cache of freed blocks is counted."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available)


@contextlib.contextmanager
def _pool(count: int, threads: int) -> Iterator[ThreadPoolExecutor]:
    """`count` Python threads with `threads` of torch's each. Work that was not begun is dropped on exit."""
    total = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "moa-lab sample", _begin, (threads,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        # Threads that begin later take over what was set last, in whichever thread.
        torch.set_num_threads(total)


def _begin(threads: int) -> None:
    # A thread's first operation would set the number again, to that of the process, had it not been asked for it before.
    torch.get_num_threads()
    torch.set_num_threads(threads)
