"""Schedules and their runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261122_2240"
down_revision = "20261122_2230"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass


def downgrade() -> None:
    pass
