"""Seeds, generators and states: what comes again, what never does."""

from __future__ import annotations

import copy
import pickle
import threading

import jax
import pytest
import torch
import torchax

F = torch.nn.functional
draw = lambda device="jax", n=8, **k: torch.rand(n, device=device, **k).tolist()


def test_torch_manual_seed_reaches_the_device(jax_devices):
    torch.manual_seed(7)
    first, other = draw(), draw("jax:1")
    torch.manual_seed(7)
    assert draw() == first and draw("jax:1") == other
    torch.manual_seed(8)
    assert draw() != first
    assert first != other, "devices draw from streams of their own"


def test_device_seeds():
    torch.jax.manual_seed(3)
    assert torch.jax.initial_seed() == 3
    cpu = torch.rand(2).tolist()
    first = draw()
    torch.jax.manual_seed_all(3)
    assert draw() == first
    torch.jax.manual_seed(2**63 + 5)
    assert torch.jax.initial_seed() == 2**63 + 5
    torch.jax.manual_seed(-1)
    negative = draw()
    torch.jax.manual_seed(2**64 - 1)
    assert draw() == negative
    seed = torch.jax.seed()
    assert isinstance(seed, int) and torch.jax.initial_seed() == seed
    torch.jax.seed_all()
    assert torch.rand(2).tolist() != cpu
    torch.jax.manual_seed(5)
    with torch.jax.device(1):
        torch.jax.manual_seed(6)
        assert torch.jax.initial_seed() == 6
    assert torch.jax.initial_seed() == 5


def test_numbers_never_come_twice():
    seen = [tuple(draw()) for _ in range(20)] + [tuple(torch.randn(8, device="jax").tolist()) for _ in range(20)]
    masks = [tuple(F.dropout(torch.ones(64, device="jax")).tolist()) for _ in range(20)]
    assert len(set(seen)) == 40 and len(set(masks)) == 20


def test_states_can_be_saved_and_restored():
    state = torch.jax.get_rng_state()
    assert state.dtype == torch.uint8 and state.device.type == "cpu"
    first = [draw(), torch.randint(0, 100, (5,), device="jax").tolist(), torch.randperm(9, device="jax").tolist()]
    torch.jax.set_rng_state(state)
    assert [
        draw(),
        torch.randint(0, 100, (5,), device="jax").tolist(),
        torch.randperm(9, device="jax").tolist(),
    ] == first
    other = torch.jax.get_rng_state("jax:1")
    torch.jax.set_rng_state(other, "jax:1")
    torch.jax.set_rng_state(other, torch.device("jax", 0))
    assert torch.equal(torch.jax.get_rng_state(0), other)
    states = torch.jax.get_rng_state_all()
    assert len(states) == torch.jax.device_count()
    torch.jax.set_rng_state_all(states)
    for bad, error in (
        (torch.zeros(3, dtype=torch.uint8), RuntimeError),
        (torch.zeros(12), TypeError),
        (None, TypeError),
        (torch.get_rng_state(), RuntimeError),
    ):
        with pytest.raises(error):
            torch.jax.set_rng_state(bad)
    assert torch.equal(torch.jax.get_rng_state(0), states[0])


def test_fork_rng():
    before = torch.jax.get_rng_state()
    with torch.random.fork_rng(devices=[0, 1], device_type="jax"):
        torch.manual_seed(1)
        draw()
    assert torch.equal(torch.jax.get_rng_state(), before)


# Generators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["jax", "jax:1", torch.device("jax")], ids=str)
def test_generators(device):
    g = torchax.Generator(device)
    assert isinstance(g, torch.Generator) and g.device == torch.device("jax", torch.device(device).index or 0)
    assert g.manual_seed(4) is g and g.initial_seed() == 4
    state, before = g.get_state(), torch.jax.get_rng_state()
    first = draw(device, generator=g)
    assert draw(device, generator=g) != first
    assert g.set_state(state) is g and draw(device, generator=g) == first
    twin = g.clone_state()
    assert draw(device, generator=twin) == draw(device, generator=g)
    assert g.seed() == g.initial_seed()
    assert torch.equal(torch.jax.get_rng_state(), before), "the device's own stream is not touched"


TAKES = {
    "rand": lambda g: torch.rand(4, device="jax", generator=g),
    "randn": lambda g: torch.randn(4, device="jax", generator=g),
    "randint": lambda g: torch.randint(0, 1000, (4,), device="jax", generator=g),
    "randperm": lambda g: torch.randperm(100, device="jax", generator=g),
    "normal_": lambda g: torch.empty(4, device="jax").normal_(generator=g),
    "uniform_": lambda g: torch.empty(4, device="jax").uniform_(generator=g),
    "exponential_": lambda g: torch.empty(4, device="jax").exponential_(generator=g),
    "random_": lambda g: torch.empty(4, device="jax").random_(generator=g),
    "bernoulli": lambda g: torch.bernoulli(torch.full((64,), 0.5, device="jax"), generator=g),
    "bernoulli_": lambda g: torch.empty(64, device="jax").bernoulli_(0.5, generator=g),
    "multinomial": lambda g: torch.multinomial(torch.ones(100, device="jax"), 10, generator=g),
    "normal": lambda g: torch.normal(torch.zeros(4, device="jax"), 1.0, generator=g),
    "poisson": lambda g: torch.poisson(torch.full((16,), 9.0, device="jax"), generator=g),
    "trunc_normal_": lambda g: torch.nn.init.trunc_normal_(torch.empty(4, device="jax"), generator=g),
    "kaiming_uniform_": lambda g: torch.nn.init.kaiming_uniform_(torch.empty(4, 4, device="jax"), generator=g),
}


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize("kind", ["jax", "cpu"])
def test_ops_take_generators(name, kind):
    make = (lambda: torchax.Generator().manual_seed(1)) if kind == "jax" else (lambda: torch.Generator().manual_seed(1))
    g = make()
    first, second = TAKES[name](g).tolist(), TAKES[name](g).tolist()
    assert first != second and TAKES[name](make()).tolist() == first


def test_generators_can_be_copied_and_refuse_other_devices():
    g = torchax.Generator().manual_seed(1)
    draw(generator=g)
    for twin in (copy.deepcopy(g), pickle.loads(pickle.dumps(g))):
        assert (
            type(twin) is torchax.Generator
            and torch.equal(twin.get_state(), g.get_state())
            and twin.initial_seed() == 1
        )
    with pytest.raises(RuntimeError, match="torch.Generator"):
        torchax.Generator("cpu")


def test_modules_and_optimisers_use_the_stream():
    torch.manual_seed(0)
    a = torch.nn.Linear(3, 3, device="jax").weight.tolist()
    torch.manual_seed(0)
    assert torch.nn.Linear(3, 3, device="jax").weight.tolist() == a
    m = torch.nn.Dropout(0.5)
    x = torch.ones(64, device="jax")
    assert m(x).tolist() != m(x).tolist() and torch.equal(m.eval()(x), x)


def test_each_thread_may_draw():
    results, errors = [], []

    def work():
        try:
            results.extend(tuple(draw(n=4)) for _ in range(10))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors and len(results) == 30


def test_keys_for_jax_code():
    env = torchax.default_env()
    data = lambda: jax.random.key_data(env.prng_key)
    torch.manual_seed(0)
    first = data()
    assert jax.dtypes.issubdtype(env.prng_key.dtype, jax.dtypes.prng_key)
    assert (data() == first).all()  # reading uses nothing up
    assert (jax.random.key_data(env.get_and_rotate_prng_key()) == first).all()
    assert not (data() == first).all()
    torch.manual_seed(0)
    assert (data() == first).all()


def test_distributions_are_right():
    torch.manual_seed(0)
    x = torch.randn(20000, device="jax", dtype=torch.float64)
    assert abs(x.mean()) < 0.03 and abs(x.std() - 1) < 0.03
    assert abs(torch.rand(20000, device="jax").mean() - 0.5) < 0.02
    assert sorted(torch.randperm(50, device="jax").tolist()) == list(range(50))
    assert abs((F.dropout(torch.ones(20000, device="jax"), 0.25) == 0).float().mean() - 0.25) < 0.02
