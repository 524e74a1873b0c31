"""Registered webhook endpoints, the health of receivers, replays, and a fuller record of attempts.

Safe with the running release: what it writes gets the new columns' defaults.
"""

from __future__ import annotations

from uuid import UUID

import sqlalchemy as sa
from alembic import op

revision = "20261122_2100"
down_revision = "20261122_2000"
branch_labels = None
depends_on = None

ID = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
MOMENT = sa.DateTime(timezone=True)
OPEN = "status IN ('pending', 'retrying')"
OLD_STATUSES = "status IN ('pending', 'sending', 'retrying', 'delivered', 'dead')"
STATUSES = (
    "status IN ('pending', 'sending', 'retrying', 'delivered', 'dead', 'cancelled', 'superseded', 'skipped')"
)


def _now() -> sa.TextClause:
    if not _on_postgresql():
        return sa.text("(strftime('%Y-%m-%d %H:%M:%f000', 'now'))")
    return sa.text("now()")


def _on_postgresql() -> bool:
    return op.get_context().dialect.name == "postgresql"


def _owned(now: sa.TextClause) -> list[sa.Column[object]]:
    return [
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("created_at", MOMENT, nullable=False, server_default=now),
        sa.Column("updated_at", MOMENT, nullable=False, server_default=now),
    ]


def _index(name: str, table: str, columns: list[str], *, where: str | None = None) -> None:
    condition = None if where is None else sa.text(where)
    op.create_index(name, table, columns, postgresql_where=condition, sqlite_where=condition)


def upgrade() -> None:
    now = _now()
    with op.batch_alter_table("tenants", recreate="auto" if _on_postgresql() else "always") as tenants:
        tenants.add_column(sa.Column("old_webhook_secrets", sa.Text(), nullable=False, server_default="[]"))
        tenants.add_column(sa.Column("webhook_signing_key", sa.Text()))
    _create_tables(now)
    with op.batch_alter_table("webhook_messages") as messages:
        messages.alter_column("job_id", existing_type=ID, nullable=True)
        messages.alter_column("job_seq", existing_type=sa.Integer(), nullable=True)
        messages.alter_column("payload", existing_type=sa.LargeBinary(), nullable=True)
    _index("ix_webhook_messages_tenant_id_created_at", "webhook_messages", ["tenant_id", "created_at"])
    _index("ix_webhook_messages_created_at", "webhook_messages", ["created_at"])

    op.drop_index("ix_webhook_deliveries_due", "webhook_deliveries")
    with op.batch_alter_table("webhook_deliveries") as deliveries:
        deliveries.alter_column("job_id", existing_type=ID, nullable=True)
        for column in (
            sa.Column("endpoint_id", ID),
            sa.Column("target_id", ID, nullable=False, server_default=str(UUID(int=0))),
            sa.Column("channel", sa.String(10), nullable=False, server_default="webhook"),
            sa.Column("trigger", sa.String(10), nullable=False, server_default="auto"),
            sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
            sa.Column("retry_schedule", sa.Text(), nullable=False, server_default="[5.0,60.0]"),
            sa.Column("give_up_at", MOMENT),
        ):
            deliveries.add_column(column)
        deliveries.drop_constraint("uq_webhook_deliveries_message_id_url", type_="unique")
        deliveries.create_unique_constraint(
            op.f("uq_webhook_deliveries_message_id_target_id_url"), ["message_id", "target_id", "url"]
        )
        deliveries.drop_constraint(op.f("ck_webhook_deliveries_status"), type_="check")
        deliveries.create_check_constraint(op.f("ck_webhook_deliveries_status"), STATUSES)
        deliveries.create_check_constraint(
            op.f("ck_webhook_deliveries_channel"), "channel IN ('webhook', 'email', 'log')"
        )
        deliveries.create_check_constraint(
            op.f("ck_webhook_deliveries_trigger"), "trigger IN ('auto', 'manual', 'recover', 'test')"
        )
    _index("ix_webhook_deliveries_due", "webhook_deliveries", ["priority", "next_at", "id"], where=OPEN)
    _index("ix_webhook_deliveries_open_target", "webhook_deliveries", ["target_id"], where=OPEN)
    _index("ix_webhook_deliveries_tenant_id_id", "webhook_deliveries", ["tenant_id", "id"])
    _index("ix_webhook_deliveries_endpoint_id_id", "webhook_deliveries", ["endpoint_id", "id"])

    with op.batch_alter_table("webhook_attempts") as attempts:
        for column in (
            sa.Column("trigger", sa.String(10), nullable=False, server_default="auto"),
            sa.Column("remote_ip", sa.String(45)),
            sa.Column("dns_ms", sa.Integer()),
            sa.Column("connect_ms", sa.Integer()),
            sa.Column("first_byte_ms", sa.Integer()),
            sa.Column("request_bytes", sa.Integer()),
            sa.Column("response_headers", sa.Text()),
            sa.Column("response_truncated", sa.Boolean(), nullable=False, server_default=sa.false()),
        ):
            attempts.add_column(column)


def _create_tables(now: sa.TextClause) -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", ID, nullable=False),
        *_owned(now),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("description", sa.String(500)),
        sa.Column("event_types", sa.Text(), nullable=False),
        sa.Column("filters", sa.Text(), nullable=False),
        sa.Column("format", sa.String(12), nullable=False),
        sa.Column("status", sa.String(10), nullable=False),
        sa.Column("disabled_reason", sa.String(20)),
        sa.Column("disabled_at", MOMENT),
        sa.Column("enabled_at", MOMENT, nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("old_secrets", sa.Text(), nullable=False),
        sa.Column("headers", sa.Text()),
        sa.Column("client_certificate", sa.Text()),
        sa.Column("ca_certificate", sa.Text()),
        sa.Column("sign_with", sa.String(4), nullable=False),
        sa.Column("timeout_seconds", sa.Float(), nullable=False),
        sa.Column("retry_schedule", sa.Text(), nullable=False),
        sa.Column("max_in_flight", sa.Integer(), nullable=False),
        sa.Column("max_per_second", sa.Float()),
        sa.Column("in_order", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_endpoints")),
        sa.CheckConstraint(
            "format IN ('standard', 'cloudevents', 'thin')", name=op.f("ck_webhook_endpoints_format")
        ),
        sa.CheckConstraint(
            "status IN ('enabled', 'paused', 'disabled')", name=op.f("ck_webhook_endpoints_status")
        ),
        sa.CheckConstraint(
            "(status = 'disabled') = (disabled_at IS NOT NULL)",
            name=op.f("ck_webhook_endpoints_disabled_has_time"),
        ),
        sa.CheckConstraint("sign_with IN ('v1', 'v1a', 'both')", name=op.f("ck_webhook_endpoints_sign_with")),
    )
    _index("ix_webhook_endpoints_tenant_id_id", "webhook_endpoints", ["tenant_id", "id"])

    op.create_table(
        "webhook_health",
        sa.Column("target_id", ID, nullable=False),
        *_owned(now),
        sa.Column("consecutive_failures", sa.Integer(), nullable=False),
        sa.Column("failing_since", MOMENT),
        sa.Column("last_failure_at", MOMENT),
        sa.Column("last_success_at", MOMENT),
        sa.Column("opened", sa.Integer(), nullable=False),
        sa.Column("blocked_until", MOMENT),
        sa.Column("blocked_reason", sa.String(12)),
        sa.Column("warned_percent", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("target_id", name=op.f("pk_webhook_health")),
        sa.CheckConstraint(
            "(blocked_until IS NULL) = (blocked_reason IS NULL)",
            name=op.f("ck_webhook_health_blocked_has_reason"),
        ),
        postgresql_with={"fillfactor": 50},
    )
    _index(
        "ix_webhook_health_blocked", "webhook_health", ["blocked_until"], where="blocked_until IS NOT NULL"
    )

    op.create_table(
        "webhook_recoveries",
        sa.Column("id", ID, nullable=False),
        *_owned(now),
        sa.Column("endpoint_id", ID, nullable=False),
        sa.Column("mode", sa.String(10), nullable=False),
        sa.Column("since", MOMENT, nullable=False),
        sa.Column("until", MOMENT, nullable=False),
        sa.Column("per_second", sa.Float(), nullable=False),
        sa.Column("status", sa.String(10), nullable=False),
        sa.Column("place", sa.String(40)),
        sa.Column("place_at", MOMENT),
        sa.Column("queued", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("finished_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_recoveries")),
        sa.CheckConstraint("mode IN ('failed', 'missing', 'all')", name=op.f("ck_webhook_recoveries_mode")),
        sa.CheckConstraint(
            "status IN ('running', 'done', 'cancelled')", name=op.f("ck_webhook_recoveries_status")
        ),
        sa.CheckConstraint(
            "(status = 'running') = (finished_at IS NULL)", name=op.f("ck_webhook_recoveries_ended_has_time")
        ),
    )
    _index("ix_webhook_recoveries_tenant_id_id", "webhook_recoveries", ["tenant_id", "id"])
    _index("ix_webhook_recoveries_running", "webhook_recoveries", ["id"], where="status = 'running'")


def downgrade() -> None:
    """What the older release has no word for goes: messages of no job, and deliveries in newer states."""
    newer = f"job_id IS NULL OR NOT ({OLD_STATUSES})"
    deliveries = f"SELECT id FROM webhook_deliveries WHERE {newer}"  # noqa: S608
    op.execute(f"DELETE FROM webhook_attempts WHERE delivery_id IN ({deliveries})")  # noqa: S608
    op.execute(f"DELETE FROM webhook_deliveries WHERE {newer}")  # noqa: S608
    with op.batch_alter_table("webhook_attempts") as attempts:
        for name in (
            "response_truncated",
            "response_headers",
            "request_bytes",
            "first_byte_ms",
            "connect_ms",
            "dns_ms",
            "remote_ip",
            "trigger",
        ):
            attempts.drop_column(name)
    for name in ("endpoint_id_id", "tenant_id_id", "open_target", "due"):
        op.drop_index(f"ix_webhook_deliveries_{name}", "webhook_deliveries")
    with op.batch_alter_table("webhook_deliveries") as deliveries:
        for name in ("trigger", "channel", "status"):
            deliveries.drop_constraint(op.f(f"ck_webhook_deliveries_{name}"), type_="check")
        deliveries.create_check_constraint(op.f("ck_webhook_deliveries_status"), OLD_STATUSES)
        deliveries.drop_constraint(op.f("uq_webhook_deliveries_message_id_target_id_url"), type_="unique")
        deliveries.create_unique_constraint(
            op.f("uq_webhook_deliveries_message_id_url"), ["message_id", "url"]
        )
        for name in (
            "give_up_at",
            "retry_schedule",
            "priority",
            "trigger",
            "channel",
            "target_id",
            "endpoint_id",
        ):
            deliveries.drop_column(name)
        deliveries.alter_column("job_id", existing_type=ID, nullable=False)
    _index("ix_webhook_deliveries_due", "webhook_deliveries", ["next_at", "id"], where=OPEN)

    op.drop_index("ix_webhook_messages_created_at", "webhook_messages")
    op.drop_index("ix_webhook_messages_tenant_id_created_at", "webhook_messages")
    op.execute("DELETE FROM webhook_messages WHERE job_id IS NULL OR job_seq IS NULL OR payload IS NULL")
    with op.batch_alter_table("webhook_messages") as messages:
        messages.alter_column("payload", existing_type=sa.LargeBinary(), nullable=False)
        messages.alter_column("job_seq", existing_type=sa.Integer(), nullable=False)
        messages.alter_column("job_id", existing_type=ID, nullable=False)
    for table in ("webhook_recoveries", "webhook_health", "webhook_endpoints"):
        op.drop_table(table)
    with op.batch_alter_table("tenants") as tenants:
        tenants.drop_column("webhook_signing_key")
        tenants.drop_column("old_webhook_secrets")
