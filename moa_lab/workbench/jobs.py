"""Long work beside the notebook: one job at a time, with progress, the time left, and a way to stop it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from moa_lab.text import one_line
from moa_lab.trace.answer import within

T = TypeVar("T")
EARLY = 0.05
"""Share of the steps that must be done before the time left is estimated."""
Status = Literal["waiting", "running", "done", "cancelled", "failed"]


class Cancelled(Exception):
    """The job was asked to stop."""


@dataclass
class Handle:
    """Given to the work of a job, to report its progress and to stop when asked to."""

    cancel: threading.Event
    _tell: Callable[[float, float], None]
    _say: Callable[[str], None] = lambda _: None

    def progress(self, done: float, total: float) -> None:
        """Report that `done` of `total` steps are done. Raises Cancelled where the job is to stop."""
        self.check()
        self.tell(done, total)

    def tell(self, done: float, total: float) -> None:
        """As `progress`, for work that checks `cancel` itself and ends early with what it has."""
        self._tell(done, total)

    def part(self, number: int, count: int, what: str = "") -> Handle:
        """For step `number` of `count`, from 0, called `what`: what it reports is a part of the progress over all steps.

        Raises Cancelled where the job is to stop.
        """
        self.check()
        if what:
            self._say(what)
        told = within(self._tell, number, count)
        assert told is not None
        told(0, 1)
        return Handle(self.cancel, told, self._say)

    def check(self) -> None:
        """Raise Cancelled where the job is to stop."""
        if self.cancel.is_set():
            raise Cancelled


class Job(Generic[T]):
    """Work in a thread. status: waiting, running, done, cancelled, failed. on_change is called, in that thread, when anything changes.

    done, total: steps. step: what it does now, "" where it does not say. result: what the work returned. error: why it failed, in words.
    elapsed_s, left_s: seconds since the start, and estimated seconds to the end.
    """

    def __init__(self, work: Callable[[Handle], T], on_change: Callable[[Job[T]], None] | None = None) -> None:
        self._work, self._on_change = work, on_change
        self._cancel, self._ended = threading.Event(), threading.Event()
        self._began = self._stopped = 0.0
        self.status: Status = "waiting"
        self.done, self.total = 0.0, 0.0
        self.step = ""
        self.result: T | None = None
        self.error = ""

    def start(self) -> Job[T]:
        """Begin; a job runs once. Raises RuntimeError the second time."""
        if self.status != "waiting":
            raise RuntimeError("a job runs once: make another")
        self.status, self._began = "running", time.monotonic()
        self._changed()
        threading.Thread(target=self._run, name="moa-lab job", daemon=True).start()
        return self

    def cancel(self) -> None:
        """Ask the work to stop at its next step."""
        self._cancel.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False on timeout."""
        return self._ended.wait(timeout_s)

    @property
    def is_running(self) -> bool:
        """True from the start to the end."""
        return self.status == "running"

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, up to the end."""
        return (self._stopped or time.monotonic()) - self._began if self._began else 0.0

    @property
    def left_s(self) -> float | None:
        """Estimated seconds to the end, at the speed so far; None where too little is done to tell (`EARLY`)."""
        told = self.is_running and self.done > 0 and self.done >= EARLY * self.total
        return self.elapsed_s * (self.total - self.done) / self.done if told else None

    def _run(self) -> None:
        status: Status = "failed"
        try:
            self.result = self._work(Handle(self._cancel, self._progress, self._stepped))
            # Work that checks the event itself may end early without an exception.
            status = "done"
        except Cancelled:
            status = "cancelled"
        # An exception in a thread would go unnoticed.
        except Exception as error:
            self.error = one_line(error)
        self._stopped = time.monotonic()
        self.status = status
        self._ended.set()
        self._changed()

    def _progress(self, done: float, total: float) -> None:
        self.done, self.total = done, total
        self._changed()

    def _stepped(self, step: str) -> None:
        self.step = step

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self)
