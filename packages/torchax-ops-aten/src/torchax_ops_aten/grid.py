"""Sampling of images and volumes at given positions (spatial transformers)."""

import itertools

import jax
import jax.numpy as jnp
from torchax.ops import aten, lowering

from .norm import wide

_BILINEAR, _NEAREST, _BICUBIC = 0, 1, 2
_ZEROS, _BORDER, _REFLECTION = 0, 1, 2


def _unnormalize(x, n: int, align_corners: bool):
    return (x + 1) * ((n - 1) / 2) if align_corners else ((x + 1) * n - 1) / 2


def _reflect(x, twice_low: int, twice_high: int):
    """Reflect until within ``[low, high]`` (given doubled)."""
    if twice_low == twice_high:
        return jnp.zeros_like(x)
    low, span = twice_low / 2, (twice_high - twice_low) / 2
    x = jnp.abs(x - low)
    flips = jnp.floor(x / span)
    extra = x - flips * span
    return jnp.where(jnp.mod(flips, 2) == 0, extra + low, span - extra + low)


def _place(x, n: int, padding_mode: int, align_corners: bool):
    """Positions outside of the image brought in, as `padding_mode` asks."""
    if padding_mode == _REFLECTION:
        x = _reflect(x, 0, 2 * (n - 1)) if align_corners else _reflect(x, -1, 2 * n - 1)
    if padding_mode != _ZEROS:
        x = jnp.clip(x, 0, n - 1)
        x = jnp.where(jnp.isnan(x), 0, x)
    return x


def _pick(image, positions, mask_outside: bool):
    """Values ``[N, C, *out]`` at whole-numbered `positions` (one ``[N, *out]`` array a dimension), zero outside."""
    batch, channels, *spatial = image.shape
    linear, inside = None, None
    for at, n in zip(positions, spatial, strict=True):
        ok = (at >= 0) & (at <= n - 1)
        at = jnp.clip(jnp.where(jnp.isnan(at), -1, at), 0, n - 1).astype(jnp.int32)
        linear = at if linear is None else linear * n + at
        inside = ok if inside is None else inside & ok
    assert linear is not None and inside is not None
    flat = image.reshape(batch, channels, -1)
    found = jax.vmap(lambda plane, i: jnp.take(plane, i, axis=-1))(flat, linear.reshape(batch, -1))
    found = found.reshape(batch, channels, *linear.shape[1:])
    return jnp.where(inside[:, None], found, 0) if mask_outside else found


def _cubic_weights(t):
    a = -0.75
    far, near = 1 + t, t
    return (
        ((a * far - 5 * a) * far + 8 * a) * far - 4 * a,
        ((a + 2) * near - (a + 3)) * near * near + 1,
        ((a + 2) * (1 - near) - (a + 3)) * (1 - near) * (1 - near) + 1,
        ((a * (2 - t) - 5 * a) * (2 - t) + 8 * a) * (2 - t) - 4 * a,
    )


def _sample(image, grid, interpolation_mode: int, padding_mode: int, align_corners: bool):
    """Values of ``[N, C, *spatial]`` at ``grid[N, *out, rank]``, whose last dimension counts from the last one (x, y, z)."""
    spatial = image.shape[2:]
    out_shape = (*image.shape[:2], *grid.shape[1:-1])
    if 0 in out_shape:
        return jnp.zeros(out_shape, image.dtype)
    rank = len(spatial)
    raw = [_unnormalize(grid[..., rank - 1 - i], n, align_corners) for i, n in enumerate(spatial)]
    if interpolation_mode == _BICUBIC:
        return _bicubic(image, raw, padding_mode, align_corners)
    at = [_place(x, n, padding_mode, align_corners) for x, n in zip(raw, spatial, strict=True)]
    if interpolation_mode == _NEAREST:
        return _pick(image, [jnp.round(x) for x in at], True)
    low = [jnp.floor(x) for x in at]
    total = None
    for corner in itertools.product((0, 1), repeat=rank):
        weight = None
        for x, x0, c in zip(at, low, corner, strict=True):
            part = x - x0 if c else x0 + 1 - x
            weight = part if weight is None else weight * part
        assert weight is not None
        value = _pick(image, [x0 + c for x0, c in zip(low, corner, strict=True)], True) * weight[:, None]
        total = value if total is None else total + value
    return total


def _bicubic(image, raw, padding_mode, align_corners):
    low = [jnp.floor(x) for x in raw]
    weights = [_cubic_weights(x - x0) for x, x0 in zip(raw, low, strict=True)]
    total = None
    for i, j in itertools.product(range(4), repeat=2):
        at = [
            _place(x0 + k - 1, n, padding_mode, align_corners)
            for x0, k, n in zip(low, (i, j), image.shape[2:], strict=True)
        ]
        value = _pick(image, at, padding_mode == _ZEROS) * (weights[0][i] * weights[1][j])[:, None]
        total = value if total is None else total + value
    return total


def _gradients(grad, image, grid, interpolation_mode, padding_mode, align_corners, output_mask):
    image_wide, grid_wide = wide(image), wide(grid)

    def forward(image, grid):
        return _sample(image, grid, interpolation_mode, padding_mode, align_corners)

    if grad.size == 0 or image.size == 0:
        grads = (jnp.zeros_like(image), jnp.zeros_like(grid))
    elif not output_mask[0]:
        grads = (None, jax.vjp(lambda g: forward(image_wide, g), grid_wide)[1](wide(grad))[0])
    else:
        grads = jax.vjp(forward, image_wide, grid_wide)[1](wide(grad))
    return (grads[0] if output_mask[0] else None), (grads[1] if output_mask[1] else None)


@lowering(aten.grid_sampler_2d.default)
def grid_sampler_2d(input, grid, interpolation_mode, padding_mode, align_corners):
    """Sample images at the positions of `grid`, which run from -1 to 1."""
    return _sample(wide(input), wide(grid), interpolation_mode, padding_mode, align_corners)


@lowering(aten.grid_sampler_3d.default)
def grid_sampler_3d(input, grid, interpolation_mode, padding_mode, align_corners):
    """Sample volumes at the positions of `grid`, which run from -1 to 1."""
    return _sample(wide(input), wide(grid), interpolation_mode, padding_mode, align_corners)


@lowering(aten.grid_sampler_2d_backward.default)
def grid_sampler_2d_backward(grad_output, input, grid, interpolation_mode, padding_mode, align_corners, output_mask):
    """Gradients of `grid_sampler_2d`."""
    return _gradients(grad_output, input, grid, interpolation_mode, padding_mode, align_corners, output_mask)


@lowering(aten.grid_sampler_3d_backward.default)
def grid_sampler_3d_backward(grad_output, input, grid, interpolation_mode, padding_mode, align_corners, output_mask):
    """Gradients of `grid_sampler_3d`."""
    return _gradients(grad_output, input, grid, interpolation_mode, padding_mode, align_corners, output_mask)
