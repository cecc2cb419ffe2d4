"""Device ``jax``: its module, several devices, factories, and what happens when devices are mixed."""

from __future__ import annotations

import io
import threading

import jax
import pytest
import torch
import torchax

from helpers import assert_same, run_python


@pytest.fixture(autouse=True)
def _first_device():
    yield
    torch.jax.set_device(0)


# The module -------------------------------------------------------------------------------------------------------


def test_the_module_is_torchs_device_module():
    import torch.jax as module  # importable by its name

    assert module is torch.jax is torch.get_device_module("jax") is torchax.device
    assert torch.jax.is_available() is True and torch.jax.is_initialized() is True
    assert torch.jax.device_count() == len(jax.devices())
    assert torch._C._get_privateuse1_backend_name() == "jax"
    assert torch.utils.backend_registration._get_custom_mod_func("device_count")() == len(jax.devices())


def test_current_device_can_be_set_and_scoped(jax_devices):
    assert torch.jax.current_device() == 0
    torch.jax.set_device(1)
    assert torch.jax.current_device() == 1 and torch.ones(2, device="jax").device == torch.device("jax", 1)
    torch.jax.set_device(torch.device("jax:0"))
    assert torch.jax.current_device() == 0
    with torch.jax.device(1):
        assert torch.ones(2, device="jax").device.index == 1
        with torch.jax.device("jax:0"):
            assert torch.jax.current_device() == 0
        assert torch.jax.current_device() == 1
    assert torch.jax.current_device() == 0
    with pytest.raises(ZeroDivisionError), torch.jax.device(1):
        1 / 0  # noqa: B018
    assert torch.jax.current_device() == 0


def _loaded(device):
    file = io.BytesIO()
    torch.save(torch.ones(2), file)
    file.seek(0)
    return torch.load(file, map_location=device)


ARRIVALS = {
    "to": lambda d: torch.ones(2).to(d),
    "to, by keyword": lambda d: torch.ones(2).to(device=d, dtype=torch.float64),
    "to, with dtype": lambda d: torch.ones(2).to(d, torch.float16, copy=True),
    "to, of another device's": lambda d: torch.ones(2, device="jax:3").to(d),
    "requires_grad": lambda d: torch.ones(2, requires_grad=True).to(d),
    "tensor": lambda d: torch.tensor([1.0], device=d),
    "as_tensor": lambda d: torch.as_tensor([1.0], device=d),
    "as_tensor, of a tensor there": lambda d: torch.as_tensor(torch.ones(2, device=d), device=d),
    "asarray": lambda d: torch.asarray([1.0], device=d),
    "new_tensor": lambda d: torch.ones(2).new_tensor([1.0], device=d),
    "zeros": lambda d: torch.zeros(2, device=d),
    "zeros_like": lambda d: torch.zeros_like(torch.ones(2), device=d),
    "arange": lambda d: torch.arange(3, device=d),
    "Module.to": lambda d: torch.nn.Linear(2, 2).to(d).weight,
    "Module, made there": lambda d: torch.nn.Linear(2, 2, device=d).weight,
    "to_empty": lambda d: torch.nn.Linear(2, 2, device="meta").to_empty(device=d).weight,
    "load": _loaded,
}


@pytest.mark.parametrize("name", ARRIVALS)
def test_a_device_without_index_is_the_current_one(name, jax_devices):
    arrive = ARRIVALS[name]
    assert arrive("jax").device.index == 0
    torch.jax.set_device(1)
    assert arrive("jax").device.index == 1 and arrive("jax").jax().devices() == {jax_devices[1]}
    assert arrive(torch.device("jax")).device.index == 1
    assert arrive("jax:0").device.index == 0 and arrive("jax:2").device.index == 2
    with torch.jax.device(2):
        assert arrive("jax").device.index == 2
    assert arrive("jax").device.index == 1
    assert arrive("cpu").device.type == "cpu"


def test_a_default_device_without_index_is_the_current_one(jax_devices):
    torch.jax.set_device(1)
    with torch.device("jax"):
        assert torch.zeros(2).device.index == torch.tensor([1.0]).device.index == 1
        assert torch.nn.Linear(2, 2).weight.device.index == 1
    torch.set_default_device("jax")
    try:
        assert torch.zeros(2).device.index == torch.tensor([1.0]).device.index == 1
        torch.jax.set_device(2)
        assert torch.zeros(2).device.index == torch.tensor([1.0]).device.index == 2
        assert torch.get_default_device().index == 2
    finally:
        torch.set_default_device(None)


def test_moving_to_the_current_device_is_differentiable():
    x = torch.ones(2, requires_grad=True)
    with torch.jax.device(1):
        y = x.to("jax") * 2
    y.sum().backward()
    assert y.device.index == 1 and x.grad.tolist() == [2, 2]


def test_the_current_device_is_the_threads_own(jax_devices):
    torch.jax.set_device(1)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.jax.current_device()))
    thread.start()
    thread.join()
    assert seen == [0] and torch.jax.current_device() == 1


@pytest.mark.parametrize("bad", [99, "jax:99", -2])
def test_a_device_that_is_not_there_is_refused(bad):
    with pytest.raises((torchax.errors.PlatformUnavailable, RuntimeError)):
        torch.jax.set_device(bad)
    assert torch.jax.current_device() == 0
    with pytest.raises(ValueError, match="type 'jax'"):
        torch.jax.set_device("cpu")


def test_memory_numbers_and_synchronize():
    x = torch.ones(1000, device="jax")
    x.jax().block_until_ready()
    torch.jax.synchronize()
    torch.jax.synchronize("jax:0")
    assert torch.jax.memory_stats()["bytes_in_use"] >= 4000
    assert torch.jax.memory_allocated() >= 4000 and torch.jax.max_memory_allocated("jax:0") >= 4000
    free, total = torch.jax.mem_get_info()
    assert 0 <= free <= total or total == 0
    torch.jax.empty_cache()


def test_amp_module():
    assert torch.bfloat16 in torch.jax.get_amp_supported_dtype() and torch.jax.is_bf16_supported()
    a = torch.ones(2, 2, device="jax")
    with torch.jax.amp.autocast():
        assert (a @ a).dtype == torch.bfloat16


def test_accelerator_functions(jax_devices):
    acc = torch.accelerator
    assert acc.is_available() and acc.current_accelerator() == torch.device("jax")
    assert acc.device_count() == len(jax_devices)
    assert acc.current_device_index() == 0
    acc.set_device_index(1)
    assert acc.current_device_index() == 1 == torch.jax.current_device()
    assert torch.ones(1, device="jax").device.index == 1
    acc.set_device_index(0)
    with acc.device_index(1):
        assert torch.jax.current_device() == 1
    assert torch.jax.current_device() == 0
    acc.synchronize()


def test_default_device():
    try:
        torch.set_default_device("jax")
        made = [
            torch.ones(2),
            torch.randn(3),
            torch.tensor([1, 2]),
            torch.arange(3),
            torch.nn.Linear(2, 3).weight,
            torch.full((2,), 1.5),
        ]
        assert all(t.device.type == "jax" for t in made)
        assert torch.get_default_device().type == "jax"
        assert torch.ones(2, device="cpu").device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert torch.ones(2).device.type == "cpu"
    with torch.device("jax"):
        assert torch.zeros(2).device == torch.device("jax:0")
    with torch.device("jax", 1):
        assert torch.zeros(2).device == torch.device("jax:1") and torch.nn.Linear(2, 2).weight.device.index == 1


# Factories --------------------------------------------------------------------------------------------------------

FACTORIES = {
    "zeros": lambda **k: torch.zeros(2, 3, **k),
    "ones": lambda **k: torch.ones((2, 3), **k),
    "full": lambda **k: torch.full((2,), 2.5, **k),
    "full int": lambda **k: torch.full((2,), 3, **k),
    "full bool": lambda **k: torch.full((2,), True, **k),
    "arange": lambda **k: torch.arange(5, **k),
    "arange float": lambda **k: torch.arange(0, 1, 0.25, **k),
    "linspace": lambda **k: torch.linspace(0, 1, 5, **k),
    "logspace": lambda **k: torch.logspace(0, 2, 3, **k),
    "eye": lambda **k: torch.eye(3, **k),
    "eye wide": lambda **k: torch.eye(2, 3, **k),
    "tensor": lambda **k: torch.tensor([[1.0, 2.0], [3.0, 4.0]], **k),
    "tensor int": lambda **k: torch.tensor(3, **k),
    "tensor bool": lambda **k: torch.tensor([True, False], **k),
    "tensor complex": lambda **k: torch.tensor([1 + 2j], **k),
    "as_tensor": lambda **k: torch.as_tensor([1, 2, 3], **k),
    "asarray": lambda **k: torch.asarray([1.0, 2.0], **k),
    "scalar_tensor": lambda **k: torch.scalar_tensor(2.5, **k),
    "tril_indices": lambda **k: torch.tril_indices(3, 3, **k),
    "triu_indices": lambda **k: torch.triu_indices(3, 3, **k),
    "hann_window": lambda **k: torch.hann_window(5, **k),
    "float64": lambda **k: torch.ones(2, dtype=torch.float64, **k),
    "requires_grad": lambda **k: torch.ones(2, requires_grad=True, **k),
    "complex": lambda **k: torch.zeros(2, dtype=torch.complex64, **k),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("device", ["jax", "jax:1"])
def test_factories(name, device, jax_devices):
    got, want = FACTORIES[name](device=device), FACTORIES[name]()
    assert got.device == torch.device(device if ":" in device else "jax:0")
    assert got.jax().devices() == {jax_devices[got.device.index]}
    assert got.requires_grad == want.requires_grad and got.is_leaf
    assert_same(got, want, layout=True)


@pytest.mark.parametrize("like", ["empty_like", "zeros_like", "ones_like", "rand_like", "randn_like"])
def test_like_factories_keep_device_dtype_and_layout(like, jax_devices):
    base = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for source in (base, base.transpose(0, 1), base[:, :, ::2], base.double()):
        other = source.to("jax:1")
        got, want = getattr(torch, like)(other), getattr(torch, like)(source)
        assert got.device == other.device and got.dtype == want.dtype and got.stride() == want.stride()
        if like in ("zeros_like", "ones_like"):
            assert_same(got, want)
    assert getattr(torch, like)(base.to("jax"), device="cpu").device.type == "cpu"
    assert getattr(torch, like)(base, device="jax:1").device == torch.device("jax:1")


def test_new_factories_stay_on_the_tensors_device(jax_devices):
    x = torch.ones(2, dtype=torch.float64, device="jax:1")
    for y in (x.new_zeros(3), x.new_ones(3), x.new_empty(3), x.new_full((3,), 1), x.new_tensor([1, 2, 3])):
        assert y.device == x.device and y.shape == (3,)
        assert y.jax().devices() == {jax_devices[1]}
    assert x.new_zeros(3).dtype == torch.float64 and x.new_zeros(2, device="cpu").device.type == "cpu"


def test_random_factories_land_on_the_device(jax_devices):
    for make in (torch.rand, torch.randn):
        x = make(100, device="jax:1")
        assert x.jax().devices() == {jax_devices[1]} and x.std() > 0.1
    assert torch.randperm(10, device="jax:1").jax().devices() == {jax_devices[1]}
    assert torch.randint(0, 9, (4,), device="jax:1").jax().devices() == {jax_devices[1]}


# Several devices --------------------------------------------------------------------------------------------------


def test_computation_stays_on_its_device(jax_devices):
    a = torch.arange(6.0, device="jax:1").reshape(2, 3)
    b = (a @ a.T + 1).relu().sum(0, keepdim=True) * torch.tensor(2.0)
    assert b.device == torch.device("jax:1") and b.jax().devices() == {jax_devices[1]}
    a.requires_grad_()
    (a * 2).sum().backward()
    assert a.grad.device == a.device and a.grad.jax().devices() == {jax_devices[1]}


def test_to_moves_between_devices_and_is_differentiable(jax_devices):
    a = torch.arange(6.0).reshape(2, 3).t()
    x = a.to("jax").requires_grad_()
    y = x.to("jax:2")
    assert y.jax().devices() == {jax_devices[2]} and x.jax().devices() == {jax_devices[0]}
    assert_same(y, a, layout=True)
    (y * y).sum().backward()
    assert_same(x.grad, 2 * a)
    assert x.grad.device == torch.device("jax:0")
    assert x.to("jax") is x and x.to("jax:0") is x and y.to("jax:2") is y
    assert y.to("jax", torch.float64).dtype == torch.float64
    assert y.to(x.device).to("cpu").equal(a)
    assert y.to("jax:2", copy=True).data_ptr() != y.data_ptr()
    assert y.to(x).device == x.device


def test_copy_between_devices():
    a = torch.zeros(3, device="jax:1")
    a.copy_(torch.tensor([1.0, 2.0, 3.0], device="jax:0"))
    assert a.tolist() == [1, 2, 3] and a.device.index == 1
    b = torch.zeros(3)
    b.copy_(a)
    assert b.tolist() == [1, 2, 3]
    a.copy_(torch.ones(3), non_blocking=True)
    assert a.tolist() == [1, 1, 1]


MIXED = {
    "add": lambda a, b: a + b,
    "mm": lambda a, b: a @ b,
    "linear": lambda a, b: torch.nn.functional.linear(a, b),
    "cat": lambda a, b: torch.cat([a, b]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "in-place": lambda a, b: a.add_(b),
    "out": lambda a, b: torch.add(a, a, out=b),
    "equal": lambda a, b: torch.equal(a, b),
    "mse": lambda a, b: torch.nn.functional.mse_loss(a, b),
    "addmm": lambda a, b: torch.addmm(a, a, b),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("devices", [("jax:0", "cpu"), ("cpu", "jax:0"), ("jax:0", "jax:1")], ids="-".join)
def test_mixed_devices_are_refused_naming_both(name, devices):
    a, b = (torch.ones(2, 2, device=d) for d in devices)
    with pytest.raises(RuntimeError) as caught:
        MIXED[name](a, b)
    assert all(d in str(caught.value) for d in devices), str(caught.value)
    assert a.sum() == 4 and b.sum() == 4


def test_cpu_scalars_mix_with_every_device():
    for device in ("jax", "jax:1"):
        x = torch.ones(2, device=device)
        y = x * torch.tensor(3.0) + torch.tensor(1)
        assert y.device == x.device and y.tolist() == [4, 4] and y.dtype == torch.float32
        assert torch.add(torch.tensor(2.0), x).tolist() == [3, 3]


def test_indices_may_lie_on_cpu():
    x = torch.arange(5.0, device="jax")
    assert x[torch.tensor([0, 3])].tolist() == [0, 3]
    x[torch.tensor([True, False, False, False, False])] = 9.0
    assert x.tolist() == [9, 1, 2, 3, 4]


@pytest.mark.parametrize("index", [99, 4])
def test_factories_refuse_a_device_that_is_not_there(index):
    for make in (
        lambda d: torch.ones(2, device=d),
        lambda d: torch.empty(2, device=d),
        lambda d: torch.ones(2).to(d),
        lambda d: torch.ones(2, device="jax").to(d),
        lambda d: torch.tensor([1.0], device=d),
    ):
        with pytest.raises(torchax.errors.PlatformUnavailable, match=f"jax:{index}.*4 device"):
            make(f"jax:{index}")


def test_a_platform_that_is_not_there():
    out = run_python(
        "import torch, torchax\n"
        "print(torch.jax.is_available())\n"
        "try: torch.ones(2, device='jax')\n"
        "except RuntimeError as e: print(type(e).__name__, e)\n",
        JAX_PLATFORMS="nonsense",
    )
    assert out.splitlines()[0] == "False"
    assert "PlatformUnavailable" in out and "nonsense" in out and "JAX_PLATFORMS" in out


# What a tensor says of itself -------------------------------------------------------------------------------------


def test_a_tensor_says_that_it_is_on_jax():
    x = torch.ones(2, device="jax")
    assert type(x) is torchax.tensor.Tensor and isinstance(x, torch.Tensor)
    assert x.device == torch.device("jax", 0) and x.is_jax and x.get_device() == 0
    assert not x.is_cpu and not x.is_cuda and not x.is_meta and not x.is_lazy and not x.is_sparse
    assert x.layout is torch.strided
    assert torch.device("jax").type == "jax" and str(torch.device("jax:2")) == "jax:2"
    assert x.cpu().device.type == "cpu" and torch.ones(2).jax().device.type == "jax"
    assert torch.nn.Linear(2, 2).jax().weight.device.type == "jax"


def test_the_jax_side_of_a_tensor(jax_devices):
    array = jax.numpy.arange(3.0)
    x = torchax.tensor.Tensor(array)
    assert x.jax() is array and x.jax_device == jax_devices[0]
    assert x.apply_jax(jax.numpy.cumsum).tolist() == [0, 1, 3]
    assert x.apply_jax_(lambda a: a + 1) is x and x.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="keep shape"):
        x.apply_jax_(lambda a: a[:1])
    assert x.tolist() == [1, 2, 3] and x.block_until_ready() is x
    assert x.torch().device.type == "cpu"
    sharded = jax.sharding.NamedSharding(jax.make_mesh((2,), ("d",)), jax.sharding.PartitionSpec("d"))
    y = torch.arange(4.0, device="jax").shard_(sharded)
    assert y.jax().sharding == sharded and (y + 1).sum() == 10
    with pytest.raises(TypeError, match=r"torch\.tensor"):
        torchax.tensor.Tensor([1, 2])


def test_factories_inside_vmap_make_jax_tensors():
    x = torch.randn(3, 2)
    result = torch.vmap(lambda t: t + torch.ones(2, device=t.device))(x.to("jax"))
    assert_same(result, x + 1)
