"""The metrics, on cases that can be counted by hand."""

import math

import numpy as np
import pytest

from lmscale.eval.metrics import digits_right, exact_match, f1, mean, normalise, rouge_l, standard_error


def test_form_does_not_count():
  assert normalise('The  Cat, a CAT; and "an" owl!') == 'cat cat and owl'
  assert exact_match('the Eiffel Tower.', ['Eiffel tower', 'x']) == 1
  assert exact_match('Eiffel', ['Eiffel tower']) == 0
  assert (exact_match('', []), exact_match('yes', [])) == (1, 0)


def test_f1_is_of_words_with_repetitions():
  assert f1('red red blue', ['red blue blue']) == pytest.approx(2 * 2 / 6)
  assert f1('a b c', ['d', 'b c']) == 1  # without articles
  assert (f1('', ['x']), f1('x', ['']), f1('', [''])) == (0, 0, 1)


def test_rouge_l():
  assert rouge_l('the cat sat here', ['the cat lay here']) == pytest.approx(3 / 4)
  assert rouge_l('b a', ['a b']) == pytest.approx(1 / 2)
  assert rouge_l('x', ['y', 'x']) == 1
  assert rouge_l('', ['x']) == 0


def test_means_and_their_errors():
  values = np.random.default_rng(0).normal(size=40)
  assert mean(list(values)) == pytest.approx(values.mean())
  assert standard_error(list(values)) == pytest.approx(values.std(ddof=1) / math.sqrt(40))
  assert math.isnan(standard_error([1.0])) and math.isnan(mean([]))


def test_digits():
  assert digits_right(' 5551234', '5551239') == pytest.approx(6 / 7)
  assert (digits_right('', '123'), digits_right('123 and more', '123')) == (0, 1)
