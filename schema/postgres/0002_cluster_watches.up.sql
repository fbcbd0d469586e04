-- Who watched which cluster when: one row for each turn of a replica at it, begun by taking the
-- lease of the cluster with the next epoch.
--
-- A replica that is cut off from the database goes on watching and keeps its events for later,
-- while another one takes over. What came at the time of both was received twice, under ids of our
-- own that differ. This table decides who keeps it: from the `connected_at` of the later turn on the
-- later one, before that the earlier one.
create table cluster_watches (
    cluster      text collate "C" not null,
    lease_epoch  integer not null,
    owner        text collate "C" not null,         -- the replica
    connected_at timestamptz,                       -- its stream was first open; null: not yet
    updated_at   timestamptz not null,              -- its last sign of life
    ended_at     timestamptz,                       -- lease given back or lost; null: still watching
    primary key (cluster, lease_epoch)
) with (fillfactor = 50);                           -- heartbeats, as those of clusters

create index cluster_watches_open on cluster_watches (owner) where ended_at is null;
