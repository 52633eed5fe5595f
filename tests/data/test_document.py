import numpy as np
import pytest

from lmscale.data import document


def test_split_depends_on_content_alone():
  texts = [f'document {i}'.encode() for i in range(200)]
  sides = [document.split_of(text, 0.3) for text in texts]
  assert sides == [document.split_of(bytes(text), 0.3) for text in texts]
  assert set(sides) == {'train', 'validation'}


@pytest.mark.parametrize('fraction', [0.0, 0.02, 0.5])
def test_the_share_is_the_fraction(fraction):
  keys = np.array([document.split_key(str(i).encode()) for i in range(20000)], np.uint64)
  share = document.in_validation(keys, fraction).mean()
  assert abs(share - fraction) <= 4 * (fraction * (1 - fraction) / len(keys)) ** 0.5


def test_a_larger_share_keeps_the_smaller_one():
  keys = np.array([document.split_key(str(i).encode()) for i in range(1000)], np.uint64)
  small, large = (document.in_validation(keys, fraction) for fraction in (0.1, 0.3))
  assert (large | ~small).all()


def test_known_value():
  # The first 8 bytes of SHA-256 of the empty string.
  assert document.split_key(b'') == 0xE3B0C44298FC1C14
