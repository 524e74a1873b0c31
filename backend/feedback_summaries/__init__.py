"""An example application on Laneway: it sums up the feedback a student was given.

Put `feedback_summaries` into `LANEWAY_TASKS`: workers learn the job type `feedback.summary`, and the API
serves the routes below `/api/v1/feedback-summaries`. Laneway knows nothing of this package; this package
uses what Laneway offers to everybody (docs/how-to/mount_an_app.md).
"""

from typing import TYPE_CHECKING

from feedback_summaries import tasks as tasks

if TYPE_CHECKING:
    from fastapi import APIRouter


def api_router() -> "APIRouter":
    """What the API mounts. Imported only there, so that workers load no web framework."""
    from feedback_summaries.api import router

    return router
