"""An optax transform behind the interface of `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
import torch
from torchax.tensor import Tensor

from ._enter import to_array, to_tensor
from .views import call_jax


class OptaxOptimizer(torch.optim.Optimizer):
    """An optax transform as an optimizer of torch: ``zero_grad``, ``step``, ``state_dict``, eagerly and in `torchax.compile`.

    The numbers are those of ``tx.update`` and `optax.apply_updates`. A parameter without a gradient counts as one with a
    gradient of zeros, and is not changed itself.

    optax's schedules work as they are. For those of `torch.optim.lr_scheduler`, make the rate a state:
    ``optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)``; it is then the group's ``lr``.

    Args:
        params: tensors, pairs ``(name, tensor)`` as from ``model.named_parameters()``, or one group with either. For the
            transform they are a list, or with names a dict (which masks and labels may go by).
        tx: the transform.

    Attributes:
        tx: the transform.
    """

    def __init__(self, params: Iterable[Any], tx: optax.GradientTransformation):
        if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
            raise TypeError(f"OptaxOptimizer takes parameters and an optax transform; got {type(tx).__name__}")
        self._ready = False
        super().__init__(params, {})
        self.tx: Any = optax.with_extra_args_support(tx)
        group = self.param_groups[0]
        if unknown := set(group) - {"params", "param_names"}:
            raise ValueError(
                f"the group has the options {', '.join(sorted(unknown))}; an optax transform has its options itself "
                "(optax.multi_transform for parts of the parameters)"
            )
        tree = self._tree([to_array(p.detach()) for p in group["params"]])
        found, self._structure = jax.tree_util.tree_flatten_with_path(tx.init(tree))
        self._names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in found]
        self._leaves: list[Any] = [to_tensor(jax.numpy.array(leaf)) for _, leaf in found]
        self._rate = _injected_rate(self.optax_state)
        if self._rate is not None:
            group["lr"] = self._rate.item()
            self.defaults["lr"] = group["lr"]
        self._update = jax.jit(self._updated)
        self._ready = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One group is all there can be: the transform's state is made for its parameters."""
        if getattr(self, "_ready", False) or self.param_groups:
            raise ValueError(
                "OptaxOptimizer has one group; treat parts of the parameters differently with optax.multi_transform"
            )
        super().add_param_group(param_group)

    @property
    def optax_state(self) -> Any:
        """The transform's state, of tensors."""
        return jax.tree_util.tree_unflatten(self._structure, self._leaves)

    def _tree(self, values: list[Any]) -> Any:
        names = self.param_groups[0].get("param_names")
        return values if names is None else dict(zip(names, values, strict=True))

    def _updated(self, params: list[Any], grads: list[Any], leaves: list[Any], extra: dict[str, Any]) -> Any:
        before = self._tree(params)
        given = jax.tree_util.tree_unflatten(self._structure, leaves)
        updates, after = self.tx.update(self._tree(grads), given, before, **extra)
        new: Any = optax.apply_updates(before, updates)
        if jax.tree_util.tree_structure(after) != self._structure:
            raise ValueError("the optax transform gave a state of another structure than its init made")
        return new if isinstance(new, list) else [new[n] for n in before], jax.tree_util.tree_leaves(after)

    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: computes the loss again and gives it.
            extra: further arguments of the transform's ``update``, tensors or numbers (``value=loss``, say).

        Returns:
            What the closure gave.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self.param_groups[0]["params"]
        with torch.no_grad():
            if self._rate is not None:
                rate = self.param_groups[0]["lr"]
                self._rate.copy_(rate) if isinstance(rate, torch.Tensor) else self._rate.fill_(rate)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            new, leaves = call_jax(self._update, list(params), grads, self._leaves, extra)
            for p, value in zip(params, new, strict=True):
                if p.grad is not None:
                    p.copy_(value)
            for old, value in zip(self._leaves, leaves, strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(value)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """``state``: the leaves of the transform's state by name; ``param_groups`` as in torch."""
        found = super().state_dict()
        found["state"] = dict(zip(self._names, self._leaves, strict=True))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: it is of another transform, or of other parameters; names what differs. Nothing was changed.
        """
        state = state_dict["state"]
        missing, extra = [n for n in self._names if n not in state], [n for n in state if n not in self._names]
        wrong = [
            n
            for n, leaf in zip(self._names, self._leaves, strict=True)
            if n in state and tuple(state[n].shape) != tuple(leaf.shape)
        ]
        if missing or extra or wrong:
            raise ValueError(
                "the state is of another transform or of other parameters: "
                f"missing {missing[:9]}, unexpected {extra[:9]}, of other shapes {wrong[:9]}"
            )
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        with torch.no_grad():
            for name, old in zip(self._names, self._leaves, strict=True):
                old.copy_(to_tensor(state[name]))


def _injected_rate(state: Any) -> Tensor | None:
    """The learning rate that `optax.inject_hyperparams` has made a state, if it is no schedule."""
    hyper, scheduled = getattr(state, "hyperparams", None), getattr(state, "hyperparams_states", {})
    if isinstance(hyper, dict) and "learning_rate" not in scheduled:
        return hyper.get("learning_rate")
    if isinstance(state, tuple):  # optax.chain and wrappers
        for part in state:
            found = _injected_rate(part)
            if found is not None:
                return found
    return None


__all__ = ["OptaxOptimizer"]
