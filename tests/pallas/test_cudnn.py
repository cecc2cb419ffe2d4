"""cuDNN's attention: which calls go to it, what programs for CUDA hold, and values and gradients.

Without a GPU, JAX's primitives for cuDNN are given a meaning on CPU: then all but cuDNN itself is run. Tests marked for platform gpu run
cuDNN: ``pytest --torchax-platform gpu tests/pallas/test_cudnn.py``.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchax
from jax.interpreters import mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from torchax import convert
from torchax.ops import REGISTRY, aten

conditions = pytest.importorskip("torchax_ops_pallas.conditions")
from torchax_ops_pallas import cudnn, lowerings, reference  # noqa: E402

jaxs = conditions.fused_attention_stablehlo
_SDPA = aten.scaled_dot_product_attention.default


@pytest.fixture
def with_cudnn(monkeypatch):
    """As if JAX's CUDA plugin were installed."""
    monkeypatch.setattr(jaxs, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))


# A meaning on CPU ------------------------------------------------------------------------------------------------


def _scores(query, key, bias, params):
    """``[batch, heads, queries, keys]`` of operands ``[batch, length, heads, features]``."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * params["scale"]
    if params["variadic_args"][0]:
        assert bias.shape[2:] == scores.shape[2:], "cuDNN broadcasts over batches and heads alone"
        scores = scores + bias
    if params["mask_type"] is jaxs.MaskType.CAUSAL:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    return scores


def _forward(query, key, value, bias, *_, is_training, **params):
    scores = _scores(query, key, bias, params)
    value = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value.astype(jnp.float32)).astype(query.dtype)
    return (out, jax.nn.logsumexp(scores, -1)) if is_training else (out,)


def _backward(query, key, value, bias, *rest, **params):
    *_, statistics, out, grad = rest
    group, full = query.shape[2] // key.shape[2], lambda x: jnp.repeat(x, group, axis=2).astype(jnp.float32)
    shared = lambda g: g.reshape(*key.shape[:3], group, -1).sum(3).astype(query.dtype)
    wide = grad.astype(jnp.float32)
    weights = jnp.exp(_scores(query, key, bias, params) - statistics[..., None])
    along = (wide * out).sum(-1).swapaxes(1, 2)[..., None]
    slope = weights * (jnp.einsum("bqhd,bkhd->bhqk", wide, full(value)) - along) * params["scale"]
    return (
        jnp.einsum("bhqk,bkhd->bqhd", slope, full(key)).astype(query.dtype),
        shared(jnp.einsum("bhqk,bqhd->bkhd", slope, query.astype(jnp.float32))),
        shared(jnp.einsum("bhqk,bqhd->bkhd", weights, wide)),
    )


@pytest.fixture
def on_cpu(with_cudnn):
    """As if the CPU were a GPU."""
    for primitive, meaning in (
        (jaxs._dot_product_attention_fwd_p, _forward),
        (jaxs._dot_product_attention_bwd_p, _backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(meaning, multiple_results=True), platform="cpu")
    with convert.compiling_for("gpu"):
        yield


# Which calls ------------------------------------------------------------------------------------------------------

_PLAIN = (2, 4, 128, 64)
_ODD = (2, 4, 129, 64)


def _mask(*shape, dtype=jnp.bool_):
    return {"attn_mask": jax.ShapeDtypeStruct(shape, dtype)}


@pytest.mark.parametrize(
    ("shapes", "options", "words"),
    [
        ((_PLAIN,) * 3, {}, None),
        ((_PLAIN,) * 3, {"is_causal": True}, None),
        ((_PLAIN, (2, 2, 128, 64), (2, 2, 128, 64)), {"enable_gqa": True}, None),
        ((_PLAIN, (2, 4, 100, 64), (2, 4, 100, 64)), {}, None),
        ((_PLAIN, (2, 4, 100, 64), (2, 4, 100, 64)), {"is_causal": True}, "as many keys as queries"),
        ((_PLAIN, _PLAIN, (2, 4, 128, 32)), {}, "heads must be a multiple of 8 wide"),
        (((2, 4, 128, 60),) * 3, {}, "multiple of 8"),
        (((2, 4, 128, 136),) * 3, {}, "128 at most"),
        ((_PLAIN,) * 3, {"dropout_p": 0.1}, "dropout"),
        ((_ODD,) * 3, {"is_causal": True}, None),
        ((_ODD,) * 3, _mask(129, 129), "lengths must be even"),
        ((_PLAIN,) * 3, _mask(128, 128), None),
        ((_PLAIN,) * 3, _mask(2, 1, 1, 128, dtype=jnp.bfloat16), None),
        ((_PLAIN,) * 3, _mask(128, 128, dtype=jnp.float32), "mask must be bool, bfloat16"),
        ((_PLAIN,) * 3, {"scale": jnp.zeros(())}, "scale must be a number"),
        (((2, 4, 8, 64), _PLAIN, _PLAIN), {}, "too few"),
        (((4, 128, 64),) * 3, {}, "dimensions"),
    ],
)
def test_which_calls_are_taken(with_cudnn, shapes, options, words):
    refusal = conditions.unfit_on_gpu(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes), **options)
    assert refusal is None if words is None else words in refusal


@pytest.mark.parametrize(("dtype", "taken"), [(jnp.float16, True), (jnp.bfloat16, True), (jnp.float32, False)])
def test_of_which_dtypes(with_cudnn, dtype, taken):
    x = jax.ShapeDtypeStruct(_PLAIN, dtype)
    assert (conditions.unfit_on_gpu(x, x, x) is None) == taken


def _device(capability, version="PJRT C API\ncuda 12090"):
    return types.SimpleNamespace(
        platform="gpu", compute_capability=capability, client=types.SimpleNamespace(platform_version=version)
    )


@pytest.mark.parametrize(
    ("device", "width", "words"),
    [
        (_device("7.5"), 64, "Ampere"),
        (_device("8.0"), 128, None),
        (_device("8.0"), 256, "128 at most"),
        (_device("9.0"), 256, None),
        (_device("10.3"), 256, None),
        (_device("9.0"), 264, "256 at most"),
        (_device("", "rocm 60100"), 64, "NVIDIA"),
    ],
)
def test_which_gpus_it_runs_on(with_cudnn, monkeypatch, device, width, words):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    x = jax.ShapeDtypeStruct((2, 4, 128, width), jnp.bfloat16)
    refusal = conditions.unfit_on_gpu(x, x, x)
    assert refusal is None if words is None else words in refusal


def test_the_setting_counts_and_reasons_are_given(monkeypatch):
    x = jax.ShapeDtypeStruct(_PLAIN, jnp.bfloat16)

    def chosen(platform):
        verdicts = REGISTRY.explain(_SDPA, platform, torch.bfloat16, ((x, x, x), {}))
        taken = next(v.lowering for v in verdicts if v.taken)
        return taken.fn, next(v.reason for v in verdicts if v.lowering.fn is lowerings.cudnn_attention)

    monkeypatch.setattr(jaxs, "cuda_versions", None)
    assert "no CUDA plugin" in chosen("gpu")[1] and chosen("gpu")[0] is not lowerings.cudnn_attention
    monkeypatch.setattr(jaxs, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))
    assert chosen("gpu")[0] is lowerings.cudnn_attention
    assert chosen("cpu")[0] is not lowerings.cudnn_attention and "platform gpu" in chosen("cpu")[1]
    with torchax.config.override(pallas="off"):
        assert "'off'" in chosen("gpu")[1]


@pytest.mark.parametrize(
    ("there", "options", "words"),
    [(False, {}, "no CUDA plugin"), (True, {"dropout_p": 0.5}, "dropout_p is 0.5"), (True, {}, None)],
)
def test_required_says_what_failed(on_cpu, monkeypatch, there, options, words):
    if not there:
        monkeypatch.setattr(jaxs, "cuda_versions", None)
    q = torch.randn(1, 2, 64, 64, device="jax", dtype=torch.bfloat16)
    with torchax.config.override(pallas="required"):
        if words is None:
            assert F.scaled_dot_product_attention(q, q, q, **options).shape == q.shape
        else:
            with pytest.raises(lowerings.KernelUnavailable, match=words):
                F.scaled_dot_product_attention(q, q, q, **options)


# Programs for CUDA, made where there is none ----------------------------------------------------------------------


class _Attention(torch.nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def _program_of_cuda(backward):
    x = torch.randn(2, 4, 128, 64).bfloat16()
    attend = torchax.interop.jax_view(_Attention())
    function = jax.jit(jax.grad(lambda x: attend(x).astype(jnp.float32).sum()) if backward else attend)
    with convert.compiling_for("gpu"):
        return function.trace(convert.to_array(x, 0)).lower(lowering_platforms=("cuda",)).as_text()


def test_programs_call_cudnn(with_cudnn):
    assert "__cudnn$fmhaSoftmax" in _program_of_cuda(False)
    both = _program_of_cuda(True)
    assert both.count("@__cudnn$fmhaSoftmax(") == 1 and both.count("@__cudnn$fmhaSoftmaxBackward(") == 1


def test_programs_hold_what_was_asked_for(with_cudnn):
    operands = [jnp.zeros((2, heads, 128, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    mask = jnp.ones((128, 128), bool)
    attend = lambda *x: cudnn.cudnn_attention(*x, mask, causal=True, scale=0.25)
    text = jax.jit(attend).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in text and "fmha_scale\\22: 0.25" in text and "CAUSAL" in text
    assert "tensor<2x2x128x64" not in text.split("@__cudnn$fmhaScaleBiasSoftmax(")[1].split("\n")[0], "BTNH"


def test_without_cudnn_programs_for_cuda_are_lowered_the_plain_way():
    assert jaxs.cuda_versions is None or jax.default_backend() == "gpu"
    if jaxs.cuda_versions is None:
        assert "__cudnn" not in _program_of_cuda(True)


def test_exported_programs_hold_nothing_that_jax_does_not_promise_to_keep(with_cudnn):
    x = torch.randn(2, 4, 128, 64).bfloat16()
    exported = torchax.export.export(_Attention(), (x,), platforms=["cuda"])
    assert "__cudnn" not in exported.program.mlir_module()


# Values -----------------------------------------------------------------------------------------------------------


def _case(heads, key_heads, length, keys, mask, dtype=np.float64):
    rng = np.random.default_rng(length)
    draw = lambda *shape: rng.standard_normal(shape)
    arrays = [draw(2, heads, length, 32), *(draw(2, key_heads, keys, 32) for _ in range(2))]
    seen = rng.random((length, keys)) > 0.3
    seen[5], seen[3, :4], seen[0] = False, False, True  # queries that see nothing, without causality and with it
    drawn = {
        "none": lambda: None,
        "bool": lambda: seen,
        "of keys": lambda: rng.random((2, 1, 1, keys)) > 0.3,
        "added": lambda: draw(2, heads, length, keys),
        "minus infinity": lambda: np.where(seen, 0.0, -np.inf),
    }[mask]()
    return arrays, drawn


def _value_and_gradients(attend, arrays):
    out, pull = jax.vjp(attend, *arrays)
    return [np.asarray(x, np.float64) for x in (out, *pull(out))]


def _compare(arrays, mask, causal, dtype=jnp.float16):
    low = [jnp.asarray(a, dtype) for a in arrays]
    low_mask = None if mask is None else jnp.asarray(mask, None if mask.dtype == bool else dtype)
    found = _value_and_gradients(lambda *x: cudnn.cudnn_attention(*x, low_mask, causal=causal, scale=0.2), low)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x), jnp.float64) for x in low]
        wide = low_mask if mask is None or mask.dtype == bool else jnp.asarray(np.asarray(low_mask), jnp.float64)
        expected = _value_and_gradients(lambda *x: reference.attention(*x, wide, causal=causal, scale=0.2), exact)
    tolerance = 4e-3 if dtype == jnp.float16 else 3e-2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


_CASES = [
    ((4, 4, 64, 64, "none"), False),
    ((4, 2, 66, 66, "none"), True),
    ((4, 2, 64, 70, "bool"), False),
    ((4, 4, 66, 66, "bool"), True),
    ((4, 1, 64, 70, "of keys"), False),
    ((4, 2, 64, 70, "added"), False),
    ((4, 2, 66, 66, "minus infinity"), True),
]


@pytest.mark.parametrize(("case", "causal"), _CASES)
def test_values_and_gradients_equal_the_reference(on_cpu, case, causal):
    _compare(*_case(*case), causal)


def test_a_learned_bias_has_a_gradient(on_cpu):
    arrays, bias = _case(2, 1, 64, 70, "added")
    q, k, v, bias = (jnp.asarray(x, jnp.float16) for x in (*arrays, bias[:, :2]))

    def gradient(attend):
        square = lambda b: jnp.square(attend(q, k, v, b, causal=False, scale=0.2).astype(jnp.float32)).sum()
        return np.asarray(jax.grad(square)(bias), np.float32)

    found, expected = gradient(cudnn.cudnn_attention), gradient(reference.attention)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("compiled", [False, True])
def test_through_torch(on_cpu, compiled):
    q, k, v = torch.randn(2, 4, 64, 32), torch.randn(2, 2, 70, 32), torch.randn(2, 2, 70, 32)
    q, k, v = (t.half() for t in (q, k, v))
    mask = torch.rand(64, 70) > 0.3
    mask[3] = False

    def run(device, compiled=False):
        leaves = [t.detach().to(device).requires_grad_() for t in (q, k, v)]

        def step(q, k, v, mask):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))

        return [t.cpu() for t in (torchax.compile(step) if compiled else step)(*leaves, mask.to(device))]

    with torchax.config.override(pallas="required"):
        found = run("jax", compiled)
    torch.testing.assert_close(found, run("cpu"), rtol=1e-2, atol=1e-2)


def test_batched_by_jax(on_cpu):
    arrays, mask = _case(4, 2, 64, 70, "of keys")
    q, k, v = (jnp.asarray(a, jnp.float16) for a in arrays)
    queries = jnp.stack([q, 2 * q])

    def attend(q):
        return cudnn.cudnn_attention(q, k, v, jnp.asarray(mask), causal=False, scale=0.2)

    def gradient(q):
        return jax.grad(lambda q: attend(q).astype(jnp.float32).sum())(q)

    for function in (attend, gradient):
        expected = jnp.stack([function(q) for q in queries])
        np.testing.assert_allclose(jax.vmap(function)(queries), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("shape", "key_heads"), [((2, 2), 2), ((1, 4), 2)])
def test_divided_operands_give_what_whole_ones_give(on_cpu, virtual_mesh, shape, key_heads):
    mesh = virtual_mesh(shape)
    arrays, mask = _case(4, key_heads, 64, 64, "bool")
    low = [jnp.asarray(a, jnp.float16) for a in arrays]

    def run(*qkv):
        attend = lambda *x: cudnn.cudnn_attention(*x, jnp.asarray(mask), causal=True, scale=0.2)
        out, pull = jax.vjp(attend, *qkv)
        return out, *pull(out)

    divided = [
        jax.device_put(x, NamedSharding(mesh, P("data", "model" if x.shape[1] % shape[1] == 0 else None))) for x in low
    ]
    for a, b in zip(jax.jit(run)(*divided), run(*low), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=2e-3)


# On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.torchax_platforms("gpu")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(("case", "causal"), _CASES)
def test_values_and_gradients_on_a_gpu(case, causal, dtype):
    _compare(*_case(*case), causal, dtype)


@pytest.mark.torchax_platforms("gpu")
def test_a_call_of_torch_is_served_on_a_gpu():
    q = torch.randn(2, 4, 128, 64, dtype=torch.bfloat16)
    with torchax.config.override(pallas="required"):
        found = F.scaled_dot_product_attention(*[q.to("jax")] * 3, is_causal=True).cpu()
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, is_causal=True), rtol=2e-2, atol=2e-2)
