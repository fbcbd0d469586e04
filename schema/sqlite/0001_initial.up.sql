-- nightcrier, version 1, SQLite.
--
-- Made to be opened by hand, also by the sqlite3 of RHEL 8 (3.26): no STRICT tables, no generated
-- columns. Times are UTC text, 2026-11-23T03:00:00.123456Z, so that text order is time order.
-- Ids are UUIDv7 text: their order is the order of arrival. Tables of short rows are clustered on
-- their id (`without rowid`): one B-tree instead of two, and new rows go to its end. The two tables
-- with long rows (payloads, reports) keep a rowid: their overflow pages would double the file.

-- What a cluster reported, one row for every report, as received.
create table fault_events (
    event_id             text not null primary key,
    cluster              text not null check (cluster <> ''),     -- our name for the cluster
    reported_cluster     text not null default '',                -- the server's name for itself
    session_id           text not null default '',                -- MCP session it came through
    subscription_id      text not null default '',
    delivery_id          text,                                    -- SSE id, where the server sends one
    fault_fingerprint    text not null default '',                -- the server's faultId: NOT unique
    fault_type           text not null check (fault_type <> ''),
    severity             text not null
                         check (severity in ('critical', 'warning', 'info', 'unknown')),
    context              text not null default '',
    occurred_at          text,                                    -- the server's clock
    received_at          text not null,                           -- our clock
    resource_api_version text not null default '',
    resource_kind        text not null default '',
    resource_namespace   text not null default '',
    resource_name        text not null default '',
    resource_uid         text not null default '',
    payload              text not null                            -- JSON, as sent
);

create index fault_events_fingerprint on fault_events (fault_fingerprint);

-- A resumed stream replays messages; the same message of the same session is stored once.
create unique index fault_events_delivery on fault_events (cluster, session_id, delivery_id)
    where delivery_id is not null;

-- One incident for every event (its id is the event's id), and the queue of the workers.
create table incidents (
    incident_id        text not null primary key references fault_events (event_id),
    status             text not null check (status in
                       ('PENDING', 'RUNNING', 'RESOLVED', 'AGENT_FAILED', 'FAILED', 'SKIPPED')),
    queue_key          integer not null,            -- virtual start time in microseconds: order of claims
    cluster            text not null,
    severity           text not null
                       check (severity in ('critical', 'warning', 'info', 'unknown')),
    fault_type         text not null,
    resource_kind      text not null default '',
    resource_namespace text not null default '',
    resource_name      text not null default '',
    created_at         text not null,
    started_at         text,                        -- first claim
    completed_at       text,
    attempt            integer not null default 0,  -- only grows: the fencing token of a claim
    attempts_charged   integer not null default 0,  -- what counts against max_attempts
    claimed_by         text,
    lease_expires_at   text,
    exit_code          integer,
    failure_reason     text,
    check ((status = 'RUNNING') = (claimed_by is not null)),
    check ((status = 'RUNNING') = (lease_expires_at is not null)),
    check ((status in ('PENDING', 'RUNNING')) = (completed_at is null))
) without rowid;

-- The queue. There must be no plain index on status, and none on lease_expires_at: the planner
-- would prefer the first for a claim and sort, the second would make every heartbeat move index rows.
create index incidents_queue on incidents (queue_key, incident_id) where status = 'PENDING';
create index incidents_queue_by_cluster on incidents (cluster, queue_key, incident_id)
    where status = 'PENDING';
create index incidents_running on incidents (cluster, incident_id) where status = 'RUNNING';

-- Lists, newest first, by page.
create index incidents_by_cluster on incidents (cluster, incident_id);
create index incidents_by_kind on incidents (resource_kind, incident_id);
create index incidents_by_severity on incidents (severity, incident_id);
create index incidents_unresolved on incidents (status, incident_id)
    where status in ('AGENT_FAILED', 'FAILED', 'SKIPPED');

-- Every change of status after creation.
create table incident_transitions (
    incident_id text not null references incidents (incident_id),
    seq         integer not null,
    from_status text not null,
    to_status   text not null,
    at          text not null,
    worker_id   text,
    reason      text not null default '',
    primary key (incident_id, seq)
) without rowid;

-- Every run of an agent.
create table agent_executions (
    execution_id       text not null primary key,
    incident_id        text not null references incidents (incident_id),
    attempt            integer not null,
    cluster            text not null,
    worker_id          text not null,
    host               text not null,
    pid                integer,
    process_started_at text,                        -- with pid: tells a process from its pid's next owner
    runtime            text not null,
    agent              text not null,
    agent_version      text,
    model              text,
    prompt_sha256      text,
    workspace          text,
    started_at         text not null,
    completed_at       text,
    exit_code          integer,
    signal             text,
    outcome            text check (outcome in ('succeeded', 'failed', 'timed_out', 'output_invalid',
                                               'not_started', 'lease_lost', 'cancelled')),
    error_message      text,
    log_paths          text,                        -- JSON list
    input_tokens       integer,
    output_tokens      integer,
    cost_usd           real,
    usage              text,                        -- JSON, as the agent reported it
    unique (incident_id, attempt),
    check ((completed_at is null) = (outcome is null))
) without rowid;

create index agent_executions_completed on agent_executions (completed_at);

create table triage_reports (
    report_id       text not null primary key,
    incident_id     text not null references incidents (incident_id),
    execution_id    text not null unique references agent_executions (execution_id),
    generated_at    text not null,
    root_cause      text,
    confidence      text check (confidence in ('HIGH', 'MEDIUM', 'LOW')),
    report_markdown text not null,
    report_html     text
);

create index triage_reports_incident on triage_reports (incident_id);

-- The outbox: what people are to be told, written with the outcome that it tells of.
create table notifications (
    notification_id  text not null primary key,
    incident_id      text references incidents (incident_id),
    kind             text not null,
    sink             text not null,
    dedupe_key       text unique,
    payload          text not null,
    status           text not null check (status in ('PENDING', 'SENT', 'DEAD')),
    attempt          integer not null default 0,
    created_at       text not null,
    next_attempt_at  text not null,
    claimed_by       text,
    lease_expires_at text,
    sent_at          text,
    last_error       text
) without rowid;

create index notifications_due on notifications (next_attempt_at) where status = 'PENDING';
create index notifications_incident on notifications (incident_id) where incident_id is not null;

-- The clusters being watched, with the lease of the replica that watches.
create table clusters (
    cluster                text not null primary key check (cluster <> ''),
    endpoint               text not null,
    labels                 text not null default '{}',
    triage_enabled         integer not null default 1 check (triage_enabled in (0, 1)),
    connection_state       text not null default 'disconnected' check (connection_state in
                           ('disconnected', 'connecting', 'subscribing', 'active', 'degraded',
                            'failed', 'standby')),
    protocol_version       text,
    owner                  text,
    lease_epoch            integer not null default 0,
    lease_expires_at       text,
    session_id             text,
    subscription_id        text,
    connected_at           text,
    stream_lost_at         text,
    last_event_at          text,
    events_total           integer not null default 0,
    malformed_total        integer not null default 0,
    permissions            text,
    permissions_checked_at text,
    last_error             text,
    updated_at             text not null
) without rowid;

-- Times in which a cluster's faults could not be received; servers replay nothing.
create table cluster_gaps (
    cluster     text not null,
    lost_at     text not null,
    restored_at text,
    reason      text not null,
    primary key (cluster, lost_at)
) without rowid;

-- Why pending work is not started.
create table holds (
    hold_id text not null primary key,
    scope   text not null,
    cluster text,                                   -- null: all clusters
    reason  text not null,
    since   text not null,
    until   text
) without rowid;

create table workers (
    worker_id    text not null primary key,
    host         text not null,
    pid          integer not null,
    version      text not null,
    role         text not null check (role in ('all', 'ingest', 'worker')),
    state        text not null check (state in ('running', 'draining', 'stopped')),
    started_at   text not null,
    heartbeat_at text not null
) without rowid;

-- ---------------------------------------------------------------------------------------------
-- Views: a contract with the people who query this file. Columns are only ever added.
-- ---------------------------------------------------------------------------------------------

-- One row for each incident: the event, the last run of the agent, the headline of its report.
create view v_incidents as
select i.incident_id, i.status, i.severity, i.cluster, i.fault_type,
       i.resource_kind, i.resource_namespace, i.resource_name,
       i.created_at, i.started_at, i.completed_at,
       round((julianday(i.completed_at) - julianday(i.created_at)) * 86400, 3) as seconds_to_complete,
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
       sum(q.pending) as pending,
       sum(q.running) as running,
       cast(round((julianday('now') - julianday(min(q.oldest_pending))) * 86400) as integer)
           as oldest_pending_seconds,
       (select h.scope from holds h
         where (h.cluster is null or h.cluster = q.cluster)
           and (h.until is null or julianday(h.until) > julianday('now'))
         order by h.since limit 1) as hold,
       (select h.reason from holds h
         where (h.cluster is null or h.cluster = q.cluster)
           and (h.until is null or julianday(h.until) > julianday('now'))
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
       round((julianday(x.completed_at) - julianday(x.started_at)) * 86400, 3) as seconds,
       x.exit_code, x.signal, x.error_message,
       x.input_tokens, x.output_tokens, x.cost_usd, x.worker_id, x.workspace
from agent_executions x;

create view v_clusters as
select c.cluster, c.connection_state, c.triage_enabled, c.events_total, c.malformed_total,
       c.last_event_at,
       cast(round((julianday('now') - julianday(c.last_event_at)) * 86400) as integer)
           as silent_seconds,
       c.connected_at, c.stream_lost_at,
       (select count(*) from cluster_gaps g where g.cluster = c.cluster) as gaps,
       (select round(sum(julianday(coalesce(g.restored_at, 'now')) - julianday(g.lost_at)) * 86400, 3)
          from cluster_gaps g where g.cluster = c.cluster) as gap_seconds,
       c.owner, c.last_error, c.permissions, c.endpoint, c.updated_at
from clusters c;
