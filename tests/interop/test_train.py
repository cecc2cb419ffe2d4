"""`OptaxOptimizer` and `make_train_step`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchax
import torchax.train
from torchax.interop import OptaxOptimizer, extract_jax, jax_jit
from torchax.train import make_train_step


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to("jax")


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 4, device="jax"), torch.tensor([0, 1, 2, 0, 1, 2], device="jax")


def by_hand(tx: Any, steps: int) -> tuple[list[float], dict[str, Any]]:
    """Losses and states of JAX and optax."""
    x, y = data()
    states, fn = extract_jax(net(), mutable=True)
    names = [n for n, _ in net().named_parameters()]
    params = {n: states[n] for n in names}

    @jax.jit
    def step(params: Any, states: Any, opt_state: Any) -> Any:
        def loss(p: Any) -> Any:
            out, after = fn({**states, **p}, (x.jax(),))
            return optax.softmax_cross_entropy_with_integer_labels(out, y.jax()).mean(), after

        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), after, opt_state

    opt_state, losses = tx.init(params), []
    for _ in range(steps):
        value, params, states, opt_state = step(params, states, opt_state)
        losses.append(float(value))
    return losses, {**states, **params}


TRANSFORMS = {
    "adam": lambda: optax.adam(1e-2),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(optax.cosine_decay_schedule(0.1, 5))),
    "by_name": lambda: optax.multi_transform(
        {"w": optax.sgd(0.1, momentum=0.9), "b": optax.adagrad(0.1)},
        lambda params: {name: "w" if name.endswith("weight") else "b" for name in params},
    ),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_equal_to_optax_by_hand(kind: str, compiled: bool) -> None:
    x, y = data()
    model = net()
    optimizer = OptaxOptimizer(model.named_parameters(), TRANSFORMS[kind]())

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = torchax.compile(step) if compiled else step
    losses = [run().item() for _ in range(6)]
    want, states = by_hand(TRANSFORMS[kind](), 6)
    np.testing.assert_allclose(losses, want, rtol=2e-4)
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value.jax(), states[name], rtol=2e-3, atol=2e-5)
    if compiled:
        assert run.cache_info().misses <= 2


def test_states_are_saved_and_loaded(tmp_path: Any) -> None:
    def make() -> Any:
        model = net()
        return model, OptaxOptimizer(model.parameters(), optax.adam(1e-2))

    def train(model: Any, optimizer: Any, steps: int) -> Any:
        x, y = data()
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model[0].weight.detach().clone()

    model, optimizer = make()
    train(model, optimizer, 2)
    torchax.save_checkpoint({"m": model, "o": optimizer.state_dict()}, tmp_path / "state.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    assert torch.load(tmp_path / "o.pt", weights_only=True)["state"]["0.count"].item() == 2
    want = train(model, optimizer, 2)
    found = torchax.load_checkpoint(tmp_path / "state.safetensors")
    again, other = make()
    again.load_state_dict(found["m"])
    other.load_state_dict(found["o"])
    torch.testing.assert_close(train(again, other, 2), want)
    with pytest.raises(ValueError, match=r"of another transform .*unexpected \['0.count'"):
        OptaxOptimizer(net().parameters(), optax.sgd(0.1)).load_state_dict(found["o"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_schedulers_of_torch(compiled: bool) -> None:
    w, twin = (nn.Parameter(torch.ones(3, device="jax")) for _ in range(2))
    optimizer = OptaxOptimizer([w], optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    reference = torch.optim.SGD([twin], lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, reference)]

    def step(p: Any, o: Any) -> None:
        o.zero_grad()
        p.square().sum().backward()
        o.step()

    ours = torchax.compile(lambda: step(w, optimizer)) if compiled else lambda: step(w, optimizer)
    for _ in range(4):
        ours()
        step(twin, reference)
        for s in schedulers:
            s.step()
        torch.testing.assert_close(w, twin)
    if compiled:
        assert ours.cache_info().misses <= 2


def test_closures_extra_arguments_and_missing_gradients() -> None:
    w, frozen = nn.Parameter(torch.ones(2, device="jax")), nn.Parameter(torch.ones(2, device="jax"))
    optimizer = OptaxOptimizer(
        [w, frozen], optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = w.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure, value=torch.tensor(1.0)).item() == 2
    assert w.tolist() == pytest.approx([0.9, 0.9]) and frozen.tolist() == [1, 1]
    for arguments, message in (
        (([{"params": [w], "weight_decay": 1.0}], optax.sgd(0.1)), "has the options weight_decay"),
        (([{"params": [w]}, {"params": [frozen]}], optax.sgd(0.1)), "one group; .*multi_transform"),
    ):
        with pytest.raises(ValueError, match=message):
            OptaxOptimizer(*arguments)
    with pytest.raises(TypeError, match="an optax transform; got float"):
        OptaxOptimizer([w], 0.1)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- make_train_step
@pytest.mark.parametrize("policy", [None, "dots_saveable", "nothing_saveable"])
@pytest.mark.parametrize("kind", ["optax", "torch"])
def test_steps_of_a_module(kind: str, policy: str | None) -> None:
    x, y = data()
    model = net()
    optimizer = optax.adam(1e-2) if kind == "optax" else torch.optim.Adam(model.parameters(), lr=1e-2)
    chosen = None if policy is None else getattr(jax.checkpoint_policies, policy)
    step = make_train_step(model, F.cross_entropy, optimizer, chosen)
    losses = [step((x,), y).item() for _ in range(6)]
    want, states = by_hand(optax.adam(1e-2), 6)
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value.jax(), states[name], rtol=2e-3, atol=2e-5)
    assert isinstance(step.optimizer, OptaxOptimizer if kind == "optax" else torch.optim.Adam)
    assert step.cache_info().misses <= 2


def test_a_policy_with_dropout() -> None:
    """The same numbers are dropped forward and backward."""
    layer, x = nn.Linear(50, 50, bias=False).to("jax"), torch.ones(1, 50, device="jax")
    model = nn.Sequential(layer, nn.Dropout(0.5))
    seen: list[Any] = []

    def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (out * target).sum()

    step = make_train_step(model, loss, optax.sgd(1.0), jax.checkpoint_policies.nothing_saveable)
    target = torch.ones(50, device="jax")
    for _ in range(3):
        before = layer.weight.detach().clone()
        value = step(x, target)
        change = (before - layer.weight.detach())[:, 0]  # 2 where the output was kept
        torch.testing.assert_close(value, (before.sum(1) * change).sum(), rtol=1e-4, atol=1e-4)
        seen.append(tuple(change.round().tolist()))
    assert len(set(seen)) == 3 and set(sum(seen, ())) == {0.0, 2.0}


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable], ids=["all", "dots"])
def test_steps_of_a_function(policy: Any) -> None:
    """The functional form that existing users write."""
    x, y = data()
    model = net().eval()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def forward(weights: Any, buffers: Any, args: Any) -> torch.Tensor:
        return torch.func.functional_call(model, {**weights, **buffers}, args)

    tx = optax.sgd(0.1, momentum=0.9)
    opt_state = tx.init({n: w.jax() for n, w in weights.items()})
    step = jax_jit(make_train_step(forward, F.cross_entropy, tx, policy), {"donate_argnums": (2,)})
    twin = net().eval()
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        value, weights, opt_state = step(weights, buffers, opt_state, (x,), y)
        reference.zero_grad()
        want = F.cross_entropy(twin(x), y)
        want.backward()
        reference.step()
        torch.testing.assert_close(value, want.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="give the module itself, or an optax transform"):
        make_train_step(forward, F.cross_entropy, reference)


def test_inputs_by_name() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return (self.w * x * scale).sum()

    model = Scaled().to("jax")
    step = make_train_step(model, lambda out, _: out, optax.sgd(1.0))
    batch = {"x": torch.ones(2, device="jax"), "scale": torch.tensor(3.0, device="jax")}
    assert step(batch, None).item() == 6 and model.w.tolist() == [-2, -2]
    assert jnp.ndim(step.optimizer.param_groups[0]["params"][0].jax()) == 1
