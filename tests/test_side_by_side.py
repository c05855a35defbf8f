"""A CPU's cores at work side by side: same results, in order, told in the caller's thread; a failure stops the rest."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from moa_lab import side_by_side as module
from moa_lab import storage
from moa_lab.side_by_side import on_one_core, side_by_side, workers

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("two_threads")


def test_two_items_are_at_work_at_once_and_results_keep_their_order() -> None:
    met = threading.Barrier(2, timeout=10)

    def work(item: int) -> tuple[int, int, int]:
        met.wait()
        # The later item of a pair is done first.
        time.sleep(0.02 * (item % 2 == 0))
        return item, torch.get_num_threads(), threading.get_ident()

    told: list[tuple[int, int]] = []
    results = side_by_side(work, range(6), CPU, after=lambda result: told.append((result[0], threading.get_ident())))
    assert [item for item, _, _ in results] == list(range(6))
    assert {threads for _, threads, _ in results} == {1}, "torch's threads are dealt out"
    assert told == [(item, threading.get_ident()) for item in range(6)]
    assert threading.get_ident() not in {ident for _, _, ident in results}


def test_an_exception_keeps_its_words_and_no_other_item_is_begun() -> None:
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            raise OSError("no space left")
        time.sleep(0.05)

    with pytest.raises(OSError, match="no space left"):
        side_by_side(work, range(100), CPU)
    assert len(begun) < 10
    count = len(begun)
    time.sleep(0.1)
    assert len(begun) == count


def test_what_stops_the_caller_stops_the_items() -> None:
    begun = []

    def stop(_: None) -> None:
        raise KeyboardInterrupt

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, range(100), CPU, after=stop)
    assert len(begun) < 10


def test_torch_has_its_threads_back_afterwards_also_in_threads_to_come() -> None:
    side_by_side(lambda item: None, range(4), CPU)
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *found] == [2, 2]


def test_work_on_one_core_has_one_of_torchs_threads_and_fails_in_its_own_words() -> None:
    assert on_one_core(torch.get_num_threads, CPU) == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError, match="lost"):
        on_one_core(lambda: {}["lost"], CPU)
    assert on_one_core(torch.get_num_threads, torch.device("cuda")) == 2


def test_items_at_once_fit_in_half_the_free_memory_and_a_gpu_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda device: 400)
    assert workers(8, CPU) == 2
    assert workers(1, CPU) == 1
    assert workers(8, CPU, bytes_each=100) == 2
    assert workers(8, CPU, bytes_each=101) == workers(8, CPU, bytes_each=10**6) == 1
    assert workers(8, torch.device("cuda")) == 1
    here = []
    side_by_side(lambda item: here.append(threading.get_ident()), range(3), CPU, bytes_each=101)
    assert set(here) == {threading.get_ident()}


def test_files_written_side_by_side_leave_the_umask_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.umask
    before = real(0o027)

    def slow(mask: int) -> int:
        try:
            return real(mask)
        finally:
            time.sleep(0.02)

    monkeypatch.setattr(os, "umask", slow)
    try:
        side_by_side(lambda item: storage.write_text(tmp_path / str(item), "text"), range(6), CPU)
    finally:
        found = real(before)
    assert found == 0o027
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
