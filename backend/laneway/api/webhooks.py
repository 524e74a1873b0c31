"""The tenant's webhook secret over HTTP."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json
from laneway.api.runtime import CallerDep, RuntimeDep, in_thread
from laneway.api.schemas import problems
from laneway.engine.callers import Role, webhook_secret
from laneway.limits.rules import RateClass
from laneway.webhooks.secrets import SecretBox

router = APIRouter(route_class=GatedRoute, tags=["webhooks"])


class WebhookSecret(BaseModel):
    """What signs everything that goes to a job's own `webhook_url`: `whsec_` and base64."""

    secret: str


@router.get(
    "/webhooks/secret", response_model=WebhookSecret, operation_id="getWebhookSecret", responses=problems()
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def get_webhook_secret(caller: CallerDep, runtime: RuntimeDep) -> Response:
    """The tenant's secret, for receivers to verify with. Needs the role operator."""

    def find() -> str:
        return webhook_secret(runtime.database, SecretBox.from_settings(runtime.settings), caller.tenant_id)

    return as_json({"secret": await in_thread(find)})
