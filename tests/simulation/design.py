"""What the protocol does, one line a thing; a mutant is the design without one of them."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Design:
    """Each field is something that the real code does. The simulator asks before doing it."""

    answer_after_commit: bool = True  # the API says 202 when the row is committed
    unique_index: bool = True  # the store, not a look before the insert, keeps unique keys unique
    claim_guard: bool = True  # only a queued row is claimed
    attempt_fence: bool = True  # a worker's write names its attempt
    token_fence: bool = True  # and its lease token
    progress_fence: bool = True  # progress does too
    reaper_fence: bool = True  # a reaper takes back the lease that it saw
    held_tokens: bool = True  # beats name what is held: a claim whose answer was lost is found
    self_fence: bool = True  # a worker that cannot beat stops what it runs
    monotonic_lease: bool = True  # silence is measured by the observer's own clock
    fresh_watch: bool = True  # an observer that could not look starts anew
    mass_guard: bool = True  # that most workers fall silent together is not believed at once
    crash_limit: bool = True  # a job that keeps killing its process is given up
    free_release: bool = True  # what a worker hands back is not charged
    wish_guard: bool = True  # a job that is to stop gets no other attempt
    wish_ending: bool = True  # and does not go back to waiting for one, which would be for ever
    promotion_lock: bool = True  # what was found due is still so when it is queued
    backoff: bool = True  # a failed attempt's successor waits
    reconciler: bool = True  # rows that no lane knows are rung again
    own_look: bool = True  # workers find work while Redis is away
    message_with_end: bool = True  # a job's end and its webhook message are one transaction
    settle_after_send: bool = True  # a delivery is done when the receiver has it, and not before
    courier_lease: bool = True  # what a dead courier held is sent by another


SOUND = Design()
MUTANTS = {f"no_{field.name}": field.name for field in fields(Design)}
"""The mutants' names, and what each leaves out."""


def design_of(mutant: str | None) -> Design:
    """The sound design, or a mutant's. Raises KeyError."""
    return SOUND if mutant is None else Design(**{MUTANTS[mutant]: False})
