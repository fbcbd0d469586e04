"""What must hold in the database; shared by the tests that kill the program."""

from __future__ import annotations

# What must hold in the database whenever nobody is working any more; each query finds offenders.
LAWS = {
    "an accepted event has exactly one incident": """
        select event_id from fault_events e
        where (select count(*) from incidents where incident_id = e.event_id) <> 1
        union all select incident_id from incidents
        where incident_id not in (select event_id from fault_events)""",
    "a fault that was sent once is stored once": """
        select resource_name from fault_events group by resource_name having count(*) > 1""",
    "an incident is at its end": """
        select incident_id from incidents where completed_at is null or claimed_by is not null
        or status not in ('RESOLVED', 'AGENT_FAILED', 'FAILED', 'SKIPPED')""",
    "transitions are numbered from 1 on": """
        select incident_id from incident_transitions
        group by incident_id having min(seq) <> 1 or max(seq) <> count(*)""",
    "the first transition comes from PENDING": """
        select incident_id from incident_transitions where seq = 1 and from_status <> 'PENDING'""",
    "a transition begins where the one before it ended, and later": """
        select later.incident_id from incident_transitions later
        join incident_transitions earlier
          on earlier.incident_id = later.incident_id and earlier.seq = later.seq - 1
        where earlier.to_status <> later.from_status or earlier.at > later.at""",
    "transitions are those of the state machine": """
        select incident_id from incident_transitions where from_status || '>' || to_status not in
        ('PENDING>RUNNING', 'RUNNING>PENDING', 'RUNNING>RESOLVED', 'RUNNING>AGENT_FAILED',
         'RUNNING>FAILED')""",
    "the last transition leads to the incident's status": """
        select i.incident_id from incidents i where i.status <>
        (select to_status from incident_transitions t
         where t.incident_id = i.incident_id order by seq desc limit 1)""",
    "an attempt is a claim": """
        select i.incident_id from incidents i where i.attempt <>
        (select count(*) from incident_transitions t
         where t.incident_id = i.incident_id and t.reason = 'claimed')""",
    "an execution belongs to an incident and to one of its attempts": """
        select execution_id from agent_executions x
        where not exists (select 1 from incidents i
                          where i.incident_id = x.incident_id and x.attempt <= i.attempt)""",
    "no execution is open": """
        select execution_id from agent_executions where completed_at is null or outcome is null""",
    "a resolved incident has one report, of its last execution": """
        select i.incident_id from incidents i where i.status = 'RESOLVED' and 1 <> (
            select count(*) from triage_reports r join agent_executions x using (execution_id)
            where r.incident_id = i.incident_id and x.attempt = i.attempt
              and x.outcome = 'succeeded')""",
    "no incident has a report more than its outcome says": """
        select i.incident_id from incidents i
        where (select count(*) from triage_reports r where r.incident_id = i.incident_id)
              <> case when i.status = 'RESOLVED' then 1 else 0 end""",
}

# Differs from PostgreSQL: there a foreign key cannot be switched off, nor a file be asked for.
SQLITE_LAWS = {
    **LAWS,
    "the file is sound": "select * from pragma_integrity_check where integrity_check <> 'ok'",
    "foreign keys are kept": "select * from pragma_foreign_key_check",
}

# Replicas alone share a database that is not one's own; all of them have stopped in peace.
POSTGRES_LAWS = {
    **LAWS,
    "nobody watches any more": "select cluster from clusters where owner is not null",
    "a cluster's watches follow each other": """
        select later.cluster from cluster_watches later
        join cluster_watches earlier
          on earlier.cluster = later.cluster and earlier.lease_epoch < later.lease_epoch
        where earlier.ended_at is null or later.connected_at < earlier.ended_at""",
    "every watch has ended": "select cluster from cluster_watches where ended_at is null",
    "every worker has said good-bye, or was killed": """
        select worker_id from workers where state not in ('stopped', 'running')""",
}
