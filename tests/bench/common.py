"""What the benchmarks share. They print, and never fail for being slow."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import sqlite_store  # noqa: E402

__all__ = [
    "ROOT",
    "at_once",
    "fresh",
    "fsync_milliseconds",
    "rounds",
    "seconds_of",
    "sqlite_store",
    "table",
]


@contextmanager
def fresh(where: str | None) -> Iterator[Path]:
    """A new directory on the disk that is to be measured (default: the current one's)."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=where or "."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def fsync_milliseconds(folder: Path) -> float:
    """The median time to make 4 KB more of a file durable: what the disk allows."""
    times = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(100):
            began = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def rounds(contestants: Mapping[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Run all of them once, then all of them again, …: what disturbs a round disturbs all."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(count):
        for name, measure in contestants.items():
            results[name].append(measure())
            print(f"round {number + 1}  {name}: {results[name][-1]:,.4g}", file=sys.stderr)
    return results


class Start:
    """What a process calls when it is ready to begin; returns when all of them are."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ready, self._go = context.Semaphore(0), context.Event()

    def __call__(self) -> None:
        self._ready.release()
        self._go.wait()

    def fire(self, count: int) -> float:
        for _ in range(count):
            if not self._ready.acquire(timeout=120):
                raise RuntimeError("a process did not become ready")
        self._go.set()
        return time.perf_counter()


@contextmanager
def at_once(count: int, target: Callable[..., None], *arguments: Any) -> Iterator[float]:
    """Processes that each run `target(start, number, *arguments)`; gives when they all began."""
    context = multiprocessing.get_context("spawn")
    start = Start()
    started = [
        context.Process(target=target, args=(start, number, *arguments)) for number in range(count)
    ]
    for process in started:
        process.start()
    try:
        yield start.fire(count)
        for process in started:
            process.join(60)
            if process.exitcode != 0:
                raise RuntimeError(f"a process ended with {process.exitcode}")
    finally:
        for process in started:
            process.kill()


def seconds_of(count: int, target: Callable[..., None], *arguments: Any) -> float:
    """How long such processes take until the last of them has ended."""
    with at_once(count, target, *arguments) as began:
        pass
    return time.perf_counter() - began


def table(results: Mapping[str, list[float]], unit: str, *, against: str) -> None:
    """Medians, the range of the rounds, and the ratio to one of the lines."""
    reference = statistics.median(results[against])
    width = max(len(name) for name in results)
    print(f"{'':{width}}  {unit:>12}  {'lowest':>10}  {'highest':>10}  ratio")
    for name, values in results.items():
        median = statistics.median(values)
        print(
            f"{name:{width}}  {median:12,.4g}  {min(values):10,.4g}  {max(values):10,.4g}"
            f"  {median / reference:5.2f}"
        )
