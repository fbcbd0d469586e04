"""Which of several replicas watches which cluster; nothing here knows of incidents.

A cluster must be watched by one replica: each event would be two incidents otherwise. Watching is
a lease on the cluster's row; here is what the rows mean, and what a replica decides from them.
state_store.py reads and writes the rows, and nightcrier.py acts on the decisions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchLease:
    """Which replica watches a cluster, and until when if it does not renew that."""

    cluster: str
    owner: str | None
    lease_epoch: int  # grows with each change of the owner
    lease_expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchView:
    """What the database says of who watches what."""

    now: datetime
    replicas: tuple[str, ...]  # those that watch and are alive
    leases: tuple[WatchLease, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchPlan:
    keep: tuple[str, ...]
    take: tuple[WatchLease, ...]
    give: tuple[str, ...]


def plan_watches(
    view: WatchView,
    me: str,
    configured: Collection[str],
    *,
    may_take_over: bool,
) -> WatchPlan:
    """What a replica should take and give back, so that all watch equally many clusters.

    An expired lease is taken only if `may_take_over`: after an outage of the database the old
    owner comes first.
    """
    replicas = sorted({me, *view.replicas})
    rank = replicas.index(me)
    known = sorted((lease for lease in view.leases), key=lambda lease: lease.cluster)
    mine = [lease.cluster for lease in known if lease.owner == me]
    wanted = [lease for lease in known if lease.cluster in configured]
    least, rest = divmod(len(wanted), len(replicas))
    share = least + (rank < rest)
    kept = [cluster for cluster in mine if cluster in configured][:share]

    def is_free(lease: WatchLease) -> bool:
        if lease.owner is None:
            return True
        expired = lease.lease_expires_at is None or lease.lease_expires_at <= view.now
        return may_take_over and expired and lease.owner != me

    free = [lease for lease in wanted if is_free(lease)]
    # Each begins elsewhere, so that they do not all reach for the same.
    start = rank * len(free) // len(replicas)
    return WatchPlan(
        keep=tuple(kept),
        take=tuple((free[start:] + free[:start])[: share - len(kept)]),
        give=tuple(cluster for cluster in mine if cluster not in kept),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTurn:
    """A replica's turn at watching a cluster."""

    cluster: str
    lease_epoch: int
    owner: str
    connected_at: datetime | None  # its stream was open for the first time
    updated_at: datetime  # its last sign of life
    ended_at: datetime | None


def received_by_another(
    moment: datetime, turns: Iterable[ClusterTurn], gaps: Collection[tuple[datetime, datetime]]
) -> bool | None:
    """Whether one of the `turns` of others received what came at a moment; None: not known yet.

    Of two replicas that were connected at once, the one that has the lease keeps the events. In
    `gaps`, from and until, the stream of whoever had the lease was lost.
    """
    for turn in turns:
        if turn.ended_at is not None and turn.ended_at <= moment:
            continue
        if turn.ended_at is None and turn.updated_at < moment:
            return None  # it may have been connected by then, or dead
        in_a_gap = any(lost_at <= moment < restored_at for lost_at, restored_at in gaps)
        if turn.connected_at is not None and turn.connected_at <= moment and not in_a_gap:
            return True
    return False
