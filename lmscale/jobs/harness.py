"""The command of lm-evaluation-harness, with our models in it: lm_eval --model lmscale --model_args workdir=RUN --tasks NAME

The harness has a table of models and no way to add to it from outside: its own command knows none but its own. So this is its
command, started when the table has one more entry; `setup.cfg` installs it under the same name, `lm_eval`, and `python -m
lmscale.jobs.harness` is the same whichever of the two was installed last. It needs the extra `eval`.
"""

import sys

from lmscale.errors import ConfigError
from lmscale.exit_codes import USER_ERROR

NAME, MODEL = 'lmscale', 'lmscale.jobs.harness_model:HarnessModel'


def register() -> None:
  """Makes the harness know our models by the name `lmscale`. Raises ConfigError where it is not installed."""
  try:
    import lm_eval.models  # noqa: F401 - fills the table, which is not done once there is an entry
    from lm_eval.api.registry import model_registry
  except ModuleNotFoundError as error:
    package = (error.name or '').partition('.')[0]
    raise ConfigError(f"the package {package} is not installed; install it with: pip install -e '.[eval]'") from error
  if NAME not in model_registry:
    model_registry.register(NAME, target=MODEL)


def main() -> int:
  """Runs the harness's command with the arguments of this process; returns the exit code."""
  try:
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return USER_ERROR
  return 0


if __name__ == '__main__':
  sys.exit(main())
