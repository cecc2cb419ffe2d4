"""Random ops: distributions, documented ranges, seeds and states."""

import pytest
import scipy.stats
import torch
import torchax  # noqa: F401

N = 20_000
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20240601)


def empty(*size, dtype=torch.float32):
    return torch.empty(*size, device="jax", dtype=dtype)


def follows(values, distribution):
    """A Kolmogorov-Smirnov test that a right draw fails once in ten thousand runs; the seed is fixed."""
    assert scipy.stats.kstest(values.detach().cpu().double().numpy().reshape(-1), distribution.cdf).pvalue > 1e-4


def has_moments(values, mean, std):
    values = values.detach().cpu().double()
    assert abs(values.mean().item() - mean) < 6 * std / values.numel() ** 0.5 + 4e-3 * std
    assert abs(values.std().item() - std) < 0.05 * std


CONTINUOUS = {
    "rand": (lambda: torch.rand(N, device="jax"), scipy.stats.uniform()),
    "rand_like": (lambda: torch.rand_like(empty(N, dtype=torch.float64)), scipy.stats.uniform()),
    "randn": (lambda: torch.randn(N, device="jax"), scipy.stats.norm()),
    "randn_double": (lambda: torch.randn(N, device="jax", dtype=torch.float64), scipy.stats.norm()),
    "randn_like": (lambda: torch.randn_like(empty(N)), scipy.stats.norm()),
    "uniform": (lambda: empty(N).uniform_(-2, 3), scipy.stats.uniform(-2, 5)),
    "normal": (lambda: empty(N).normal_(1, 2), scipy.stats.norm(1, 2)),
    "normal_size": (lambda: torch.normal(1.0, 2.0, (N,), device="jax"), scipy.stats.norm(1, 2)),
    "normal_mean": (lambda: torch.normal(torch.ones(N, device="jax"), 2.0), scipy.stats.norm(1, 2)),
    "normal_std": (lambda: torch.normal(1.0, torch.full((N,), 2.0, device="jax")), scipy.stats.norm(1, 2)),
    "exponential": (lambda: empty(N).exponential_(2.0), scipy.stats.expon(scale=0.5)),
    "log_normal": (lambda: empty(N).log_normal_(0.5, 0.25), scipy.stats.lognorm(0.25, scale=1.6487212707)),
    "cauchy": (lambda: empty(N).cauchy_(1.0, 2.0), scipy.stats.cauchy(1, 2)),
    "gamma": (lambda: torch._standard_gamma(torch.full((N,), 2.5, device="jax")), scipy.stats.gamma(2.5)),
    "dirichlet": (
        lambda: torch._sample_dirichlet(torch.tensor([1.0, 2.0, 3.0], device="jax").expand(N, 3))[:, 1],
        scipy.stats.beta(2, 4),
    ),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous(name):
    draw, distribution = CONTINUOUS[name]
    values = draw()
    assert values.device.type == "jax"
    follows(values, distribution)


DISCRETE = {
    "bernoulli": (lambda: torch.bernoulli(torch.full((N,), 0.3, device="jax")), scipy.stats.bernoulli(0.3)),
    "bernoulli_p": (lambda: empty(N).bernoulli_(0.3), scipy.stats.bernoulli(0.3)),
    "bernoulli_tensor": (lambda: empty(N).bernoulli_(torch.full((N,), 0.3, device="jax")), scipy.stats.bernoulli(0.3)),
    "randint": (lambda: torch.randint(-3, 7, (N,), device="jax"), scipy.stats.randint(-3, 7)),
    "randint_like": (lambda: torch.randint_like(empty(N), 5), scipy.stats.randint(0, 5)),
    "random_to": (lambda: empty(N).random_(7), scipy.stats.randint(0, 7)),
    "random_from": (lambda: empty(N, dtype=torch.int64).random_(2, 7), scipy.stats.randint(2, 7)),
    "geometric": (lambda: empty(N).geometric_(0.25), scipy.stats.geom(0.25)),
    "poisson": (lambda: torch.poisson(torch.full((N,), 3.5, device="jax")), scipy.stats.poisson(3.5)),
    "binomial": (
        lambda: torch.binomial(torch.full((N,), 10.0, device="jax"), torch.full((N,), 0.3, device="jax")),
        scipy.stats.binom(10, 0.3),
    ),
    "multinomial": (
        lambda: torch.multinomial(torch.tensor([1.0, 0.0, 3.0], device="jax"), N, replacement=True),
        scipy.stats.rv_discrete(values=([0, 1, 2], [0.25, 0.0, 0.75])),
    ),
    "multinomial_one": (
        lambda: torch.multinomial(torch.tensor([1.0, 0.0, 3.0], device="jax").expand(N, 3), 1)[:, 0],
        scipy.stats.rv_discrete(values=([0, 1, 2], [0.25, 0.0, 0.75])),
    ),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete(name):
    draw, distribution = DISCRETE[name]
    values = draw().cpu().double()
    counted, expected, rest = [], [], 1.0
    for k in range(int(distribution.ppf(1e-4)), int(distribution.ppf(1 - 1e-3)) + 1):
        p = float(distribution.pmf(k))
        if p * N < 5:
            assert abs((values == k).sum().item() - p * N) < 40, k
            continue
        counted.append((values == k).sum().item())
        expected.append(p * N)
        rest -= p
    counted.append(N - sum(counted))
    expected.append(max(rest * N, 1e-9))
    if expected[-1] < 1:
        assert counted[-1] < 40
        expected[-2] += expected.pop()
        counted[-2] += counted.pop()
    assert scipy.stats.chisquare(counted, expected, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("dtype", FLOATS)
def test_ranges(dtype):
    """The ends that torch documents: 1 never comes up in [0, 1), 0 never in (0, inf)."""
    unit = torch.rand(N, device="jax", dtype=dtype)
    assert unit.dtype == dtype and (unit >= 0).all() and (unit < 1).all()
    spread = empty(N, dtype=dtype).uniform_(-1, 1)
    assert (spread >= -1).all() and (spread < 1).all()
    assert (empty(N, dtype=dtype).exponential_() > 0).all()
    assert (empty(N, dtype=dtype).geometric_(0.9) >= 1).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_moments(dtype):
    has_moments(torch.rand(N, device="jax", dtype=dtype), 0.5, 12**-0.5)
    has_moments(torch.randn(N, device="jax", dtype=dtype), 0, 1)
    has_moments(empty(N, dtype=dtype).normal_(3, 2), 3, 2)
    has_moments(empty(N, dtype=dtype).bernoulli_(0.3), 0.3, 0.21**0.5)
    assert torch.randn(N, device="jax", dtype=dtype).abs().max() > 3.2  # tails


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex(dtype):
    values = torch.randn(N, device="jax", dtype=dtype)
    assert values.dtype == dtype
    has_moments(values.real, 0, 0.5**0.5)
    has_moments(values.imag, 0, 0.5**0.5)
    has_moments(torch.rand(N, device="jax", dtype=dtype).imag, 0.5, 12**-0.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
def test_random_integers(dtype):
    values = empty(N, dtype=dtype).random_().cpu()
    top = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    assert values.min() >= 0
    assert values.double().mean().item() == pytest.approx(top / 2, rel=0.05)
    if top < 256:
        assert values.max() == top
    wide = torch.empty(N, dtype=torch.int64, device="jax").random_(-(2**63), None).cpu()
    assert (wide < 0).any() and (wide > 0).any()


@pytest.mark.parametrize("n", [0, 1, 5, 1000])
def test_randperm(n):
    values = torch.randperm(n, device="jax")
    assert values.dtype == torch.int64
    assert torch.equal(values.cpu().sort().values, torch.arange(n))
    if n == 1000:
        assert not torch.equal(values, torch.randperm(n, device="jax"))


def test_multinomial_without_replacement():
    weights = torch.tensor([[0.1, 0.0, 0.4, 0.5]], device="jax").expand(2000, 4)
    drawn = torch.multinomial(weights, 3).cpu()
    assert (drawn != 1).all()
    assert torch.equal(drawn.sort(-1).values, torch.tensor([0, 2, 3]).expand(2000, 3))
    first = torch.bincount(drawn[:, 0], minlength=4) / 2000
    torch.testing.assert_close(first, torch.tensor([0.1, 0.0, 0.4, 0.5]), atol=0.05, rtol=0)


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_dropout(p):
    x = torch.ones(N, device="jax", requires_grad=True)
    y = torch.nn.functional.dropout(x, p)
    y.sum().backward()
    kept = y.detach() != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.02)
    scale = 1 / (1 - p) if p < 1 else 0.0
    torch.testing.assert_close(y.detach(), kept * scale)
    torch.testing.assert_close(x.grad, kept * scale)


@pytest.mark.parametrize("name", ["rand", "randn"])
def test_empty(name):
    assert getattr(torch, name)(0, 3, device="jax").shape == (0, 3)
    assert empty(0).uniform_().shape == (0,)


def test_seed_and_state():
    torch.manual_seed(7)
    first = torch.rand(5, device="jax")
    state = torch.jax.get_rng_state()
    second = torch.rand(5, device="jax")
    third = torch.nn.functional.dropout(torch.ones(50, device="jax"))
    torch.jax.set_rng_state(state)
    assert torch.equal(torch.rand(5, device="jax"), second)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(50, device="jax")), third)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(5, device="jax"), first)
    assert not torch.equal(first, second)


def test_gamma_gradients():
    """Reparametrized gradients agree with CPU torch's for the same draws."""
    alpha = torch.rand(200, dtype=torch.float64) * 5 + 0.1
    draw = torch._standard_gamma(alpha)
    expected = torch._standard_gamma_grad(alpha, draw)
    torch.testing.assert_close(
        torch._standard_gamma_grad(alpha.to("jax"), draw.to("jax")).cpu(), expected, rtol=1e-3, atol=1e-5
    )
    concentration = torch.rand(50, 4, dtype=torch.float64) * 3 + 0.3
    x = torch._sample_dirichlet(concentration)
    total = concentration.sum(-1, True).expand_as(x)
    expected = torch._dirichlet_grad(x, concentration, total)
    actual = torch._dirichlet_grad(x.to("jax"), concentration.to("jax"), total.to("jax")).cpu()
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-3)
