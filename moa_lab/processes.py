"""Processes that share a run: `torchrun` starts them, each holds the whole model, and they share out samples.

All of them do the same steps in the same order. What decides a step (what is on disk, what fits in memory, what a solver with a time
limit found) is the first process's, which the others are told; it alone writes records. Numbers travel as Python objects between CPUs
(gloo), on machines with GPUs too: they are small beside what it takes to compute them.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")

WAIT = datetime.timedelta(days=1)
"""How long a process waits for the others, which may search or compile meanwhile. One that ended is noticed at once."""
GOES_ON = "the same command goes on where the run was"


class LostProcessError(OSError):
    """Another process of the run ended."""


@dataclass(frozen=True)
class _Failure:
    """What a process raised, on its way to the others."""

    error: BaseException


@dataclass
class _Group:
    rank: int = 0
    count: int = 1
    alone: bool = False
    """Whether the first process works while the others wait."""


_group = _Group()


def asked_for() -> int:
    """Processes that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def started() -> int:
    """Processes of this run."""
    return _group.count


def sharing() -> int:
    """Processes that share what is done now: one within `from_first`."""
    return 1 if _group.alone else _group.count


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return _group.rank == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that `torchrun` started with this one, each with a GPU of its own where there are GPUs; alone without it.

    Raises ValueError where a host has fewer GPUs than processes, LostProcessError inside where another process ended. A process that it
    leaves ends: it ignores SIGTERM from then on, which `torchrun` sends at any moment, so that what was raised is told.
    """
    if asked_for() == 1:
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local + 1} of this host finds {torch.cuda.device_count()} GPUs: start as many processes as GPUs")
        torch.cuda.set_device(local)
    dist.init_process_group("gloo", timeout=WAIT)
    _group.rank, _group.count = dist.get_rank(), dist.get_world_size()
    before = signal.signal(signal.SIGTERM, _stopped)
    if not is_first():
        # One process tells; what goes wrong here alone is an error, which is still told.
        logging.disable(logging.WARNING)
    try:
        yield
    except LostProcessError:
        before = signal.SIG_IGN
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        logging.disable(logging.NOTSET)
        _group.rank, _group.count = 0, 1
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def from_first(make: Callable[[], Result]) -> Result:
    """`make()` of the first process, for all: the others wait. What it raises ends them all, and is told once."""
    if sharing() == 1:
        return make()
    told: list[Any] = [None]
    if is_first():
        _group.alone = True
        try:
            told[0] = make()
        except BaseException as error:
            told[0] = _Failure(_sendable(error))
            _talk(lambda: dist.broadcast_object_list(told, 0))
            raise
        finally:
            _group.alone = False
    _talk(lambda: dist.broadcast_object_list(told, 0))
    if isinstance(told[0], _Failure):
        _leave()
    found: Result = told[0]
    return found


def first_then_others(make: Callable[[], Result]) -> Result:
    """`make()` of every process, of the first before the others, which find what it left on disk."""
    made: list[Result] = []
    from_first(lambda: made.append(make()))
    return made[0] if made else make()


def shared_out(
    work: Callable[[Sequence[Item]], Sequence[Result]],
    items: Sequence[Item],
    *,
    at_once: int = 1,
    after: Callable[[Result], None] | None = None,
    first_only: bool = False,
) -> list[Result]:
    """A result for every item, in their order. work: takes some items, gives their results. items: the same in every process.

    at_once: items that a process takes before results are exchanged. after: called with every result, in order. first_only: the first
    process alone gets results, the others an empty list. What a process raises ends all of them, and is told once.
    """
    count, results = sharing(), list[Result]()
    for start in range(0, len(items), count * at_once):
        round_ = items[start : start + count * at_once]
        try:
            mine: Any = list(work(round_[_group.rank :: count] if count > 1 else round_))
        except Exception as error:
            if count == 1:
                raise
            mine = _Failure(_sendable(error))
        told = [mine] if count == 1 else _exchanged(mine, count, first_only)
        if told is None:
            continue
        for place in range(len(round_)):
            result = told[place % count][place // count]
            results.append(result)
            if after:
                after(result)
    return results


def _exchanged(mine: Any, count: int, first_only: bool) -> list[Any] | None:
    """Of every process, what it has; None where the first alone is told."""
    told: list[Any] = [None] * count
    # All hear of a failure; of what is large, the first alone.
    heard = mine if isinstance(mine, _Failure) or not first_only else None
    _talk(lambda: dist.all_gather_object(told, heard))
    for each in told:
        if isinstance(each, _Failure):
            if is_first():
                raise each.error
            _leave()
    if first_only:
        _talk(lambda: dist.gather_object(mine, told if is_first() else None, 0))
    return told if is_first() or not first_only else None


def _talk(exchange: Callable[[], None]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        raise LostProcessError(f"another process of this run ended; {GOES_ON}") from error


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an error of another library cannot do
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _leave() -> NoReturn:
    """End a process whose first one tells why."""
    raise SystemExit(2)


def _stopped(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise LostProcessError(f"the run was stopped; {GOES_ON}")
