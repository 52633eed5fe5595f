"""The exceptions for mistakes of the user's."""


class ConfigError(ValueError):
  """A mistake of the user's: one line that names the field, the arithmetic and what to do."""


class UnknownField(ConfigError):
  """A config field that does not exist."""
