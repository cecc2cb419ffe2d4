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


def steps(info, kwargs, device, dtype):
    """The parameters after some steps on a loss whose gradients change from step to step, and the optimizer."""
    params = parameters(device, dtype, info.optim_cls.__name__ == "Muon")
    optimizer = info.optim_cls(params, **copy.deepcopy(kwargs))

    def closure():
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = torch.stack([((p - 0.5) * (p.detach().cos() + 2)).square().sum() for p in params]).sum()
            loss.backward()
        return loss

    for _ in range(STEPS):
        with torch.no_grad() if kwargs.get("differentiable") else torch.enable_grad():
            if info.step_requires_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    return params, optimizer


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
                want, _ = steps(info, plain, "cpu", dtype)
                got, optimizer = steps(info, moved(given, "jax"), "jax", dtype)
                rtol, atol = (2e-5, 2e-6) if dtype == torch.float32 else (1e-7, 1e-9)
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
    loaded.load_state_dict(optimizer.state_dict())

    def closure(group, stepped):
        def fn():
            with torch.enable_grad():
                stepped.zero_grad()
                loss = torch.stack([p.sin().sum() for p in group]).sum()
                loss.backward()
            return loss

        return fn

    optimizer.step(closure(params, optimizer))
    loaded.step(closure(others, loaded))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu())
