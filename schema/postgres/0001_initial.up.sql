-- nightcrier, version 1, PostgreSQL 13 and later.
--
-- The same tables, columns, checks, indexes and views as in ../sqlite/0001_initial.up.sql, which says
-- what they are for. What differs:
--
-- Types. Times are `timestamptz`. Ids are `uuid`: 16 bytes instead of 37, and their order is still
-- the order of arrival. JSON is `jsonb`, which can be asked but keeps neither spaces nor the order of
-- keys. What is counted in microseconds, tokens or events is `bigint`: `integer` has 32 bits here.
--
-- Collation. Names, words and everything else that is compared are `text collate "C"`: byte order, as
-- in SQLite, and quicker. And no index depends on the collations of the C library, which change with
-- its version and leave indexes corrupt. Comparing two columns of different collations is an error,
-- so all of them have this one. Prose that is only read has the collation of the database.
--
-- Storage. There is no `without rowid`. An update writes a new version of the row; where no indexed
-- column changes and the page has room, no index is touched (HOT). `fillfactor` leaves that room.
--
-- No sequence, trigger, extension, domain or enum type: other engines that speak this SQL lack them,
-- or they cost there. No name of a schema: the tables go where `search_path` says.

create table fault_events (
    event_id             uuid not null primary key,
    cluster              text collate "C" not null check (cluster <> ''),
    reported_cluster     text collate "C" not null default '',
    session_id           text collate "C" not null default '',  -- 512 characters at most, as delivery_id:
    subscription_id      text collate "C" not null default '',  -- an index row has 2,704 bytes at most
    delivery_id          text collate "C",
    fault_fingerprint    text collate "C" not null default '',
    fault_type           text collate "C" not null check (fault_type <> ''),
    severity             text collate "C" not null
                         check (severity in ('critical', 'warning', 'info', 'unknown')),
    context              text not null default '',
    occurred_at          timestamptz,
    received_at          timestamptz not null,
    resource_api_version text collate "C" not null default '',
    resource_kind        text collate "C" not null default '',
    resource_namespace   text collate "C" not null default '',
    resource_name        text collate "C" not null default '',
    resource_uid         text collate "C" not null default '',
    payload              jsonb not null
);

create index fault_events_fingerprint on fault_events (fault_fingerprint);

create unique index fault_events_delivery on fault_events (cluster, session_id, delivery_id)
    where delivery_id is not null;

-- Vacuum after 5,000 dead rows, whatever the size of the table, and without pauses: every claim goes
-- through the dead rows at the front of the queue. The three autovacuum settings are the one thing
-- here that only PostgreSQL and engines built from it know.
create table incidents (
    incident_id        uuid not null primary key references fault_events (event_id),
    status             text collate "C" not null check (status in
                       ('PENDING', 'RUNNING', 'RESOLVED', 'AGENT_FAILED', 'FAILED', 'SKIPPED')),
    queue_key          bigint not null,
    cluster            text collate "C" not null,
    severity           text collate "C" not null
                       check (severity in ('critical', 'warning', 'info', 'unknown')),
    fault_type         text collate "C" not null,
    resource_kind      text collate "C" not null default '',
    resource_namespace text collate "C" not null default '',
    resource_name      text collate "C" not null default '',
    created_at         timestamptz not null,
    started_at         timestamptz,
    completed_at       timestamptz,
    attempt            integer not null default 0,
    attempts_charged   integer not null default 0,
    claimed_by         text collate "C",
    lease_expires_at   timestamptz,
    exit_code          integer,
    failure_reason     text,
    check ((status = 'RUNNING') = (claimed_by is not null)),
    check ((status = 'RUNNING') = (lease_expires_at is not null)),
    check ((status in ('PENDING', 'RUNNING')) = (completed_at is null))
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_cost_delay = 0);

-- The queue. There must be no plain index on status, and none on lease_expires_at: the planner
-- would prefer the first for a claim and sort, the second would make every heartbeat write to all
-- the indexes of the row.
create index incidents_queue on incidents (queue_key, incident_id) where status = 'PENDING';
create index incidents_queue_by_cluster on incidents (cluster, queue_key, incident_id)
    where status = 'PENDING';
create index incidents_running on incidents (cluster, incident_id) where status = 'RUNNING';

create index incidents_by_cluster on incidents (cluster, incident_id);
create index incidents_by_kind on incidents (resource_kind, incident_id);
create index incidents_by_severity on incidents (severity, incident_id);
create index incidents_unresolved on incidents (status, incident_id)
    where status in ('AGENT_FAILED', 'FAILED', 'SKIPPED');

create table incident_transitions (
    incident_id uuid not null references incidents (incident_id),
    seq         integer not null,
    from_status text collate "C" not null,
    to_status   text collate "C" not null,
    at          timestamptz not null,
    worker_id   text collate "C",
    reason      text not null default '',
    primary key (incident_id, seq)
);

-- No fillfactor: the one update of a row sets completed_at, which is indexed.
create table agent_executions (
    execution_id       uuid not null primary key,
    incident_id        uuid not null references incidents (incident_id),
    attempt            integer not null,
    cluster            text collate "C" not null,
    worker_id          text collate "C" not null,
    host               text collate "C" not null,
    pid                integer,
    process_started_at timestamptz,
    runtime            text collate "C" not null,
    agent              text collate "C" not null,
    agent_version      text collate "C",
    model              text collate "C",
    prompt_sha256      text collate "C",
    workspace          text collate "C",
    started_at         timestamptz not null,
    completed_at       timestamptz,
    exit_code          integer,
    signal             text collate "C",
    outcome            text collate "C"
                       check (outcome in ('succeeded', 'failed', 'timed_out', 'output_invalid',
                                          'not_started', 'lease_lost', 'cancelled')),
    error_message      text,
    log_paths          jsonb,
    input_tokens       bigint,
    output_tokens      bigint,
    cost_usd           double precision,
    usage              jsonb,
    unique (incident_id, attempt),
    check ((completed_at is null) = (outcome is null))
);

create index agent_executions_completed on agent_executions (completed_at);

create table triage_reports (
    report_id       uuid not null primary key,
    incident_id     uuid not null references incidents (incident_id),
    execution_id    uuid not null unique references agent_executions (execution_id),
    generated_at    timestamptz not null,
    root_cause      text,
    confidence      text collate "C" check (confidence in ('HIGH', 'MEDIUM', 'LOW')),
    report_markdown text not null,
    report_html     text
);

create index triage_reports_incident on triage_reports (incident_id);

create table notifications (
    notification_id  uuid not null primary key,
    incident_id      uuid references incidents (incident_id),
    kind             text collate "C" not null,
    sink             text collate "C" not null,
    dedupe_key       text collate "C" unique,
    payload          jsonb not null,
    status           text collate "C" not null check (status in ('PENDING', 'SENT', 'DEAD')),
    attempt          integer not null default 0,
    created_at       timestamptz not null,
    next_attempt_at  timestamptz not null,
    claimed_by       text collate "C",
    lease_expires_at timestamptz,
    sent_at          timestamptz,
    last_error       text
);

create index notifications_due on notifications (next_attempt_at) where status = 'PENDING';
create index notifications_incident on notifications (incident_id) where incident_id is not null;

-- Few rows that are updated all the time: half of each page is left for their next versions.
create table clusters (
    cluster                text collate "C" not null primary key check (cluster <> ''),
    endpoint               text collate "C" not null,
    labels                 jsonb not null default '{}',
    triage_enabled         boolean not null default true,
    connection_state       text collate "C" not null default 'disconnected' check (connection_state in
                           ('disconnected', 'connecting', 'subscribing', 'active', 'degraded',
                            'failed', 'standby')),
    protocol_version       text collate "C",
    owner                  text collate "C",
    lease_epoch            integer not null default 0,
    lease_expires_at       timestamptz,
    session_id             text collate "C",
    subscription_id        text collate "C",
    connected_at           timestamptz,
    stream_lost_at         timestamptz,
    last_event_at          timestamptz,
    events_total           bigint not null default 0,
    malformed_total        bigint not null default 0,
    permissions            jsonb,
    permissions_checked_at timestamptz,
    last_error             text,
    updated_at             timestamptz not null
) with (fillfactor = 50);

create table cluster_gaps (
    cluster     text collate "C" not null,
    lost_at     timestamptz not null,
    restored_at timestamptz,
    reason      text not null,
    primary key (cluster, lost_at)
);

create table holds (
    hold_id uuid not null primary key,
    scope   text collate "C" not null,
    cluster text collate "C",
    reason  text not null,
    since   timestamptz not null,
    until   timestamptz
);

create table workers (
    worker_id    text collate "C" not null primary key,
    host         text collate "C" not null,
    pid          integer not null,
    version      text collate "C" not null,
    role         text collate "C" not null check (role in ('all', 'ingest', 'worker')),
    state        text collate "C" not null check (state in ('running', 'draining', 'stopped')),
    started_at   timestamptz not null,
    heartbeat_at timestamptz not null
) with (fillfactor = 50);

-- ---------------------------------------------------------------------------------------------
-- Views: a contract with the people who query this database. Columns are only ever added.
-- The casts keep numbers what they are in SQLite: PostgreSQL rounds and sums to `numeric`.
-- ---------------------------------------------------------------------------------------------

-- One row for each incident: the event, the last run of the agent, the headline of its report.
create view v_incidents as
select i.incident_id, i.status, i.severity, i.cluster, i.fault_type,
       i.resource_kind, i.resource_namespace, i.resource_name,
       i.created_at, i.started_at, i.completed_at,
       cast(round(cast(extract(epoch from i.completed_at - i.created_at) as numeric), 3)
            as double precision) as seconds_to_complete,
       i.attempt, i.claimed_by, i.failure_reason,
       r.root_cause, r.confidence,
       x.agent, x.model, x.outcome, x.exit_code, x.cost_usd, x.workspace,
       e.occurred_at, e.fault_fingerprint, e.context
from incidents i
join fault_events e on e.event_id = i.incident_id
left join agent_executions x
       on x.incident_id = i.incident_id
      and x.attempt = (select max(attempt) from agent_executions where incident_id = i.incident_id)
left join triage_reports r on r.execution_id = x.execution_id;

-- One row for each cluster that has work waiting or running.
create view v_queue as
select q.cluster,
       cast(sum(q.pending) as bigint) as pending,
       cast(sum(q.running) as bigint) as running,
       cast(round(extract(epoch from now() - min(q.oldest_pending))) as integer)
           as oldest_pending_seconds,
       (select h.scope from holds h
         where (h.cluster is null or h.cluster = q.cluster)
           and (h.until is null or h.until > now())
         order by h.since limit 1) as hold,
       (select h.reason from holds h
         where (h.cluster is null or h.cluster = q.cluster)
           and (h.until is null or h.until > now())
         order by h.since limit 1) as hold_reason
from (select cluster, count(*) as pending, 0 as running, min(created_at) as oldest_pending
        from incidents where status = 'PENDING' group by cluster
      union all
      select cluster, 0, count(*), null
        from incidents where status = 'RUNNING' group by cluster) q
group by q.cluster;

create view v_executions as
select x.execution_id, x.incident_id, x.attempt, x.cluster, x.agent, x.model, x.outcome,
       x.started_at, x.completed_at,
       cast(round(cast(extract(epoch from x.completed_at - x.started_at) as numeric), 3)
            as double precision) as seconds,
       x.exit_code, x.signal, x.error_message,
       x.input_tokens, x.output_tokens, x.cost_usd, x.worker_id, x.workspace
from agent_executions x;

create view v_clusters as
select c.cluster, c.connection_state, c.triage_enabled, c.events_total, c.malformed_total,
       c.last_event_at,
       cast(round(extract(epoch from now() - c.last_event_at)) as integer) as silent_seconds,
       c.connected_at, c.stream_lost_at,
       (select count(*) from cluster_gaps g where g.cluster = c.cluster) as gaps,
       (select cast(round(cast(sum(extract(epoch from coalesce(g.restored_at, now()) - g.lost_at))
                               as numeric), 3) as double precision)
          from cluster_gaps g where g.cluster = c.cluster) as gap_seconds,
       c.owner, c.last_error, c.permissions, c.endpoint, c.updated_at
from clusters c;
