"""The second wall between tenants: PostgreSQL's row-level security.

Every table with a tenant has a policy that binds the role TENANT_ROLE to the tenant that the transaction
names. A request's transaction takes on that role (db.Database.read, write); workers, sweeps and admins
do not, and pay nothing. So a query that forgot its tenant finds nothing of others.
"""

from __future__ import annotations

import sqlalchemy as sa

from laneway import models
from laneway.db import TENANT_ROLE, TENANT_VARIABLE, Database

POLICY = "laneway_tenant"

_ROLE = f"""
DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{TENANT_ROLE}') THEN
    CREATE ROLE {TENANT_ROLE} NOLOGIN;
  END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END $$"""


def tenants_columns() -> dict[str, str]:
    """The tables whose rows are tenants' own, each with the column that says whose."""
    owned = {name: "tenant_id" for name, table in models.metadata.tables.items() if "tenant_id" in table.c}
    return owned | {models.tenants.name: "id"}


def prepare(database: Database) -> None:
    """Make the role and the policies that are not there yet. Safe to repeat, and beside all that runs.

    The database's user must own the tables, and may create roles or has been granted TENANT_ROLE.
    """
    columns = tenants_columns()
    with database.write() as connection:
        connection.exec_driver_sql(_ROLE)
        may_use = f"SELECT pg_has_role(current_user, '{TENANT_ROLE}', 'MEMBER')"
        if not connection.exec_driver_sql(may_use).scalar():
            connection.exec_driver_sql(f"GRANT {TENANT_ROLE} TO CURRENT_USER")
        connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA public TO {TENANT_ROLE}")
        for name in sorted(models.metadata.tables):
            connection.exec_driver_sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {name} TO {TENANT_ROLE}")
    for name in unprepared(database):  # each alone: whoever uses the table waits for a moment
        own = f"{columns[name]} = CAST(current_setting('{TENANT_VARIABLE}', true) AS uuid)"
        with database.write() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY")
            connection.exec_driver_sql(f"DROP POLICY IF EXISTS {POLICY} ON {name}")
            connection.exec_driver_sql(
                f"CREATE POLICY {POLICY} ON {name} USING (current_user <> '{TENANT_ROLE}' OR {own})"
            )


def unprepared(database: Database) -> list[str]:
    """The tables that lack their policy: with one of them, `prepare` is to be called."""
    known = sa.text("SELECT tablename FROM pg_policies WHERE policyname = :policy")
    with database.read() as connection:
        prepared = set(connection.execute(known, {"policy": POLICY}).scalars())
    return sorted(set(tenants_columns()) - prepared)
