"""Real processes under faults, and the proof that nothing acknowledged was lost."""
