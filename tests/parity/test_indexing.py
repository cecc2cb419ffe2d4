"""Random index expressions, read and written, against CPU torch."""

import pytest
import torch
import torchax  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

SIZES = st.integers(1, 4)
DTYPES = st.sampled_from([torch.float32, torch.int64, torch.bfloat16, torch.bool, torch.complex64])


def values(shape, dtype, start=1):
    """Different values (as far as the dtype allows) of a shape."""
    count = torch.Size(shape).numel()
    return (torch.arange(start, start + count) % 97).reshape(shape).to(dtype)


def same(jax, cpu):
    assert jax.shape == cpu.shape
    assert jax.dtype == cpu.dtype
    torch.testing.assert_close(jax.cpu(), cpu, equal_nan=True)


@st.composite
def index_tensors(draw, size, shape):
    entries = draw(
        st.lists(st.integers(-size, size - 1), min_size=torch.Size(shape).numel(), max_size=torch.Size(shape).numel())
    )
    return torch.tensor(entries, dtype=draw(st.sampled_from([torch.int64, torch.int32]))).reshape(shape)


@st.composite
def expressions(draw, shape, masks=True, unique=False):
    """An index expression for a tensor of `shape`."""
    common = draw(st.sampled_from([(2,), (3,), (1,), (2, 3), ()]))
    parts, d, tensors = [], 0, False
    while d < len(shape):
        kinds = ["slice", "integer", "tensor", "none", "stop"] + (["mask"] if masks and not tensors else [])
        kind = draw(st.sampled_from(kinds))
        size = shape[d]
        if kind == "stop":
            break
        if kind == "none":
            parts.append(None)
            if len(parts) > 6:
                break
            continue
        if kind == "slice":
            parts.append(
                slice(
                    draw(st.integers(-size, size)),
                    draw(st.one_of(st.none(), st.integers(-size, size))),
                    draw(st.integers(1, 2)),
                )
            )
        elif kind == "integer":
            parts.append(draw(st.integers(-size, size - 1)))
        elif kind == "mask":
            width = draw(st.integers(1, min(2, len(shape) - d)))
            covered = shape[d : d + width]
            n = torch.Size(covered).numel()
            parts.append(torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))).reshape(covered))
            d += width - 1
            masks, tensors = False, True
            common = ()  # the number of True elements is anything: other tensors must broadcast
        else:
            ndim = draw(st.integers(0, len(common)))
            parts.append(draw(index_tensors(size, common[len(common) - ndim :])))
            tensors = True
        d += 1
    return tuple(parts)


def on_device(expression):
    return tuple(e.to("jax") if isinstance(e, torch.Tensor) else e for e in expression)


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=4), dtype=DTYPES)
def test_read(data, shape, dtype):
    x = values(shape, dtype)
    expression = data.draw(expressions(shape))
    same(x.to("jax")[on_device(expression)], x[expression])


@given(
    data=st.data(),
    shape=st.lists(SIZES, min_size=1, max_size=3),
    dtype=DTYPES,
    form=st.sampled_from(["number", "tensor", "full"]),
)
def test_write(data, shape, dtype, form):
    x = values(shape, dtype)
    expression = data.draw(expressions(shape))
    target = x[expression]
    if form == "number":
        new = 3
    elif form == "tensor":
        new = torch.tensor(5, dtype=dtype)
    else:  # equal positions get equal values: which write wins is not specified
        new = torch.full_like(target, 7)
        if all(not isinstance(e, torch.Tensor) or e.dtype == torch.bool for e in expression):
            new = values(target.shape, dtype, 50)
    y, written = x.to("jax"), x.clone()
    y[on_device(expression)] = new.to("jax") if isinstance(new, torch.Tensor) else new
    written[expression] = new
    same(y, written)


@given(
    data=st.data(),
    shape=st.lists(SIZES, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.int64, torch.float64]),
)
def test_accumulate(data, shape, dtype):
    common = data.draw(st.sampled_from([(4,), (2, 3), (1,)]))
    count = data.draw(st.integers(1, len(shape)))
    indices = [data.draw(index_tensors(n, common)).long() for n in shape[:count]]
    x, new = values(shape, dtype), values((*common, *shape[count:]), dtype, 10)
    actual = x.to("jax").index_put([i.to("jax") for i in indices], new.to("jax"), accumulate=True)
    same(actual, x.index_put(indices, new, accumulate=True))
    y = x.to("jax")
    y.index_put_([i.to("jax") for i in indices], new[:1].to("jax"), accumulate=True)
    same(y, x.clone().index_put_(indices, new[:1], accumulate=True))


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=3))
def test_gradients(data, shape):
    expression = data.draw(expressions(shape))
    x = values(shape, torch.float32)
    a, b = x.clone().requires_grad_(), x.to("jax").requires_grad_()
    read = a[expression]
    if not read.numel() or not read.requires_grad:
        return
    weight = values(read.shape, torch.float32, 3)
    (read * weight).sum().backward()
    (b[on_device(expression)] * weight.to("jax")).sum().backward()
    same(b.grad, a.grad)


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=3), dim=st.integers(-1, 0))
def test_gather_and_scatter(data, shape, dim):
    x = values(shape, torch.float32)
    smaller = [data.draw(st.integers(1, n)) for n in shape]
    smaller[dim] = data.draw(st.integers(1, 5))
    index = data.draw(index_tensors(shape[dim], smaller)).long() % shape[dim]
    source = values([max(a, b) for a, b in zip(smaller, shape, strict=True)], torch.float32, 20)
    d, i, s = x.to("jax"), index.to("jax"), source.to("jax")
    same(d.gather(dim, i), x.gather(dim, index))
    same(d.scatter(dim, i, 7), x.scatter(dim, index, 7))
    same(d.scatter_add(dim, i, s), x.scatter_add(dim, index, source))
    reduce = data.draw(st.sampled_from(["sum", "prod", "mean", "amax", "amin"]))
    itself = data.draw(st.booleans())
    same(
        d.scatter_reduce(dim, i, s, reduce, include_self=itself),
        x.scatter_reduce(dim, index, source, reduce, include_self=itself),
    )


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=3), dim=st.integers(-1, 0))
def test_along_one_dimension(data, shape, dim):
    x = values(shape, torch.float32)
    index = data.draw(index_tensors(shape[dim], (3,))).long() % shape[dim]
    shape[dim] = 3
    source = values(shape, torch.float32, 30)
    d, i, s = x.to("jax"), index.to("jax"), source.to("jax")
    same(d.index_select(dim, i), x.index_select(dim, index))
    same(d.index_add(dim, i, s, alpha=2), x.index_add(dim, index, source, alpha=2))
    same(d.index_fill(dim, i, 4), x.index_fill(dim, index, 4))
    if len(set(index.tolist())) == 3:
        same(d.index_copy(dim, i, s), x.index_copy(dim, index, source))


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=3))
def test_masks(data, shape):
    x = values(shape, torch.float32)
    n = x.numel()
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))).reshape(shape)
    d, m = x.to("jax"), mask.to("jax")
    same(d[m], x[mask])
    same(d.masked_select(m), x.masked_select(mask))
    same(m.nonzero(), mask.nonzero())
    source = values((n,), torch.float32, 40)
    same(d.masked_scatter(m, source.to("jax")), x.masked_scatter(mask, source))
    picked = int(mask.sum())
    y, written = x.to("jax"), x.clone()
    y[m] = source[:picked].to("jax")
    written[mask] = source[:picked]
    same(y, written)


@pytest.mark.parametrize(
    "shape,mask_shape,value_shape",
    [
        ((3, 4), (3,), (4,)),
        ((3, 4), (3,), (1, 4)),
        ((3, 4), (3,), (2, 1)),
        ((2, 3, 4), (2, 3), (4,)),
        ((3, 4), (3, 4), ()),
    ],
)
@pytest.mark.parametrize("accumulate", [False, True])
def test_mask_with_broadcast_values(shape, mask_shape, value_shape, accumulate):
    mask = torch.zeros(mask_shape, dtype=torch.bool)
    mask.view(-1)[[0, 2]] = True
    x, new = values(shape, torch.float32), values(value_shape, torch.float32, 60)
    actual = x.to("jax").index_put((mask.to("jax"),), new.to("jax"), accumulate=accumulate)
    same(actual, x.index_put((mask,), new, accumulate=accumulate))


def test_list_index():
    x = values((4, 3), torch.float32)
    same(x.to("jax")[[1, -1]], x[[1, -1]])
    same(x.to("jax")[:, [0, 2]], x[:, [0, 2]])


def test_cpu_index():
    x = values((4, 3), torch.float32)
    same(x.to("jax")[torch.tensor([1, 3])], x[torch.tensor([1, 3])])
    same(x.to("jax")[torch.tensor([True, False, True, True])], x[torch.tensor([True, False, True, True])])
