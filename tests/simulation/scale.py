"""How large and how fast the simulated world is: the real one's proportions, with shorter waits."""

JOBS = 20
WORKERS = 4
CHILDREN = 2
LANE_WINDOW = 6
CRASH_LIMIT = 3

LEASE_SECONDS = 12.0
BEAT_SECONDS = 2.0
TICK_SECONDS = 1.0
POLL_SECONDS = 0.5
OWN_LOOK_SECONDS = 5.0
CANCEL_GRACE_SECONDS = 3.0
DRAIN_SECONDS = 4.0
COURIER_LEASE_SECONDS = 10.0

CALM_AT = 60.0  # no fault begins after this
LAST_MOMENT = 300.0  # by now every job must have ended
STALL_SECONDS = 16.0  # work that is due is begun, by a worker that idles all the while
UNHEARD_SECONDS = 8.0  # a queued row's id is in its lane
