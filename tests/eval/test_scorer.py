"""A model of ours as tasks see it: each log-likelihood is that of one pass over the whole text, in float64."""

import string

import jax
import numpy as np
import pytest
from generate.made import GREEDY, LONGEST, ONE, PATTERNS, engine, oracle, whole_pass

from lmscale.config import GenerateConfig, MeshConfig
from lmscale.eval.requests import Continuation, Rolling, Window, Writing
from lmscale.eval.scorer import Scorer


class Letters:
  """A letter or a space is a token; `th` is one, too."""

  identity, size, end = 'letters', 29, 28
  letters = string.ascii_lowercase + ' '

  def encode(self, text):
    ids, at = [], 0
    while at < len(text):
      pair = text[at : at + 2] == 'th'
      ids.append(27 if pair else self.letters.index(text[at]))
      at += 2 if pair else 1
    return np.array(ids, np.int32)

  def decode(self, ids):
    return ''.join((*self.letters, 'th', '')[i] for i in ids)


@pytest.fixture(autouse=True)
def exact():
  with jax.enable_x64(True):
    yield


def scorer(arch='hybrid', mesh=ONE, batch=4, chunk=64, context=LONGEST):
  return Scorer(engine(arch, mesh), Letters(), GenerateConfig(batch=batch, prefill_chunk=chunk), context)


def one_pass(arch, before, scored):
  """(log-probability, whether greedy) of `scored` behind `before`, ids."""
  ids = [*before, *scored]
  logits, _ = whole_pass(arch)(np.pad(np.array(ids, np.int32), (0, LONGEST - len(ids))), len(ids))
  logits = np.asarray(logits)[len(before) - 1 : len(ids) - 1, : Letters.size]
  logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
  return logps[np.arange(len(scored)), scored].sum(), bool((logits.argmax(-1) == scored).all())


PAIRS = [('the cat ', 'sat'), ('the cat ', 'ran away'), ('', 'a dog'), ('the cat', ' sat'), ('x', 'y'), ('the cat ', 's'), ('to be or', ' not to be')]


@pytest.mark.parametrize('arch', PATTERNS)
def test_continuations_equal_one_pass(arch):
  asked = [Continuation(*pair) for pair in PAIRS]
  for batch, chunk in ((4, 64), (1, 3)) if arch == 'hybrid' else ((4, 3),):
    model = scorer(arch, batch=batch, chunk=chunk)
    for request, found in zip(asked, model.continuations(asked), strict=True):
      before, scored = model.encode_pair(request.context, request.text)
      logp, greedy = one_pass(arch, before, scored)
      assert found.logp == pytest.approx(logp, rel=1e-5), request  # log-probabilities are float32
      assert (found.greedy, found.tokens) == (greedy, len(scored))
    assert model.truncated == 0


def test_eight_devices_say_the_same():
  asked, written = [Continuation(*pair) for pair in PAIRS], [Writing('the cat ', (), 3), Writing('to be', (), 3)]
  alone, sharded = scorer(), scorer(mesh=MeshConfig(1, 4, 2, 3))
  for found, want in zip(sharded.continuations(asked), alone.continuations(asked), strict=True):
    assert found.logp == pytest.approx(want.logp, rel=1e-6) and found[1:] == want[1:]
  assert sharded.write(written) == alone.write(written)


def test_how_texts_become_tokens():
  model = scorer()
  assert model.encode_pair('a ', 'b') == ([0], [26, 1])  # the space goes to what follows it
  assert model.encode_pair('', 'ab') == ([28], [0, 1])
  assert model.encode_pair('at', 'he') == ([0, 27], [4])  # tokenised together, cut where the context alone ends


def test_what_is_longer_than_the_context_loses_its_beginning():
  model, text = scorer(context=8), 'abcdefghij'
  (found,) = model.continuations([Continuation(text, ' klm')])
  assert found.logp == pytest.approx(one_pass('hybrid', [5, 6, 7, 8, 9], [26, 10, 11, 12])[0], rel=1e-5)
  assert model.truncated == 1
  (found,) = model.continuations([Continuation('a', 'bcdefghijklm')])
  assert (found.tokens, model.truncated) == (8, 2)
  assert model.write([Writing(text * 3, (), 3)]) == scorer(context=8).write([Writing((text * 3)[-5:], (), 3)])
  assert model.truncated == 3


def test_what_is_empty():
  model = scorer()
  assert model.continuations([Continuation('abc', ''), Continuation('', '')]) == [(0.0, True, 0)] * 2
  assert model.rolling([Rolling('')]) == [(0.0, True, 0)]
  assert model.write([Writing('', (), 2)]) == model.write([Writing('', ('zzzz',), 2)])  # from the end of a document on


@pytest.mark.parametrize('length', [1, 7, 8, 9, 16, 21])
def test_every_token_of_a_long_text_is_scored_once(length):
  model = scorer(context=8)
  ids = list(np.random.default_rng(length).integers(0, 26, length))
  pairs = model.cut_windows(ids)
  assert [i for _, scored in pairs for i in scored] == ids
  assert pairs[0][0] == [28] and all(len(before) + len(scored) == 9 for before, scored in pairs[1:])
  (found,) = model.rolling([Rolling(Letters().decode(ids))])
  assert found.logp == pytest.approx(sum(one_pass('hybrid', *pair)[0] for pair in pairs), rel=1e-5)
  assert (found.tokens, model.truncated) == (length, 0)


def test_every_token_of_a_window_is_that_of_one_pass():
  ids = np.random.default_rng(3).integers(0, 26, (2, 21))
  found = scorer(chunk=8).windows([Window(tuple(row)) for row in ids.tolist()])
  for logps, row in zip(found, ids.tolist(), strict=True):
    wanted = [one_pass('hybrid', [28, *row[:i]], [row[i]])[0] for i in range(21)]
    assert logps == pytest.approx(wanted, rel=1e-5)


def test_writing_is_greedy_and_ends_where_it_is_asked_to():
  model = scorer(batch=3)
  ids = oracle('hybrid', [0, 1, 2], GREEDY, 8, ids=Letters.size, end=Letters.end)
  whole = Letters().decode(ids)
  asked = [Writing('abc', (), 8), Writing('abc', (whole[3:5],), 8), Writing('abc', (), 2), Writing('the cat', (), 8)]
  found = model.write(asked)
  assert found[:3] == [whole, whole[: whole.index(whole[3:5])], Letters().decode(ids[:2])]
  assert model.write(asked[::-1]) == found[::-1]
