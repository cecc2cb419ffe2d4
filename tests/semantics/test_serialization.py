"""Copies and files: `copy`, `pickle`, `torch.save` and `torch.load`, with storages shared as before."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchax
from torchax.tensor import Tensor

DEVICES = ("jax", "cpu")


def saved(value) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_file(value):
    return torch.load(saved(value))  # weights_only=True, the default


def through_file_to_jax(value):
    return torch.load(saved(value), map_location="jax")


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "save": through_file, "save to": through_file_to_jax}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.int64,
        torch.bfloat16,
        torch.bool,
        torch.complex64,
        torch.uint16,
        torch.float8_e5m2,
    ],
    ids=str,
)
def test_a_copy_has_values_and_layout(how, dtype):
    if how == "pickle" and dtype in (torch.uint16, torch.float8_e5m2):
        pytest.skip("torch cannot pickle these on CPU either, only save them")
    base = torch.randn(4, 6).to(dtype) if dtype != torch.bool else torch.randn(4, 6) > 0
    for t in (base, base.t(), base[1:, ::2], base[2, 3], base[:0]):
        x, want = base.to("jax"), t
        x = x.as_strided(t.shape, t.stride(), t.storage_offset())
        got = COPIES[how](x)
        assert type(got) is Tensor and got.device == x.device and got.dtype == dtype
        assert (
            got.shape == want.shape and got.stride() == want.stride() and got.storage_offset() == want.storage_offset()
        )
        assert str(got.float().tolist() if not dtype.is_complex else got.tolist()) == str(
            want.float().tolist() if not dtype.is_complex else want.tolist()
        )
        assert got.data_ptr() != x.data_ptr() or not t.numel()


@pytest.mark.parametrize("how", ["deepcopy", "save", "save to"])  # torch's plain pickles do not share
def test_shared_storages_stay_shared(how):
    x = torch.arange(6.0, device="jax")
    a, b, c, other = COPIES[how]([x, x.view(2, 3), x[2:], torch.arange(6.0, device="jax")])
    b[0, 2] = 100.0
    assert a.tolist() == [0, 1, 100, 3, 4, 5] and c.tolist() == [100, 3, 4, 5] and other[2] == 2
    assert x[2] == 2
    assert a.untyped_storage().data_ptr() == c.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


@pytest.mark.parametrize("how", COPIES)
def test_gradients_flags_and_kinds(how):
    x = torch.ones(2, device="jax", requires_grad=True)
    p = torch.nn.Parameter(torch.ones(2, device="jax"))
    frozen = torch.nn.Parameter(torch.ones(2, device="jax"), requires_grad=False)
    buffer = torch.nn.Buffer(torch.ones(2, device="jax"))
    a, b, c, d = COPIES[how]([x, p, frozen, buffer])
    assert a.requires_grad and a.is_leaf and not isinstance(a, torch.nn.Parameter)
    assert isinstance(b, torch.nn.Parameter) and b.requires_grad and b.device.type == "jax"
    assert isinstance(c, torch.nn.Parameter) and not c.requires_grad
    assert isinstance(d, torch.nn.Buffer) == isinstance(COPIES[how](torch.nn.Buffer(torch.ones(2))), torch.nn.Buffer)
    (a * 2).sum().backward()
    assert a.grad.tolist() == [2, 2] and x.grad is None


def test_deepcopy_takes_gradients_and_attributes_along():
    p = torch.nn.Parameter(torch.ones(2, device="jax"))
    (p * 3).sum().backward()
    p.note = ["kept"]
    q = copy.deepcopy(p)
    assert q.grad.tolist() == [3, 3] and q.grad is not p.grad and q.note == ["kept"] and q.note is not p.note
    q.grad.zero_()
    assert p.grad.tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(p * 2)


def test_copy_copy_shares_as_torchs_does():
    results = []
    for device in DEVICES:
        x = torch.zeros(3, device=device)
        twin = copy.copy(x)
        twin.add_(1)
        results.append((x.tolist(), twin.tolist(), twin is x, type(copy.copy(torch.nn.Parameter(x))).__name__))
    assert results[0][:3] == results[1][:3] and results[1][0] == [1, 1, 1]


def test_deepcopied_modules_are_independent_and_stay_tied():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    m = Tied().to("jax")
    m.register_buffer("window", torch.arange(4.0, device="jax"))
    m.register_buffer("start", m.window[:2])
    n = copy.deepcopy(m)
    assert n.head.weight is n.embed.weight is not m.embed.weight and n.head.weight.device.type == "jax"
    n.window[0] = 7
    assert n.start[0] == 7 and m.window[0] == 0
    linear = through_pickle(torch.nn.Sequential(torch.nn.Linear(2, 2)).to("jax"))
    assert linear[0].weight.device.type == "jax" and isinstance(linear[0].weight, torch.nn.Parameter)
    assert torch.load(saved(linear), weights_only=False)[0].weight.device.type == "jax"


# Files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_jax_tensors_opens_on_cpu():
    x = torch.arange(6.0, device="jax").view(2, 3)
    state = {
        "a": x,
        "b": x.t(),
        "p": torch.nn.Parameter(x * 2),
        "i": torch.arange(3, device="jax"),
        "n": 3,
        "s": "text",
    }
    got = torch.load(saved(state), map_location="cpu")
    assert all(v.device.type == "cpu" for v in got.values() if isinstance(v, torch.Tensor))
    assert got["a"].tolist() == x.tolist() and got["b"].stride() == (1, 3) and got["n"] == 3 and got["s"] == "text"
    assert got["b"].untyped_storage().data_ptr() == got["a"].untyped_storage().data_ptr()
    assert isinstance(got["p"], torch.nn.Parameter) and got["p"].requires_grad and not isinstance(got["p"], Tensor)


@pytest.mark.parametrize("location", ["jax", "jax:0", "jax:1", torch.device("jax"), torch.device("jax", 1)], ids=str)
def test_a_file_of_cpu_tensors_opens_on_jax(location, jax_devices):
    t = torch.arange(6.0).view(2, 3)
    got = torch.load(
        saved({"a": t, "b": t.t(), "p": torch.nn.Parameter(t[0]), "d": t.double(), "h": t.bfloat16()}),
        map_location=location,
    )
    index = torch.device(location).index or 0
    for v in got.values():
        assert type(v) is Tensor or isinstance(v, torch.nn.Parameter)
        assert v.device == torch.device("jax", index) and v.jax().devices() == {jax_devices[index]}
    assert got["a"].tolist() == t.tolist() and got["b"].stride() == (1, 3) and got["d"].dtype == torch.float64
    assert isinstance(got["p"], torch.nn.Parameter) and got["p"].requires_grad
    got["a"][0, 1] = 50.0
    assert got["b"][1, 0] == 50, "the storage is shared, as it was"
    assert t[0, 1] == 1


@pytest.mark.parametrize(
    "location",
    [
        lambda storage, place: storage.cpu() if hasattr(storage, "cpu") else storage,
        {"jax:0": "cpu"},
        {"jax:0": "jax:1"},
    ],
    ids=["function", "to cpu", "to jax:1"],
)
def test_other_map_locations(location):
    x = torch.arange(3.0, device="jax")
    got = torch.load(saved(x), map_location=location)
    assert got.tolist() == [0, 1, 2]
    if isinstance(location, dict):
        assert str(got.device) == location["jax:0"]


@pytest.mark.parametrize("where", ["jax", "cpu"])
def test_views_of_other_types(where):
    x = torch.tensor([1.0, 2.0, 3.0], device=where)
    bits = x.view(torch.int32)[1:]
    got = torch.load(saved(bits), map_location="jax")
    assert got.dtype == torch.int32 and got.tolist() == bits.tolist() and got.storage_offset() == 1
    with pytest.raises(RuntimeError, match="same data as different types"):
        saved([x, bits])
    a, b = copy.deepcopy([x, bits])
    b[0] = 0
    assert a.tolist() == [1, 0, 3]


def test_jax_files_move_between_devices():
    got = torch.load(saved(torch.ones(2, device="jax:1")))
    assert got.device == torch.device("jax:1")
    assert torch.load(saved(torch.ones(2, device="jax:1")), map_location="jax:0").device == torch.device("jax:0")
    with pytest.raises(torchax.errors.PlatformUnavailable, match="jax:77"):
        torch.load(saved(torch.ones(2)), map_location="jax:77")


def test_legacy_format_and_mmap(tmp_path):
    x = torch.arange(4.0, device="jax")
    file = io.BytesIO()
    torch.save({"x": x}, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    assert torch.load(file)["x"].tolist() == [0, 1, 2, 3]
    torch.save({"x": torch.arange(4.0)}, tmp_path / "cpu.pt")
    got = torch.load(tmp_path / "cpu.pt", mmap=True, map_location="jax")["x"]
    assert got.device.type == "jax" and got.tolist() == [0, 1, 2, 3]


def test_a_state_dict_and_an_optimizer_go_through_a_file():
    torch.manual_seed(0)
    m = torch.nn.Linear(3, 2).to("jax")
    opt = torch.optim.Adam(m.parameters(), lr=0.1)
    x = torch.randn(5, 3).to("jax")

    def step(m, opt):
        opt.zero_grad()
        m(x).square().sum().backward()
        opt.step()

    step(m, opt)
    file = saved({"model": m.state_dict(), "opt": opt.state_dict(), "rng": torch.jax.get_rng_state()})
    for location in ("jax", "cpu", None):
        file.seek(0)
        state = torch.load(file, map_location=location)
        n = torch.nn.Linear(3, 2).to("jax")
        n.load_state_dict(state["model"])
        again = torch.optim.Adam(n.parameters(), lr=0.5)
        again.load_state_dict(copy.deepcopy(state["opt"]))
        assert again.param_groups[0]["lr"] == 0.1
        assert again.state[n.weight]["exp_avg"].device.type == "jax"
        m2 = copy.deepcopy(m)
        opt2 = torch.optim.Adam(m2.parameters(), lr=0.1)
        opt2.load_state_dict(copy.deepcopy(opt.state_dict()))
        step(n, again)
        step(m2, opt2)
        torch.testing.assert_close(n.weight.cpu(), m2.weight.cpu())
        torch.jax.set_rng_state(state["rng"].cpu())


@pytest.mark.parametrize("damage", ["truncated", "nonsense", "missing"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "x.pt"
    data = saved(torch.arange(1000.0, device="jax")).getvalue()
    if damage != "missing":
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"nonsense")
    with pytest.raises((RuntimeError, FileNotFoundError, pickle.UnpicklingError, EOFError)):
        torch.load(path, map_location="jax")


def test_tensors_being_traced_cannot_be_saved():
    import jax

    def f(a):
        torch.save(Tensor(a), io.BytesIO())
        return a

    with pytest.raises(torchax.errors.TracerEscaped, match="saving"):
        jax.jit(f)(jax.numpy.ones(3))
