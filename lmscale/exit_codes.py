"""The exit codes of a run: what a scheduler may do next (README, docs/clusters.md)."""

DONE = 0
USER_ERROR = 2  # a mistake in a flag, a config or the data: starting again does not help
DIVERGED = 3  # train.nonfinite_budget or train.spike_budget steps were skipped; the last checkpoint is from before the last
AGAIN = 75  # run the same command again: interrupted and saved, or before the first step, or another process of the run is gone
KILLED = 130  # interrupted a second time, or nothing is saved

TOGETHER = (DONE, DIVERGED, AGAIN)  # what all processes of a run come to by themselves
