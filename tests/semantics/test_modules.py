"""Modules on device ``jax``: moving, tying, loading, hooks, data loaders."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset
from torchax.tensor import Tensor

from helpers import assert_same


class Net(nn.Module):
    """Parameters of several dtypes, buffers, and weights that are tied."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.register_parameter("unused", None)

    def forward(self, i):
        return self.head(self.norm(self.embed(i)) * self.mask)


def tensors(m: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers())}


MOVES = {
    "to(device)": lambda m: m.to("jax"),
    "to(device, dtype)": lambda m: m.to("jax", torch.float64),
    "to(other)": lambda m: m.to(torch.ones(1, device="jax")),
    "jax()": lambda m: m.jax(),
    "to(keyword)": lambda m: m.to(device=torch.device("jax"), dtype=torch.bfloat16, non_blocking=True),
    "to(device 1)": lambda m: m.to("jax:1"),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("future", [False, True], ids=["", "overwrite"])
def test_moving_keeps_objects_ties_and_flags(name, future):
    m = Net()
    m.norm.bias.requires_grad_(False)
    m.head.weight.note = "kept"
    before, ids = copy.deepcopy(m.state_dict()), {k: id(v) for k, v in m.named_parameters(remove_duplicate=False)}
    torch.__future__.set_overwrite_module_params_on_conversion(future)
    try:
        assert MOVES[name](m) is m
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert all(t.device.type == "jax" for t in tensors(m).values())
    assert (
        m.head.weight is m.embed.weight
        and isinstance(m.head.weight, nn.Parameter)
        and isinstance(m.head.weight, Tensor)
    )
    assert ids == {k: id(v) for k, v in m.named_parameters(remove_duplicate=False)}
    assert not m.norm.bias.requires_grad and m.norm.weight.requires_grad and m.head.weight.note == "kept"
    assert m.mask.dtype == torch.bool and m.norm.num_batches_tracked.dtype == torch.int64 and m.unused is None
    dtype = {"to(device, dtype)": torch.float64, "to(keyword)": torch.bfloat16}.get(name, torch.float32)
    for key, value in m.state_dict().items():
        assert value.dtype == (dtype if before[key].is_floating_point() else before[key].dtype)
        torch.testing.assert_close(value.cpu(), before[key].to(value.dtype))
    m.to("cpu")
    assert not any(isinstance(t, Tensor) for t in tensors(m).values()) and m.head.weight is m.embed.weight
    assert ids == {k: id(v) for k, v in m.named_parameters(remove_duplicate=False)}
    assert type(m.head.weight) is nn.Parameter


CASTS = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}


@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast):
    m = Net().to("jax")
    weight = m.head.weight
    assert getattr(m, cast)() is m
    assert m.head.weight is weight is m.embed.weight and weight.dtype == CASTS[cast]
    assert str(weight.jax().dtype) == str(CASTS[cast]).removeprefix("torch.")
    assert m.mask.dtype == torch.bool and m.norm.running_mean.dtype == CASTS[cast]
    out = m(torch.tensor([0, 1, 2], device="jax"))
    assert out.dtype == CASTS[cast]
    m.type(torch.float32)
    assert m.head.weight.dtype == torch.float32


def test_an_optimizer_made_before_the_move_stays_valid():
    def train(moves):
        torch.manual_seed(1)
        m = Net()
        opt = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for device in moves:
            m.to(device)
            opt.zero_grad()
            m(torch.tensor([0, 1, 2, 3], device=device)).square().mean().backward()
            for group in opt.state.values():  # as on every device, state does not move by itself
                for k, v in group.items():
                    group[k] = v.to(device) if isinstance(v, torch.Tensor) and v.dim() else v
            opt.step()
        return m.to("cpu").state_dict()

    assert_close(train(["cpu", "cpu", "cpu", "cpu"]), train(["jax", "jax", "cpu", "jax"]))


def assert_close(a, b):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5)


def test_gradients_move_along():
    m = nn.Linear(2, 2)
    m(torch.ones(1, 2)).sum().backward()
    grad = m.weight.grad.clone()
    m.to("jax")
    assert m.weight.grad.device.type == "jax" and m.weight.grad.tolist() == grad.tolist()
    m(torch.ones(1, 2, device="jax")).sum().backward()
    assert torch.equal(m.weight.grad.cpu(), 2 * grad)
    m.to("cpu")
    assert torch.equal(m.weight.grad, 2 * grad)


def test_moving_while_a_graph_holds_the_parameters():
    m = Net()
    m.eval()
    loss = m(torch.tensor([0, 1])).sum()
    m.to("jax")
    assert m.head.weight is m.embed.weight and m.head.weight.device.type == "jax"
    assert m(torch.tensor([0, 1], device="jax")).device.type == "jax"
    del loss


def test_a_failed_move_leaves_the_module_as_it_was():
    m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    m[1].weight.data = m[1].weight.data.to(torch.float16)
    m.register_buffer("bad", torch.eye(2).to_sparse())
    weight = m[0].weight
    with pytest.raises(TypeError):
        m.to("jax")
    assert m[0].weight is weight and m.bad.is_sparse
    assert sorted(n for n, _ in m.named_parameters()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    del m.bad
    m.to("jax").to("cpu")


def test_state_dict_and_load_state_dict():
    cpu, m = Net(), Net().to("jax")
    weight = m.head.weight
    assert str(m.load_state_dict(cpu.state_dict())) == "<All keys matched successfully>"
    assert m.head.weight is weight and weight.device.type == "jax"
    assert_same(dict(m.state_dict()), dict(cpu.state_dict()))
    fresh = Net()
    fresh.load_state_dict(m.state_dict())
    assert type(fresh.head.weight) is nn.Parameter
    torch.testing.assert_close(fresh.head.weight, cpu.head.weight)
    state = m.state_dict()
    assert state["head.weight"].data_ptr() == m.head.weight.data_ptr() and not state["head.weight"].requires_grad
    with pytest.raises(RuntimeError, match="size mismatch"):
        m.load_state_dict({**state, "norm.weight": torch.ones(7)})
    with pytest.raises(RuntimeError, match="Missing key"):
        m.load_state_dict({})


@pytest.mark.parametrize("source", ["jax", "cpu", "jax:1"])
def test_load_state_dict_with_assign(source):
    m = nn.Linear(2, 3)
    state = {k: v.to(source) for k, v in nn.Linear(2, 3).state_dict().items()}
    m.load_state_dict(state, assign=True)
    assert str(m.weight.device) == {"jax": "jax:0"}.get(source, source) and isinstance(m.weight, nn.Parameter)
    assert m.weight.data_ptr() == state["weight"].data_ptr() and m.weight.requires_grad
    m(torch.ones(1, 2, device=source)).sum().backward()


@pytest.mark.parametrize("start", ["cpu", "meta", "jax"])
def test_to_empty(start):
    m = Net().to(start)
    m.to_empty(device="jax")
    assert all(t.device.type == "jax" for t in tensors(m).values())
    assert m.head.weight.shape == (5, 4) and isinstance(m.head.weight, nn.Parameter) and m.head.weight is m.embed.weight
    with torch.no_grad():
        nn.init.ones_(m.head.weight)
    assert m.head.weight.sum() == 20


def test_meta_modules():
    with torch.device("meta"):
        m = nn.Linear(2, 2)
    m.load_state_dict({k: v.to("jax") for k, v in nn.Linear(2, 2).state_dict().items()}, assign=True)
    assert m(torch.ones(1, 2, device="jax")).device.type == "jax"
    assert nn.Linear(2, 2, device="jax").to("meta").weight.device.type == "meta"


def test_parameters_and_buffers():
    p = nn.Parameter(torch.ones(2, device="jax"))
    assert isinstance(p, nn.Parameter) and isinstance(p, Tensor) and p.requires_grad and p.is_leaf
    assert not isinstance(torch.ones(2, device="jax"), nn.Parameter)
    m = nn.Module()
    m.p = p
    m.register_buffer("b", torch.zeros(2, device="jax"))
    m.list = nn.ParameterList([p, nn.Parameter(torch.ones(1, device="jax"))])
    assert list(dict(m.named_parameters())) == ["p", "list.1"] and list(m.state_dict()) == [
        "p",
        "b",
        "list.0",
        "list.1",
    ]
    with pytest.raises(TypeError):
        m.p = torch.ones(2, device="jax")
    with pytest.raises(RuntimeError):
        nn.Parameter(torch.ones(2, dtype=torch.int64, device="jax"))
    p.data = torch.full((2,), 3.0, device="jax")
    assert p.tolist() == [3, 3] and p.requires_grad and isinstance(p, nn.Parameter)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        p.data = torch.ones(2)


# Hooks ------------------------------------------------------------------------------------------------------------


def _hooked(device):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(device)
    log = []

    def note(name):
        return lambda *a: log.append((name, pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), a[1:])))

    m[0].register_forward_pre_hook(note("pre"))
    m[0].register_forward_hook(note("forward"))
    m[0].register_forward_hook(lambda mod, i, out: out * 2)
    m[1].register_full_backward_hook(note("backward"))
    m[2].register_full_backward_pre_hook(note("pre backward"))
    m[2].weight.register_hook(lambda g: g * 10)
    m[2].bias.register_post_accumulate_grad_hook(lambda p: log.append(("accumulated", p.grad.detach().cpu())))
    x = torch.linspace(-1, 1, 6).reshape(2, 3).to(device).requires_grad_()
    x.register_hook(lambda g: log.append(("input", g.detach().cpu())))
    y = m(x)
    y.retain_grad()
    handle = y.register_hook(lambda g: g * 100)
    handle.remove()
    y.square().sum().backward()
    return log, [p.grad.cpu() for p in m.parameters()], y.grad.cpu()


def test_hooks_run_as_on_cpu():
    got, want = _hooked("jax"), _hooked("cpu")
    assert [name for name, *_ in got[0]] == [name for name, *_ in want[0]]
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b) if isinstance(a, torch.Tensor) else None


def test_gradient_hooks_may_step_the_optimizer():
    m = nn.Linear(2, 2).to("jax")
    steps = {p: torch.optim.SGD([p], lr=0.5) for p in m.parameters()}

    def stepping(p):
        steps[p].step()
        steps[p].zero_grad()

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(stepping)
    before = m.bias.tolist()
    m(torch.ones(1, 2, device="jax")).sum().backward()
    assert m.bias.grad is None and m.bias.tolist() == pytest.approx([b - 0.5 for b in before])


# Utilities of torch.nn --------------------------------------------------------------------------------------------


def _utility(name, device):
    torch.manual_seed(0)
    m = nn.Linear(3, 4)
    x = torch.randn(2, 3)
    if name == "weight_norm":
        m = nn.utils.parametrizations.weight_norm(m)
    elif name == "old weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            m = nn.utils.weight_norm(m)
    elif name == "parametrize":

        class Symmetric(nn.Module):
            def forward(self, w):
                return w.triu() + w.triu(1)

        nn.utils.parametrize.register_parametrization(m, "weight", Symmetric())
    elif name == "spectral_norm":
        m = nn.utils.parametrizations.spectral_norm(m)
    elif name == "pruned":
        prune.l1_unstructured(m, "weight", amount=0.5)
    m = m.to(device)
    out = m(x.to(device))
    out.square().sum().backward()
    norm = nn.utils.clip_grad_norm_(m.parameters(), 0.5)
    nn.utils.clip_grad_value_(m.parameters(), 0.3)
    vector = nn.utils.parameters_to_vector(m.parameters())
    nn.utils.vector_to_parameters(vector * 2, m.parameters())
    return out, norm, {k: v.grad for k, v in m.named_parameters()}, dict(m.state_dict())


@pytest.mark.parametrize("name", ["plain", "weight_norm", "old weight_norm", "parametrize", "spectral_norm", "pruned"])
def test_nn_utils(name):
    assert_same(_utility(name, "jax"), _utility(name, "cpu"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("norm", [2.0, float("inf"), 1.0])
def test_clip_grad_norm(norm, foreach):
    results = []
    for device in ("jax", "cpu"):
        ps = [torch.arange(4.0, device=device).requires_grad_(), torch.ones(2, 2, device=device).requires_grad_()]
        for p in ps:
            p.grad = p.detach() * 3
        results.append((nn.utils.clip_grad_norm_(ps, 1.0, norm, foreach=foreach), [p.grad for p in ps]))
    assert_same(*results)


def test_clip_grad_norm_names_what_is_not_finite():
    p = torch.ones(2, device="jax", requires_grad=True)
    p.grad = torch.tensor([float("nan"), 1.0], device="jax")
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)


def test_averaged_models():
    results = []
    for device in ("jax", "cpu"):
        torch.manual_seed(0)
        m = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(device)
        ema = torch.optim.swa_utils.AveragedModel(
            m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        swa = torch.optim.swa_utils.AveragedModel(m)
        opt = torch.optim.SGD(m.parameters(), lr=0.1)
        scheduler = torch.optim.swa_utils.SWALR(opt, swa_lr=0.05)
        data = torch.linspace(-1, 1, 12).reshape(6, 2).to(device)
        for _ in range(3):
            opt.zero_grad()
            m(data).square().sum().backward()
            opt.step()
            ema.update_parameters(m)
            swa.update_parameters(m)
            scheduler.step()
        torch.optim.swa_utils.update_bn([data], swa)
        results.append([{k: v.cpu() for k, v in a.state_dict().items()} for a in (ema, swa)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# Data loaders -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize(("workers", "pin"), [(0, False), (0, True), (2, True), (2, False)])
def test_data_loaders_give_cpu_tensors_that_move(workers, pin):
    data = TensorDataset(torch.arange(10.0).reshape(5, 2), torch.arange(5))
    seen = []
    for x, y in DataLoader(data, batch_size=2, num_workers=workers, pin_memory=pin):
        assert x.device.type == "cpu" == y.device.type
        x, y = x.to("jax", non_blocking=True), y.to("jax")
        seen += (x.sum(1) + y).tolist()
    assert seen == [1, 6, 11, 16, 21]


def test_data_loaders_over_jax_tensors():
    data = TensorDataset(torch.arange(10.0, device="jax").reshape(5, 2), torch.arange(5, device="jax"))
    batches = list(DataLoader(data, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0)))
    assert all(x.device.type == "jax" for x, _ in batches) and sorted(i for _, y in batches for i in y.tolist()) == [
        0,
        1,
        2,
        3,
        4,
    ]
    part, rest = torch.utils.data.random_split(data, [2, 3])
    assert len(part) == 2 and rest[0][0].device.type == "jax"


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_pinning():
    x = torch.ones(2, device="jax")
    assert not x.is_pinned() and not torch.ones(2).is_pinned()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        x.pin_memory()
    with pytest.raises(RuntimeError, match="between processes"):
        x.share_memory_()
    assert not x.is_shared()


def test_default_device_and_data_loader():
    with torch.device("jax"):
        for (x,) in DataLoader(
            TensorDataset(torch.arange(4.0)), batch_size=2, shuffle=True, generator=torch.Generator("cpu")
        ):
            assert x.device.type == "jax"
