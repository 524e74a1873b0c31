"""Batches, chains and dependencies."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261122_2250"
down_revision = "20261122_2240"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass


def downgrade() -> None:
    pass
