"""The order of a queue that is fair to all who fill it; nothing here knows of incidents.

incidents.py and state_store.py use this module; it imports nothing from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

MINUTE = 60 * 1_000_000  # microseconds, the unit of queue keys
_SLOT = MINUTE // 2
_OVERTAKE = 15 * MINUTE

Lane = tuple[str, str]  # who fills it, and how urgent it is


class QueueLanes:
    """Decides the order of a queue when things are put into it (start-time fair queuing).

    A thing starts at the head of the queue, later by a delay for its urgency, and one slot behind
    the last of its lane. So what is critical goes first, who is noisy starves nobody, and since
    delays age, nothing starves. Newcomers may overtake what has been waiting by 15 minutes at most.
    The lanes are memory: they start from what is pending.
    """

    def __init__(
        self, delays: Mapping[str, int], pending: Iterable[tuple[str, str, int]] = ()
    ) -> None:
        """`delays` by urgency; `pending`: who, how urgent, the largest key of the lane."""
        self._delays = delays
        self._last = {(who, urgency): key for who, urgency, key in pending}

    def assign(
        self,
        lanes: Sequence[Lane],
        *,
        now: int,
        head: int | None,
        newest_pending: Callable[[Sequence[str]], Mapping[str, int]],
    ) -> list[int]:
        """Queue keys for things, given by their lanes.

        `head` is the smallest key that is pending, `newest_pending` the largest of each of some
        who fill the queue; it is asked for the lanes that are ahead of the queue.
        """
        if head is None:
            self._last.clear()
        start = now if head is None else max(now - _OVERTAKE, min(head, now))
        # Looked up once: another thread may find the queue empty, and clear them, at any moment.
        known = {lane: self._last.get(lane) for lane in set(lanes)}
        given = {lane: last for lane, last in known.items() if last is not None}
        earliest = {lane: start + self._delays[lane[1]] for lane in set(lanes)}
        ahead = [lane for lane, last in given.items() if last + _SLOT > earliest[lane]]
        # What such a lane was given may have been claimed since, here or elsewhere.
        newest = newest_pending(sorted({who for who, _ in ahead})) if ahead else {}
        for lane in ahead:
            given[lane] = min(given[lane], newest.get(lane[0], start - _SLOT))
        keys = []
        for lane in lanes:
            key, last = earliest[lane], given.get(lane)
            if last is not None and last + _SLOT > key:
                key = last + _SLOT
            given[lane] = key
            keys.append(key)
        self._last |= given
        return keys
