"""Jobs: progress, the time left, stopping, failing in words."""

from __future__ import annotations

import threading

import pytest

from moa_lab.workbench.jobs import Handle, Job


def test_a_job_tells_its_progress_and_returns_its_result() -> None:
    heard: list[tuple[str, int, int]] = []

    def work(handle: Handle) -> str:
        for done in range(4):
            handle.progress(done, 3)
        return "made"

    job = Job(work, lambda job: heard.append((job.status, job.done, job.total))).start()
    assert job.wait(5)
    assert (job.status, job.result, job.error) == ("done", "made", "")
    assert heard == [("running", 0, 0), *[("running", done, 3) for done in range(4)], ("done", 3, 3)]
    assert job.elapsed_s > 0
    assert job.left_s is None


def test_the_time_left_follows_from_what_is_done() -> None:
    reached, go = threading.Event(), threading.Event()

    early: list[float | None] = []

    def work(handle: Handle) -> None:
        handle.progress(1, 40)
        early.append(job.left_s)
        handle.progress(1, 4)
        reached.set()
        go.wait(5)

    job = Job(work)
    job.start()
    assert reached.wait(5)
    assert early == [None], "a fortieth tells nothing yet"
    left = job.left_s
    assert left is not None
    assert left == pytest.approx(3 * job.elapsed_s, rel=0.2)
    go.set()
    assert job.wait(5)


def test_parts_of_a_job_are_one_progress_which_names_its_step() -> None:
    heard: list[tuple[str, float, float]] = []

    def work(handle: Handle) -> None:
        for number, (what, total) in enumerate([("first", 4), ("second", 0), ("third", 2)]):
            part = handle.part(number, 3, what)
            for done in range(total + 1):
                part.progress(done, total)
        inner = handle.part(2, 3).part(1, 2, "fourth")
        inner.progress(1, 2)

    job = Job(work, lambda job: heard.append((job.step, job.done, job.total))).start()
    assert job.wait(5)
    assert (job.status, job.step, job.done) == ("done", "fourth", 2.75)
    assert ("first", 0.25, 3) in heard
    assert ("second", 1.0, 3) in heard
    assert ("third", 2.5, 3) in heard


def test_a_part_is_not_begun_once_the_job_is_cancelled() -> None:
    job = Job(lambda handle: handle.cancel.wait(5) and handle.part(1, 2, "more")).start()
    job.cancel()
    assert job.wait(5)
    assert (job.status, job.step) == ("cancelled", "")


def test_a_cancelled_job_ends_at_its_next_step_and_another_can_start() -> None:
    reached, steps = threading.Event(), []

    def work(handle: Handle) -> None:
        while True:
            handle.progress(len(steps), 0)
            steps.append(1)
            reached.set()
            handle.cancel.wait(5)

    job = Job(work).start()
    assert reached.wait(5)
    job.cancel()
    assert job.wait(5)
    assert (job.status, len(steps)) == ("cancelled", 1)
    again = Job(lambda handle: 7).start()
    assert again.wait(5)
    assert again.result == 7


def test_a_failure_is_told_in_words() -> None:
    def work(handle: Handle) -> None:
        raise ValueError("density 0.01\n is infeasible")

    job = Job(work).start()
    assert job.wait(5)
    assert (job.status, job.error) == ("failed", "density 0.01 is infeasible")


def test_a_job_runs_once() -> None:
    job = Job(lambda handle: None).start()
    with pytest.raises(RuntimeError, match="make another"):
        job.start()
