"""Checks of how a pipeline cuts layers and batch, with mesh.data known."""

from lmscale.config.fields import Config
from lmscale.errors import ConfigError

MOST_TASKS = 2**19  # of a step: its timetable is made and checked task by task


def check_stages(config: Config) -> None:
  """Whether every device gets mesh.virtual stages, and every stage a layer."""
  mesh, train, layers = config.mesh, config.train, len(config.model.layers)
  if train.stored_microbatches and (mesh.pipe == 1 or train.remat != 'full'):
    raise ConfigError(
      f'train.stored_microbatches: {train.stored_microbatches} with mesh.pipe {mesh.pipe} and train.remat {train.remat}; it is for '
      'train.remat=full in a pipeline: set it to 0'
    )
  if mesh.pipe > 1 and train.stack != 'runs':
    raise ConfigError(
      f'train.stack: {train.stack} with mesh.pipe {mesh.pipe}; the stages of a pipeline have one stack per kind of layer: set train.stack=runs'
    )
  if mesh.vocab_on_pipe and (mesh.pipe == 1 or config.model.vocab % (mesh.pipe * mesh.tensor)):
    raise ConfigError(
      f'mesh.vocab_on_pipe: model.vocab {config.model.vocab} / (mesh.pipe {mesh.pipe} * mesh.tensor {mesh.tensor} = '
      f'{mesh.pipe * mesh.tensor}) is not a whole number; set model.vocab to a multiple, or mesh.vocab_on_pipe=false'
      if mesh.pipe > 1
      else 'mesh.vocab_on_pipe: mesh.pipe is 1, without a pipeline; set mesh.vocab_on_pipe=false or mesh.pipe above 1'
    )
  if mesh.virtual > 1 and mesh.schedule != 'interleaved':
    raise ConfigError(
      f'mesh.virtual: {mesh.virtual} stages a device with mesh.schedule {mesh.schedule}; only interleaved has more than one: '
      'set mesh.schedule=interleaved or mesh.virtual=1'
    )
  if mesh.virtual > 1 and mesh.pipe == 1:
    raise ConfigError(
      f'mesh.virtual: {mesh.virtual} stages a device with mesh.pipe 1, without a pipeline; set mesh.virtual=1 or mesh.pipe above 1'
    )
  if mesh.pipe > layers:
    raise ConfigError(
      f'mesh.pipe: {mesh.pipe} stages for the {layers} layers of model.pattern; each needs at least one layer: '
      f'set mesh.pipe to at most {layers}'
    )
  if mesh.pipe * mesh.virtual > layers:
    raise ConfigError(
      f'mesh.virtual: mesh.pipe {mesh.pipe} * mesh.virtual {mesh.virtual} = {mesh.pipe * mesh.virtual} stages for the {layers} '
      f'layers of model.pattern; each needs at least one layer: set mesh.virtual to at most {layers // mesh.pipe}'
    )


def check_microbatches(config: Config, path: str, size: int) -> None:
  """Whether the schedule can go through a batch of `size` sequences, which the field `path` says."""
  mesh, train = config.mesh, config.train
  unit = train.microbatch * mesh.data
  count = size // unit
  if mesh.pipe == 1:
    return
  if mesh.schedule == 'interleaved' and count % mesh.pipe:
    raise ConfigError(
      f'{path}: {size} / (train.microbatch {train.microbatch} * mesh.data {mesh.data}) = {count} microbatches are not a multiple '
      f'of mesh.pipe {mesh.pipe}, which mesh.schedule interleaved needs; nearest: {nearest_multiples(size, unit * mesh.pipe)}, or '
      'set mesh.schedule=1f1b and mesh.virtual=1'
    )
  tasks = count * mesh.pipe * mesh.virtual
  if tasks > MOST_TASKS:
    raise ConfigError(
      f'{path}: {count} microbatches * mesh.pipe {mesh.pipe} * mesh.virtual {mesh.virtual} = {tasks} tasks a step are more than '
      f'{MOST_TASKS}; raise train.microbatch or mesh.data'
    )


def nearest_multiples(size: int, unit: int) -> str:
  """The positive multiples of `unit` next to `size`, in words."""
  return ' or '.join(str(n * unit) for n in (size // unit, size // unit + 1) if n)
