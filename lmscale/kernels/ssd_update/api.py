"""One decoding step of the SSD: choice of implementation and checks."""

import jax

from lmscale.kernels.ssd_update.xla import ssd_update_xla


def ssd_update(
  state: jax.Array,
  x: jax.Array,
  dt: jax.Array,
  A: jax.Array,
  B: jax.Array,
  C: jax.Array,
  *,
  D: jax.Array | None = None,
  z: jax.Array | None = None,
  slots: jax.Array | None = None,
  implementation: str | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """state <- exp(dt A) state + dt x B^T and y = state C (arXiv 2405.21060, section 2), for one token of every row.

  With D, y + D x; with z, the result times silu(z). Computed in acc = promote_types(float32, x.dtype, state.dtype).

  Args:
    state: [b, h, p, n], or with slots a pool [s, h, p, n]. Donate it to have it updated in place.
    x: [b, h, p].
    dt: [b, h], already positive (after softplus).
    A: [h], negative.
    B, C: [b, g, n]; heads (h / g) i .. (h / g) (i + 1) - 1 use group i.
    D: [h] or [h, p]. z: [b, h, p].
    slots: [b] int32, the row of the pool that belongs to each row of x, none twice. The pool's other rows stay as
      they are, to the bit. A slot outside the pool marks an idle row: it starts from zero and nothing is stored.
    implementation: 'xla'. None chooses.
    interpret: run 'pallas_triton' on the CPU, slowly, for tests.

  Returns:
    y [b, h, p] in x.dtype and the state (or pool) in its own dtype.

  Raises:
    ValueError: shapes that do not fit, an unknown implementation, or a named one that cannot do what is asked.
  """
  y, state = ssd_update_xla(state, x, dt, A, B, C, D, z, slots)
  return y.astype(x.dtype), state
