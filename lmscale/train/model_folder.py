"""A model on disk is the folder of a run: its config and the parameters of its newest whole checkpoint, the optimizer optional.

  model = open_model('runs/hybrid')             # model.config, model.step, model.tokenizer; no array is read
  params = model.params(setup, jnp.bfloat16)    # on setup's mesh, stacked as it stacks

Whatever generates, evaluates, exports or starts from a trained model reads it here. `write_model` makes such a folder of
parameters that come from somewhere else: whole, or not there.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from lmscale import config as config_lib
from lmscale.config import Config, ModelConfig
from lmscale.data import atomic_folder
from lmscale.errors import ConfigError
from lmscale.models import model
from lmscale.models.stacking import make_stacking
from lmscale.parallel.layout import map_layout
from lmscale.parallel.setup import Setup
from lmscale.parallel.zero import compute_dtype
from lmscale.train import stored
from lmscale.train.changes import ON_PURPOSE, changed, changed_function
from lmscale.train.checkpoint import Check, Checkpointer, DamagedCheckpoint
from lmscale.train.streamed import Pending, Rows, write_once
from lmscale.train.workdir import read_config, write_atomic

TOKENIZER = 'tokenizer'  # the folder in a model's folder with its tokenizer's files
PARAMS_ONLY = 'params_only'  # in a checkpoint's metadata: it has no optimizer state


log = logging.getLogger(__name__)


class ModelFolder:
  """The model in a folder. Fields, all of the newest checkpoint whose metadata is whole:

  path, config (as `config.json` says, else as the checkpoint does; a tokenizer that lies in the folder is found there), step,
  meta (all that is stored with it), data (the identity of what it was trained on), about (where it was imported from, else empty), notes (lines for people).
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    with Checkpointer(_checkpoints(path), read_only=True) as source:
      steps = source.steps()[::-1]
      for step in steps:
        with contextlib.suppress(DamagedCheckpoint):  # told when the one before it is restored
          self._take(step, source.meta(step))
          return
    what = f'all of {len(steps)} checkpoints are damaged' if steps else 'no checkpoint'
    raise ConfigError(f'{path}: {what}; give the folder of a run that saved one')

  @property
  def tokenizer(self) -> str | None:
    """The identity of the tokenizer whose ids the model reads (`Tokenizer.identity`); None where nobody knows."""
    return self.data.get('tokenizer') if isinstance(self.data, dict) else None

  def params(self, setup: Setup, dtype: Any = None) -> Any:
    """The parameters in the form of `models.model.init_runs` on setup's mesh and stacking. Call from every process.

    dtype: of what the model computes in it; norms, decays and other full-precision parameters are at least float32. None:
    the master's, float32 or float64. Whatever dtype is stored is cast stack by stack: never is there a second whole copy.
    A checkpoint whose arrays are damaged is passed over, loudly, and `step` is then of the one before.

    Raises:
      ConfigError: no checkpoint is whole, or the parameters are not those of setup's model.
    """
    dtype = setup.master_dtype if dtype is None else dtype
    abstract, index = abstract_params(setup, dtype)
    if lines := changed_function(self.config, setup.config):
      raise ConfigError(f'{self.path}: the parameters are of another model: {"; ".join(lines)}')
    return stored.stacked(self.restore(abstract, index)['params'], setup.stacking)

  def restore(self, abstract: dict[str, Any], index: stored.Index, check: Check = lambda step, meta: None) -> dict[str, Any]:
    """The entries of `abstract` (`params`, as a checkpoint stores them) of the newest whole checkpoint; see `params`.

    check(step, meta): is called before arrays are read, and may refuse by a ConfigError.
    """

    def take(step: int, meta: dict[str, Any]) -> None:
      check(step, meta)
      self._take(step, meta)

    with Checkpointer(_checkpoints(self.path), read_only=True) as source:
      return source.restore(abstract, index=index, check=take, partial=True, cast=True)[0]

  def fingerprint(self) -> str:
    """Of the parameters of checkpoint `step`, see `stored.fingerprint`."""
    with Checkpointer(_checkpoints(self.path), read_only=True) as source:
      return stored.fingerprint(source.described(self.step, 'params')[1])

  @contextlib.contextmanager
  def rows(self) -> Iterator[Rows]:
    """The parameters of checkpoint `step` as they are stored, to be read one at a time."""
    with Checkpointer(_checkpoints(self.path), read_only=True) as source:
      yield Rows(source, self.step)

  def pass_over(self, damage: DamagedCheckpoint) -> None:
    """Goes to the next older checkpoint, loudly. Raises ConfigError where there is none."""
    bad = self.path / 'checkpoints' / str(self.step)
    with Checkpointer(_checkpoints(self.path), read_only=True) as source:
      for step in [step for step in source.steps()[::-1] if step < self.step]:
        with contextlib.suppress(DamagedCheckpoint):
          self._take(step, source.meta(step))
          log.warning('CHECKPOINT %s IS DAMAGED (%s): going back to an older one', bad, damage)
          return
    raise ConfigError(f'checkpoint {bad} is damaged ({damage}), and there is no older one that is whole') from damage

  def _take(self, step: int, meta: dict[str, Any]) -> None:
    kept, self.notes = trained_with(meta, self.path, step)
    if kept is None:
      raise ConfigError(f'{self.path}: {self.notes[0]}; without it nobody knows what the parameters mean: put it back')
    config = read_config(self.path) or kept
    if lines := changed_function(kept, config):
      raise ConfigError(
        f'{self.path / "config.json"} is of another model than the checkpoint of step {step}: {"; ".join(lines)}; put back what '
        'belongs to it, or move it away to go by the config in the checkpoint'
      )
    model_lines = [line for line in changed(kept, config, ON_PURPOSE) if line.startswith('model.')]
    self.notes += [f'{self.path / "config.json"}, other than the checkpoint: {line}' for line in model_lines]
    self.step, self.meta, self.data, self.about = step, meta, meta.get('data'), meta.get('about', {})
    self.config = _with_tokenizer_of(self.path, config)


def open_model(folder: str | pathlib.Path) -> ModelFolder:
  """The model in the folder of a run, or of an import. Reads no arrays and changes nothing there.

  Raises:
    ConfigError: no such folder, no config, no checkpoint or only damaged ones, or a config of another model.
  """
  return ModelFolder(pathlib.Path(folder).expanduser().absolute())


def folder_config(folder: str | pathlib.Path) -> Config:
  """`open_model(folder).config`, without a look at the checkpoints where there is a config.json: that would start JAX, and how
  it is to be set up stands in the config.

  Raises:
    ConfigError: as `open_model`.
  """
  path = pathlib.Path(folder).expanduser().absolute()
  _checkpoints(path)
  found = read_config(path)
  return _with_tokenizer_of(path, found) if found else open_model(path).config


def abstract_params(setup: Setup, dtype: Any) -> tuple[dict[str, Any], stored.Index]:
  """({'params': ...} as a checkpoint stores it, shapes and shardings of setup's mesh; the index of its stacks)."""
  shapes = jax.eval_shape(lambda: model.init_runs(setup.config.model, setup.stacking, 0))

  def one(leaf: Any, shape: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, compute_dtype(leaf, dtype), sharding=NamedSharding(setup.mesh, leaf.stored))

  return {'params': stored.unstacked(map_layout(one, setup.layout, shapes))}, stored.index_of(setup.stacking, ('params',))


def write_model(
  folder: str | pathlib.Path, config: Config, leaves: Mapping[str, Pending], about: dict[str, Any], tokenizer: str | None = None,
  step: int = 0, beside: Callable[[pathlib.Path], None] = lambda folder: None,
) -> None:  # fmt: skip
  """Makes a folder of a model: `config.json` and a checkpoint of parameters alone. It is there when it is whole.

  leaves: {canonical name, as `params/layers/3/q_kernel` or `params/embed/tokens`: how to get it}, written one at a time; any
  floating dtype, the same for a name in all layers of a kind. about: JSON, where they come from. tokenizer: its identity.
  beside(folder): writes other files of the model, before the folder has its name.

  Raises:
    ConfigError: the folder exists and is not empty, cannot be written, or the leaves are not the parameters of `config`.
  """
  index = stored.index_of(make_stacking(config.model.layers, 'unrolled'), ('params',))
  shapes = param_shapes(config.model)
  if wrong := [name for name in shapes.keys() | leaves.keys() if name not in leaves or leaves[name].shape != shapes.get(name)]:
    raise ConfigError(f'{folder}: not the parameters of this model: {", ".join(sorted(wrong)[:6])}')
  meta = {'step': step, 'samples': 0, 'tokens': 0, 'data': {'tokenizer': tokenizer}, 'config': config_lib.to_dict(config)}
  meta |= {PARAMS_ONLY: True, 'about': about}

  def build(temporary: pathlib.Path) -> None:
    write_once(temporary / 'checkpoints', step, dict(_unrolled(leaves)), meta, index)
    beside(temporary)
    write_atomic(temporary / 'config.json', json.dumps(config_lib.to_dict(config), indent=2) + '\n')

  atomic_folder.make(pathlib.Path(folder).expanduser().absolute(), build)


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """{canonical name: shape} of every parameter, for instance `params/layers/3/q_kernel`."""
  specs = model.param_specs(config)
  layers = {str(i): layer for i, layer in enumerate(specs['layers'])}
  return {name: spec.shape for name, spec in stored.named({'params': {**specs, 'layers': layers}}).items()}


def _unrolled(leaves: Mapping[str, Pending]) -> Iterator[tuple[str, Pending]]:
  """Each layer's leaf as a stack of one row: (path, leaf)."""
  for name, leaf in leaves.items():
    tree, layers, rest = name.partition('/layers/')
    if layers:
      index, _, name = rest.partition('/')
      row = functools.partial(_as_row, leaf.load)
      yield f'{tree}/layers/{index}/0/{name}', dataclasses.replace(leaf, shape=(1, *leaf.shape), load=row)
    else:
      yield name, leaf


def _as_row(load: Callable[[], np.ndarray]) -> np.ndarray:
  return load()[None]


def trained_with(meta: dict[str, Any], folder: pathlib.Path, step: int) -> tuple[Config | None, list[str]]:
  """(the config of a checkpoint: its own, else the folder's config.json, else None; notes for people).

  Raises:
    ConfigError: one of them cannot be read.
  """
  found = read_config(folder)
  if 'config' not in meta:
    return found, [] if found else [f'{folder} has no config.json, and its checkpoint is of a version that kept no config']
  try:
    kept = config_lib.from_dict(meta['config'])
  except ConfigError as error:
    raise ConfigError(f'checkpoint {folder / "checkpoints" / str(step)}: written by another version of lmscale ({error})') from error
  return kept, [] if found else [f'{folder / "config.json"} is missing: the config kept in the checkpoint was used']


def _checkpoints(path: pathlib.Path) -> pathlib.Path:
  if path.is_file():
    raise ConfigError(f'{path} is a file; give the folder of a run (a pickle, .pt or .bin is never read)')
  if not path.is_dir():
    raise ConfigError(f'{path}: no such folder; give the folder of a run, or of an import')
  if not (path / 'checkpoints').is_dir():
    raise ConfigError(f'{path} has no checkpoints; give the folder of a run that saved one')
  return path / 'checkpoints'


def _with_tokenizer_of(path: pathlib.Path, config: Config) -> Config:
  """`config` with the tokenizer that was copied into the folder, wherever the folder is now."""
  copied = path / TOKENIZER / pathlib.PurePath(config.data.tokenizer).name
  if config.data.tokenizer == 'bytes' or not copied.is_file():
    return config
  return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(copied)))
