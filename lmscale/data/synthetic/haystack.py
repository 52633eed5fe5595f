"""The text that needles are hidden in where no other is named: on every machine that has Python."""

import functools


@functools.cache
def topics() -> str:
  """Python's help topics (Python Software Foundation License), about 0.5 MB, in the order of their names."""
  from pydoc_data import topics

  return '\n\n'.join(topics.topics[name] for name in sorted(topics.topics))
