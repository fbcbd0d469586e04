"""sql_database.py: calls that wait at the same time are made as one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from fake_mcp import run
from sql_database import GroupCall, RowRefused, StoreUnavailable


class Store:
    """Answers when it is told to, and refuses what is negative."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.called, self.open = asyncio.Event(), asyncio.Event()
        self.failure: Exception | None = None

    async def together(self, items: Sequence[int]) -> list[int | Exception]:
        self.calls.append(list(items))
        self.called.set()
        await self.open.wait()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        if any(item < 0 for item in items):
            raise RowRefused("negative")
        return [KeyError(item) if item == 13 else item * 10 for item in items]


def test_what_comes_while_a_call_is_made_goes_into_the_next() -> None:
    async def scenario() -> None:
        store = Store()
        group = GroupCall(store.together)
        first = asyncio.create_task(group.call(1))
        await store.called.wait()
        rest = [asyncio.create_task(group.call(item)) for item in (2, 3, 13)]
        await asyncio.sleep(0)
        store.open.set()
        assert await first == 10
        assert await rest[0] == 20
        assert await rest[1] == 30
        with pytest.raises(KeyError):
            await rest[2]
        assert store.calls == [[1], [2, 3, 13]]
        assert await group.call(4) == 40

    run(scenario())


def test_one_that_is_refused_does_not_hold_up_the_others() -> None:
    async def scenario() -> None:
        store = Store()
        store.open.set()
        group = GroupCall(store.together)
        results = await asyncio.gather(
            *(group.call(item) for item in (1, -1, 2)), return_exceptions=True
        )
        assert (results[0], results[2]) == (10, 20)
        assert isinstance(results[1], RowRefused)
        assert store.calls == [[1, -1, 2], [1], [-1], [2]]

    run(scenario())


def test_a_failure_is_told_to_all_and_the_next_call_is_made() -> None:
    async def scenario() -> None:
        store = Store()
        store.open.set()
        store.failure = StoreUnavailable("away")
        group = GroupCall(store.together)
        results = await asyncio.gather(
            *(group.call(item) for item in (1, 2)), return_exceptions=True
        )
        assert [type(result) for result in results] == [StoreUnavailable] * 2
        assert await group.call(3) == 30

    run(scenario())


def test_who_does_not_wait_any_more_keeps_nobody_from_an_answer() -> None:
    async def scenario() -> None:
        store = Store()
        group = GroupCall(store.together)
        impatient, patient = (asyncio.create_task(group.call(item)) for item in (1, 2))
        await store.called.wait()
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        store.open.set()
        assert await patient == 20
        assert store.calls == [[1, 2]], "a call that was made is carried out"

    run(scenario())


def test_a_call_is_of_a_limited_size() -> None:
    async def scenario() -> None:
        store = Store()
        store.open.set()
        group = GroupCall(store.together)
        results = await asyncio.gather(*(group.call(item) for item in range(100, 350)))
        assert results == [item * 10 for item in range(100, 350)]
        assert [len(call) for call in store.calls] == [100, 100, 50]

    run(scenario())
