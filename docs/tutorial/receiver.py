"""A receiver of webhooks: verifies each one, prints what it says. Needs WEBHOOK_SECRET."""

# ruff: noqa: T201 - printing is what it is for

import os

from aiohttp import web

from laneway.errors import WebhookNotVerified
from laneway.webhooks.signing import verify_webhook


async def receive(request: web.Request) -> web.Response:
    body = await request.read()  # the raw bytes: they are what was signed
    try:
        event = verify_webhook(body, request.headers, os.environ["WEBHOOK_SECRET"])
    except WebhookNotVerified as error:
        print(f"refused: {error}", flush=True)
        return web.Response(status=401)
    job = event["data"]
    print(f"{event['type']} attempt {job['attempt']} result {job['result']}", flush=True)
    return web.Response(status=204)


app = web.Application()
app.router.add_post("/", receive)

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(os.environ.get("PORT", "9000")))
