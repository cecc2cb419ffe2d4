"""Every model of the zoo on device jax against the same model on CPU: no model is patched, nothing falls back to CPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
import torchax
import transformers
from torchax import _missing

from models import nets, running
from models.running import Pair
from models.zoo import ZOO

transformers.logging.set_verbosity_error()


def _checks(name: str) -> Iterator[str]:
    """What is checked of a model. Rows of one model come one after the other: they share its copy and its programs."""
    yield "forward"
    if ZOO[name].compiles:
        yield "compiled"
    yield from ("backward", "steps", "bfloat16")
    if ZOO[name].generate is not None:
        yield "generate"


@functools.lru_cache(maxsize=1)
def _pair(name: str) -> Pair:
    return Pair(ZOO[name])


@pytest.fixture(autouse=True)
def _no_fallback() -> Iterator[None]:
    assert torchax.config.fallback == "error"
    _missing.SERVED.clear()
    yield
    assert not _missing.SERVED, f"CPU torch stood in for {dict(_missing.SERVED)}"


@pytest.mark.parametrize(("name", "check"), [(name, check) for name in ZOO for check in _checks(name)])
def test_model(name: str, check: str) -> None:
    getattr(running, f"check_{check}")(_pair(name))


@pytest.mark.parametrize("name", [name for name, model in ZOO.items() if model.tied])
def test_tied_weights_stay_tied(name: str) -> None:
    torch.manual_seed(1)
    module = ZOO[name].build().to("jax")
    for there_and_back in ("jax", torch.bfloat16, "cpu"):
        module = module.to(there_and_back)
        named = dict(module.named_parameters(remove_duplicate=False))
        for one, other in ZOO[name].tied:
            assert named[one] is named[other], f"{one} and {other} came apart in .to({there_and_back})"


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str
)
def test_adamw_variants(options: dict[str, bool]) -> None:
    running.check_steps(_pair("attention"), **options)


def test_channels_last() -> None:
    torch.manual_seed(1)
    cpu = nets.ResNet18().eval().to(memory_format=torch.channels_last)
    jax_ = copy.deepcopy(cpu).to("jax")
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert jax_.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    running.compare_named(running.gradients(jax_, {"x": x.to("jax")}), running.gradients(cpu, {"x": x}), 1e-4)


class Dropped(torch.nn.Module):
    """Dropout between layers of an LSTM, in attention and in the layers of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(40, 32)
        self.rnn = torch.nn.LSTM(32, 32, num_layers=2, batch_first=True, dropout=0.2)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.2, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 1)
        self.head = torch.nn.Linear(32, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.rnn(self.embedding(tokens))[0]).mean(1))


def test_trains_with_dropout() -> None:
    torch.manual_seed(1)
    module, tokens, labels = Dropped().to("jax"), torch.randint(40, (8, 6)).to("jax"), torch.arange(8).to("jax") % 4
    with torch.no_grad():
        assert not torch.equal(module(tokens), module(tokens)), "two masks are the same"
        assert torch.equal(module.eval()(tokens), module(tokens))
    optimizer, losses = torch.optim.AdamW(module.train().parameters(), lr=1e-2), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(tokens), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_generates_by_sampling() -> None:
    """Sampling draws from device jax: reproducible after a seed, other tokens without."""
    pair = _pair("gpt2")
    prompt = running.to("jax", {k: pair.inputs[k] for k in pair.model.prompt})

    def sample() -> list[list[int]]:
        return pair.jax.generate(
            **prompt, max_new_tokens=5, do_sample=True, top_k=50, top_p=0.95, temperature=1.5
        ).tolist()

    torch.manual_seed(3)
    first = sample()
    again = sample()
    torch.manual_seed(3)
    assert sample() == first != again
