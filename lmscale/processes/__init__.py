"""Runs of several processes: how they find each other, what they tell each other, how they end together.

`cluster` reads who there is, `connect` brings them together, `peers` is what they say to each other, `interrupt` what a
signal does to them. In a run of one process everything that concerns the others answers at once.
"""

from lmscale.processes.cluster import find_cluster
from lmscale.processes.connect import WAIT, start
from lmscale.processes.interrupt import interrupts
from lmscale.processes.peers import count, finish, is_first, is_lost, share, stop_after, wait_for_all, watching, who

__all__ = [
  'WAIT', 'count', 'find_cluster', 'finish', 'interrupts', 'is_first', 'is_lost', 'share', 'start', 'stop_after', 'wait_for_all',
  'watching', 'who',
]  # fmt: skip
