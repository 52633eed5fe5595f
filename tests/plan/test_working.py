"""What a traced function holds at one time."""

import jax
import jax.numpy as jnp

from lmscale.plan.working import working_bytes

M = jax.ShapeDtypeStruct((16, 16), jnp.float32)
ONE = 16 * 16 * 4


def test_results_live_until_they_are_last_read():
  assert working_bytes(lambda a: a @ a, M) == ONE
  assert working_bytes(lambda a: (a @ a) @ a, M) == 2 * ONE
  assert working_bytes(lambda a: ((a @ a) @ a) @ a, M) == 2 * ONE
  assert working_bytes(lambda a: (b := a @ a, b @ a), M) == 2 * ONE


def test_elementwise_operations_fuse_unless_read_twice():
  assert working_bytes(lambda a: (jnp.exp(a) + 1) @ a, M) == ONE
  assert working_bytes(lambda a: (e := jnp.exp(a)) @ e, M) == 2 * ONE


def test_the_inside_of_a_loop_counts_while_it_runs():
  def loop(a):
    return jax.lax.fori_loop(0, 3, lambda i, c: (c @ c) @ c, a)

  assert working_bytes(loop, M) >= 1.9 * ONE
  assert working_bytes(jax.jit(loop), M) == working_bytes(loop, M)
