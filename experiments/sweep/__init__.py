"""``ehr sweep``: the study that processes share, the processes, and what was found."""
