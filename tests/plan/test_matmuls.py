"""Matrix products counted in compiled programs."""

import jax
import jax.numpy as jnp

from lmscale.plan.matmuls import matmul_flops


def test_products_of_loops_count_as_often_as_they_run():
  def function(a, b, stack):
    def outer(x, w):
      return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

    return jax.lax.scan(outer, a, stack)[0] @ b, jnp.einsum('hij,hjk->hik', stack, stack)

  shapes = [jnp.zeros(shape) for shape in ((4, 16), (16, 5), (7, 16, 16))]
  text = jax.jit(function).lower(*shapes).compile().as_text()
  assert matmul_flops(text) == 2 * (7 * 3 * 4 * 16 * 16 + 4 * 16 * 5 + 7 * 16**3)
