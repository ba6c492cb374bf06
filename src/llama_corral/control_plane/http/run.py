"""`POST /services/{service_name}/run`: one request, one task, its result as JSON. The hot route."""

from __future__ import annotations

import json
from typing import Any, Final

from ...protocol.lifecycle import TaskStatus
from ...protocol.records import Accepted, Terminal
from ...web import ErrorBody, Request, Response, Routes
from ..plane import ControlPlane
from .keys import KEY_HEADER, task_id_of
from .models import RunAnswer, RunQuery, RunRefusal

FAILED: Final = 424
"""`Failed Dependency`: the request was right and was accepted; the workflow that it depends on raised. No 4xx of the door
(nothing ran then) and no 5xx (this server is well, and repeating the request blindly would run the workflow again)."""

_STATUSES: Final = {
    TaskStatus.COMPLETED: 200,
    TaskStatus.FAILED: FAILED,
    TaskStatus.CANCELLED: 409,
    TaskStatus.TIMED_OUT: 504,
}


class RunRoutes:
    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane

    def routes(self) -> list[Routes]:
        routes = Routes(tag="Services")
        routes.add(
            "POST",
            "/services/{service_name}/run",
            self.run_service,
            hot=True,
            returns=RunAnswer,
            answers={202: RunAnswer, **dict.fromkeys((409, FAILED, 429, 503, 504), RunRefusal | ErrorBody)},
            takes_headers=KEY_HEADER,
        )
        return [routes]

    async def run_service(
        self, service_name: str, query: RunQuery, request: Request, body: dict[str, Any] | None = None
    ) -> Response:
        """Run a workflow and answer its result as JSON.

        The body is a JSON object: the start arguments of the workflow. If the client goes away before the answer, the
        task is cancelled. With `?detach=true` the answer is 202 with the ids at once, and the task goes on.

        A request with an `Idempotency-Key` header, or with a `task_id`, may be repeated: it joins the task of the first
        one. The same key with another request is a conflict (409).

        Other answers than the result, all with `task_id` and `status` beside the error: 424 if the workflow raised, 409
        if somebody cancelled the task, 504 if `?timeout=` passed, 503 if this server stops and the task goes on. 429 with
        `Retry-After`: too many tasks wait for the service, nothing was stored.
        """
        task_id, client_id = task_id_of(request, service_name, query.task_id)
        if query.detach:
            accepted = await self.plane.submit(
                service_name,
                body or {},
                session_id=query.session_id,
                task_id=task_id,
                client_id=client_id,
                **query.options(),
            )
            return Response.json(_ids(accepted, accepted.status), status=202)
        accepted, terminal = await self.plane.run(
            service_name,
            body or {},
            session_id=query.session_id,
            task_id=task_id,
            client_id=client_id,
            # When this server stops, nobody has left: the task is stored and goes on elsewhere, or later.
            abandoned=lambda: not request.drain.is_set(),
            **query.options(),
        )
        return self._answer(accepted, terminal)

    def _answer(self, accepted: Accepted, terminal: Terminal | None) -> Response:
        if terminal is None:
            return self._pending(accepted)
        if terminal.status is not TaskStatus.COMPLETED:
            return _refuse(accepted, terminal)
        head = json.dumps(_ids(accepted, terminal.status), separators=(",", ":"))
        # The result is JSON text already; parsing it to write it again would only cost time.
        return Response(f'{head[:-1]},"result":{terminal.result or "null"}}}'.encode())

    def _pending(self, accepted: Accepted) -> Response:
        where = f"GET /tasks/{accepted.task_id}/result?wait=SECONDS answers the result."
        if self.plane.draining:
            error = {"code": "draining", "message": "This server is stopping; the task goes on.", "hint": where}
            return _error(accepted, accepted.status, 503, error, {"Retry-After": "1"})
        error = {
            "code": "task_timed_out",
            "message": "The task's time is over; its run has not ended yet.",
            "hint": where,
        }
        return _error(accepted, accepted.status, 504, error)


def _ids(accepted: Accepted, status: TaskStatus) -> dict[str, Any]:
    return {"task_id": accepted.task_id, "session_id": accepted.session_id, "status": status.value}


def _refuse(accepted: Accepted, terminal: Terminal) -> Response:
    error: dict[str, Any] = {
        "code": f"task_{terminal.status.value}",
        "message": terminal.result_text or terminal.status.value,
        "hint": f"GET /tasks/{accepted.task_id} answers the record.",
    }
    if terminal.error is not None:
        error |= terminal.error.model_dump(exclude={"traceback"})
    return _error(accepted, terminal.status, _STATUSES[terminal.status], error)


def _error(
    accepted: Accepted, status: TaskStatus, code: int, error: dict[str, Any], headers: dict[str, str] | None = None
) -> Response:
    body = {**_ids(accepted, status), "result": None, "error": error, "detail": error["message"]}
    return Response.json(body, status=code, headers=headers)
