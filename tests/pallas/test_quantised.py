"""Products of 8-bit operands: as CPU torch computes them, and what the TPU compiler makes of them."""

import re

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
import torchax
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.functional import ScalingType, SwizzleType

from helpers import examples
from tpu_programs import compile_for_tpu

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SIZES = st.tuples(*[st.integers(0, 40)] * 3)


def _int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def _float8(*shape, dtype=torch.float8_e4m3fn):
    return (2 * torch.randn(shape)).to(dtype)


def _agree(function, *args, tolerance=1e-5):
    """`function` gives on device jax what it gives on CPU: dtype, shape, strides, values; or an error of the same class."""
    ours = [a.to("jax") if isinstance(a, torch.Tensor) else a for a in args]
    try:
        expected = function(*args)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            function(*ours)
        return
    found = function(*ours)
    assert found.device.type == "jax"
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    scale = expected.double().abs().max().item() if expected.numel() else 0.0
    difference = (found.cpu().double() - expected.double()).abs()
    allowed = tolerance if expected.dtype == torch.float32 else 2 * torch.finfo(expected.dtype).eps
    assert (difference <= allowed * (expected.double().abs() + 0.01 * scale)).all()


@examples(6)
@given(sizes=_SIZES, turned=st.booleans())
def test_int_mm_is_exact(sizes, turned):
    m, k, n = sizes
    x, y = _int8(m, k), (_int8(n, k).T if turned else _int8(k, n))
    found = torch._int_mm(x.to("jax"), y.to("jax"))
    expected = torch._int_mm(x, y)
    assert found.dtype == torch.int32 and torch.equal(found.cpu(), expected)
    out = torch.empty((m, n), dtype=torch.int32, device="jax")
    assert torch._int_mm(x.to("jax"), y.to("jax"), out=out) is out and torch.equal(out.cpu(), expected)


def test_int_mm_of_the_largest_sums():
    x = torch.full((2, 60000), -128, dtype=torch.int8)
    found = torch._int_mm(x.to("jax"), x.T.to("jax"))
    assert found.cpu().tolist() == [[60000 * 2**14] * 2] * 2


@examples(6)
@given(sizes=_SIZES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_weights_of_int8(sizes, dtype):
    m, k, n = sizes
    x, weight, scales = torch.randn(m, k).to(dtype), _int8(n, k), (torch.rand(n) / 64).to(dtype)
    found = torch.ops.aten._weight_int8pack_mm(*(t.to("jax") for t in (x, weight, scales)))
    expected = x.double() @ weight.double().T * scales.double()  # CPU torch reads beyond the end of small operands
    assert found.dtype == dtype
    atol = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.cpu().double(), expected, rtol=torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_int8_as_on_cpu(dtype):
    _agree(
        torch.ops.aten._weight_int8pack_mm,
        torch.randn(32, 64).to(dtype),
        _int8(48, 64),
        (torch.rand(48) / 64).to(dtype),
    )


@examples(6)
@given(
    sizes=_SIZES,
    dtypes=st.tuples(st.sampled_from(_FLOAT8), st.sampled_from(_FLOAT8)),
    out=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    rows=st.booleans(),
    bias=st.sampled_from([None, torch.float32, torch.bfloat16]),
    result=st.sampled_from([None, 0.5, 3.0]),
)
@example((32, 16, 8), _FLOAT8, torch.float8_e5m2, False, None, 3.0)
@example((32, 16, 8), _FLOAT8, None, True, None, 0.5)
def test_scaled_mm(sizes, dtypes, out, rows, bias, result):
    m, k, n = sizes
    x, y = _float8(m, k, dtype=dtypes[0]), _float8(n, k, dtype=dtypes[1]).T
    scales = (torch.rand(m, 1), torch.rand(1, n)) if rows else (torch.rand(()), torch.rand(1))
    extra = (None if bias is None else torch.randn(n).to(bias), None if result is None else torch.tensor(result), out)
    _agree(torch.ops.aten._scaled_mm, x, y, *scales, *extra)
    kind = ScalingType.RowWise if rows else ScalingType.TensorWise

    def of_lists(x, y, a, b, bias):
        return F.scaled_mm(x, y, a, kind, b, kind, bias=bias, output_dtype=out)

    _agree(of_lists, x, y, *scales, extra[0])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *_FLOAT8])
def test_out_of_another_dtype_is_rounded_once(dtype, given):
    x, y, scale = _float8(16, 32), _float8(16, 32).T, torch.tensor(0.37)
    out_dtype, result = dtype if given else None, torch.tensor(3.0)
    recipe = [ScalingType.TensorWise.value]

    def into(x, y, scale, result):
        out = torch.empty(16, 16, dtype=dtype, device=x.device)
        return torch.ops.aten._scaled_mm.out(x, y, scale, scale, None, result, out_dtype, out=out)

    def into_v2(x, y, scale):
        out, lists = torch.empty(16, 16, dtype=dtype, device=x.device), ([scale], recipe, [0])
        return torch.ops.aten._scaled_mm_v2.out(x, y, *lists, *lists, None, out_dtype, out=out)

    _agree(into, x, y, scale, result)
    _agree(into_v2, x, y, scale)
    _agree(lambda *t: torch.ops.aten._scaled_mm.out(*t, out_dtype=torch.float64, out=t[0].float()), x, y, scale, scale)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("_int_mm", lambda: (torch.randn(4, 4), _int8(4, 4))),
        ("_int_mm", lambda: (_int8(4, 3), _int8(4, 4))),
        ("_weight_int8pack_mm", lambda: (torch.randn(4, 8), _int8(3, 8), torch.rand(4))),
        ("_weight_int8pack_mm", lambda: (torch.randn(4, 8), _int8(3, 8), torch.rand(3).bfloat16())),
        ("_weight_int8pack_mm", lambda: (torch.randn(4, 8), torch.randn(3, 8), torch.rand(3))),
        ("_scaled_mm", lambda: (torch.randn(4, 8), _float8(8, 4), torch.ones(()), torch.ones(()))),
        ("_scaled_mm", lambda: (_float8(4, 8), _float8(7, 4), torch.ones(()), torch.ones(()))),
        ("_scaled_mm", lambda: (_float8(4, 8), _float8(8, 4), torch.ones(4), torch.ones(4))),
        ("_scaled_mm", lambda: (_float8(4, 8), _float8(8, 4), torch.ones(4, 1), torch.ones(()))),
        ("_scaled_mm", lambda: (_float8(4, 8), _float8(8, 4), torch.ones(()), torch.ones(()), torch.ones(3))),
        ("_scaled_mm", lambda: (_float8(4, 8), _float8(8, 4), torch.ones(()), torch.ones(()), None, torch.ones(2))),
    ],
)
def test_refused_as_on_cpu(op, args):
    torch_op, args = getattr(torch.ops.aten, op), args()
    with pytest.raises((RuntimeError, ValueError)):
        torch_op(*args)
    _agree(torch_op, *args)


def test_scales_of_blocks_and_swizzled_ones_are_refused():
    x, y, one, blocks = (
        _float8(4, 32).to("jax"),
        _float8(32, 4).to("jax"),
        torch.ones((), device="jax"),
        torch.ones(4, 1),
    )
    with pytest.raises(ValueError, match="scaling configuration"):
        F.scaled_mm(x, y, blocks.to("jax"), ScalingType.BlockWise1x32, blocks.to("jax"), ScalingType.BlockWise1x32)
    tensor, swizzled = ScalingType.TensorWise, SwizzleType.SWIZZLE_32_4_4
    with pytest.raises(ValueError, match="swizzle"):
        F.scaled_mm(x, y, one, tensor, one, tensor, swizzle_a=swizzled, swizzle_b=swizzled)
    with pytest.raises(ValueError, match="contract"):
        F.scaled_mm(x, y, one, tensor, one, tensor, contraction_dim=[0, 1])


def test_a_linear_layer_with_int8_weights_compiled():
    x, weight, scales = torch.randn(3, 16), _int8(8, 16), torch.rand(8)

    def layer(x, weight, scales):
        return torch.relu(torch.ops.aten._weight_int8pack_mm(x, weight, scales)) + 1

    found = torchax.compile(layer)(*(t.to("jax") for t in (x, weight, scales)))
    torch.testing.assert_close(found.cpu(), layer(x, weight, scales), rtol=1e-5, atol=1e-3)


# Compiled by the TPU compiler --------------------------------------------------------------------------------------


def _compile(function, *shapes, topology):
    avals = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    with jax.default_matmul_precision("highest"):  # as torch asks for float32
        return compile_for_tpu(function, *avals, topology=topology)


_K, _N = 4096, 14336


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("topology", "rows"), [("v4:2x2x1", 8), ("v5e:2x2", 8), ("v5e:2x2", 8192), ("v5p:2x2x1", 8), ("v6e:2x2", 512)]
)
def test_no_copy_of_the_weights_on_tpu(topology, rows):
    """Each operand is read as it lies, the int8 product is one of int8: why there is no kernel of ours."""
    from torchax_ops_aten.quantized import int_mm, scaled_mm, weight_int8pack_mm

    one, f8 = ((), jnp.float32), jnp.float8_e4m3fn
    programs = {
        "int8 weights": (weight_int8pack_mm, [((rows, _K), jnp.bfloat16), ((_N, _K), jnp.int8), ((_N,), jnp.bfloat16)]),
        "int8": (int_mm, [((rows, _K), jnp.int8), ((_K, _N), jnp.int8)]),
        "float8": (
            lambda x, y, a, b: scaled_mm(x, y, a, b, out_dtype=torch.bfloat16),
            [((rows, _K), f8), ((_K, _N), f8), one, one],
        ),
    }
    for name, (function, shapes) in programs.items():
        program = _compile(function, *shapes, topology=topology)
        memory, text = program.memory_analysis(), program.as_text() or ""
        assert memory is not None and memory.temp_size_in_bytes < 2**20, name
        assert not re.search(rf"(?:bf16|f32)\[(?:{_N},{_K}|{_K},{_N})\]", text[text.index("\nENTRY") :]), name
        if name == "int8":
            assert re.search(r"s32\[\d+,\d+\]\S* (convolution|dot)\(", text), text
