"""An example application on Laneway: one job type that sums up the feedback a student was given.

Put `feedback_summaries` into `LANEWAY_TASKS` and the type `feedback.summary` is there. Laneway knows
nothing of this package; this package uses what Laneway offers to everybody.
"""

from feedback_summaries import tasks as tasks
