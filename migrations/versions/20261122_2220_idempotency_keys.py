"""Idempotency keys, tags to search by, and the numbers that let streams of events be resumed.

Safe with the running release: on PostgreSQL the number of its events is a default of the column, and the
index is built while it reads and writes. The tags of jobs that it makes meanwhile are not searched by.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261122_2220"
down_revision = "20261122_2210"
branch_labels = None
depends_on = None

ID = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
MOMENT = sa.DateTime(timezone=True)
EVENTS = "ix_job_events_tenant_id_tx"


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("request", ID, nullable=False),
        sa.Column("answer", sa.Text()),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_idempotency_keys")),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    op.create_table(
        "job_tags",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("tag", sa.String(100), nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "tag", name=op.f("pk_job_tags")),
    )
    op.create_index("ix_job_tags_tenant_id_tag_job_id", "job_tags", ["tenant_id", "tag", "job_id"])
    if op.get_context().dialect.name == "sqlite":
        op.add_column("job_events", sa.Column("tx", sa.BigInteger(), server_default=sa.text("NULL")))
        _fill_tags("json_each(jobs.tags) AS each")
        op.create_index(EVENTS, "job_events", ["tenant_id", "tx"])
        return
    # Two steps: with a default from the start every row of the table would be written anew.
    op.add_column("job_events", sa.Column("tx", sa.BigInteger()))
    op.alter_column(
        "job_events",
        "tx",
        server_default=sa.text("CAST(CAST(pg_current_xact_id() AS text) AS bigint)"),
        existing_type=sa.BigInteger(),
    )
    with op.get_context().autocommit_block():
        _timeouts(lock="0", statement="2h")
        _fill_tags("jsonb_array_elements_text(CAST(jobs.tags AS jsonb)) AS each(value)")
        op.drop_index(EVENTS, "job_events", if_exists=True, postgresql_concurrently=True)
        op.create_index(EVENTS, "job_events", ["tenant_id", "tx"], postgresql_concurrently=True)
        _timeouts(lock="2s", statement="30s")  # as env.py has them


def downgrade() -> None:
    op.drop_index(EVENTS, "job_events", if_exists=True)
    with op.batch_alter_table("job_events") as events:
        events.drop_column("tx")
    op.drop_table("job_tags")
    op.drop_table("idempotency_keys")


def _fill_tags(each: str) -> None:
    op.execute(
        "INSERT INTO job_tags (job_id, tag, tenant_id)"  # noqa: S608
        f" SELECT DISTINCT jobs.id, each.value, jobs.tenant_id FROM jobs, {each} WHERE jobs.tags <> '[]'"
        " ON CONFLICT (job_id, tag) DO NOTHING"
    )


def _timeouts(*, lock: str, statement: str) -> None:
    op.execute(f"SET lock_timeout = '{lock}'")
    op.execute(f"SET statement_timeout = '{statement}'")
