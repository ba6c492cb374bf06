"""What changes services, instances and sessions. The rules of `accept_units` hold here too."""

from __future__ import annotations

import json
from typing import Any

from ..protocol.records import DeletedSession, InstanceRecord, ServiceRecord, SessionRecord
from .endings import forget_epochs
from .transaction import Transaction


def put_service(tx: Transaction, service: ServiceRecord, instance: InstanceRecord | None) -> None:
    tx.run(
        tx.sql.put_service,
        {
            "service_name": service.service_name,
            "definition": service.definition,
            "events": service.events,
            "start_schema": service.start_schema,
            "registered_at": service.registered_at,
        },
    )
    if instance is not None:
        tx.run(
            tx.sql.put_instance,
            {
                "instance_id": instance.instance_id,
                "service_name": instance.service_name,
                "capacity": instance.capacity,
                "heartbeat": instance.heartbeat,
                "started_at": instance.started_at,
                "embedded": int(instance.embedded),
            },
        )


def delete_service(tx: Transaction, service_name: str) -> bool:
    tx.run(tx.sql.delete_instances_of, {"service_name": service_name})
    return tx.run(tx.sql.delete_service, {"service_name": service_name}) > 0


def delete_instance(tx: Transaction, instance_id: str) -> None:
    tx.run(tx.sql.delete_instance, {"instance_id": instance_id})


def create_session(tx: Transaction, session: SessionRecord) -> bool:
    values = {
        "session_id": session.session_id,
        "state": session.state,
        "version": session.version,
        "policy": session.policy,
        "created_at": session.created_at,
    }
    return tx.run(tx.sql.insert_session, values) > 0


def merge_state(tx: Transaction, session_id: str, changes: str) -> SessionRecord | None:
    """`changes` is a JSON object as text: encoded by the caller, where a value that is no JSON is its error."""
    row = tx.one(tx.sql.lock_session, {"session_id": session_id})
    if row is None:
        return None
    state: dict[str, Any] = json.loads(row[1])
    state.update(json.loads(changes))
    merged = json.dumps(state, ensure_ascii=False, separators=(",", ":"))
    tx.run(tx.sql.set_state, {"session_id": session_id, "new_state": merged})
    # Its tasks are not listed: there may be very many, and this is the writer's time.
    return SessionRecord(row[0], merged, row[2] + 1, *row[3:])


def delete_session(tx: Transaction, session_id: str) -> DeletedSession | None:
    key = {"session_id": session_id}
    tx.hold_lines((session_id,))
    tx.hold_tasks(session_id)
    running = tx.all(tx.sql.session_owned, key)
    if not tx.run(tx.sql.delete_session, key):
        return None
    highest = tx.one(tx.sql.session_epochs, key)
    assert highest is not None
    forget_epochs(tx, highest[0] or 0)
    for statement in tx.sql.delete_session_rows:
        tx.run(statement, key)
    return DeletedSession(session_id, tuple((task_id, owner) for task_id, owner in running))
