"""Errors head by head: one pooled over the heads hides a head that is small, or wrong alone."""

import numpy as np

# The dim of the heads, or of the groups, in results and gradients of `ssd` by name.
DIM = {'y': 2, 'state': 1, 'x': 2, 'dt': 2, 'A': 0, 'B': 2, 'C': 2, 'D': 0, 'z': 2, 'initial_state': 1}
BESIDE = 4  # times the error of the reference are allowed


def assert_heads_close(got, want, bounds, scales=None, reference=None):
  """Of every head of every leaf: rms error <= bound * rms of the wanted, and no element worse than four times that share
  of the largest; or either at most BESIDE times what the reference has.

  Args:
    got, want, reference: ((y, state), {name: gradient}) of `ssd`; want in float64, and the reference, say 'scan' in
      float32, or None.
    bounds: the relative error allowed of 'y', 'state', and by the name of the argument of each gradient.
    scales: {name: one number per head} that stand for the rms of a wanted gradient where they are larger: of a sum,
      the root of the sum of its terms' squares.
  """
  got, want, reference = (None if m is None else _flat(m) for m in (got, want, reference))
  assert got.keys() == want.keys()
  report, failed = [], False
  for (kind, key), wanted in want.items():
    name = kind + key
    error, size = _per_head(got[kind, key] - wanted, key), _per_head(wanted, key)
    assert got[kind, key].shape == wanted.shape, f'{name}: shape {got[kind, key].shape}, wanted {wanted.shape}'
    assert np.isfinite(got[kind, key]).all(), f'{name}: not finite'
    scale = size if scales is None or key not in scales else np.maximum(size, scales[key])
    bound = np.maximum(bounds[key] * scale * [[1], [4]], np.finfo(np.float32).tiny)  # below is 0 for every purpose
    if reference is not None:
      bound = np.maximum(bound, BESIDE * _per_head(reference[kind, key] - wanted, key))
    wrong = error > bound
    failed |= wrong.any()
    for head in range(error.shape[1]):
      e, b, s = error[:, head], bound[:, head], scale[0, head] or 1
      report.append(
        f'{"FAIL" if wrong[:, head].any() else "ok  "} {name} head {head}: relative RMSE {e[0] / s:.1e} '
        f'(bound {b[0] / s:.1e}), largest error {e[1]:.1e} (bound {b[1]:.1e})'
      )
  print('\n'.join(report))
  assert not failed, '\n'.join(line for line in report if line.startswith('FAIL'))


def _flat(results):
  (y, state), gradients = results
  named = {('', 'y'): y, ('', 'state'): state} | {('d', name): gradient for name, gradient in gradients.items()}
  return {name: np.asarray(m, np.float64) for name, m in named.items()}


def _per_head(m, name):
  """(rms, largest) of every head, [2, heads]."""
  m = np.moveaxis(m, DIM[name], 0).reshape(m.shape[DIM[name]], -1)
  return np.stack([np.sqrt(np.square(m).mean(1)), np.abs(m).max(1)])
