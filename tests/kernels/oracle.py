"""The recurrences in NumPy and float64, one token at a time, with their gradients written out: what must come out.

Independent of the package and of automatic differentiation. `ssd` and `selective_scan` take the arguments of the
operations as a dict and return ((y, state), gradients of sum(weights[0] * y) + sum(weights[1] * state)). `terms`
says how large the terms are whose sums are the gradients of A and D.
"""

import numpy as np


def recurrence(log_decay, keep, v, B, C, state, dy, dstate):
  """h_t = keep_t exp(log_decay_t) h_(t-1) + v_t B_t^T, y_t = h_t C_t, and the gradients.

  log_decay [b, l, h, p or 1, n or 1], keep [b, l], v and dy [b, l, h, p], B and C [b, l, h, n], state [b, h, p, n].
  Returns (y, last state), (gradients of log_decay, v, B, C, state).
  """
  l = v.shape[1]
  decay = np.exp(log_decay) * keep[:, :, None, None, None]
  states = np.empty((l + 1, *state.shape))
  states[0] = state
  y = np.empty_like(v)
  for t in range(l):
    states[t + 1] = decay[:, t] * states[t] + v[:, t, ..., None] * B[:, t, :, None]
    y[:, t] = (states[t + 1] @ C[:, t, ..., None])[..., 0]
  d_log, d_v, d_B, d_C = (np.empty_like(m) for m in (log_decay, v, B, C))
  d_h = dstate.copy()
  for t in reversed(range(l)):
    d_h += dy[:, t, ..., None] * C[:, t, :, None]
    d_C[:, t] = (dy[:, t, :, None] @ states[t + 1])[..., 0, :]
    d_v[:, t] = (d_h @ B[:, t, ..., None])[..., 0]
    d_B[:, t] = (v[:, t, :, None] @ d_h)[..., 0, :]
    d_h = decay[:, t] * d_h
    d_log[:, t] = _sum_to(d_h * states[t], log_decay.shape[2:])
  return (y, states[l]), (d_log, d_v, d_B, d_C, d_h)


def ssd(arguments, weights, segment_ids=None):
  """Of `lmscale.kernels.ssd.ssd`. arguments: x, dt, A, B, C and, if used, D, z, initial_state."""
  results, gradients, _ = _ssd(arguments, weights, segment_ids)
  return results, gradients


def terms(arguments, weights, segment_ids=None):
  """{'A': [h], 'D': [h]}: the root of the sum of the squares of what `ssd` sums up to the gradients of A and D [h]."""
  _, _, found = _ssd(arguments, weights, segment_ids)
  return {name: np.sqrt(np.square(m).sum((0, 1, 3))) for name, m in found.items() if np.ndim(arguments.get(name)) == 1}


def _ssd(arguments, weights, segment_ids):
  a = {name: np.asarray(value, np.float64) for name, value in arguments.items()}
  x, A, h = a['x'], a['A'], a['x'].shape[2]
  keep, real = _documents(segment_ids, x.shape[:2])
  dt = a['dt'] * real[..., None]
  state = a.get('initial_state', np.zeros((len(x), h, x.shape[3], a['B'].shape[3])))
  d_core, finish = _after(a, weights[0], real[..., None, None])
  (core, state), (d_log, d_v, d_B, d_C, d_state) = recurrence(
    (dt * A)[..., None, None], keep, dt[..., None] * x, _to_heads(a['B'], h), _to_heads(a['C'], h), state,
    d_core, np.asarray(weights[1], np.float64),
  )  # fmt: skip
  d_log = d_log[..., 0, 0]
  y, gradients = finish(core)
  gradients['x'] += dt[..., None] * d_v
  gradients |= {
    'dt': (d_log * A + (d_v * x).sum(-1)) * real[..., None], 'A': (d_log * dt).sum((0, 1)),
    'B': _to_groups(d_B, a['B']), 'C': _to_groups(d_C, a['C']), 'initial_state': d_state,
  }  # fmt: skip
  return (y, state), {name: gradients[name] for name in arguments}, {'A': (d_log * dt)[..., None], 'D': d_core * x}


def selective_scan(arguments, weights, segment_ids=None):
  """Of `lmscale.kernels.selective_scan.selective_scan`; B and C [b, l, g, n]. A channel is a head of width 1."""
  a = {name: np.asarray(value, np.float64) for name, value in arguments.items()}
  x, A, d = a['x'], a['A'], a['x'].shape[2]
  keep, real = _documents(segment_ids, x.shape[:2])
  dt = a['dt'] * real[..., None]
  state = a.get('initial_state', np.zeros((x.shape[0], *A.shape)))
  d_core, finish = _after(a, weights[0], real[..., None])
  (core, state), (d_log, d_v, d_B, d_C, d_state) = recurrence(
    (dt[..., None] * A)[:, :, :, None], keep, (dt * x)[..., None], _to_heads(a['B'], d), _to_heads(a['C'], d),
    state[:, :, None], d_core[..., None], np.asarray(weights[1], np.float64)[:, :, None],
  )  # fmt: skip
  d_log, d_v = d_log[:, :, :, 0], d_v[..., 0]
  y, gradients = finish(core[..., 0])
  gradients['x'] += dt * d_v
  gradients |= {
    'dt': ((d_log * A).sum(-1) + d_v * x) * real[..., None], 'A': (d_log * dt[..., None]).sum((0, 1)),
    'B': _to_groups(d_B, a['B']), 'C': _to_groups(d_C, a['C']), 'initial_state': d_state[:, :, 0],
  }  # fmt: skip
  return (y, state[:, :, 0]), {name: gradients[name] for name in arguments}


def gated_norm(y, z, scale, groups, eps, gate_first, weights):
  """Of `lmscale.kernels.gated_norm.gated_norm`: (result, gradients of sum(weights * result) for y, z and scale)."""
  y, z, scale, weights = (np.asarray(m, np.float64) for m in (y, z, scale, weights))
  b, t, h, _ = y.shape
  gate, slope = _silu(z)

  def mean(m):
    grouped = m.reshape(b, t, groups, -1).mean(-1)
    return np.repeat(grouped, h // groups, axis=-1)[..., None]

  u, outer = (y * gate, weights) if gate_first else (y, weights * gate)
  inverse = (mean(u**2) + eps) ** -0.5
  d_u = inverse * outer * scale - inverse**3 * u * mean(outer * scale * u)
  normal = u * inverse * scale
  d_scale = (outer * u * inverse).sum((0, 1))
  if gate_first:
    return normal, (d_u * gate, d_u * y * slope, d_scale)
  return normal * gate, (d_u, weights * normal * slope, d_scale)


def _documents(segment_ids, shape):
  """keep: False at the first token of every document of a row but its first. real: False at padding."""
  keep, real = np.ones(shape, bool), np.ones(shape, bool)
  for row, ids in enumerate([] if segment_ids is None else segment_ids):
    current = 0
    for t, segment in enumerate(ids):
      real[row, t] = segment != 0
      keep[row, t] = segment in (0, current) or current == 0
      current = segment or current
  return keep, real


def _after(a, weight, real):
  """The D skip and the z gate. Returns the gradient for the core's output, and core -> (y, gradients of x, D, z)."""
  x = a['x']
  D = a.get('D', np.zeros(x.shape[2:]))
  D = D.reshape(*D.shape, *[1] * (x.ndim - 2 - D.ndim))
  gate, slope = _silu(a['z']) if 'z' in a else (1.0, 0.0)
  d_skip = np.asarray(weight, np.float64) * real * gate

  def finish(core):
    skip = core + D * x
    d_D = (d_skip * x).sum((0, 1))
    gradients = {'x': D * d_skip, 'D': d_D if a.get('D', d_D).shape == d_D.shape else d_D.sum(-1)}
    return skip * gate * real, gradients | {'z': np.asarray(weight, np.float64) * real * skip * slope}

  return d_skip, finish


def _silu(z):
  sigmoid = 1 / (1 + np.exp(-z))
  return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


def _to_heads(m, heads):
  return np.repeat(m, heads // m.shape[2], axis=2)


def _to_groups(m, like):
  b, l, g, n = like.shape
  return m.reshape(b, l, g, -1, n).sum(3)


def _sum_to(m, shape):
  """Sums the dims of m [b, ...] that are 1 in `shape` (without b)."""
  axes = tuple(i + 1 for i, size in enumerate(shape) if size == 1 and m.shape[i + 1] != 1)
  return m.sum(axes, keepdims=True) if axes else m
