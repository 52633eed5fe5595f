"""Every wrong input that a training run meets, one table: 25 rows of things that people, disks and schedulers do.

Each case says what the exit code is, what the one line on standard error names, and that nothing half-written is left:
the folder is byte for byte what it was, but for what a case says may change. Cases run in this process, where `run.main`
is the command; those about signals, streams and full disks run the small program of `train/fake_program.py`.
"""

import dataclasses
import gzip
import hashlib
import json
import logging
import lzma
import os
import pathlib
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

import run
from lmscale import config as config_lib
from lmscale.data.loader import Loader
from lmscale.data.sources import file_streams
from lmscale.errors import ConfigError
from lmscale.interop import folder as folder_lib
from lmscale.jobs import train as train_job
from lmscale.train import checkpoint, program
from lmscale.train.checkpoint import Checkpointer
from lmscale.train.workdir import open_workdir

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(pathlib.Path(__file__).parent / 'train'))
import fake_program

TEXT = ''.join(f'line {i} of a text that is long enough\n' for i in range(400))
TINY = config_lib.Config(
  name='tiny',
  model=config_lib.ModelConfig(pattern='-', d_model=8, vocab=257, mlp=config_lib.MLPConfig(d_ff=8)),
  train=config_lib.TrainConfig(steps=4, batch=8, seq_len=16, loss_chunk=16),
  optimizer=config_lib.OptimizerConfig(schedule='constant', warmup_tokens=0),
  data=config_lib.DataConfig(sources=(config_lib.SourceConfig(name='mine', kind='text', path='text.txt'),)),
  loop=config_lib.LoopConfig(eval_every=0, checkpoint_every=2, keep=3),
)


@dataclasses.dataclass
class Case:
  """One wrong input. `argv` changes the tiny run; `act`, where given, takes the place of run.main and returns the code."""

  row: int
  what: str
  argv: tuple[str, ...] | str = ()
  says: tuple[str, ...] | str = ()  # in the one line of the error; where the code is 0, anywhere on standard error
  files: dict[str, str | bytes] = dataclasses.field(default_factory=dict)
  prepare: Callable | None = None  # prepare(folder, monkeypatch)
  act: Callable | None = None  # act(folder) -> exit code
  code: int = 2
  changes: tuple[str, ...] | None = ()  # beginnings of paths that may change; None: anything may
  stdout: tuple[str, ...] = ()

  @property
  def id(self) -> str:
    return f'{self.row:02}-{self.what.replace(" ", "-")}'


def snapshot(folder: pathlib.Path) -> dict[str, str]:
  """Every path below `folder` with the hash of its content; locks hold a process number."""
  paths = (p for p in folder.rglob('*') if p.name != 'lock')
  return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() and not p.is_symlink() else ''
          for p in paths}  # fmt: skip


def tiny(*more: str) -> int:
  """The tiny run of this folder, by the command line."""
  return run.main(['--config=tiny.json', '--workdir=run', *more])


def source(path: str, kind: str = 'text', **more: object) -> str:
  return f'--config.data.sources={json.dumps([{"name": "mine", "kind": kind, "path": path, **more}])}'


def check(case: Case, folder: pathlib.Path, code: int, out: str, err: str, before: dict[str, str]) -> None:
  says = (case.says,) if isinstance(case.says, str) else case.says
  assert code == case.code, err
  assert 'Traceback' not in out + err
  assert '\x1b' not in out + err
  errors = [line for line in err.splitlines() if line.startswith('error: ')]
  if case.code == 2:
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0], err
  for detail in says:
    assert detail in (errors[0] if errors else err)
  for detail in case.stdout:
    assert detail in out
  if case.changes is not None:
    after = snapshot(folder)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert not {path for path in changed if not path.startswith(case.changes or '\0')}
  assert not [p for p in folder.parent.rglob('*') if p.name.startswith('tmp-') or p.name.endswith('.tmp')]


# What the rows need


class Small(fake_program.FakeProgram):
  """The small program fed by the real loader: run.main takes milliseconds instead of compiling a model."""

  broken: Exception | None = None  # raised by the third step

  def batch(self, plan, loader):
    return self._rows(loader, plan.first_sample, plan.batch), plan.learning_rate

  def step(self, state, batch):
    self.calls = getattr(self, 'calls', 0) + 1
    if self.calls == 3 and self.broken:
      raise self.broken
    return super().step(state, batch)

  def evaluate(self, state, loader, samples):
    return float(self._loss(state.params, self._rows(loader, 0, samples))), samples

  @staticmethod
  def _rows(loader, first, rows):
    x = np.zeros((rows, fake_program.SIZE), np.float32)
    x[:, : loader.seq_len] = loader.batch(first, range(rows))['tokens'] / 256
    return x


@pytest.fixture(autouse=True)
def small_program(monkeypatch):
  monkeypatch.setattr(program, 'Program', Small)
  monkeypatch.setattr(Small, 'broken', None)


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> pathlib.Path:
  """A folder with tiny.json, text.txt and `run`, a finished run of 4 steps with checkpoints of steps 2 and 4."""
  folder = tmp_path_factory.mktemp('finished')
  make_inputs(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setattr(program, 'Program', Small)
    assert tiny() == 0
  return folder


def make_inputs(folder: pathlib.Path) -> None:
  config = config_lib.to_dict(TINY)
  config['data']['cache'] = '../cache'
  (folder / 'tiny.json').write_text(json.dumps(config))
  (folder / 'text.txt').write_text(TEXT)


CASES: list[Case] = []


def cases(row: int, *rows: tuple, **common: object) -> None:
  """Adds cases (what, argv, says[, more fields])."""
  for what, argv, says, *more in rows:
    CASES.append(Case(row, what, argv, says, **{**common, **(more[0] if more else {})}))


cases(
  1,
  ('misspelt field', '--config.train.stpes=3', ('train.stpes', 'train.steps')),
  ('wrong type', '--config.train.steps=3.5', ('train.steps', 'an integer', "'3.5'")),
  ('group for a value', '--config.train=3', ('train', 'a group of fields')),
  ('in a recipe', '--config=bad.py', ('bad.py:4', 'stpes'),
   {'files': {'bad.py': 'from lmscale import config as c\ndef get_config():\n  x = c.to_config_dict(c.Config())\n  x.train.stpes = 3\n'}}),
  ('in a saved config', '--config=bad.json', ('bad.json', 'another version', 'sed', 'seed'), {'files': {'bad.json': '{"sed": 1}'}}),
  ('no such list element', '--config.data.sources.5.weight=1', ('data.sources.5', 'there are 1')),
)  # fmt: skip
cases(
  2,
  ('stray word', 'train.steps=3', ('train.steps=3', '--config.train.steps=3')),
  ('file without a flag', 'configs/quickstart.py', ('configs/quickstart.py', 'flags')),
  ('unknown flag', '--confg=x.py', ('--confg', '--config')),
)
cases(
  3,
  *((f'{field}={value}', f'--config.{field}={value}', (f'{field}:', value)) for field, value in (
    ('train.steps', '-5'), ('train.steps', '0'), ('train.batch', '0'), ('train.seq_len', '-1'), ('model.vocab', '0'),
    ('optimizer.learning_rate', 'nan'), ('optimizer.learning_rate', 'inf'), ('optimizer.learning_rate', '1e+300'),
    ('optimizer.learning_rate', '-1.0'), ('optimizer.weight_decay', '1e+200'), ('loop.eval_samples', '10000000000'),
    ('emulate', '100000'), ('loop.temperature', '-0.5'), ('train.nonfinite_budget', '-1'),
  )),
  ('warm-up beyond the end', '--config.optimizer.warmup_tokens=513', ('optimizer.warmup_tokens', '513', '512 tokens')),
  ('absurd depth', f'--config.model.pattern={"-" * 5000}', ('model.pattern', '5000 layers')),
)  # fmt: skip
cases(
  4,
  ('kv heads', ('--config.model.pattern=*', '--config.model.attention.kv_heads=3'), ('model.attention.kv_heads', '4 = 1 * 3 + 1')),
  ('groups', ('--config.model.pattern=M', '--config.model.mamba2.groups=3'), ('model.mamba2.groups', '8 = 2 * 3 + 2')),
  ('heads over the mesh', ('--config.model.pattern=*', '--config.mesh.tensor=8'), ('mesh.tensor', '4 = 0 * 8 + 4')),
  ('pattern symbol', '--config.model.pattern=M-X', ('model.pattern', "'X' at position 2")),
  ('empty pattern', '--config.model.pattern=', ('model.pattern', 'no layers')),
  ('empty stage', '--config.model.pattern=M||-', ('model.pattern', 'without layers')),
  ('odd rotation', ('--config.model.pattern=*', '--config.model.positions=rope', '--config.model.attention.head_dim=7'),
   ('model.rope_fraction', '7 * 1.0 = 7')),
  ('vocabulary below the tokenizer', '--config.model.vocab=256', ('model.vocab', '256', '257')),
)  # fmt: skip
cases(
  5,
  ('mesh product', '--config.mesh.data=3', ('mesh', '= 3', '8 devices', 'mesh.data=8')),
  ('batch over data', '--config.train.batch=12', ('train.batch', '12', '8', '8 or 16')),
  ('tensor', '--config.mesh.tensor=3', ('mesh', '8 devices', 'mesh.tensor=2')),
)
cases(
  6,
  ('missing file', source('no.txt'), ('data.sources.0', 'no.txt', 'no such file')),
  ('empty file', source('empty.txt'), ('mine', '0 tokens'), {'files': {'empty.txt': ''}}),
  ('unreadable file', source('/proc/self/mem'), ('data.sources.0', '/proc/self/mem', 'cannot be read')),
  ('folder without text', source('data'), ('data.sources.0', 'data', 'no *.txt'), {'files': {'data/x.csv': ''}}),
  ('folder for a config', '--config=.', 'folder'),
  ('dangling link', source('data'), ('data.sources.0', 'data/gone: a link to /not/there'),
   {'files': {'data/x.txt': TEXT}, 'prepare': lambda folder, _: os.symlink('/not/there', folder / 'data' / 'gone')}),
  ('xz archive', source('x.txt.xz'), ('x.txt.xz', 'is an xz archive, not text: unpack it'), {'files': {'x.txt.xz': lzma.compress(TEXT.encode())}}),
  ('parquet as text', source('x.parquet'), ('x.parquet', 'is a parquet file', 'to_json'), {'files': {'x.parquet': b'PAR1\x15\0\x15\x10PAR1'}}),
  ('UTF-16 without its mark', source('x.txt'), ('x.txt', '5,800 of 11,600 bytes are NUL', 'utf-16le'),
   {'files': {'x.txt': ('a word ' * 828 + 'more').encode('utf-16-le')}}),
  ('glob of nothing', source('*.text'), ('data.sources.0', '*.text', 'matches no file')),
  ('pipe', source('pipe'), ('pipe', 'neither a file'), {'prepare': lambda folder, _: os.mkfifo(folder / 'pipe')}),
  ('NUL in a path', source('a\0b'), ('data.sources.0', 'NUL')),
)
cases(
  7,
  ('corpus shorter than a sequence', source('short.txt'), ('mine', '1 of 1 documents', '4 tokens', '= 17'),
   {'files': {'short.txt': 'abc'}}),
  ('too little held out', ('--config.loop.eval_every=2', '--config.data.validation=0.0003'),
   ('mine', 'text.txt', 'validation split', '1 of 1 documents', '5 tokens', 'raise data.validation from 0.0003 to 0.01')),
)  # fmt: skip
cases(
  8,
  ('bytes that are no text', '', '',
   {'files': {'odd.txt': b'\xef\xbb\xbfa\x00b\r\n\xff\xfe' + TEXT.encode()}, 'code': 0,
    'act': lambda folder: reads('a\0b\r\n\ufffd\ufffd' + TEXT, source('odd.txt'))}),
  ('lone surrogate and a long line', '', ('odd.jsonl:2: longer than 200 bytes', '1 lines'),
   {'files': {'odd.jsonl': '{"text": "a\\ud800b"}\r\n{"text": "' + 'x' * 300 + '"}\n{"text": "' + 'y' * 50 + '"}'}, 'code': 0,
    'prepare': lambda folder, patch: patch.setattr(file_streams, 'MAX_LINE', 200),
    'act': lambda folder: reads('a\ufffdb' + 'y' * 50, source('odd.jsonl', 'jsonl'))}),
)  # fmt: skip
GOOD_LINE = json.dumps({'text': TEXT}) + '\n'
BAD_LINES = ('{"text": ', '[1]', '{"other": "x"}', '{"text": 7}', '{"text": "a", "text": "b"}', '[' * 100_000)
cases(
  9,
  ('some bad lines', '', ('6 lines give no text', 'x.jsonl:2: broken JSON', 'x.jsonl:3: not a JSON object', ':4: no field "text"',
                          ':5: field "text" is not a string', ':6: field "text" twice', ':7: broken JSON (RecursionError)'),
   {'files': {'x.jsonl': GOOD_LINE + '\n'.join(BAD_LINES) + '\n'}, 'code': 0,
    'act': lambda folder: reads(TEXT, source('x.jsonl', 'jsonl'))}),
  ('too many bad lines', source('x.jsonl', 'jsonl'), ('data.sources.0', 'x.jsonl:102: not a JSON object', 'more than 100 lines'),
   {'files': {'x.jsonl': GOOD_LINE + '7\n' * 200}}),
  ('another field', source('x.jsonl', 'jsonl', field='content'), ('data.sources.0', 'no field "content"', 'more than 100'),
   {'files': {'x.jsonl': GOOD_LINE * 200}}),
)  # fmt: skip
cases(
  10,
  ('truncated gz', source('x.txt.gz'), ('data.sources.0', 'x.txt.gz', 'the archive is truncated', 'bytes of text'),
   {'files': {'x.txt.gz': gzip.compress(TEXT.encode())[:-20]}}),
  ('truncated gz of lines', source('x.jsonl.gz', 'jsonl'), ('x.jsonl.gz', 'truncated', 'last whole line is line'),
   {'files': {'x.jsonl.gz': gzip.compress((json.dumps({'text': TEXT[:99]}) + '\n').encode() * 400)[:-20]}}),
  ('damaged zst', source('x.txt.zst'), ('data.sources.0', 'x.txt.zst', 'archive'),
   {'files': {'x.txt.zst': b'\x28\xb5\x2f\xfd' + b'\x07' * 50}}),
  ('no archive', source('x.txt.gz'), ('x.txt.gz', 'is no .gz archive', '6c 69 6e 65'), {'files': {'x.txt.gz': TEXT}}),
  ('bomb', source('x.txt.gz'), ('x.txt.gz', 'unpacks to more than'),
   {'files': {'x.txt.gz': gzip.compress(bytes(1 << 22))},
    'prepare': lambda folder, patch: patch.setattr(file_streams, 'BOMB_BYTES', 1 << 20)}),
)  # fmt: skip


def megatron(folder: pathlib.Path, ids: object = range(50), code: int = 8, version: int = 1, magic: bytes = b'MMIDIDX\0\0',
             sequences: int = 1, bin_size: int | None = None) -> None:  # fmt: skip
  """x.bin and x.idx of one document, with one thing wrong."""
  tokens = np.array(ids, '<u2').tobytes()
  (folder / 'x.bin').write_bytes(tokens[:bin_size])
  header = magic + struct.pack('<QBQQ', version, code, sequences, 2)
  (folder / 'x.idx').write_bytes(header + struct.pack('<iqqq', len(tokens) // 2, 0, 0, 1))


def wrong_index(**wrong: object) -> dict[str, object]:
  return {'prepare': lambda folder, _: megatron(folder, **wrong)}


cases(
  11,
  ('wrong magic', source('x', 'megatron'), ('data.sources.0', 'x.idx', 'no index'), wrong_index(magic=b'MMIDIDY\0\0')),
  ('wrong version', source('x', 'megatron'), ('x.idx', 'version 2'), wrong_index(version=2)),
  ('wrong dtype', source('x', 'megatron'), ('x.idx', 'dtype code 9'), wrong_index(code=9)),
  ('counts beyond the file', source('x', 'megatron'), ('x.idx', str(2**60)), wrong_index(sequences=2**60)),
  ('short bin', source('x', 'megatron'), ('x.idx', '100 bytes', '90'), wrong_index(bin_size=90)),
  ('ids beyond the vocabulary', source('x', 'megatron'), ('x.bin', 'ids from 0 to 999', '0 to 256'), wrong_index(ids=[0, 999])),
  ('missing index', source('y', 'megatron'), ('y.idx', 'no such file')),
)


def other_tokenizer(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """A run with one tokenizer.json, which is then another one."""
  resumable(folder, monkeypatch)
  shutil.rmtree(folder / 'run')
  write_tokenizer(folder, 'abc')
  assert tiny('--config.data.tokenizer=tokenizer.json', '--config.model.vocab=300') == 0
  write_tokenizer(folder, 'bac')


def write_tokenizer(folder: pathlib.Path, letters: str) -> None:
  vocab = {c: i for i, c in enumerate([*dict.fromkeys(letters + ''.join(sorted({*TEXT}))), '<unk>', '</s>'])}
  special = [{'id': vocab['</s>'], 'content': '</s>', 'special': True, 'single_word': False, 'lstrip': False, 'rstrip': False,
              'normalized': False}]  # fmt: skip
  described = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': special, 'normalizer': None,
               'pre_tokenizer': {'type': 'Split', 'pattern': {'String': ''}, 'behavior': 'Isolated', 'invert': False},
               'post_processor': None, 'decoder': None,
               'model': {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<unk>'}}  # fmt: skip
  (folder / 'tokenizer.json').write_text(json.dumps(described))


TOKENIZER = ('--config.data.tokenizer=tokenizer.json', '--config.model.vocab=300')
cases(
  12,
  ('missing tokenizer', TOKENIZER, ('data.tokenizer', 'tokenizer.json', 'No such file')),
  ('damaged tokenizer', TOKENIZER, ('data.tokenizer', 'tokenizer.json', 'damaged'), {'files': {'tokenizer.json': '{"version": "1.0"'}}),
  ('damaged SentencePiece model', '--config.data.tokenizer=x.model', ('data.tokenizer', 'x.model', 'damaged'),
   {'files': {'x.model': b'\x0a\x0c\x07<unk>'}}),
  ('pickle as tokenizer', '--config.data.tokenizer=x.pkl', ('data.tokenizer', 'x.pkl', 'tokenizer.json'),
   {'files': {'x.pkl': pickle.dumps({})}}),
  ('other than the checkpoint\'s', (*TOKENIZER, '--config.train.steps=6'), ('run', 'tokenizer: "tokenizer.json-v', 'other data'),
   {'prepare': other_tokenizer, 'changes': ('../cache',)}),
)  # fmt: skip


def resumable(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Puts the finished run of 4 steps into this folder; `--config.train.steps=6` goes on with it."""
  shutil.copytree(FINISHED[0] / 'run', folder / 'run')


def after(change: Callable[[pathlib.Path], None]) -> Callable:
  """The finished run, after `change(its checkpoints)`."""

  def prepare(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumable(folder, monkeypatch)
    change(folder / 'run' / 'checkpoints')

  return prepare


def largest(folder: pathlib.Path) -> pathlib.Path:
  return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip(*steps: str) -> Callable[[pathlib.Path], None]:
  """Flips one bit of the largest file of each of these checkpoints."""

  def change(checkpoints: pathlib.Path) -> None:
    for step in steps:
      path = largest(checkpoints / step / 'state')
      data = bytearray(path.read_bytes())
      data[len(data) // 2] ^= 16
      path.write_bytes(data)

  return change


def truncate(checkpoints: pathlib.Path) -> None:
  path = largest(checkpoints / '4' / 'state')
  os.truncate(path, path.stat().st_size // 2)


def add_nan(checkpoints: pathlib.Path) -> None:
  with Checkpointer(checkpoints) as kept:
    tree, meta = kept.restore(fake_program.FakeProgram(TINY).abstract_stored())
    tree['params']['layers']['0']['kernel'] = tree['params']['layers']['0']['kernel'].at[3, 3].set(np.nan)
    shutil.rmtree(checkpoints / '4')
  with Checkpointer(checkpoints) as kept:
    kept.save(4, tree, meta, wait=True)


def other_tree(leaf: Callable) -> Callable:
  """The finished run under a program whose stored tree is another."""

  def prepare(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumable(folder, monkeypatch)
    abstract = fake_program.FakeProgram.abstract_stored
    monkeypatch.setattr(Small, 'abstract_stored', lambda self: leaf(abstract(self)))

  return prepare


def reshaped(tree: dict) -> dict:
  kernel = tree['params']['layers']['0']['kernel']
  return {**tree, 'params': {'layers': {'0': {'kernel': kernel.update(shape=(256, 128))}}}}


MORE = '--config.train.steps=6'
RESUMED = ('run/', '../cache')
REFUSED = ('run/config.json', 'run/environment.json', 'run/tensorboard')
fallback = {'code': 0, 'changes': RESUMED, 'stdout': ()}
cases(
  13,
  ('bit flipped', MORE, ('4 IS DAMAGED', 'going back to an older one', 'finished: step 6'), {'prepare': after(flip('4')), **fallback}),
  ('truncated', MORE, ('4 IS DAMAGED', 'finished: step 6'), {'prepare': after(truncate), **fallback}),
  ('missing shard', MORE, ('4 IS DAMAGED', 'finished: step 6'),
   {'prepare': after(lambda folder: shutil.rmtree(folder / '4' / 'state' / 'd')), **fallback}),
  ('NaN weights', MORE, ('4 IS DAMAGED', 'params/layers/0/kernel holds NaN', 'finished: step 6'), {'prepare': after(add_nan), **fallback}),
  ('all damaged', MORE, ('run/checkpoints', 'all of 2 checkpoints are damaged'), {'prepare': after(flip('2', '4')), 'changes': REFUSED}),
  ('another leaf', MORE, ('checkpoints/4', 'more is in the model but not stored'),
   {'prepare': other_tree(lambda tree: {**tree, 'more': tree['step']}), 'changes': REFUSED}),
  ('a leaf too many', MORE, ('checkpoints/4', 'skipped is stored but not in the model'),
   {'prepare': other_tree(lambda tree: {k: v for k, v in tree.items() if k != 'skipped'}), 'changes': REFUSED}),
  ('another shape', MORE, ('checkpoints/4', 'stored as float32[256, 256], the model has float32[256, 128]'),
   {'prepare': other_tree(reshaped), 'changes': REFUSED}),
)  # fmt: skip


def edit_config(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  resumable(folder, monkeypatch)
  path = folder / 'run' / 'config.json'
  path.write_text(path.read_text().replace('"seed"', '"flux": 1, "seed"', 1))


def reads_format(number: int) -> Callable:
  def prepare(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumable(folder, monkeypatch)
    monkeypatch.setattr(checkpoint, 'FORMAT', number)
    monkeypatch.setattr(checkpoint, 'READABLE', (number,))

  return prepare


cases(
  14,
  ('another model', (MORE, '--config.model.d_model=16'), ('other settings', 'model.d_model: 8 -> 16', '--workdir'), {'prepare': resumable}),
  ('config of another version', MORE, ('run/config.json', 'another version', 'flux'), {'prepare': edit_config}),
  ('newer format', MORE, ('checkpoints/4', 'format 3', 'reads up to 2', 'update it'), {'prepare': reads_format(2), 'changes': REFUSED}),
)


def told(function: Callable[[pathlib.Path], object]) -> Callable[[pathlib.Path], int]:
  """What run.main makes of a mistake that a library function finds; no job of the command reads such files yet."""

  def act(folder: pathlib.Path) -> int:
    try:
      function(folder)
    except ConfigError as error:
      return run._user_error(error, [])
    return 0

  return act


def index_of(name: object) -> dict[str, str]:
  return {'model.safetensors.index.json': json.dumps({'weight_map': {'a': name}})}


def link_out(folder: pathlib.Path, _: object) -> None:
  (folder.parent / 'outside.safetensors').write_bytes(b'')
  (folder / 'in.safetensors').symlink_to('../outside.safetensors')


cases(
  15,
  ('path upwards', '', ('index.json', "'../in.safetensors' is not the plain name"), {'files': index_of('../in.safetensors')}),
  ('absolute path', '', ('index.json', 'is not the plain name'), {'files': index_of('/etc/in.safetensors')}),
  ('link', '', ('in.safetensors', 'link out of the folder'), {'files': index_of('in.safetensors'), 'prepare': link_out}),
  act=told(folder_lib.open_tensors),
)
INIT = '--config.train.init_from='
cases(
  16,
  ('as init_from', INIT + 'x.pt', ('train.init_from', 'x.pt', 'pickle'), {'files': {'x.pt': pickle.dumps({})}}),
  ('init_from with another tokenizer', (INIT + 'run', '--workdir=new', *TOKENIZER), ('train.init_from', 'data.tokenizer: "bytes-v1" -> "tokenizer.json-v'),
   {'prepare': lambda folder, patch: (resumable(folder, patch), write_tokenizer(folder, 'abc'))}),
  ('init_from with another activation', (INIT + 'run', '--workdir=new', '--config.model.mlp.activation=relu2', '--config.model.norm=layernorm'),
   ('train.init_from', 'another model', 'model.norm: "rmsnorm" -> "layernorm"; model.mlp.activation: "gelu" -> "relu2"'), {'prepare': resumable}),
  ('as a config', '--config=x.pkl', ('x.pkl', '.json'), {'files': {'x.pkl': pickle.dumps({})}}),
  ('as weights', '', ('only safetensors are read', '.pt'),
   {'files': {'pytorch_model.bin': pickle.dumps({})}, 'act': told(folder_lib.open_tensors)}),
)  # fmt: skip


def with_file_limit(size: int, step: int) -> Callable[[pathlib.Path], int]:
  """The run, with no file allowed to grow beyond `size` bytes from `step` on: what a quota or a full disk does."""

  def act(folder: pathlib.Path) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limited(Small):
      def step(self, state, batch):
        state, metrics = super().step(state, batch)
        if self.calls == step:
          resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return state, metrics

    program.Program = Limited
    try:
      return tiny(MORE)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

  return act


NEWER = ('run/metrics.jsonl', 'run/goodput.json', 'run/checkpoints/6.orbax', *REFUSED)
cases(
  17,
  ('workdir below a file', '--workdir=text.txt/run', ('--workdir', 'text.txt', 'a file, not a folder')),
  ('workdir that cannot be made', '--workdir=/proc/run', ('/proc/run', 'another --workdir')),
  ('cache that cannot be made', ('--config.data.cache=/proc/cache', source('new.txt')), ('data.cache', '/proc/cache'),
   {'files': {'new.txt': TEXT}}),
  ('no room for a checkpoint', '', ('run/checkpoints', 'could not be saved', 'last good one is of step 4', 'File too large'),
   {'prepare': resumable, 'act': with_file_limit(100_000, 1), 'changes': NEWER}),
  ('no room for the log', '', ('metrics.jsonl', 'File too large'),
   {'prepare': resumable, 'act': with_file_limit(10, 1), 'changes': NEWER}),
)  # fmt: skip


def held(folder: pathlib.Path) -> int:
  with open_workdir('run', config_lib.from_dict(json.loads((folder / 'tiny.json').read_text()))):
    return tiny()


cases(18, ('a second process', '', ('run', 'in use by process', str(os.getpid())), {'act': held, 'prepare': resumable,
                                                                                 'changes': REFUSED}))  # fmt: skip
cases(
  19,
  ('seed', '--config.seed=1', ('seed: 0 -> 1',)),
  ('batch', '--config.train.batch=16', ('train.batch: 8 -> 16',)),
  ('schedule', ('--config.optimizer.schedule=cosine', '--config.optimizer.learning_rate=0.1'),
   ('optimizer.schedule: "constant" -> "cosine"', 'optimizer.learning_rate: 0.001 -> 0.1')),
  ('source', source('other.txt'), ('other data', 'sources.0.content', 'data.sources.0.path: "text.txt" -> "other.txt"'),
   {'files': {'other.txt': TEXT + 'more'}, 'changes': ('../cache',)}),
  ('the same file with other text', MORE, ('run', 'other data', 'sources.0.content'),
   {'prepare': lambda folder, patch: (resumable(folder, patch), (folder / 'text.txt').write_text(TEXT + 'more')),
    'changes': (*REFUSED, '../cache')}),
  prepare=resumable,
)  # fmt: skip


def signalled(number: int) -> Callable[[pathlib.Path], int]:
  """The run, sent a signal during its third step; then the same command again."""

  def act(folder: pathlib.Path) -> int:
    class Signalled(Small):
      def step(self, state, batch):
        if getattr(self, 'calls', 0) == 2:
          os.kill(os.getpid(), number)
        return super().step(state, batch)

    program.Program = Signalled
    assert tiny() == 75
    assert (folder / 'run' / 'checkpoints' / '3').is_dir()
    program.Program = Small
    return tiny()

  return act


def twice(folder: pathlib.Path) -> int:
  """A process that is told to stop while it sleeps in a step, and told again."""
  command = [sys.executable, fake_program.__file__, str(folder / 'run'), 'delay=30']
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
  for line in process.stderr:
    if 'compiling' in line:
      process.send_signal(signal.SIGINT)
    if 'SIGINT' in line:
      process.send_signal(signal.SIGINT)
      break
  print(line, process.communicate(timeout=30)[1], file=sys.stderr)
  return process.returncode


def failing(error: BaseException) -> dict[str, object]:
  return {'prepare': lambda folder, patch: patch.setattr(Small, 'broken', error), 'changes': ('run', '../cache')}


cases(
  20,
  *((name, '', ('stopped and saved at step 3', 'going on', 'finished: step 4'),
     {'act': signalled(getattr(signal, name)), 'code': 0, 'changes': ('run', '../cache')}) for name in ('SIGINT', 'SIGTERM')),
  ('SIGINT twice', '', 'once more ends at once', {'act': twice, 'code': 130, 'changes': ('run',)}),
  ('host out of memory', '', ('out of memory', 'mesh.zero', '--job=plan'), failing(MemoryError())),
  ('device out of memory', '--config.train.microbatch=1', ('out of memory', 'train.compute_dtype=bfloat16', 'allocating 8 bytes'),
   failing(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocating 8 bytes\nmore'))),
)  # fmt: skip


def poisoned(factor: float, sample: int) -> Callable:
  """Every number of the text is multiplied by `factor` from this sample on; if it is finite, only in this batch."""

  def prepare(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Small._rows

    def changed(loader, first, n):
      hit = first == sample if np.isfinite(factor) else first >= sample
      return rows(loader, first, n) * (factor if hit else 1)

    monkeypatch.setattr(Small, '_rows', staticmethod(changed))

  return prepare


cases(
  21,
  ('loss not finite', '--config.train.nonfinite_budget=2',
   ('step 3: loss or gradient is not finite', 'its samples are 16..23', 'stopped: 2 steps', 'last checkpoint is of step 2'),
   {'prepare': poisoned(np.nan, 9), 'code': 3, 'changes': ('run', '../cache')}),
  ('sudden spike', '--config.train.steps=24',
   ('step 21: gradient norm', 'its samples are 160..167', 'train.spike_skip', 'finished: step 24'),
   {'prepare': poisoned(100.0, 160), 'code': 0, 'changes': ('run', '../cache')}),
  ('spike to be skipped', ('--config.train.steps=24', '--config.train.spike_skip=20'),
   ('step 21: gradient norm', 'step skipped (1 of at most 20); its samples are 160..167', 'finished: step 24'),
   {'prepare': poisoned(100.0, 160), 'code': 0, 'changes': ('run', '../cache')}),
  ('spikes above the budget', ('--config.train.steps=24', '--config.train.spike_skip=20', '--config.train.spike_budget=1'),
   ('step 21: gradient norm', 'stopped: 1 steps had a gradient norm far above', 'last checkpoint is of step 20'),
   {'prepare': poisoned(100.0, 160), 'code': 3, 'changes': ('run', '../cache')}),
  ('threshold that skips ordinary steps', '--config.train.spike_skip=0.5', ('train.spike_skip', '0.5', 'more than 1')),
)  # fmt: skip

STRANGE = """
import sys, time
sys.path[:0] = [{root!r}, {train!r}]
moments = iter(range(10**9, 0, -1000))
time.time = lambda: float(next(moments))
import test_wrong_inputs
test_wrong_inputs.program.Program = test_wrong_inputs.Small
import run
run.plain_warnings()
sys.exit(run.main(sys.argv[1:]))
"""


def strange_place(folder: pathlib.Path) -> int:
  """No terminal, an ASCII-only standard output, an unknown time zone and locale, a clock that goes back, odd paths."""
  odd = folder / 'ein ge\u00fcbter \U0001f40d Ordner' / 'run\x1b[31m'
  script = STRANGE.format(root=str(ROOT), train=str(ROOT / 'tests'))
  environment = {**os.environ, 'LC_ALL': 'C', 'PYTHONIOENCODING': 'ascii:strict', 'TZ': 'No/Where', 'NO_COLOR': '1',
                 'TERM': 'dumb', 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}  # fmt: skip
  argv = ['--config=tiny.json', f'--workdir={odd}', '--config.loop.sample_every=2', '--config.loop.sample_prompt=\u00e9\x07',
          '--config.loop.eval_every=2', '--config.data.validation=0.5', source('many.jsonl', 'jsonl')]  # fmt: skip
  command = [sys.executable, '-c', script, *argv]
  done = subprocess.run(command, check=False, env=environment, capture_output=True, timeout=120, cwd=folder)
  print(done.stdout.decode('ascii'))
  print(done.stderr.decode('ascii'), file=sys.stderr)
  assert (odd / 'loss.svg').exists()
  return done.returncode


cases(
  22,
  ('strange terminal clock and paths', '', ('finished: step 4', r'\x07'),
   {'act': strange_place, 'code': 0, 'changes': ('ein', '../cache'), 'stdout': (r'\U0001f40d', 'workdir'),
    'files': {'many.jsonl': ''.join(json.dumps({'text': f'{i}: {TEXT[:99]}'}) + '\n' for i in range(40))}}),
)  # fmt: skip
cases(
  23,
  ('negative temperature', '--config.loop.temperature=-1', ('loop.temperature', '-1.0', '[0, 100]')),
  ('temperature that is no number', '--config.loop.temperature=nan', ('loop.temperature', 'nan')),
  ('prompt longer than the positions', ('--config.model.positions=learned', '--config.model.max_positions=16',
    '--config.loop.sample_every=2', '--config.loop.sample_tokens=10', '--config.loop.sample_prompt=seven b'),
   ('loop.sample_tokens', '10 after a prompt of 7 bytes = 17 tokens', 'model.max_positions 16')),
  ('no tokens asked for', '--config.loop.sample_tokens=0', ('loop.sample_tokens', '0')),
  ('empty prompt', ('--config.loop.sample_every=2', '--config.loop.sample_prompt='), 'step 2: sample',
   {'code': 0, 'changes': ('run', '../cache')}),
)  # fmt: skip


GENERATE = '--job=generate'
PROMPTS = (GENERATE, '--prompts=p.jsonl')
trained = {'prepare': resumable}
cases(
  23,
  ('nothing to continue', GENERATE, ('--prompt', 'one of --prompt=TEXT and --prompts=FILE'), trained),
  ('two kinds of prompts', (*PROMPTS, '--prompt=a'), ('--prompt', 'one of'), trained),
  ('prompt for training', '--prompt=a', ('--prompt', 'only with --job=generate')),
  ('no run to generate from', (GENERATE, '--prompt=a'), ('run', 'no such folder', 'the folder of a run')),
  ('a file for a run', (GENERATE, '--prompt=a', '--workdir=x.pt'), ('x.pt is a file', 'pickle'), {'files': {'x.pt': pickle.dumps({})}}),
  ('a run without checkpoints', (GENERATE, '--prompt=a'), ('run has no checkpoints',),
   {'prepare': after(lambda checkpoints: shutil.rmtree(checkpoints))}),
  *((f'a bad line of prompts {i}', PROMPTS, ('p.jsonl:2: ', says), {'files': {'p.jsonl': b'{"text": "a"}\n' + line}, **trained})
    for i, (line, says) in enumerate((
      (b'{"text": ', 'broken JSON'), (b'\n{"text": "b"}', 'broken JSON'), (b'"\xff"', 'broken JSON'), (b'[' * 100_000, 'broken JSON'),
      (b'[1]', 'one of "text" and "ids"'), (b'{"txt": "a"}', 'one of "text" and "ids"'),
      (b'{"text": "a", "ids": [1]}', 'one of'), (b'{"text": "a", "text": "b"}', 'one of'), (b'{"text": 7}', '"text" must be a string'),
      (b'{"ids": [1.5]}', 'integers from 0 to 256'), (b'{"ids": [true]}', 'integers'), (b'{"ids": [257]}', 'integers from 0 to 256'),
      (b'{"ids": 5}', 'a list'), (b'{"ids": {"a": 1}}', 'a list'),
    ))),
  ('no lines of prompts', PROMPTS, ('p.jsonl has no lines',), {'files': {'p.jsonl': ''}, **trained}),
  ('no file of prompts', PROMPTS, ('--prompts: p.jsonl', 'No such file'), trained),
  ('a folder to write to', (GENERATE, '--prompt=a', '--out=run'), ('--out', 'run is a folder'), trained),
  ('no folder to write in', (GENERATE, '--prompt=a', '--out=no/x.jsonl'), ('--out', 'there is no folder', 'no'), trained),
  ('prompts to be written over', (*PROMPTS, '--out=p.jsonl'), ('--out', 'is the file of prompts'),
   {'files': {'p.jsonl': '{"text": "a"}'}, **trained}),
  ('continued beyond the positions', (GENERATE, '--prompt=seven b', '--config.generate.tokens=10',
    '--config.model.positions=learned', '--config.model.max_positions=16'),
   ('prompt 1: 7 tokens + generate.tokens 10 = 17', 'model.max_positions 16'), trained),
  ('other parameters', (GENERATE, '--prompt=a', '--config.model.d_model=16'), ('model.d_model: 8 -> 16',), trained),
  ('a mesh that the model does not fit', (GENERATE, '--prompt=a', '--config.mesh.tensor=3'), ('mesh', '8 devices', 'tensor 3'), trained),
  *((f'generate.{field} {value}', (GENERATE, '--prompt=a', f'--config.generate.{field}={value}'), (f'generate.{field}', *says), trained)
    for field, value, *says in (
      ('tokens', '0', 'less than 1'), ('temperature', '-1', '[0, 100]'), ('temperature', 'nan'), ('top_k', '-1', 'less than 0'),
      ('top_p', '0', '(0, 1]'), ('top_p', '1.5', '(0, 1]'), ('batch', '0'), ('prefill_chunk', '0'), ('stop', '[""]', 'empty text'),
      ('stop', 'x', 'a JSON list'), ('stop', '[7]', 'a string'),
    )),
)  # fmt: skip
cases(
  12,
  ("generating with other than the run's", (GENERATE, '--prompt=a', *TOKENIZER), ('data.tokenizer', 'was trained with tokenizer.json-v'),
   {'prepare': other_tokenizer, 'changes': ('../cache',)}),
)  # fmt: skip


EVAL = ('--job=eval', '--tasks=copy', '--lengths=64')
cases(
  12,
  ("scoring with other than the run's tokenizer", (*EVAL, *TOKENIZER), ('data.tokenizer', 'was trained with tokenizer.json-v'),
   {'prepare': other_tokenizer, 'changes': ('../cache',)}),
)  # fmt: skip
cases(13, ('scoring parameters of other shapes', EVAL, ('checkpoints/4', 'does not fit the model', 'params/layers/0/kernel is stored'), trained))
cases(
  14,
  ('scoring another model', (*EVAL, '--config.model.d_model=16'), ('run', 'model.d_model: 8 -> 16'), trained),
  ('scoring a newer format', EVAL, ('checkpoints/4', 'format 3', 'reads up to 2'), {'prepare': reads_format(2)}),
)
cases(
  16,
  ('scored as a run', (*EVAL, '--workdir=x.pt'), ('x.pt is a file', 'pickle'), {'files': {'x.pt': pickle.dumps({})}}),
  ('as a data set', (*EVAL, '--tasks=piqa', '--data=.'), ('piqa.jsonl:1: not JSON',), {'files': {'piqa.jsonl': pickle.dumps({})}, **trained}),
)
cases(
  23,
  ('no tasks', '--job=eval', ('--tasks: none', 'winogrande'), trained),
  ('a task that there is not', ('--job=eval', '--tasks=arc'), ('--tasks', "'arc' is no task"), trained),
  ('tasks for training', '--tasks=copy', ('--tasks', 'only with --job=eval')),
  ('no such data', (*EVAL, '--data=no'), ('--data', 'no is no folder'), trained),
  ('tasks on a schedule without names', '--config.eval.every=2', ('eval.tasks', 'eval.every is 2')),
  ('a task on a schedule that there is not', ('--config.eval.every=2', '--config.eval.tasks=["arc"]'), ('eval.tasks', "'arc' is no task")),
  ('no data on a schedule', ('--config.eval.every=2', '--config.eval.tasks=["text"]'), ('task text', '--data=FOLDER (or eval.data)')),
  ('a length too small', (*EVAL, '--lengths=3'), ('task copy: 3 tokens are too few',), trained),
  ('a context beyond the positions', (*EVAL, '--config.model.positions=learned', '--config.model.max_positions=16'),
   ('eval.lengths', '64 tokens', 'model.max_positions 16'), trained),
  *((f'eval.{field} {value}', f'--config.eval.{field}={value}', (f'eval.{field}', *says)) for field, value, *says in (
    ('every', '-1', 'less than 0'), ('samples', '-1', 'less than 0'), ('lengths', '[]', 'at least one'), ('lengths', '[0]', '0'), ('tasks', 'copy', 'JSON list'),
  )),
)  # fmt: skip


def blend(*weights: float) -> str:
  sources = [{'name': f'{i}', 'kind': 'text', 'path': 'text.txt', 'weight': w} for i, w in enumerate(weights)]
  return f'--config.data.sources={json.dumps(sources)}'


cases(
  24,
  ('negative weight', blend(1, -1), ('data.sources.1.weight', '-1')),
  ('all zero', blend(0, 0), ('data.sources', 'weights sum to 0')),
  ('NaN weight', blend(1, float('nan')), ('data.sources.1.weight', 'nan')),
  ('infinite weight', blend(1, float('inf')), ('data.sources.1.weight', 'inf')),
  ('no sources', '--config.data.sources=[]', ('data.sources', 'at least one')),
  ('one name twice', '--config.data.sources=[{"name": "a"}, {"name": "a"}]', ('data.sources', "'a'")),
  ('an exhausted source', (blend(3, 1), '--config.train.steps=400', '--job=train'), '',
   {'act': lambda folder: data(blend(3, 1), '--config.train.steps=2000'), 'code': 0, 'changes': ('../cache',),
    'stdout': ('75% of the blend, 16.88 epochs', '25% of the blend, 16.88 epochs')}),
)  # fmt: skip


def without(*packages: str) -> Callable:
  def prepare(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in packages:
      monkeypatch.setitem(sys.modules, package, None)
    # Another test may have imported these, or have filled the cache.
    for name in ('tfds_source', 'stdlib_dataset'):
      monkeypatch.delitem(sys.modules, f'lmscale.data.sources.{name}', raising=False)
      monkeypatch.delattr(f'lmscale.data.sources.{name}', raising=False)
    monkeypatch.setenv('LMSCALE_CACHE', str(folder.parent / 'no cache yet'))
    if (folder / 'tokenizer.json').exists():
      write_tokenizer(folder, 'xyz')  # one that no test has opened yet

  return prepare


cases(
  25,
  ('tokenizers', TOKENIZER, ('tokenizers', 'pip install', "'.[data]'"), {'files': {'tokenizer.json': ''}, 'prepare': without('tokenizers')}),
  ('sentencepiece', '--config.data.tokenizer=y.model', ('sentencepiece', "'.[data]'"),
   {'files': {'y.model': b'1'}, 'prepare': without('sentencepiece')}),
  ('zstandard', source('x.txt.zst'), ('zstandard', "'.[data]'"),
   {'files': {'x.txt.zst': b'\x28\xb5\x2f\xfd' + b'\x07' * 50}, 'prepare': without('zstandard')}),
  ('a package of the core', '--config.data.sources=[{"kind": "stdlib"}]', ('array_record', 'make install'),
   {'prepare': without('array_record', 'array_record.python')}),
)  # fmt: skip


FINISHED: list[pathlib.Path] = []


def data(*argv: str) -> int:
  """What a run says about its data before the first step."""
  flags, overrides = run.parse_flags(['--config=tiny.json', *argv])
  config = run.recipes.load(flags.config, overrides)
  print(train_job.format_data(Loader(config), config.train.steps * config.train.batch))
  return 0


def reads(text: str, *argv: str) -> int:
  """Checks the text that the loader's tokens stand for, documents one after the other."""
  flags, overrides = run.parse_flags(['--config=tiny.json', *argv])
  loader = Loader(run.recipes.load(flags.config, overrides))
  tokens = loader.stores[0].tokens
  assert loader.tokenizer.decode(tokens) == text
  return 0


@pytest.fixture
def plain_log(monkeypatch):
  """Warnings as `python run.py` shows them."""
  logger = logging.getLogger('lmscale')
  monkeypatch.setattr(logger, 'propagate', True)
  handlers = list(logger.handlers)
  run.plain_warnings()
  yield
  logger.handlers[:] = handlers


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # Orbax's threads, cut off in a save
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.id)
def test_a_wrong_input_is_one_line_and_nothing_is_half_written(case, finished, tmp_path, monkeypatch, capsys, plain_log):
  FINISHED[:] = [finished]
  folder = tmp_path / 'place'
  folder.mkdir()
  make_inputs(folder)
  monkeypatch.chdir(folder)
  for name, content in case.files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
  if case.prepare:
    case.prepare(folder, monkeypatch)
  before = snapshot(folder)
  capsys.readouterr()
  argv = (case.argv,) if isinstance(case.argv, str) else case.argv
  code = case.act(folder) if case.act else tiny(*filter(None, argv))
  out, err = capsys.readouterr()
  check(case, folder, code, out, err, before)


def test_every_row_has_a_case_and_every_case_a_name():
  assert {case.row for case in CASES} == set(range(1, 26))
  assert len({case.id for case in CASES}) == len(CASES)
