"""Random numbers: where keys come from, how states are saved, and `Generator`.

A state is ``uint32[3]``: the two halves of the seed and a counter. Each random op uses the key ``fold_in(seed,
counter)`` and leaves the counter one higher; inside compiled code the state is an operand like any other.
"""

from __future__ import annotations

import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ._execute import state as _execution
from ._storage import Storage, dense_meta

_STEP = np.array([0, 0, 1], np.uint32)
_META = None


class KeySource:
    """A stream of PRNG keys."""

    def __init__(self, seed: int):
        global _META
        if _META is None:
            _META = dense_meta((3,), torch.uint32)
        self.storage = Storage(_initial(seed), _META)

    def load(self) -> Any:
        """The state, ``uint32[3]``."""
        value = _execution.executor.load(self.storage)
        if _execution.executor.owner is None and isinstance(value, jax.Array) and len(value.sharding.device_set) > 1:
            return np.asarray(value)  # a program over several devices left it there; others may use other devices
        return value

    def store(self, value: Any) -> None:
        """Replace the state."""
        _execution.executor.store(self.storage, value)

    def next_key(self) -> jax.Array:
        """A fresh key for JAX code."""
        key, after = draw(jnp.asarray(self.load()))
        self.store(after)
        return key


def draw(state: Any) -> tuple[jax.Array, Any]:
    """A fresh key from a state, and the state after it."""
    key = jax.random.wrap_key_data(state[:2], impl="threefry2x32")
    return jax.random.fold_in(key, state[2]), state + _STEP


class Generator(torch.Generator):
    """A source of random numbers for tensors on device ``jax``, with a state that can be saved: see `torch.Generator`.

    Args:
        device: ``"jax"`` or ``"jax:N"``.
    """

    _source: KeySource
    _index: int

    def __new__(cls, device: Any = "jax") -> Generator:
        device = torch.device(device)
        if device.type != "jax":
            raise RuntimeError(
                f"torchax.Generator makes generators for device 'jax'; got {str(device)!r}: use torch.Generator for that"
            )
        self = super().__new__(cls, device="cpu")  # pyright: ignore[reportCallIssue]
        self._source, self._index = KeySource(torch.initial_seed()), device.index or 0
        _generators[self._cdata] = self  # type: ignore[attr-defined]
        return self

    def __init__(self, device: Any = "jax"):
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("jax", self._index)

    def manual_seed(self, seed: int) -> Generator:
        self._source.store(_initial(seed))
        return self

    def seed(self) -> int:
        seed = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu"))
        self.manual_seed(seed)
        return seed

    def initial_seed(self) -> int:
        return initial_seed(self._source)

    def get_state(self) -> torch.Tensor:
        return get_state(self._source)

    def set_state(self, new_state: torch.Tensor) -> Generator:  # type: ignore[override]
        set_state(self._source, new_state)
        return self

    def __deepcopy__(self, memo: Any) -> Generator:
        return self.clone_state()

    def __reduce__(self) -> Any:
        return _restored, (str(self.device), self.get_state())

    def clone_state(self) -> Generator:
        return Generator(self.device).set_state(self.get_state())


def _restored(device: str, state: torch.Tensor) -> Generator:
    return Generator(device).set_state(state)


_generators: weakref.WeakValueDictionary[int, Generator] = (
    weakref.WeakValueDictionary()
)  # by C++ object: ops get a wrapper of it
_defaults: dict[int, KeySource] = {}


def default(index: int) -> KeySource:
    """The source that device ``jax:index`` uses where no generator is named."""
    source = _defaults.get(index)
    if source is None:
        source = _defaults.setdefault(index, KeySource(torch.initial_seed() + index))
    return source


def source(generator: torch.Generator | None, index: int) -> KeySource:
    """The keys of a generator; a CPU generator gives a new seed at every call."""
    if generator is None:
        return default(index)
    ours = _generators.get(generator._cdata)  # type: ignore[attr-defined]
    if ours is not None:
        return ours._source
    return KeySource(int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu", generator=generator)))


def manual_seed(index: int, seed: int) -> None:
    """Seed the default source of device ``jax:index``."""
    default(index).store(_initial(seed))


def initial_seed(source: KeySource) -> int:
    """The seed that the state was made from."""
    low, high, _ = _values(source)
    return int(low) | int(high) << 32


def get_state(source: KeySource) -> torch.Tensor:
    """The state as a CPU tensor, ``uint8[12]``."""
    return torch.from_numpy(_values(source).view(np.uint8).copy())


def set_state(source: KeySource, new_state: torch.Tensor) -> None:
    """Restore what `get_state` gave.

    Raises:
        TypeError: not a CPU byte tensor.
        RuntimeError: not a state of device ``jax``.
    """
    if not isinstance(new_state, torch.Tensor) or new_state.dtype != torch.uint8 or new_state.device.type != "cpu":
        raise TypeError(
            "expected a torch.ByteTensor on CPU, as get_rng_state gives it; got "
            + (
                f"{new_state.dtype} on {new_state.device}"
                if isinstance(new_state, torch.Tensor)
                else type(new_state).__name__
            )
        )
    if new_state.numel() != 12:
        raise RuntimeError(f"RNG state of device 'jax' has 12 bytes; got {new_state.numel()} (of another device?)")
    source.store(new_state.numpy().view(np.uint32).copy())


def _initial(seed: int) -> np.ndarray:
    seed = int(seed) & (1 << 64) - 1  # torch takes negative seeds, too
    return np.array([seed & 0xFFFFFFFF, seed >> 32, 0], np.uint32)


def _values(source: KeySource) -> np.ndarray:
    from .convert import host_array

    return host_array(source.load(), "reading the RNG state")
