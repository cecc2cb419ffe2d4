"""What the kernels compute, in plain `jax.numpy`: the yardstick of the tests and the source of gradients."""

import jax
import jax.numpy as jnp
from jax import lax


def attention(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool, scale: float) -> jax.Array:
    """``softmax(query @ key.T * scale) @ value`` over ``[..., length, features]``, the softmax in float32."""
    scores = jnp.einsum("...le,...se->...ls", query, key, preferred_element_type=jnp.float32) * scale
    if causal:
        rows, columns = (lax.broadcasted_iota(jnp.int32, scores.shape[-2:], i) for i in (0, 1))
        scores = jnp.where(columns <= rows, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("...ls,...sv->...lv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return out.astype(query.dtype)
