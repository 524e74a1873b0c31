"""What API keys may do, from where and until when; who did what.

Safe with the running release: its keys may do all that their role may, from anywhere.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261122_2210"
down_revision = "20261122_2200"
branch_labels = None
depends_on = None

ID = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
MOMENT = sa.DateTime(timezone=True)
REFUSAL = "the audit log is only added to"


def _on_postgresql() -> bool:
    return op.get_context().dialect.name == "postgresql"


def upgrade() -> None:
    for column in (
        sa.Column("name", sa.String(100)),
        sa.Column("scopes", sa.Text()),
        sa.Column("allowed_cidrs", sa.Text()),
        sa.Column("replaces", sa.String(12)),
        sa.Column("last_used_at", MOMENT),
        sa.Column("last_used_ip", sa.String(45)),
    ):
        op.add_column("api_keys", column)
    op.create_index("ix_api_keys_tenant_id", "api_keys", ["tenant_id"])
    op.create_index("ix_api_keys_updated_at", "api_keys", ["updated_at"])

    now = sa.text("now()" if _on_postgresql() else "(strftime('%Y-%m-%d %H:%M:%f000', 'now'))")
    op.create_table(
        "audit_log",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False, server_default=now),
        sa.Column("actor", sa.String(100), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("key_id", sa.String(12)),
        sa.Column("action", sa.String(40), nullable=False),
        sa.Column("target", sa.String(200), nullable=False),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("address", sa.String(45)),
        sa.Column("request_id", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.create_index("ix_audit_log_tenant_id_id", "audit_log", ["tenant_id", "id"])
    if _on_postgresql():
        op.execute(
            "CREATE OR REPLACE FUNCTION audit_log_stays() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{REFUSAL}'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_log_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log "
            "FOR EACH STATEMENT EXECUTE FUNCTION audit_log_stays()"
        )
        return
    for what in ("update", "delete"):
        op.execute(
            f"CREATE TRIGGER audit_log_no_{what} BEFORE {what} ON audit_log "
            f"BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END"
        )


def downgrade() -> None:
    """What was done is forgotten. Keys with bounds, which the older release would not see, are revoked."""
    bounded = "scopes IS NOT NULL OR allowed_cidrs IS NOT NULL"
    op.execute(
        "UPDATE api_keys SET revoked_at = coalesce(revoked_at, CURRENT_TIMESTAMP) "  # noqa: S608
        f"WHERE {bounded}"
    )
    op.drop_table("audit_log")
    if _on_postgresql():
        op.execute("DROP FUNCTION audit_log_stays()")
    op.drop_index("ix_api_keys_updated_at", "api_keys")
    op.drop_index("ix_api_keys_tenant_id", "api_keys")
    with op.batch_alter_table("api_keys") as keys:
        for name in ("last_used_ip", "last_used_at", "replaces", "allowed_cidrs", "scopes", "name"):
            keys.drop_column(name)
