"""`torchax.compile`: what is captured, what is written back, what stays an alias, when it records again."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax

from helpers import train_step


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_one_program_per_signature(compile_counter: Any) -> None:
    fn = torchax.compile(lambda x, n=1: (x * n + 1).sum())
    x = torch.ones(3, device="jax")
    assert fn(x).item() == 6
    compile_counter.reset()
    with compile_counter.expect(0):
        for _ in range(3):
            fn(x).jax().block_until_ready()
    assert fn(x, 2).item() == 9 and fn(x, n=2).item() == 9 and fn(torch.ones(4, device="jax")).item() == 8
    assert fn(x.double()).dtype == torch.float64
    assert fn.cache_info()[:3] == (3, 5, 5)
    fn.cache_clear()
    assert fn.cache_info() == (0, 0, 0, ())


def test_decorator_and_method() -> None:
    @torchax.compile
    def double(x: torch.Tensor) -> torch.Tensor:
        """Twice."""
        return x * 2

    @torchax.compile(donate_state=False)
    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    class Trainer:
        def __init__(self) -> None:
            self.seen = torch.zeros((), device="jax")

        @torchax.compile
        def see(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += x.sum()
            return self.seen * 2

    x = torch.ones(2, device="jax")
    assert double(x).tolist() == [2, 2] and triple(x).tolist() == [3, 3]
    assert double.__name__ == "double" and double.__doc__ == "Twice."
    trainer = Trainer()
    assert [trainer.see(x).item() for _ in range(3)] == [4, 8, 12] and trainer.seen.item() == 6


def test_module_stays_the_module() -> None:
    model = small().to("jax")
    compiled = torchax.compile(model)
    assert isinstance(compiled, nn.Sequential) and type(compiled).__name__ == "Sequential"
    assert compiled.state_dict().keys() == model.state_dict().keys()
    assert all(p is q for p, q in zip(compiled.parameters(), model.parameters(), strict=True))
    compiled.eval()
    assert not model.training and not model[1].training
    x = torch.randn(2, 1, 8, 8, device="jax")
    torch.testing.assert_close(compiled(x), model(x))
    twin = copy.deepcopy(compiled)
    assert twin[0].weight is not compiled[0].weight
    torch.testing.assert_close(twin(x), model(x))
    again = pickle.loads(pickle.dumps(compiled))
    torch.testing.assert_close(again(x), model(x))
    assert compiled.cache_info().misses == 1


def test_backward_through_a_compiled_forward() -> None:
    model, twin = small().to("jax"), small().to("jax")
    compiled = torchax.compile(model)
    x, y = torch.randn(6, 1, 8, 8), torch.randint(0, 5, (6,)).to("jax")
    for _ in range(3):
        grads = []
        for m, call in ((model, compiled), (twin, twin)):
            given = x.to("jax").requires_grad_()
            m.zero_grad()
            F.cross_entropy(call(given), y).backward()
            grads.append([given.grad, *[p.grad for p in m.parameters()]])
        for g, w in zip(*grads, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
    assert compiled.cache_info() == (2, 1, 1, ())
    for b, c in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c)


def test_backward_respects_detach_and_no_grad() -> None:
    w = torch.randn(3, device="jax", requires_grad=True)

    def fn(x: torch.Tensor) -> Any:
        with torch.no_grad():
            scale = (w * 2).exp()
        return (x * w).detach() * w + scale, (x * 2).long()

    x = torch.randn(3, device="jax", requires_grad=True)
    value, whole = torchax.compile(fn)(x)
    assert value.requires_grad and not whole.requires_grad
    value.sum().backward()
    assert x.grad is None
    torch.testing.assert_close(w.grad, (x * w).detach())


def test_second_backward_and_second_derivative() -> None:
    x = torch.randn(3, device="jax", requires_grad=True)
    fn = torchax.compile(lambda x: x**3)
    y = fn(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 6 * x.detach() ** 2)
    (g,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        g.sum().backward()


def test_aliases_of_arguments() -> None:
    def fn(x: Any, y: Any) -> Any:
        x.add_(1)
        return x, x.view(-1), y[0], x[0] * 1

    fn = torchax.compile(fn)
    for _ in range(2):
        x, y = torch.zeros(2, 2, device="jax"), torch.arange(4.0, device="jax")
        a, b, c, d = fn(x, y)
        assert a is x and b.untyped_storage() == x.untyped_storage() and c.untyped_storage() == y.untyped_storage()
        b[0] = 7
        assert x.tolist() == [[7, 1], [1, 1]] and d.tolist() == [1, 1]
    both = torch.zeros(2, 2, device="jax")
    fn(both, both)
    assert both.tolist() == [[1, 1], [1, 1]]
    base = torch.zeros(4, 2, device="jax")
    fn(base[1:3], both)
    assert base.sum(1).tolist() == [0, 2, 2, 0]
    host = torch.zeros(2, 2)
    fn(host, both)
    assert host.tolist() == [[1, 1], [1, 1]]


def test_overlapping_arguments() -> None:
    base = torch.arange(6.0, device="jax")

    @torchax.compile
    def shift(a: torch.Tensor, b: torch.Tensor) -> None:
        a.add_(10)
        b.mul_(2)

    for _ in range(2):
        got, want = base.clone(), base.clone()
        shift(got[:4], got[2:])
        want[:4].add_(10)
        want[2:].mul_(2)
        assert got.tolist() == want.tolist()


def test_aliases_of_captured_state() -> None:
    cache = torch.zeros(4, device="jax")
    weight = nn.Parameter(torch.ones(3, device="jax"))

    @torchax.compile
    def fn(i: torch.Tensor) -> Any:
        cache[i.view(1)] = 1
        return cache, cache[1:], weight

    for i in range(3):
        whole, part, same = fn(torch.tensor(i, device="jax"))
        assert same is weight
        assert whole.untyped_storage() == cache.untyped_storage() == part.untyped_storage()
    assert cache.tolist() == [1, 1, 1, 0] and part.tolist() == [1, 1, 0]


def test_results_that_share_memory() -> None:
    @torchax.compile
    def fn(x: torch.Tensor) -> Any:
        y = x * 2
        return y, y[0], y.t()

    y, row, turned = fn(torch.ones(2, 3, device="jax"))
    row.zero_()
    assert y.sum().item() == 6 and turned.sum().item() == 6 and turned.stride() == (1, 3)


def test_argument_that_is_also_captured() -> None:
    state = torch.zeros(3, device="jax")

    @torchax.compile
    def fn(x: torch.Tensor) -> torch.Tensor:
        state.add_(x + 1)
        return x.sum()

    other = torch.ones(3, device="jax")
    fn(other)
    assert state.tolist() == [2, 2, 2]
    fn(state)
    assert state.tolist() == [5, 5, 5]
    fn(other)
    assert state.tolist() == [7, 7, 7]


def test_dropout_masks_differ_and_follow_the_seed() -> None:
    x = torch.ones(64, device="jax")
    fn = torchax.compile(lambda x: F.dropout(x, 0.5))
    assert not torch.equal(fn(x), fn(x))
    torch.manual_seed(3)
    got = fn(x), fn(x)
    torch.manual_seed(3)
    want = F.dropout(x, 0.5), F.dropout(x, 0.5)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_random_numbers_inside_jax_functions_inside() -> None:
    from torchax.interop import call_jax, jax_view

    fn = torchax.compile(lambda x: call_jax(jax.jit(jax_view(lambda y: F.dropout(y, 0.5))), x))
    x = torch.ones(64, device="jax")
    assert len({tuple(fn(x).tolist()) for _ in range(4)}) == 4


def test_captured_by_a_jitted_function_inside() -> None:
    from torchax.interop import call_jax, jax_view

    w = torch.ones(3, device="jax")
    fn = torchax.compile(lambda x: call_jax(jax.jit(jax_view(lambda y: y * w)), x))
    x = torch.ones(3, device="jax")
    assert fn(x).tolist() == [1, 1, 1]
    w.mul_(3)
    assert fn(x).tolist() == [3, 3, 3] and fn.cache_info().hits == 1


def test_training_flags_and_modes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to("jax")
    compiled = torchax.compile(lambda x: model(x))
    x = torch.ones(2, 4, device="jax")
    compiled(x)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        assert not compiled(x).requires_grad
    assert compiled(x).requires_grad
    with torch.autocast("jax", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16
    with torch.inference_mode():
        assert compiled(x).is_inference() or not compiled(x).requires_grad
    assert compiled(x).dtype == torch.float32


def test_replaced_parameters_and_buffers() -> None:
    model = nn.BatchNorm1d(3).to("jax")
    compiled = torchax.compile(model.eval())
    x = torch.randn(4, 3, device="jax")
    compiled(x)
    model.weight = nn.Parameter(torch.full((3,), 5.0, device="jax"))
    torch.testing.assert_close(compiled(x), model(x))
    model.running_mean = torch.ones(3, device="jax")
    torch.testing.assert_close(compiled(x), model(x))
    model.bias.data = torch.ones(3, device="jax")
    torch.testing.assert_close(compiled(x), model(x))
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    torch.testing.assert_close(compiled(x), model(x))
    model.half()
    torch.testing.assert_close(compiled(x.half()), model(x.half()))


def test_buffer_that_is_assigned_anew() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean = self.mean * 0.5 + x.mean() * 0.5
            return x - self.mean

    eager, model = Average().to("jax"), Average().to("jax")
    compiled = torchax.compile(model)
    for i in range(4):
        x = torch.full((3,), float(i), device="jax")
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(model.mean, eager.mean)
    assert compiled.cache_info().misses <= 2


def test_lazily_made_state() -> None:
    class Lazy(nn.Module):
        memory: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.memory is None:
                self.memory = torch.zeros_like(x)
            self.memory.add_(x)
            return self.memory * 2

    compiled = torchax.compile(Lazy())
    x = torch.ones(2, device="jax")
    assert [compiled(x)[0].item() for _ in range(4)] == [2, 4, 6, 8]
    assert compiled.cache_info()[:3] == (2, 2, 1)


def test_tensor_kept_by_the_function() -> None:
    kept: dict[str, torch.Tensor] = {}

    @torchax.compile
    def fn(x: torch.Tensor) -> torch.Tensor:
        kept["activation"] = x * 2
        return kept["activation"] + 1

    for i in range(4):
        assert fn(torch.full((2,), float(i), device="jax"))[0].item() == 2 * i + 1
        assert kept["activation"].tolist() == [2 * i, 2 * i]


def test_jax_arrays_and_numpy_pass() -> None:
    fn = torchax.compile(lambda x, a, n: (x + torchax.interop.torch_view(a), a * 2, n.sum()))
    x, a = torch.ones(2, device="jax"), jnp.arange(2.0)
    s, doubled, n = fn(x, a, np.arange(3))
    assert s.tolist() == [1, 2] and isinstance(doubled, jax.Array) and doubled.tolist() == [0, 2] and n == 3


def test_compiled_inside_compiled_and_inside_jax() -> None:
    inner = torchax.compile(lambda x: x * 2)
    outer = torchax.compile(lambda x: inner(x) + inner(x))
    x = torch.ones(2, device="jax")
    assert outer(x).tolist() == [4, 4] and inner.cache_info().misses == 0
    assert jax.jit(torchax.interop.jax_view(inner))(jnp.ones(2)).tolist() == [2, 2]


def test_gradients_of_arguments_inside() -> None:
    @torchax.compile
    def fn(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), x)
        return h

    x = torch.arange(3.0, device="jax")
    torch.testing.assert_close(fn(x), 6 * x)


def test_threads() -> None:
    model = small().to("jax").eval()
    compiled = torchax.compile(model)
    inputs = [torch.randn(n, 1, 8, 8, device="jax") for n in (1, 2, 3, 4)]
    want = [model(x).detach() for x in inputs]
    failures: list[Any] = []

    def work(i: int) -> None:
        try:
            for _ in range(3):
                torch.testing.assert_close(compiled(inputs[i]).detach(), want[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_second_device(jax_devices: Any) -> None:
    model = small().to("jax:1")
    x = torch.randn(2, 1, 8, 8, device="jax:1")
    compiled = torchax.compile(lambda x: model(x) + torch.ones(5))
    torch.testing.assert_close(compiled(x), model(x) + 1, check_device=True)


def test_static_cache_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    model = LlamaForCausalLM(config).eval().to("jax")
    compiled = torchax.compile(model)
    tokens = torch.randint(0, 32, (1, 6), device="jax")
    with torch.no_grad():
        want = model(tokens).logits
        cache = StaticCache(config=config, max_cache_len=8)
        got = [compiled(tokens[:, :3], past_key_values=cache).logits]
        for i in range(3, 6):
            out = compiled(tokens[:, i : i + 1], past_key_values=cache)
            assert out.past_key_values is cache
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-5)
    assert compiled.cache_info().misses <= 3


def test_an_op_kept_whole_runs_forward_once():
    lstm = nn.LSTM(3, 4).to("jax")

    @torchax.compile
    def step(x):
        loss = lstm(x)[0].square().mean()
        return torch.autograd.grad(loss, list(lstm.parameters()))

    x = torch.randn(5, 2, 3, device="jax")
    assert step.lower(x).as_text().count("stablehlo.while") == 2  # forward and backward
    expected = torch.autograd.grad(lstm(x)[0].square().mean(), list(lstm.parameters()))
    torch.testing.assert_close(step(x), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_an_op_kept_whole_while_something_else_saves_its_tensors():
    x = torch.randn(1, 2, 8, 4, device="jax", requires_grad=True)
    attend = lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)

    @torchax.compile
    def step(x):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t * 2):
            y = attend(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        return grad, len(packed)

    grad, saved = step(x)
    assert saved == 3
    doubled = (2 * x.detach()).requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(attend(doubled).sum(), doubled)[0])


def test_lower_gives_the_program_and_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)).to("jax")
    optimizer = torch.optim.AdamW(model.parameters())
    step = torchax.compile(train_step(model, optimizer))
    x = torch.randn(6, 4, device="jax")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.jax.get_rng_state()
    for _ in range(2):
        compiled = step.lower(x).compile()
        assert compiled.cost_analysis()["flops"] > 0 and "f32[6,8]" in compiled.as_text()
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.jax.get_rng_state(), random_state)
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k])
    step(x)
    step.lower(x)
    assert step.cache_info().misses == 1


def test_dataclasses_as_results():
    @dataclasses.dataclass(frozen=True)
    class Out:
        value: Any
        parts: Any
        nothing: Any = None
        n: int = 3

    fn = torchax.compile(lambda x: Out(x * 2, [x + 1]))
    x = torch.ones(2, device="jax")
    first, second = fn(x), fn(x * 5)
    assert type(second) is Out and second.value.tolist() == [10, 10] and second.parts[0].tolist() == [6, 6]
    assert first.value.tolist() == [2, 2] and (first.nothing, first.n) == (None, 3)
    assert fn.cache_info()[:2] == (1, 1)
