"""What a team writes first: a FastAPI endpoint that validates a body and enqueues it on RQ.

No keys, no limits, no row: what it answers 202 is in Redis only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import redis
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from rq import Queue

from bench.records import record


class Body(BaseModel):
    """The fields of `client.BODY`, with limits like those of `JobSpec`."""

    model_config = ConfigDict(extra="forbid")

    job_type: Annotated[str, Field(min_length=1, max_length=100)]
    parameters: dict[str, Any]
    priority: Literal["critical", "high", "normal", "low"]
    title: Annotated[str, Field(max_length=200)]
    tags: Annotated[tuple[Annotated[str, Field(max_length=100)], ...], Field(max_length=20)]
    metadata: dict[str, Any]
    timeout_seconds: Annotated[int, Field(ge=1, le=86400)]
    max_retries: Annotated[int, Field(ge=0, le=100)]


def create_app(redis_url: str) -> FastAPI:
    queue = Queue("default", connection=redis.Redis.from_url(redis_url))
    app = FastAPI()

    @app.post("/jobs", status_code=202)
    def create_job(body: Body) -> dict[str, str]:  # not async: FastAPI runs it in a thread
        job = queue.enqueue(
            record,
            body.parameters["number"],
            job_timeout=body.timeout_seconds,
            description=body.title,
            meta=body.metadata,
        )
        return {"id": job.id, "status": "queued"}

    return app
