"""What API keys may do, from where and until when; who did what."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261122_2210"
down_revision = "20261122_2200"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass


def downgrade() -> None:
    pass
