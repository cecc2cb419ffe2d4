"""Every optimizer of PyTorch's own specification: three steps on device jax are three steps on CPU, in all forms."""

import copy

import pytest
import torch
import torchax  # noqa: F401
from torch.testing._internal.common_optimizers import optim_db

STEPS = 3
DENSE = [info for info in optim_db if not info.only_supports_sparse_grads]


def forms(info):
    """The ways in which an optimizer can run its step."""
    yield {}
    if "foreach" in info.supported_impls:
        yield {"foreach": False}
        yield {"foreach": True}
    if "fused" in info.supported_impls:
        yield {"fused": True}
    if "differentiable" in info.supported_impls:
        yield {"differentiable": True}
    if info.has_capturable_arg:
        yield {"capturable": True}
        if "foreach" in info.supported_impls:
            yield {"capturable": True, "foreach": True}


def parameters(device, dtype, matrices):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4, 2)] if matrices else [(3, 4), (5,), ()]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [torch.nn.Parameter(t.to(device)) for t in drawn]


def closure_of(params):
    """Sets gradients that change from step to step; works for tensors that are no leaves, too."""

    def closure():
        leaves = [p.detach().requires_grad_() for p in params]
        with torch.enable_grad():
            loss = torch.stack([((p - 0.5) * (p.detach().cos() + 2)).square().sum() for p in leaves]).sum()
            loss.backward()
        for p, leaf in zip(params, leaves, strict=True):
            p.grad = leaf.grad
        return loss.detach()

    return closure


def steps(info, kwargs, device, dtype):
    """The parameters after some steps, and the optimizer."""
    params = parameters(device, dtype, info.optim_cls.__name__ == "Muon")
    if kwargs.get("differentiable"):
        params = [p.clone() for p in params]  # autograd follows the steps: they write no leaves
        for p in params:
            p.retain_grad()
    optimizer = info.optim_cls(params, **copy.deepcopy(kwargs))
    closure = closure_of(params)
    for _ in range(STEPS):
        if info.step_requires_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return params, optimizer


def on_cpu(info, plain, form, dtype):
    """The same on CPU, in the form that an accelerator would take by default; CPU torch has not all of them."""
    form = {k: v for k, v in form.items() if k != "capturable"}
    if not form and "foreach" in info.supported_impls:
        form = {"foreach": True}
    try:
        return steps(info, {**plain, **form}, "cpu", dtype)[0]
    except (RuntimeError, ValueError):
        return steps(info, plain, "cpu", dtype)[0]


def tolerance(info, form, dtype):
    if dtype == torch.float64:  # a capturable step counts, and takes powers of its rates, in float32
        return (2e-5, 2e-6) if form.get("capturable") else (1e-7, 1e-9)
    # up to sixty evaluations, each of which starts where rounding has led the ones before
    return (5e-3, 1e-3) if info.optim_cls.__name__ == "LBFGS" else (2e-5, 2e-6)


def moved(kwargs, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


@pytest.mark.parametrize("info", DENSE, ids=lambda info: info.optim_cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_three_steps(info, dtype):
    problems = []
    for item in info.optim_inputs_func(device="cpu"):
        plain = {k: v for k, v in item.kwargs.items() if k not in ("foreach", "fused", "differentiable", "capturable")}
        for form in forms(info):
            given = {**plain, **form}
            if isinstance(given.get("lr"), torch.Tensor) and form.get("foreach") and not form.get("capturable"):
                continue  # torch refuses a tensor lr there
            try:
                want = on_cpu(info, plain, form, dtype)
                got, optimizer = steps(info, moved(given, "jax"), "jax", dtype)
                rtol, atol = tolerance(info, form, dtype)
                for g, w in zip(got, want, strict=True):
                    assert g.device.type == "jax"
                    torch.testing.assert_close(g.detach().cpu(), w.detach(), rtol=rtol, atol=atol)
                for state in optimizer.state.values():
                    for name, value in state.items():
                        if isinstance(value, torch.Tensor) and value.dim():
                            assert value.device.type == "jax", name
            except Exception as error:
                problems.append(f"{item.desc} {form}: {type(error).__name__}: {str(error)[:300]}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("info", DENSE, ids=lambda info: info.optim_cls.__name__)
def test_state_dict_goes_on(info):
    """An optimizer that loads another's state goes on as that one does."""
    item = info.optim_inputs_func(device="cpu")[0]
    params, optimizer = steps(info, item.kwargs, "jax", torch.float32)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = info.optim_cls(others, **item.kwargs)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else the two would share their states

    for group, stepped in ((params, optimizer), (others, loaded)):
        closure = closure_of(group)
        closure()
        stepped.step(closure)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu())
