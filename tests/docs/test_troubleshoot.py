"""The SQL that people are told to type when something is wrong, and the names that the doctor gives it."""

from __future__ import annotations

import re

import pytest
import sqlalchemy as sa

from docs.markdown import ROOT, Block, blocks, prose
from factories import add_job, add_worker
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine.doctor import CHECKS

PAGE = ROOT / "docs/how-to/troubleshoot.md"
SQL = [block for block in blocks(PAGE) if block.language == "sql"]


@pytest.mark.parametrize("block", SQL, ids=lambda block: block.place)
def test_each_statement_runs_on_the_stores_it_is_for(block: Block, database: Database) -> None:
    if block.mark == "PostgreSQL" and database.dialect != "postgresql":
        return
    add_worker(database)
    for status in JobStatus:
        add_job(database, status, dead_letter_reason="exhausted" if status is JobStatus.FAILED else None)
    with database.read() as connection:
        found = connection.execute(sa.text(block.text.rstrip().rstrip(";").replace(":", r"\:")))
        rows = found.all()
    about_nobody = "pg_stat" in block.text or "webhook_deliveries" in block.text or "job_events" in block.text
    assert about_nobody or rows


def test_every_sentence_of_the_doctor_is_on_the_page() -> None:
    said = set(re.findall(r"`([a-z_]+)`", prose(PAGE)))
    assert {check.name for check in CHECKS} - said == set()
