"""Random draws. Every lowering gets a fresh key; half-width floats are drawn in float32, as their tails need it."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import random
from torchax.dtypes import to_jax
from torchax.ops import aten, raise_if, stateful

from ._index import is_half, opmath, scalar


def _real(dtype):
    """The float dtype of a draw for `dtype`."""
    dtype = np.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return np.dtype(np.float32 if dtype == np.complex64 else np.float64)
    return opmath(dtype) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(np.float32)


def _unit(key, shape, dtype):
    """Uniform over [0, 1); half-width floats get as many random bits as they hold, so that 1 stays out."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts = random.uniform(key, (2, *shape), _real(dtype))
        return jax.lax.complex(parts[0], parts[1])
    return random.uniform(key, tuple(shape), dtype)


def _open_unit(key, shape, dtype):
    """Uniform over (0, 1)."""
    tiny = jnp.finfo(dtype).eps / 4
    return jnp.clip(random.uniform(key, tuple(shape), dtype), tiny, 1 - jnp.finfo(dtype).eps / 2)


def _normal(key, shape, dtype):
    if is_half(dtype):
        return random.normal(key, tuple(shape), np.float32).astype(dtype)
    return random.normal(key, tuple(shape), dtype)


def _default(dtype):
    return to_jax(dtype or torch.get_default_dtype())


@stateful(aten.rand.default, aten.rand.generator, random=True)
def rand(size, *, dtype=None, key):
    """Uniform over [0, 1)."""
    return _unit(key, tuple(size), _default(dtype))


@stateful(aten.rand_like.default, aten.rand_like.generator, random=True)
def rand_like(x, *, dtype=None, key):
    """Uniform over [0, 1), shaped as `x`."""
    return _unit(key, x.shape, to_jax(dtype) if dtype else x.dtype)


@stateful(aten.randn.default, aten.randn.generator, random=True)
def randn(size, *, dtype=None, key):
    """Standard normal; complex values have variance 1."""
    return _normal(key, size, _default(dtype))


@stateful(aten.randn_like.default, aten.randn_like.generator, random=True)
def randn_like(x, *, dtype=None, key):
    """Standard normal, shaped as `x`."""
    return _normal(key, x.shape, to_jax(dtype) if dtype else x.dtype)


def _in_64_bit_mode():
    return jax.dtypes.canonicalize_dtype(np.int64) == np.int64


def _integers(key, shape, low, high, dtype):
    """Integers in [low, high); known bounds may go as far as the 64-bit types do."""
    shape, wide = tuple(shape), dtype in (np.int64, np.uint64, np.uint32)
    if isinstance(low, int) and isinstance(high, int):
        if high > 2**63 - 1:
            with jax.enable_x64(True):
                bits = random.bits(key, shape, np.uint64)
                bits = bits % np.uint64(high - low) if high - low < 2**64 else bits
                return (bits + np.uint64(low % 2**64)).astype(dtype)
        wide = wide or high > 2**31 - 1 or low < -(2**31)
    elif jnp.issubdtype(dtype, jnp.floating) and _in_64_bit_mode():
        wide = True
    draw = np.int64 if wide else np.int32
    with jax.enable_x64(wide or _in_64_bit_mode()):
        return random.randint(key, shape, scalar(low, draw), scalar(high, draw), draw).astype(dtype)


@stateful(aten.randint.low, aten.randint.low_generator, random=True, operands=("low", "high"))
def randint_low(low, high, size, *, dtype=torch.int64, key):
    """Integers in [low, high)."""
    return _integers(key, size, low, high, to_jax(dtype or torch.int64))


@stateful(aten.randint.default, aten.randint.generator, random=True, operands=("high",))
def randint(high, size, *, dtype=torch.int64, key):
    """Integers in [0, high)."""
    return _integers(key, size, 0, high, to_jax(dtype or torch.int64))


@stateful(aten.randint_like.low_dtype, aten.randint_like.low_generator_dtype, random=True, operands=("low", "high"))
def randint_like_low(x, low, high, *, dtype=None, key):
    """Integers in [low, high), shaped as `x`."""
    return _integers(key, x.shape, low, high, to_jax(dtype) if dtype else np.dtype(x.dtype))


@stateful(aten.randint_like.default, aten.randint_like.generator, random=True, operands=("high",))
def randint_like(x, high, *, dtype=None, key):
    """Integers in [0, high), shaped as `x`."""
    return _integers(key, x.shape, 0, high, to_jax(dtype) if dtype else np.dtype(x.dtype))


@stateful(aten.randint_like.Tensor, aten.randint_like.Tensor_generator, random=True)
def randint_like_tensor(x, high, *, dtype=None, key):
    """Integers in [0, high), shaped as `x`."""
    return _integers(key, x.shape, 0, high, to_jax(dtype) if dtype else np.dtype(x.dtype))


@stateful(aten.randperm.default, aten.randperm.generator, random=True)
def randperm(n, *, dtype=torch.int64, key):
    """A permutation of 0 .. n-1."""
    return random.permutation(key, jnp.arange(n, dtype=jnp.int32)).astype(to_jax(dtype or torch.int64))


@stateful(aten.uniform.default, random=True, operands=("from", "to"), checks=True)
def uniform(x, low=0.0, high=1.0, *, key):
    """Uniform over [low, high)."""
    raise_if(
        jnp.asarray(low) > high, RuntimeError, "uniform_ expects to return a [from, to) range, but found from > to"
    )
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        work = x.dtype
        return _unit(key, x.shape, work) * scalar(high, work) + scalar(low, work) * (1 + 0j)
    work = opmath(x.dtype)
    low, high = scalar(low, work), scalar(high, work)
    values = (random.uniform(key, x.shape, work) * (high - low) + low).astype(x.dtype)
    return jnp.where(values < high.astype(x.dtype), values, low.astype(x.dtype))  # rounding may reach `high`


@stateful(aten.normal_functional.default, random=True, operands=("mean", "std"))
def normal_functional(x, mean=0.0, std=1.0, *, key):
    """Normal, shaped as `x`."""
    work = x.dtype if jnp.issubdtype(x.dtype, jnp.complexfloating) else _real(x.dtype)
    return random.normal(key, x.shape, work) * scalar(std, work) + scalar(mean, work)


@stateful(aten.normal.float_float, random=True, operands=("mean", "std"))
def normal_float_float(mean, std, size, *, dtype=None, key):
    """Normal."""
    return normal_functional(jax.ShapeDtypeStruct(tuple(size), _default(dtype)), mean, std, key=key)


@stateful(
    aten.normal.Tensor_float,
    aten.normal.float_Tensor,
    aten.normal.Tensor_Tensor,
    random=True,
    operands=("mean", "std"),
    checks=True,
)
def normal_tensor(mean, std=1.0, *, key):
    """Normal with a mean and deviation for every element."""
    if not jnp.iscomplexobj(std):
        raise_if(jnp.asarray(std) < 0, RuntimeError, "normal expects all elements of std >= 0.0")
    dtype = max((jnp.asarray(a) for a in (mean, std) if hasattr(a, "dtype")), key=np.ndim).dtype
    work = dtype if jnp.issubdtype(dtype, jnp.complexfloating) else _real(dtype)
    shape = np.broadcast_shapes(np.shape(mean), np.shape(std))
    return random.normal(key, shape, work) * scalar(std, work) + scalar(mean, work)


def _check_probabilities(p):
    raise_if(~((p >= 0) & (p <= 1)), RuntimeError, "bernoulli: expected probabilities in [0, 1]")


@stateful(aten.bernoulli.default, random=True, checks=True)
def bernoulli(x, *, key):
    """1 with the probability that `x` gives, else 0."""
    _check_probabilities(x)
    return (random.uniform(key, x.shape, _real(x.dtype)) < x).astype(x.dtype)


@stateful(aten.bernoulli.p, random=True, operands=("p",))
def bernoulli_p(x, p, *, key):
    """1 with probability `p`, else 0, shaped as `x`."""
    work = _real(x.dtype)
    return (random.uniform(key, x.shape, work) < scalar(p, work)).astype(x.dtype)


@stateful(aten.bernoulli.Tensor, random=True, checks=True)
def bernoulli_tensor(x, p, *, key):
    """1 with the probability that `p` gives, else 0, shaped as `x`."""
    _check_probabilities(p)
    return (random.uniform(key, x.shape, _real(p.dtype)) < p).astype(x.dtype)


@stateful(aten.native_dropout.default, random=True)
def native_dropout(x, p, train=None, *, key):
    """Zero with probability `p`, the rest scaled by ``1 / (1 - p)``; and the mask of the rest."""
    if train is False or p == 0:
        return x, jnp.ones(x.shape, bool)
    if p == 1:
        return jnp.zeros_like(x), jnp.zeros(x.shape, bool)
    mask = random.bernoulli(key, np.float32(1 - p), x.shape)
    return jnp.where(mask, x * np.asarray(1 / (1 - p), x.dtype), jnp.zeros((), x.dtype)), mask


@stateful(aten._fused_dropout.default, random=True)
def fused_dropout(x, p, *, key):
    """Dropout that keeps with probability `p`; and its mask."""
    mask = random.bernoulli(key, np.float32(p), x.shape)
    return jnp.where(mask, x * np.asarray(1 / p, x.dtype), jnp.zeros((), x.dtype)), mask.astype(jnp.uint8)


@stateful(aten.rrelu_with_noise_functional.default, random=True)
def rrelu_with_noise_functional(x, noise, lower=0.125, upper=1 / 3, training=False, *, key):
    """Leaky ReLU whose slope is uniform over [lower, upper) in training; and the slopes."""
    if not training:
        slope = (lower + upper) / 2
        return jnp.where(x >= 0, x, x * jnp.asarray(slope).astype(x.dtype)), noise
    slopes = uniform(jax.ShapeDtypeStruct(x.shape, x.dtype), lower, upper, key=key)
    noise = jnp.where(x <= 0, slopes, jnp.ones((), x.dtype))
    return x * noise, noise


@stateful(aten.exponential.default, random=True, operands=("lambd",))
def exponential(x, lambd=1.0, *, key):
    """Exponential with rate `lambd`, over (0, inf)."""
    work = _real(x.dtype)
    return -jnp.log(_open_unit(key, x.shape, work)) / scalar(lambd, work)


@stateful(aten.geometric.default, random=True, operands=("p",))
def geometric(x, p, *, key):
    """Number of trials up to the first success, at least 1."""
    work = _real(x.dtype)
    trials = jnp.ceil(jnp.log(_open_unit(key, x.shape, work)) / jnp.log1p(-scalar(p, work)))
    return jnp.maximum(trials, 1).astype(x.dtype)


@stateful(aten.log_normal.default, random=True, operands=("mean", "std"))
def log_normal(x, mean=1.0, std=2.0, *, key):
    """The exponential of a normal."""
    work = _real(x.dtype)
    return jnp.exp(random.normal(key, x.shape, work) * scalar(std, work) + scalar(mean, work))


@stateful(aten.cauchy.default, random=True, operands=("median", "sigma"))
def cauchy(x, median=0.0, sigma=1.0, *, key):
    """Cauchy."""
    work = _real(x.dtype)
    return scalar(median, work) + scalar(sigma, work) * jnp.tan(np.pi * (_open_unit(key, x.shape, work) - 0.5))


def _inclusive_top(dtype):
    """The largest value that ``random_`` draws: all integers that the dtype holds exactly from 0 on."""
    if dtype == jnp.bool_:
        return 1
    if jnp.issubdtype(dtype, jnp.floating):
        return 2 ** (jnp.finfo(dtype).nmant + 1)
    return int(jnp.iinfo(dtype).max)


@stateful(aten.random.default, random=True)
def random_default(x, *, key):
    """Integers from 0 to the largest of the dtype (for floats 2 to the number of mantissa bits)."""
    return _integers(key, x.shape, 0, _inclusive_top(x.dtype) + 1, np.dtype(x.dtype))


@stateful(aten.random.to, random=True)
def random_to(x, to, *, key):
    """Integers in [0, to)."""
    return _integers(key, x.shape, 0, to, np.dtype(x.dtype))


@stateful(getattr(aten.random, "from"), random=True)
def random_from(x, low, to=None, *, key):
    """Integers in [low, to), up to the largest of the dtype if `to` is None."""
    return _integers(key, x.shape, low, _inclusive_top(x.dtype) + 1 if to is None else to, np.dtype(x.dtype))
