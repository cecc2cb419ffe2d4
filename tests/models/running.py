"""How a model of the zoo is run on both sides, and how the two are compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torchax
from torch.utils._pytree import tree_flatten, tree_map

from models.zoo import Model

STEPS = 3


def to(device: str | torch.device | torch.dtype, tree: Any) -> Any:
    """Tensors moved to a device, or floating ones cast."""

    def move(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or (isinstance(device, torch.dtype) and not x.is_floating_point()):
            return x
        return x.to(device)

    return tree_map(move, tree)


class Pair:
    """A model on CPU, its copy on device jax, and the inputs of both.

    Attributes:
        cpu: the model, in evaluation mode.
        jax: its copy, moved by `Module.to`.
        inputs: keyword arguments on CPU.
    """

    def __init__(self, model: Model):
        torch.manual_seed(1)
        self.model = model
        self.cpu = model.build().eval()
        for p in self.cpu.parameters():  # norms and biases start as ones and zeros, which hides mistakes
            if p.dim() == 1:
                p.data += 0.1 * torch.randn_like(p)
        self.inputs = model.inputs()
        self.jax = copy.deepcopy(self.cpu).to("jax")

    def fresh(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Copies of both that may be trained."""
        return copy.deepcopy(self.cpu), copy.deepcopy(self.cpu).to("jax")

    def loss_inputs(self) -> dict[str, Any]:
        return {**self.inputs, **(self.model.loss_kwargs(self.inputs) if self.model.loss_kwargs else {})}


def floats(output: Any) -> list[torch.Tensor]:
    """The floating point tensors in a model's output, caches included, in order."""
    return [x for x in _tensors(output) if x.is_floating_point()]


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif type(leaf).__name__.endswith(("Cache", "Layer")):  # what pytree does not know: caches and their layers
            yield from _tensors([value for _, value in sorted(vars(leaf).items())])


def loss_of(module: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's own loss, or a fixed random projection of its outputs."""
    output = module(**inputs)
    if getattr(output, "loss", None) is not None:
        return output.loss
    total = None
    for x in floats(output):
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(x.device)
        term = (x * weights).mean()
        total = term if total is None else total + term
    assert total is not None
    return total


def relative_error(got: torch.Tensor, want: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest value (at least `floor`) of `want`."""
    assert isinstance(got, torch.Tensor) and got.device.type == "jax", f"the result is on {got.device}"
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{got.dtype}{[*got.shape]}, torch: {want.dtype}{[*want.shape]}"
    )
    got, want = got.detach().cpu().double(), want.detach().double()
    if not want.numel():
        return 0.0
    assert torch.equal(got.isfinite(), want.isfinite()), "not finite in other places"
    keep = want.isfinite()
    if not keep.any():
        return 0.0
    return float((got - want)[keep].abs().max() / max(float(want[keep].abs().max()), floor, 1e-30))


def assert_close(got: Any, want: Any, tolerance: float, what: str = "") -> None:
    """Every floating point tensor of an output is close to torch's on CPU."""
    left, right = floats(got), floats(want)
    assert len(left) == len(right) > 0, f"{len(left)} results, torch: {len(right)}"
    for i, (g, w) in enumerate(zip(left, right, strict=True)):
        error = relative_error(g, w)
        assert error < tolerance, f"{what} result {i} {[*w.shape]} is off by {error:.2e}"


def gradients(module: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """The loss and the gradient of every parameter."""
    module.zero_grad()
    loss = loss_of(module, inputs)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in module.named_parameters()}}


def train(module: torch.nn.Module, inputs: dict[str, Any], steps: int = STEPS, **options: Any) -> list[torch.Tensor]:
    """Losses of some AdamW steps.

    Adam divides a gradient by its size: ones that are zero up to rounding would turn into noise, so `eps` is large.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1, **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(module, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def compare_named(got: dict[str, torch.Tensor | None], want: dict[str, torch.Tensor | None], tolerance: float) -> None:
    """Gradients or parameters by name. One that is zero but for rounding is held against the largest of them."""
    assert list(got) == list(want)
    largest = max((float(w.detach().abs().max()) for w in want.values() if w is not None and w.numel()), default=0.0)
    wrong = []
    for name, w in want.items():
        g = got[name]
        assert (g is None) == (w is None), (
            f"{name}: {'no' if g is None else 'a'} gradient, torch: {'none' if w is None else 'one'}"
        )
        if g is None or w is None:
            continue
        error = relative_error(g, w, floor=1e-2 * largest)
        if not error < tolerance:
            wrong.append(f"{name} {[*w.shape]} is off by {error:.2e}")
    assert not wrong, "; ".join(wrong)


def check_forward(pair: Pair) -> None:
    with torch.no_grad():
        assert_close(pair.jax(**to("jax", pair.inputs)), pair.cpu(**pair.inputs), 1e-4)


def check_compiled(pair: Pair) -> None:
    """The third call runs no line of the model's Python any more."""
    calls: list[object] = []
    module = copy.deepcopy(pair.jax)
    module.register_forward_pre_hook(lambda module, args: calls.append(module))
    with torch.no_grad():
        compiled, inputs = torchax.compile(module), to("jax", pair.inputs)
        want = pair.cpu(**pair.inputs)
        for call in ("first", "second"):
            assert_close(compiled(**inputs), want, 1e-4, f"{call} call:")
        before = len(calls)
        assert_close(compiled(**inputs), want, 1e-4, "third call:")
    assert len(calls) == before, "the model runs eagerly"


def check_backward(pair: Pair) -> None:
    inputs = pair.loss_inputs()
    compare_named(gradients(pair.jax, to("jax", inputs)), gradients(pair.cpu, inputs), 1e-4)
    for module in (pair.jax, pair.cpu):
        module.zero_grad(set_to_none=True)


def check_steps(pair: Pair, **options: Any) -> None:
    """In training mode: batch statistics included, without dropout."""
    cpu, jax_ = (m.train() for m in pair.fresh())
    inputs = pair.loss_inputs()
    want, got = train(cpu, inputs, **options), train(jax_, to("jax", inputs), **options)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert relative_error(g, w) < 1e-4, f"loss of step {i}: {g.item()}, torch: {w.item()}"
    assert got[-1].item() != got[0].item()
    compare_named(dict(jax_.named_parameters()), dict(cpu.named_parameters()), 1e-4)
    compare_named(dict(jax_.named_buffers()), dict(cpu.named_buffers()), 1e-4)


def check_generate(pair: Pair) -> None:
    """The same tokens, and at every step the same scores: a token alone says little about the cache behind it."""
    prompt = {k: pair.inputs[k] for k in pair.model.prompt}
    options = {**pair.model.generate, "return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        want = pair.cpu.generate(**prompt, **options)
        got = pair.jax.generate(**to("jax", prompt), **options)
    assert got.sequences.device.type == "jax"
    assert got.sequences.tolist() == want.sequences.tolist()
    assert_close(got.scores, want.scores, 1e-4)


def check_bfloat16(pair: Pair) -> None:
    cpu, jax_ = (m.to(torch.bfloat16) for m in pair.fresh())
    inputs = to(torch.bfloat16, pair.inputs)
    with torch.no_grad():
        reference = floats(copy.deepcopy(cpu).float()(**to(torch.float32, inputs)))
        want, got = floats(cpu(**inputs)), floats(jax_(**to("jax", inputs)))
    assert len(got) == len(want) == len(reference)
    for i, (g, w, r) in enumerate(zip(got, want, reference, strict=True)):
        assert g.dtype == w.dtype, f"result {i}: {g.dtype}, torch: {w.dtype}"
        error = relative_error(g.float(), r.float())
        assert error < 2e-2, f"result {i} {[*w.shape]} is off by {error:.2e} (torch on CPU: {_error(w, r):.2e})"


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())
