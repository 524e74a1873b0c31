"""Workers tell which job types they know and which of their jobs have begun.

So a job that none of them knows can say so, and a worker's death is blamed on what it was running alone.
Safe with the running release: its workers leave the columns empty, which means that nobody knows.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261122_1900"
down_revision = "20261122_1800"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("job_types", sa.Text(), nullable=True))
    op.add_column("workers", sa.Column("begun", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "begun")
    op.drop_column("workers", "job_types")
