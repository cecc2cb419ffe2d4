"""Storages and views: which tensors share memory, what they report, and what torch refuses."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch

from helpers import assert_same

VIEWS = {
    "view": lambda t: t.view(6, 4),
    "reshape": lambda t: t.reshape(-1),
    "slice": lambda t: t[:, 1:, ::2],
    "select": lambda t: t[1],
    "negative select": lambda t: t[..., -1],
    "narrow": lambda t: t.narrow(1, 1, 2),
    "transpose": lambda t: t.transpose(0, 2),
    "permute": lambda t: t.permute(2, 0, 1),
    "mT": lambda t: t.mT,
    "movedim": lambda t: t.movedim(0, -1),
    "swapaxes": lambda t: t.swapaxes(0, 1),
    "expand": lambda t: t[:, :1].expand(2, 5, 4),
    "broadcast_to": lambda t: torch.broadcast_to(t[0], (3, 3, 4)),
    "unfold": lambda t: t.unfold(2, 2, 2),
    "diagonal": lambda t: t.diagonal(0, 1, 2),
    "as_strided": lambda t: t.as_strided((2, 3), (3, 2), 4),
    "squeeze": lambda t: t[:1].squeeze(0),
    "unsqueeze": lambda t: t.unsqueeze(1),
    "flatten": lambda t: t.flatten(1),
    "unflatten": lambda t: t.unflatten(2, (2, 2)),
    "split": lambda t: t.split(2, dim=2)[1],
    "split sizes": lambda t: t.split([1, 2], dim=1)[1],
    "chunk": lambda t: t.chunk(2, dim=2)[0],
    "tensor_split": lambda t: t.tensor_split(3, dim=2)[1],
    "unbind": lambda t: t.unbind(1)[2],
    "hsplit": lambda t: t.hsplit(3)[0],
    "detach": lambda t: t.detach(),
    "data": lambda t: t.data,
    "view_as": lambda t: t.view_as(torch.empty(4, 6)),
    "contiguous of contiguous": lambda t: t.contiguous(),
    "T": lambda t: t[0].T,
    "none": lambda t: t[None, ..., None],
    "ravel": lambda t: t.ravel(),
    "alias": lambda t: torch.ops.aten.alias(t),
    "view(dtype)": lambda t: t.view(torch.int32),
    "view(narrower)": lambda t: t.view(torch.int16),
    "view(wider)": lambda t: t.view(torch.float64),
    "view_as_complex": lambda t: torch.view_as_complex(t.view(2, 3, 2, 2)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_share_memory_and_geometry(name):
    cpu = torch.arange(24.0).reshape(2, 3, 4).clone()
    x = cpu.to("jax")
    a, b = VIEWS[name](x), VIEWS[name](cpu)
    assert_same(a, b, layout=True)
    assert a.is_contiguous() == b.is_contiguous() and a._is_view() == b._is_view()
    assert a.data_ptr() - x.data_ptr() == b.data_ptr() - cpu.data_ptr()
    assert (
        a.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and a.untyped_storage() == x.untyped_storage()
    )
    assert (a._base is x) == (b._base is cpu) and a._version == b._version
    if not any(s == 0 and n > 1 for n, s in zip(b.shape, b.stride(), strict=True)):
        for t, base in ((a, x), (b, cpu)):
            t.mul_(2 if not t.is_complex() else 1j)
            base[0, 0] += 1
            t.copy_(t.clone())
        assert_same(x, cpu)
        assert_same(a, b, layout=True)
        assert x._version == cpu._version == a._version


COPIES = {
    "clone": lambda t: t.clone(), "reshape of transposed": lambda t: t.t().reshape(-1), "contiguous": lambda t: t.t().contiguous(),
    "flatten of transposed": lambda t: t.t().flatten(), "index": lambda t: t[[0, 1]], "mask": lambda t: t[t > 1], "to copy": lambda t: t.to(t.dtype, copy=True),
    "repeat": lambda t: t.repeat(1, 1), "new_tensor": lambda t: t.clone().detach(), "cpu and back": lambda t: t.cpu().to(t.device),
}  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_copies_do_not_share(name):
    x = torch.arange(6.0, device="jax").reshape(2, 3)
    y = COPIES[name](x)
    y.zero_()
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]] and y.data_ptr() != x.data_ptr()


def test_no_copy_where_torch_makes_none():
    x = torch.ones(2, 3, device="jax")
    for y in (
        x.contiguous(),
        x.to(torch.float32),
        x.to("jax"),
        x.float(),
        x.expand(2, 3),
        x.reshape(2, 3),
        x.type_as(x),
    ):
        assert y.data_ptr() == x.data_ptr()
    assert (
        x.contiguous() is x
        and x.to(torch.float32) is x
        and x.float() is x
        and x.to(x) is x
        and x.to("jax", torch.float32) is x
    )


def test_is_set_to_and_identity():
    x = torch.ones(4, device="jax")
    y, z = x.detach(), x[1:]
    assert y.is_set_to(x) and not z.is_set_to(x) and not x.clone().is_set_to(x)
    assert torch._C._is_alias_of(x, x) and len({x.untyped_storage(), z.untyped_storage()}) == 1
    assert x.untyped_storage().nbytes() == 16 == z.untyped_storage().nbytes() and x.untyped_storage().device == x.device
    assert torch.empty(0, device="jax").data_ptr() == 0 and x.data_ptr() != x.clone().data_ptr()
    assert "torchax" in repr(x.untyped_storage())


def test_storages_are_freed():
    x = torch.ones(1000, device="jax")
    storage, array = weakref.ref(x._s), weakref.ref(x.jax())
    y = x[2:4] + 1
    del x
    gc.collect()
    assert storage() is None and array() is None
    assert y.tolist() == [2, 2]


def test_versions_count_writes():
    logs = []
    for d in ("jax", "cpu"):
        x = torch.zeros(4, device=d)
        log = [x._version]
        for write in (
            lambda t: t.add_(1),
            lambda t: t[1:].mul_(2),
            lambda t: t.detach().fill_(3),
            lambda t: t.data.zero_(),
            lambda t: t.__setitem__(0, 1.0),
            lambda t: torch.add(t, t, out=t),
            lambda t: t.copy_(t.clone()),
            lambda t: t.resize_(4),
            lambda t: t.squeeze_(),
        ):
            write(x)
            log.append(x._version)
        logs.append(log)
    assert logs[0] == logs[1]


# set_, resize_, .data ---------------------------------------------------------------------------------------------


def resizes(d):
    x = torch.arange(6.0, device=d).reshape(2, 3)
    y = x[1]
    out = [x.shape]
    x.resize_(3, 2)
    x[2, 1] = 50.0
    out += [x.clone(), y.clone()]
    x.resize_(2)
    out += [x.clone(), y.clone()]
    x.resize_(4, 4)
    x[2:].zero_()
    x[1, 2:] = 7.0
    y.fill_(-1)
    out += [x.clone(), y.clone(), x.untyped_storage().nbytes()]
    z = torch.empty(0, device=d).resize_(2, 2).fill_(3)
    z.resize_as_(torch.ones(3, device=d))
    w = torch.ones(1, 2, 2, 2, device=d).resize_(1, 2, 2, 2, memory_format=torch.channels_last)
    return [*out, z, w.stride()]


def sets(d):
    x, y = torch.arange(6.0, device=d), torch.zeros(2, 2, device=d)
    y.set_(x.untyped_storage(), 1, (2, 2), (2, 1))
    y.mul_(10)
    z = torch.empty(0, device=d).set_(x)
    z[0] = -5
    w = torch.empty(0, device=d).set_(y)
    e = torch.ones(3, device=d)
    e.set_()
    return x, y, z, w, e, y.storage_offset()


def datas(d):
    p = torch.nn.Parameter(torch.ones(2, 3, device=d))
    keep = p.data
    out = (p * 2).sum()
    p.data = torch.full((4,), 2.0, device=d)
    p.data.add_(1)
    p.data[0] = 9
    with torch.no_grad():
        keep.zero_()
    q = torch.ones(2, device=d)
    q.data = torch.ones(2, 2, dtype=torch.int64, device=d)
    return p.detach(), keep, out.detach(), p._version, q, p.requires_grad


def in_place_views(d):
    x = torch.arange(6.0, device=d).reshape(1, 2, 3)
    y = x.detach()
    x.squeeze_(0).t_()
    x.unsqueeze_(0).transpose_(0, 1).swapaxes_(0, 2)
    x.add_(1)
    z = torch.arange(6.0, device=d)
    z.as_strided_((2, 2), (2, 1), 1)
    return x, y, z, x.stride()


def complex_views(d):
    x = torch.tensor([1 + 2j, 3 - 1j], device=d)
    x.real.mul_(10)
    x.imag[1] = 7.0
    torch.view_as_real(x)[0, 1] = -1.0
    c = x.conj()
    out = [x.clone(), (c * 1).clone(), c.resolve_conj().clone(), x.real.clone(), c.imag.neg()]
    x.mul_(2)
    return [*out, c.clone(), torch.view_as_complex(torch.ones(2, 2, device=d))]


def bit_views(d):
    x = torch.tensor([1.0, -2.0, 3.5, 0.0], device=d)
    i = x.view(torch.int32)
    i[0] = 0x40000000
    b = x.view(torch.uint8)
    b[4:8] = 0
    h = x[2:].view(torch.float16)
    s = i.as_strided((2, 2), (1, 1), 1)
    w = b.as_strided((4,), (2,), 3)
    w.fill_(1)
    c = torch.tensor([1 + 2j, 3 - 1j], device=d)
    r = torch.view_as_real(c)[1]
    r.as_strided((2,), (1,), 1).mul_(10)
    c.view(torch.float32).resize_(7)[4:] = 0.5
    return s.clone(), w, c, r.clone(), x, i.clone(), b.clone(), h.view(torch.int16), x.view(torch.int64)


def memory_formats(d):
    x = torch.arange(24.0, device=d).reshape(1, 2, 3, 4)
    y = x.to(memory_format=torch.channels_last)
    out = [
        y.is_contiguous(),
        y.is_contiguous(memory_format=torch.channels_last),
        y.stride(),
        (y + 1).stride(),
        y.clone().stride(),
    ]
    out += [
        y.contiguous().stride(),
        torch.empty_like(y).stride(),
        y.relu().stride(),
        y[0].stride(),
        y.mean(0).shape,
        (y + x).stride(),
    ]
    y[0, 0] = 5
    conv = torch.nn.Conv2d(2, 2, 1)
    conv.weight.data.fill_(1)
    conv.bias.data.zero_()
    m = conv.to(d).to(memory_format=torch.channels_last)
    out += [m.weight.stride(), torch.empty((1, 2, 2, 2), memory_format=torch.channels_last, device=d).stride()]
    z = torch.ones(1, 2, 2, 2, 2, device=d).contiguous(memory_format=torch.channels_last_3d)
    return [*out, y, z.stride(), y.permute(0, 2, 3, 1).is_contiguous()]


def strided_factories(d):
    x = torch.empty_strided((2, 3), (1, 2), device=d).fill_(1)
    y = torch.empty_strided((2, 2), (5, 2), device=d).zero_()
    z = torch.empty_permuted((2, 3, 4), (2, 0, 1), device=d)
    return (
        x,
        y,
        z.stride(),
        x.is_contiguous(),
        torch.ones(4, 4, device=d)[::2, ::2].clone().stride(),
        x.new_empty_strided((2,), (3,)).stride(),
    )


@pytest.mark.parametrize(
    "program",
    [resizes, sets, datas, in_place_views, complex_views, bit_views, memory_formats, strided_factories],
    ids=lambda f: f.__name__,
)
def test_program(program):
    listed = lambda r: [tuple(x) if isinstance(x, torch.Size) else x for x in r]
    assert_same(listed(program("jax")), listed(program("cpu")), layout=True)


# out= -------------------------------------------------------------------------------------------------------------


def test_out_is_written_and_resized_with_torchs_warning():
    for d in ("jax", "cpu"):
        a = torch.arange(3.0, device=d)
        out = torch.empty(0, device=d)
        assert torch.add(a, 1, out=out) is out and out.tolist() == [1, 2, 3]
        wrong = torch.ones(2, 2, device=d)
        with pytest.warns(UserWarning, match="An output with one or more elements was resized"):
            torch.mul(a, 2, out=wrong)
        assert wrong.tolist() == [0, 2, 4] and wrong.shape == (3,)
        wide = torch.empty(3, dtype=torch.float64, device=d)
        torch.add(a, a, out=wide)
        assert wide.tolist() == [0, 2, 4] and wide.dtype == torch.float64
        base = torch.zeros(2, 3, device=d)
        torch.exp(torch.zeros(3, device=d), out=base[1])
        assert base.tolist() == [[0, 0, 0], [1, 1, 1]]
        values, indices = torch.empty(0, device=d), torch.empty(0, dtype=torch.int64, device=d)
        result = torch.max(base, 1, out=(values, indices))
        assert result.values is values and values.tolist() == [0, 1]
        transposed = torch.zeros(2, 3, device=d).t()
        torch.ones(3, 2, out=transposed)
        assert transposed.sum() == 6 and transposed.stride() == (1, 3)


REFUSALS = {
    "write to an expanded tensor": lambda d: torch.ones(1, device=d).expand(3).add_(1),
    "copy_ to an expanded tensor": lambda d: torch.ones(1, device=d).expand(3).copy_(torch.ones(3, device=d)),
    "int += float": lambda d: torch.ones(2, dtype=torch.int64, device=d).add_(1.5),
    "int += float tensor": lambda d: torch.ones(2, dtype=torch.int32, device=d).mul_(torch.ones(2, device=d)),
    "bool += int": lambda d: torch.ones(2, dtype=torch.bool, device=d).add_(1),
    "float += complex": lambda d: torch.ones(2, device=d).add_(1j),
    "int /= int": lambda d: torch.ones(2, dtype=torch.int64, device=d).div_(2),
    "in-place broadcast": lambda d: torch.ones(2, device=d).add_(torch.ones(3, 2, device=d)),
    "out dtype": lambda d: torch.add(torch.ones(2, device=d), 1, out=torch.empty(2, dtype=torch.int64, device=d)),
    "out dtype of exp": lambda d: torch.exp(torch.ones(2, device=d), out=torch.empty(2, dtype=torch.int32, device=d)),
    "view of transposed": lambda d: torch.ones(2, 3, device=d).t().view(-1),
    "view size": lambda d: torch.ones(6, device=d).view(4, 2),
    "view dtype": lambda d: torch.ones(3, device=d).view(torch.float64),
    "select range": lambda d: torch.ones(3, device=d)[5],
    "copy_ shape": lambda d: torch.ones(3, device=d).copy_(torch.ones(2, device=d)),
    "setitem shape": lambda d: torch.ones(3, device=d).__setitem__(slice(0, 2), torch.ones(3, device=d)),
    "as_strided range": lambda d: torch.ones(3, device=d).as_strided((5,), (1,)),
    "as_strided negative": lambda d: torch.ones(3, device=d).as_strided((2,), (-1,)),
    "resize_ with grad": lambda d: torch.ones(3, device=d, requires_grad=True).resize_(2),
    "expand smaller": lambda d: torch.ones(3, device=d).expand(2),
    "squeeze dim": lambda d: torch.ones(3, device=d).squeeze(4),
    "unsqueeze dim": lambda d: torch.ones(3, device=d).unsqueeze(5),
    "narrow": lambda d: torch.ones(3, device=d).narrow(0, 2, 5),
    "split": lambda d: torch.ones(3, device=d).split([1, 1]),
    "permute": lambda d: torch.ones(2, 3, device=d).permute(0, 0),
    "unfold": lambda d: torch.ones(3, device=d).unfold(0, 5, 1),
    "diagonal": lambda d: torch.ones(3, device=d).diagonal(),
    "real": lambda d: torch.ones(3, device=d).imag,
    "negative step": lambda d: torch.ones(3, device=d)[::-1],
    "channels_last of a matrix": lambda d: torch.ones(3, 3, device=d).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_torchs(name):
    with pytest.raises(Exception) as want:
        REFUSALS[name]("cpu")
    with pytest.raises(type(want.value)) as got:
        REFUSALS[name]("jax")
    normal = lambda e: re.sub(r"(?i)jax|cpu|lazy|meta", "", re.sub(r"\s+", " ", str(e.value)))[:100]
    assert normal(got) == normal(want)


def test_a_refused_write_changes_nothing():
    x = torch.ones(2, dtype=torch.int64, device="jax")
    y = x[:1]
    version = x._version
    for write in (
        lambda: x.add_(1.5),
        lambda: x.add_(torch.ones(3, 2, dtype=torch.int64, device="jax")),
        lambda: x.copy_(torch.ones(7, device="jax")),
        lambda: x.add_(torch.ones(2, dtype=torch.int64)),
        lambda: torch.mul(torch.ones(2, device="jax"), 3.0, out=x),
    ):
        with pytest.raises(RuntimeError):
            write()
        assert x.tolist() == [1, 1] and y.tolist() == [1] and x.shape == (2,)
    assert x._version == version
