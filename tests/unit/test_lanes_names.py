"""Names of lanes, queues and keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rq import Queue
from rq.job import Job

from laneway.domain.spec import QUEUE_PATTERN, JobSpec, Priority, lane_of, queue_of
from laneway.lanes.backend import LanesUnavailable, by_lane
from laneway.lanes.rq_lanes import queue_key

queues = st.from_regex(QUEUE_PATTERN, fullmatch=True).filter(lambda name: name not in set(Priority))


@given(queues, st.sampled_from(Priority))
def test_every_lane_belongs_to_the_queue_it_was_made_for(queue: str, priority: Priority) -> None:
    assert queue_of(lane_of(queue, priority)) == queue


@pytest.mark.parametrize("priority", Priority)
def test_the_lanes_of_the_default_queue_bear_the_priorities_names(priority: Priority) -> None:
    assert queue_of(JobSpec(job_type="demo.echo", priority=priority).lane) == "default"
    assert queue_of(f"default_{priority}") == f"default_{priority}"


def test_a_lanes_list_is_the_rq_queue_of_its_name() -> None:
    assert queue_key("emails-high") == Queue.redis_queue_namespace_prefix + "emails-high"
    assert Job.redis_job_namespace_prefix == "rq:job:"


def test_ids_keep_their_order_in_each_lane() -> None:
    assert by_lane([("b", "1"), ("a", "2"), ("b", "3"), ("b", "1")]) == {"b": ["1", "3", "1"], "a": ["2"]}


def test_unavailable_lanes_say_so_by_code() -> None:
    assert (LanesUnavailable.code, LanesUnavailable.status) == ("lanes_unavailable", 503)
