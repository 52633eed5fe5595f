import numpy as np

from lmscale.data import permutations


def test_is_a_permutation_that_depends_on_the_whole_key():
  for n in (0, 1, 2, 1000):
    assert sorted(permutations.permutation(n, 'a', 1)) == list(range(n))
  first = permutations.permutation(1000, 'a', 1)
  assert np.array_equal(first, permutations.permutation(1000, 'a', 1))
  for other in (('a', 2), ('b', 1), ('a', '1'), ('a',)):
    assert not np.array_equal(first, permutations.permutation(1000, *other))


def test_known_value():
  # Runs must not change with the library: these come from Philox's raw stream, which NumPy keeps stable.
  assert permutations.permutation(8, 'documents', 0).tolist() == [3, 4, 6, 2, 1, 7, 0, 5]
