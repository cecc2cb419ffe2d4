"""Complex numbers: made from parts, taken apart, conjugated."""

import jax.numpy as jnp
from jax import lax
from torchax.ops import aten, lowering, table

from ._common import is_complex


@lowering(aten.complex.default)
def complex_(real, imag):
    """real + i imag."""
    return lax.complex(*jnp.broadcast_arrays(real, imag))


@lowering(aten.polar.default)
def polar(abs, angle):
    """abs (cos(angle) + i sin(angle))."""
    return lax.complex(*jnp.broadcast_arrays(abs * jnp.cos(angle), abs * jnp.sin(angle)))


@lowering(aten.angle.default, promote="complex_to_float")
def angle(x):
    """The argument in (-pi, pi]; of real numbers 0, pi or NaN."""
    if is_complex(x):
        return jnp.arctan2(x.imag, x.real)
    x = x.astype(jnp.result_type(x, jnp.float32)) if not jnp.issubdtype(x.dtype, jnp.floating) else x
    return jnp.where(jnp.isnan(x), x, jnp.where(x < 0, jnp.pi, 0.0).astype(x.dtype))


CONJUGATES = table(
    {"_conj_physical": lambda x: jnp.conj(x) if is_complex(x) else x},
)
