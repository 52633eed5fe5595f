"""`--job=generate`: a folder of a model in, lines or text out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import run
from lmscale import config as config_lib
from lmscale.config import GenerateConfig, MeshConfig
from lmscale.data.tokenizer import ByteTokenizer
from lmscale.generate.generator import Generator, collect
from lmscale.jobs import generate as job
from lmscale.models import model
from lmscale.train.console import printable
from lmscale.train.model_folder import write_model
from lmscale.train.streamed import Pending

MODEL = tiny.change(tiny.MODEL, pattern='M*', vocab=264)
PROMPTS = [{'text': 'a'}, {'ids': [0xE2, 0x82]}, {'text': ''}, {'text': '\ud800 é'}]
FLAGS = ('--config.generate.tokens=12', '--config.generate.temperature=1.5', '--config.generate.batch=3', '--config.emulate=0')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A model in bfloat16 that was trained on a mesh of four."""
  folder = tmp_path_factory.mktemp('model')
  write(folder, MODEL, {}, ByteTokenizer.identity)
  (folder / 'p.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in PROMPTS))
  return folder


def write(folder, shape, about, tokenizer):
  config = tiny.change(tiny.config(MeshConfig(2, 1, 2, 1), shape, compute_dtype='bfloat16'), generate=GenerateConfig(top_k=50))
  tree = model.init_layers(shape, 0)
  leaves = {f'params/layers/{i}/{name}': leaf for i, layer in enumerate(tree.pop('layers')) for name, leaf in layer.items()}
  leaves |= {f'params/{part}/{name}': leaf for part, rest in tree.items() for name, leaf in rest.items()}
  arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
  pending = {name: Pending(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}
  write_model(folder / 'run', config, pending, about, tokenizer=tokenizer, step=3)


@pytest.fixture
def engines(monkeypatch):
  """The engines that the job makes."""
  made, make = [], job.Engine
  monkeypatch.setattr(job, 'Engine', lambda *args: made.append(make(*args)) or made[-1])
  return made


def command(folder, *argv):
  return run.main(['--job=generate', f'--workdir={folder / "run"}', *FLAGS, *argv])


def test_lines_in_lines_out(folder, engines, tmp_path, capsys):
  out = tmp_path / 'o.jsonl'
  before = sum(leaf.nbytes for leaf in jax.live_arrays())
  assert command(folder, f'--prompts={folder / "p.jsonl"}', f'--out={out}') == 0
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  (engine,) = engines
  assert dict(engine.setup.mesh.shape) == {'pipe': 1, 'data': 4, 'tensor': 2}
  ids = [[97], [0xE2, 0x82], [256], [*'\ufffd é'.encode()]]
  options = GenerateConfig(12, 1.5, 50, batch=3)
  want = collect(Generator(engine, 257).generate(ids, options, 0, end=256), 4)
  for line, prompt, expected in zip(lines, PROMPTS, want, strict=True):
    assert list(line) == ['prompt', 'ids', 'text', 'finish']
    assert line['prompt'] == next(iter(prompt.values()))
    assert line['ids'] == [i for i in expected.ids if i != 256] and line['finish'] == expected.finish
  assert lines[0]['text'] == ByteTokenizer().decode(lines[0]['ids'])
  assert capsys.readouterr().out == ''
  # What is held is the model once, in the compute dtype but for norms and decays.
  held = jax.tree.leaves(engine.params)
  assert {leaf.dtype for leaf in held if leaf.ndim > 2} == {jnp.dtype('bfloat16')}
  whole = sum(leaf.nbytes for leaf in held)
  assert whole < 0.6 * 4 * sum(leaf.size for leaf in held)
  assert sum(leaf.nbytes for leaf in jax.live_arrays()) - before < 1.2 * whole + engine.cache_bytes(8, 256)


def test_text_as_it_is_made(folder, capsys, tmp_path):
  """Of several prompts one after the other, with headings; a stop string ends one."""
  assert command(folder, '--prompt=a') == 0
  shown, error = capsys.readouterr()
  assert shown.startswith('a') and shown.endswith('\n') and '===' not in shown
  assert 'at step 3' in error and '1 prompt, ' in error
  assert command(folder, '--prompt=a', f'--out={tmp_path / "o.jsonl"}') == 0
  text = json.loads((tmp_path / 'o.jsonl').read_text())['text']
  assert shown == printable('a' + text) + '\n'
  stop = text[3]
  assert command(folder, '--prompt=a', f'--config.generate.stop={json.dumps([stop])}') == 0
  assert capsys.readouterr().out == printable('a' + text[: text.index(stop)]) + '\n'
  assert command(folder, f'--prompts={folder / "p.jsonl"}') == 0
  several = capsys.readouterr().out
  assert several.startswith(f'=== prompt 1 of 4\n{shown}=== prompt 2 of 4\n')
  assert [line for line in several.splitlines() if line.startswith('===')] == [f'=== prompt {i} of 4' for i in (1, 2, 3, 4)]


def test_any_seed(folder, capsys):
  texts = []
  for seed in (0, 2**31, 2**32 - 1):
    assert command(folder, '--prompt=a', f'--config.seed={seed}') == 0
    texts.append(capsys.readouterr().out)
  assert len(set(texts)) == 3


def test_the_config_of_the_run_is_the_default(folder):
  flags, overrides = run.parse_flags(['--job=generate', f'--workdir={folder / "run"}', '--config.generate.tokens=7'])
  config = run.load_config(flags, overrides)
  assert config.model == MODEL and config.generate == GenerateConfig(7, top_k=50)
  flags, overrides = run.parse_flags(['--job=generate'])
  with pytest.raises(config_lib.ConfigError, match='--workdir: give the folder of a run'):
    run.load_config(flags, overrides)


def test_a_model_that_came_without_a_tokenizer_reads_ids(tmp_path, capsys):
  """Whatever the size of its vocabulary: nobody knows what its ids mean."""
  write(tmp_path, tiny.change(MODEL, vocab=40), {'from': 'elsewhere'}, None)
  (tmp_path / 'p.jsonl').write_text('{"ids": [3, 9]}\n')
  assert command(tmp_path, f'--prompts={tmp_path / "p.jsonl"}', f'--out={tmp_path / "o.jsonl"}') == 0
  line = json.loads((tmp_path / 'o.jsonl').read_text())
  assert len(line['ids']) == 12 and all(0 <= i < 40 for i in line['ids']) and line['finish'] == 'length'
  assert line['text'] == ''.join(f'{i} ' for i in line['ids'])
  capsys.readouterr()
  assert command(tmp_path, '--prompt=a') == 2
  assert 'the model came without a tokenizer, so a text has no ids' in capsys.readouterr().err
