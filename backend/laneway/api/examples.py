"""Bodies that the OpenAPI document shows, by operation. A test sends each of them."""

from __future__ import annotations

from typing import Any

EXAMPLES: dict[str, dict[str, Any]] = {
    "createJob": {
        "a job": {"job_type": "demo.echo", "parameters": {"hello": "world"}},
        "with all the trimmings": {
            "job_type": "demo.sleep",
            "parameters": {"seconds": 3},
            "priority": "high",
            "title": "A nap",
            "tags": ["nap"],
            "metadata": {"order": 7},
            "delay_seconds": 60,
            "timeout_seconds": 30,
            "max_retries": 5,
            "retry_delay_seconds": 10,
            "unique_key": "the one nap",
            "webhook_url": "https://hooks.example.com/jobs",
            "webhook_events": ["job.completed", "job.failed"],
        },
        "a URL to be called": {
            "target": {
                "url": "https://api.example.com/invoices/7/send",
                "headers": {"Authorization": "Bearer its-own-key"},
                "body": {"copy_to": "books@example.com"},
                "success": ["2xx", 409],
            }
        },
    },
    "changeJob": {"sooner": {"priority": "critical", "tags": ["urgent"]}},
    "reportJobProgress": {"half-way": {"percent": 50, "message": "3 of 6 pages", "details": {"page": 3}}},
    "reportJobComplete": {"with a result": {"result": {"invoice": "2026-0007", "sent": True}}},
    "reportJobFailure": {"out of paper": {"message": "the printer has no paper", "retry_after_seconds": 600}},
    "cancelJob": {"now": {"reason": "changed my mind", "terminate": True}},
    "cancelJobs": {
        "what waits in a queue": {"filter": {"queue": "default", "status": ["queued"]}, "dry_run": True}
    },
    "retryJob": {"with other parameters": {"parameters": {"hello": "again"}}},
    "retryDeadLetter": {"with other parameters": {"parameters": {"times": 0}}},
    "retryDeadLetters": {"ten a second": {"filter": {"job_type": "demo.fail"}, "rate": 10}},
    "purgeDeadLetters": {"how many": {"filter": {"reason": "permanent"}, "dry_run": True}},
    "createWebhookEndpoint": {
        "ends of jobs": {"url": "https://hooks.example.com/laneway", "event_types": ["job.*"]}
    },
    "changeWebhookEndpoint": {"paused": {"status": "paused"}},
    "rotateWebhookEndpointSecret": {"with an hour of grace": {"grace_seconds": 3600}},
    "rotateWebhookSecret": {"with an hour of grace": {"grace_seconds": 3600}},
    "recoverWebhookEndpoint": {"how many": {"since": "2026-11-01T00:00:00Z", "dry_run": True}},
    "pauseQueue": {"with a reason": {"reason": "the mail server is down"}},
    "purgeQueue": {"how many": {"confirm": "default", "dry_run": True}},
    "createBatch": {
        "of one type": {
            "job_type": "demo.echo",
            "items": [{"parameters": {"n": 1}}, {"parameters": {"n": 2}}],
        },
        "of several types": {
            "jobs": [{"job_type": "demo.echo", "parameters": {"n": 1}}, {"job_type": "demo.noop"}],
            "defaults": {"priority": "low"},
            "on_invalid": "skip",
            "on_complete": {"job_type": "demo.echo", "parameters": {"all": "done"}},
        },
    },
    "cancelBatch": {"with a reason": {"reason": "the wrong file"}},
    "createChain": {
        "one after the other": {
            "name": "nap, then tell",
            "chain_definition": [
                {"job_type": "demo.sleep", "parameters": {"seconds": 1}},
                {"job_type": "demo.echo", "parameters": {"slept": {"$result": "step_0.slept_seconds"}}},
            ],
            "execute": True,
        },
        "side by side": {
            "name": "two naps",
            "execution_mode": "parallel",
            "chain_definition": [{"job_type": "demo.sleep"}, {"job_type": "demo.sleep"}],
        },
    },
    "changeChain": {"another name": {"name": "tell, then nap", "stop_on_failure": False}},
    "cancelChain": {"with a reason": {"reason": "changed my mind"}},
    "createScheduledJob": {
        "every working day": {
            "name": "reports",
            "job_type": "demo.echo",
            "cron_expression": "30 9 * * 1-5",
            "timezone": "Europe/Berlin",
        },
        "every five minutes": {"job_type": "demo.noop", "interval_seconds": 300, "overlap": "skip"},
    },
    "changeScheduledJob": {"paused": {"is_active": False}},
    "previewScheduledJob": {"the next three": {"cron_expression": "@daily", "count": 3}},
    "createApiKey": {"for a service that only queues": {"role": "user", "scopes": ["jobs:write"]}},
    "changeApiKey": {"from one network": {"allowed_cidrs": ["192.0.2.0/24"]}},
    "rotateApiKey": {"with an hour to change it": {"overlap_seconds": 3600}},
    "createToken": {"for a browser": {"expires_in_seconds": 300, "scopes": ["jobs:read"]}},
    "forceCompleteJob": {"done by hand": {"result": {"by": "hand"}, "reason": "fixed it on the machine"}},
    "cleanUpJobs": {"how many": {"older_than_days": 30, "statuses": ["completed"], "dry_run": True}},
    "createTenant": {"a tenant": {"name": "acme"}},
    "changeTenant": {
        "another name": {"name": "acme-inc"},
        "a limit": {"max_running": 20},
        "twice the turns": {"weight": 2},
    },
    "setTenantRateLimit": {
        "more for a while": {"quota": 100, "window_seconds": 60, "reason": "their launch"}
    },
}
