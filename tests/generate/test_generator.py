"""Prefill in chunks and one step per token give what one pass over each sequence gives, row by row, in float64."""

import functools

import jax
import numpy as np
import pytest
from generate.made import DRAWN, GREEDY, LONGEST, ONE, PATTERNS, engine, oracle, whole_pass

from lmscale.config import ConfigError, GenerateConfig, MeshConfig
from lmscale.generate.engine import IDLE, STATE
from lmscale.generate.generator import AHEAD, Generator, cache_length, collect

rng = np.random.default_rng(0)
PROMPTS = [rng.integers(0, 40, n).tolist() for n in (5, 1, 13, 2, 8)]
TOKENS = 6
MESHES = {'data and tensor': MeshConfig(1, 2, 2, 3), 'trained with a pipeline': MeshConfig(2, 2, 2, 1), 'cut groups': MeshConfig(1, 1, 4, 1)}


@pytest.fixture(autouse=True)
def exact():
  with jax.enable_x64(True):
    yield


def options(sampling=GREEDY, chunk=64, batch=5, tokens=TOKENS):
  return GenerateConfig(tokens, *sampling, batch=batch, prefill_chunk=chunk)


def generate(arch, how, mesh=ONE, prompts=PROMPTS, **more):
  return collect(Generator(engine(arch, mesh)).generate(prompts, how, 0, **more), len(prompts))


@functools.cache
def expected(arch, sampling):
  return [oracle(arch, prompt, sampling, TOKENS, index) for index, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize(('arch', 'chunks'), [('hybrid', (1, 2, 3, 7, 64)), *((arch, (3,)) for arch in PATTERNS if arch != 'hybrid')])
def test_every_architecture_and_chunk(arch, chunks):
  for chunk in chunks:
    found = generate(arch, options(DRAWN, chunk))
    assert [one.ids for one in found] == expected(arch, DRAWN), (arch, chunk)
    assert {one.finish for one in found} == {'length'}


def leaf_of_row(caches, row):
  return {jax.tree_util.keystr(path): np.asarray(leaf)[row] for path, leaf in jax.tree_util.tree_leaves_with_path(caches)}


@pytest.mark.parametrize('arch', PATTERNS)
def test_what_is_kept_after_a_step_is_what_one_pass_keeps(arch):
  """Each leaf of each row; two documents in a row, cut anywhere; an idle row keeps its keys."""
  it = engine(arch)
  documents = [[PROMPTS[2][:7], PROMPTS[4]], [PROMPTS[0]], [PROMPTS[3], PROMPTS[2]]]
  row_tokens = [[token for document in row for token in document] for row in documents]
  row_positions = [[i for document in row for i in range(len(document))] for row in documents]
  row_segments = [[number for number, document in enumerate(row, 1) for _ in document] for row in documents]
  caches, done = it.empty(3, LONGEST), np.zeros(3, np.int32)
  for counts in ((3, 3, 0), (2, 1, 3), (3, 0, 3), (3, 0, 3), (3, 0, 3), (0, 0, 2)):
    chunk = np.zeros((3, 3, 3), np.int32)
    for row, n in enumerate(counts):
      for values, rows in zip(chunk, (row_tokens, row_positions, row_segments), strict=True):
        values[row, 3 - n :] = rows[row][done[row] : done[row] + n]
    _, caches = it.prefill(caches, *chunk, done)
    done += np.array(counts, np.int32)
  assert done.tolist() == [len(row) - 1 for row in row_tokens]
  before = jax.tree.map(np.asarray, caches)
  state = dict(zip(STATE, ([r[-1] for r in row_tokens], [p[-1] for p in row_positions], done, [0, 1, 2], [0, 0, 0]), strict=True))
  live = np.array([True, False, True])
  chosen, state, caches = it.step(
    caches, {k: it.put(np.array(v, np.int32)) for k, v in state.items()}, it.put(live), it.put(np.int32(0), whole=True), GREEDY, 40
  )
  assert np.asarray(state['slots']).tolist() == [len(row_tokens[0]), IDLE, len(row_tokens[2])]
  for row in (0, 2):
    last = documents[row][-1]
    logits, want = whole_pass(arch)(np.pad(np.array(last, np.int32), (0, LONGEST - len(last))), len(last))
    assert int(chosen[row]) == int(logits[len(last) - 1].argmax())
    start = len(row_tokens[row]) - len(last)
    want = leaf_of_row(want, 0)
    for name, leaf in leaf_of_row(caches, row).items():
      if name.endswith(("['k']", "['v']")):
        leaf, want[name] = leaf[:, start : start + len(last)], want[name][:, : len(last)]
      np.testing.assert_allclose(leaf, want[name], atol=1e-12, err_msg=f'{name}, row {row}')
  for name, leaf in leaf_of_row(caches, 1).items():
    if name.endswith(("['k']", "['v']")):
      np.testing.assert_array_equal(leaf, leaf_of_row(before, 1)[name])


@pytest.mark.parametrize('mesh', MESHES.values(), ids=MESHES)
def test_meshes(mesh):
  """Five prompts on one, two and four ranks of data."""
  assert [one.ids for one in generate('hybrid', options(DRAWN, 7), mesh)] == expected('hybrid', DRAWN)


def test_a_row_depends_on_its_prompt_alone():
  """In batches of one, two and five, beside others that stop early, and beside other prompts."""
  want = expected('hybrid', DRAWN)
  for batch in (1, 2):
    assert [one.ids for one in generate('hybrid', options(DRAWN, 7, batch))] == want
  others = [prompt if i == 2 else prompt[::-1] for i, prompt in enumerate(PROMPTS)]
  assert generate('hybrid', options(DRAWN, 7), prompts=others)[2].ids == want[2]
  found = generate('hybrid', options(DRAWN, 7), watch=lambda prompt, token: prompt in (0, 3))
  assert [one.ids for one in found] == [ids[:1] if i in (0, 3) else ids for i, ids in enumerate(want)]
  assert [one.finish for one in found] == ['stop' if i in (0, 3) else 'length' for i in range(5)]


def test_the_end_of_a_document_ends_a_row():
  """Here of the greedy tokens."""
  greedy = expected('hybrid', GREEDY)
  end = greedy[2][3]
  for one, ids in zip(generate('hybrid', options(chunk=7), end=end), greedy, strict=True):
    stopped = end in ids
    assert one.ids == (ids[: ids.index(end) + 1] if stopped else ids)
    assert one.finish == ('stop' if stopped else 'length')


def test_all_stopped_ends_the_batch(monkeypatch):
  it, steps = engine('hybrid'), []
  step = it.step
  monkeypatch.setattr(it, 'step', lambda *args: steps.append(1) or step(*args))
  assert len(list(Generator(it).generate(PROMPTS, options(chunk=7, tokens=50), 0, watch=lambda prompt, token: True))) == 5
  assert len(steps) == 1 + AHEAD  # which were under way


def test_a_prefix_for_many_rows():
  """Read once, then repeated: each row goes on as if it had read the whole."""
  it, prefix, ends = engine('hybrid'), PROMPTS[2], (3, 17, 4, 29, 5)
  tokens = np.zeros((5, 16), np.int32)
  tokens[1, :13] = prefix
  segments = (np.arange(16) < 13) & (np.arange(5)[:, None] == 1)
  at = np.broadcast_to(np.arange(16, dtype=np.int32), (5, 16))
  _, caches = it.prefill(it.empty(5, LONGEST), tokens, at, segments.astype(np.int32), np.zeros(5, np.int32))
  many = it.repeat(caches, np.ones(5, np.int32))
  assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, many, caches))
  where = np.full(5, 13, np.int32)
  state = dict(zip(STATE, (ends, where, where, np.arange(5), np.zeros(5)), strict=True))
  chosen, _, _ = it.step(
    many, {k: it.put(np.array(v, np.int32)) for k, v in state.items()}, it.put(np.ones(5, bool)), it.put(np.int32(0), whole=True), GREEDY, 40
  )
  assert np.asarray(chosen).tolist() == [oracle('hybrid', [*prefix, end], GREEDY, 1)[0] for end in ends]


def test_never_an_id_that_the_tokenizer_has_not():
  hot = options((5.0, 0, 1.0), tokens=20)
  found = collect(Generator(engine('mamba2'), ids=7).generate(PROMPTS, hot, 0), 5)
  assert {i for one in found for i in one.ids} <= set(range(7))
  assert max(i for one in generate('mamba2', hot) for i in one.ids) >= 7


def test_prompts_that_cannot_be():
  for prompts, says in (([[1], []], 'prompt 2: no tokens'), ([[40]], 'prompt 1: ids from 40 to 40, the model has 0 to 39')):
    with pytest.raises(ConfigError, match=says):
      generate('hybrid', options(), prompts=prompts)
  assert generate('hybrid', options(), prompts=[]) == []


def test_cache_lengths_are_few():
  lengths = [cache_length(n) for n in range(1, 70_000)]
  assert all(n <= length <= max(n + 255, 1.25 * n + 1) for n, length in enumerate(lengths, 1))
  assert len(set(lengths)) == 29 and cache_length(1 << 16) == 1 << 16
