"""The one exception for mistakes of the user's."""


class ConfigError(ValueError):
  """A mistake of the user's: one line that names the field, the arithmetic and what to do."""
