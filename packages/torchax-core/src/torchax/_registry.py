"""Who lowers which op, and on which condition: the one registry.

Plugins describe lowerings with the decorators below (or make `Lowering` records from tables) and hand them over in
their ``torchax_register_ops`` hook; `Registry.resolve` picks one for a call, `Registry.explain` says why.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import difflib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch

from .errors import PluginError

Kind = Literal["functional", "view", "views", "stateful", "dynamic", "composite"]
Promotion = Literal["default", "keep", "int_to_float", "always_bool", "complex_to_float", "bool_to_long"]
Op = "torch._ops.OpOverload | torch._ops.OpOverloadPacket | str"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowering:
    """How one op is carried out on `jax.Array`s, and when this way is taken.

    Attributes:
        op: qualified name of the overload, ``"aten::add.Tensor"``.
        fn: the lowering. It is called with the schema's arguments, arrays in place of tensors.
        kind: what the op is. ``functional``: values in, values out, in-place and ``out=`` forms follow from it;
            ``view``: an alias of its base, read by `fn` and written by `inverse`; ``views``: several aliases, `fn`
            lists them as calls of single views; ``stateful``: also writes the arguments `writes` or draws random
            numbers; ``dynamic``: the result's shape depends on values, so `fn` runs outside of ``jax.jit``. Of results in
            NumPy the strides are kept; ``composite``: `fn` takes tensors and calls other ops, before autograd if `whole`.
        promote: torch's type promotion, done before `fn` is called; None hands operands over as they are.
        promote_only: names of the arguments that take part in the promotion; empty means all tensors and numbers.
        exact: names of the arguments that, where they are numbers or tensors without dimensions, enter a computation with
            16-bit floats as they are: CPU torch's kernels take factors, divisors and parameters of functions like that.
            Other operands enter it in the common dtype.
        static: names of ``Scalar`` arguments that decide the program and are compiled in.
        operands: names of ``int``, ``float`` (or list) arguments that are run-time operands.
        specialize: for an operand, the values worth a program of their own.
        inverse: for a view, how a new value of the view is written into its base.
        prepare: for a view, the arguments split into static ones and run-time positions (see `ViewLowering.prepare`). For a
            factory, whose arguments are numbers, ``prepare(*args, **kwargs)`` gives ``(static, operands)``, and `fn` is called
            with both; None leaves the refusal to torch.
        whole: a composite op that is kept whole before autograd.
        backward: for a whole op, its backward; None derives it with `jax.vjp`.
        saves_result: whether `backward` is given the result, which then may not be overwritten before it; None if not.
        grad: how JAX differentiates `fn` where it cannot by itself (a Pallas kernel, a loop) or should not:
            ``grad(cotangents, args, result, needs)`` gives the cotangents of the tensor arguments, None where not needed.
            `jax.grad` over a torch function uses it; torch's autograd has its own formulas, or `backward`.
        random: `fn` takes a keyword ``key``, a fresh PRNG key.
        writes: names of arguments whose new values `fn` returns after the results.
        products: `fn` multiplies matrices; `torch.set_float32_matmul_precision` decides their precision.
        checks: `fn` states errors that depend on values with `torchax.ops.raise_if`.
        meta: whether torch's meta kernel says shapes and dtypes of the results. False where it refuses what CPU torch
            takes: then they are those that `fn` gives. A function mends what the meta kernel gives where CPU torch gives
            something else: called with it and the call's arguments, it returns meta tensors.
        memory_format_of: names of the arguments whose memory format (channels last, if one of them has it) the results have,
            where torch's meta kernel gives row-major strides.
        column_major: indices of the results whose matrices lie column by column, as LAPACK leaves them, where torch has no
            meta kernel or it says otherwise.
        layouts: `fn` takes a keyword ``row_major``, the names of the tensor arguments that are contiguous.
        platforms: platforms that this lowering serves; empty means every one.
        dtypes: dtypes of the first tensor argument that it serves; empty means every one.
        when: a predicate over the call's arguments, `jax.ShapeDtypeStruct`s in place of tensors. If it has an attribute
            `refusal`, called alike, that gives the reason for a no in words.
        priority: the highest whose conditions hold is taken.
        provider: name of the plugin.
        family: the module that it comes from.
    """

    op: str
    fn: Callable[..., Any]
    kind: Kind = "functional"
    promote: Promotion | None = None
    promote_only: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()
    specialize: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    inverse: Callable[..., Any] | None = None
    prepare: Callable[..., Any] | None = None
    whole: bool = False
    backward: Callable[..., Any] | None = None
    saves_result: bool = False
    grad: Callable[..., Any] | None = None
    random: bool = False
    writes: tuple[str, ...] = ()
    checks: bool = False
    products: bool = False
    meta: bool | Callable[..., Any] = True
    memory_format_of: tuple[str, ...] = ()
    column_major: tuple[int, ...] = ()
    layouts: bool = False
    platforms: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    when: Callable[..., bool] | None = None
    priority: int = 0
    provider: str = ""
    family: str = ""
    table: bool = False

    @property
    def conditions(self) -> str:
        """The conditions in words, for reports."""
        parts = []
        if self.platforms:
            parts.append("platform in " + "/".join(self.platforms))
        if self.dtypes:
            parts.append("dtype in " + "/".join(str(d).removeprefix("torch.") for d in self.dtypes))
        if self.when is not None:
            parts.append(getattr(self.when, "__name__", "predicate"))
        return ", ".join(parts) or "always"


def _with(entry: Lowering, **changes: Any) -> Lowering:
    """`dataclasses.replace`, which takes ten times as long: there are hundreds at every start, with plugins thousands."""
    changed = object.__new__(Lowering)
    vars(changed).update(vars(entry), **changes)
    return changed


def op_name(op: Any) -> str:
    """The qualified name of an overload: ``aten::add.Tensor``, ``aten::relu`` for the overload ``default``."""
    if isinstance(op, torch._ops.OpOverload):
        return op.name()
    if isinstance(op, torch._ops.OpOverloadPacket):
        return op._qualified_op_name
    if isinstance(op, str) and op:
        name = op if "::" in op else "aten::" + op
        return name.removesuffix(".default")
    raise TypeError(
        f"expected a torch op overload or its name, e.g. torch.ops.aten.add.Tensor or 'add.Tensor'; got {op!r}"
    )


def lowering(*ops: Any, **attributes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function over `jax.Array`s as the lowering of `ops`.

    The function has the parameters of the ops' schema, with their defaults; ``layout``, ``device``, ``pin_memory``,
    ``memory_format`` and ``generator`` are never passed. Its results are cast to the dtypes that torch says, and
    must have the shapes that torch says. See `Lowering` for the attributes.
    """
    if not ops:
        raise TypeError("lowering() needs at least one op, e.g. @lowering(torch.ops.aten.softplus.default)")

    def mark(fn: Callable[..., Any]) -> Callable[..., Any]:
        family = getattr(fn, "__module__", "").rpartition(".")[2]
        records = [Lowering(op=op_name(op), fn=fn, **{"family": family, **attributes}) for op in ops]
        fn.__torchax__ = [*getattr(fn, "__torchax__", ()), *records]  # type: ignore[attr-defined]
        return fn

    return mark


def stateful(*ops: Any, **attributes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the lowering of ops that draw random numbers (``random=True``) or write arguments (``writes=...``).

    Arguments that the schema marks as written need no ``writes``.
    """
    return lowering(*ops, kind="stateful", **attributes)


class ViewLowering:
    """A view: how it is read from its base, and (`inverse`) how a new value of the view is written into the base."""

    def __init__(self, read: Callable[..., Any], ops: tuple[Any, ...], attributes: dict[str, Any]):
        self.read, self._ops, self._attributes = read, ops, attributes
        self.__module__, self.__name__, self.__doc__ = read.__module__, read.__name__, read.__doc__
        self._inverse: Callable[..., Any] | None = None
        self._prepare: Callable[..., Any] | None = None

    def inverse(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn(base, value, *static, *positions)`` gives the base in which the view reads `value`."""
        self._inverse = fn
        return fn

    def prepare(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn(shape, strides, *args)`` splits the op's arguments into ``(static, positions, offset)``.

        `static` is compiled in and decides the view's shape, `positions` are run-time operands (where a slice
        begins), `offset` is what the view adds to the storage offset; None leaves shape and errors to torch.
        """
        self._prepare = fn
        return fn

    @property
    def __torchax__(self) -> list[Lowering]:
        family = self.__module__.rpartition(".")[2]
        return [
            Lowering(op=op_name(op), fn=self.read, kind="view", inverse=self._inverse, prepare=self._prepare,
                     **{"family": family, **self._attributes})
            for op in self._ops
        ]  # fmt: skip


def view_lowering(*ops: Any, **attributes: Any) -> Callable[[Callable[..., Any]], ViewLowering]:
    """Decorate ``read(base, *static, *positions)``, the value of a view; give it `.inverse` and, if need be, `.prepare`."""
    return lambda fn: ViewLowering(fn, ops, attributes)


def table(
    entries: Mapping[str, Callable[..., Any]],
    *,
    overloads: Iterable[str] = ("default",),
    family: str = "",
    **attributes: Any,
) -> list[Lowering]:
    """Lowerings of regular ops, ``{"neg": jnp.negative}``, for each of `overloads`. Assign it to a module-level name."""
    return [
        Lowering(op=op_name(f"{name}.{overload}"), fn=fn, family=family, table=True, **attributes)
        for name, fn in entries.items()
        for overload in overloads
    ]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why one candidate was taken or passed over."""

    lowering: Lowering
    taken: bool
    reason: str


class Registry:
    """All lowerings of all plugins, by op, highest priority first."""

    def __init__(self) -> None:
        self._by_op: dict[str, list[Lowering]] = {}
        self._by_provider: dict[str, list[Lowering]] = {}
        self._provider = ""
        self.undefined: set[str] = set()  # ops that were not defined when the parameters of lowerings were looked at
        self.listeners: list[Callable[[], Any]] = []  # told of every change: rules that were made are stale

    def __contains__(self, op: Any) -> bool:
        return op_name(op) in self._by_op

    def ops(self) -> list[str]:
        """Qualified names of all ops that have a lowering, sorted."""
        return sorted(self._by_op)

    def lowerings(self, op: Any) -> list[Lowering]:
        """The candidates for `op`, highest priority first."""
        return list(self._by_op.get(op_name(op), ()))

    def all(self) -> list[Lowering]:
        """Every lowering of every plugin."""
        return [entry for entries in self._by_op.values() for entry in entries]

    def of(self, provider: str) -> list[Lowering]:
        """Every lowering of one plugin, in the order in which they were added."""
        return list(self._by_provider.get(provider, ()))

    def add(self, entry: Lowering) -> None:
        """Register one lowering for the plugin whose hook is running.

        Raises:
            PluginError: the same plugin registers it twice with the same priority and conditions, or it is no lowering.
        """
        if not isinstance(entry, Lowering):
            raise PluginError(
                f"registry.add takes a torchax.ops.Lowering, got {entry!r}; of a decorated function, registry.collect"
            )
        if not isinstance(entry.priority, int | float):
            raise PluginError(f"{entry.op}: priority {entry.priority!r} is no number")
        if not entry.provider:
            entry = _with(entry, provider=self._provider)
        entries = self._by_op.setdefault(entry.op, [])
        for other in entries:
            if other.provider == entry.provider and _same_conditions(other, entry):
                raise PluginError(
                    f"plugin {entry.provider!r} lowers {entry.op} twice on the same condition ({entry.conditions}): "
                    f"{_where(other.fn)} and {_where(entry.fn)}; give one of them a priority or a predicate"
                )
        bisect.insort(entries, entry, key=lambda e: -e.priority)
        self._by_provider.setdefault(entry.provider, []).append(entry)
        self.changed()

    def collect(self, module: types.ModuleType, **attributes: Any) -> None:
        """Register every lowering that `module` defines: decorated functions, and tables at module level.

        Args:
            module: the module.
            attributes: attributes that all of its lowerings have, ``products=True`` say.
        """
        for value in list(vars(module).values()):
            if isinstance(value, list) and value and isinstance(value[0], Lowering):
                for entry in value:
                    family = entry.family or module.__name__.rpartition(".")[2]
                    self.add(_with(entry, **{"family": family, "provider": self._provider, **attributes}))
            elif getattr(value, "__module__", None) == module.__name__:
                for entry in getattr(value, "__torchax__", ()):
                    self.add(_with(entry, **{"provider": self._provider, **attributes}))

    def remove(self, provider: str) -> list[str]:
        """Forget what `provider` registered; the names of the ops concerned."""
        touched = list(dict.fromkeys(entry.op for entry in self._by_provider.pop(provider, ())))
        for op in touched:
            kept = [e for e in self._by_op[op] if e.provider != provider]
            if kept:
                self._by_op[op] = kept
            else:
                del self._by_op[op]
        self.changed()
        return touched

    @contextlib.contextmanager
    def providing(self, provider: str) -> Iterator[None]:
        """Within, whatever is added is attributed to `provider`; if it raises, all of that is taken back."""
        outer, self._provider = self._provider, provider
        try:
            yield
        except BaseException:
            self.remove(provider)
            raise
        finally:
            self._provider = outer

    def changed(self) -> None:
        """Forget what was resolved: also for plugins whose predicates depend on a setting, when it changes."""
        for listener in self.listeners:
            listener()

    def resolve(
        self,
        op: Any,
        platform: str,
        dtype: torch.dtype | None = None,
        call: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> Lowering | None:
        """The lowering that serves a call, or None.

        Args:
            op: the op.
            platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
            dtype: dtype of the first tensor argument.
            call: arguments for predicates, `jax.ShapeDtypeStruct`s in place of tensors.

        Raises:
            PluginError: two plugins of equal priority both want the call.
        """
        entries = self._by_op.get(op_name(op))
        if not entries:
            return None
        if len(entries) == 1 and entries[0].conditions == "always":
            return entries[0]
        willing = [e for e in entries if _refusal(e, platform, dtype, call) is None]
        if not willing:
            return None
        if len(willing) > 1 and willing[0].priority == willing[1].priority:
            a, b = willing[:2]
            raise PluginError(
                f"{a.op} is lowered by plugins {a.provider!r} ({_where(a.fn)}) and {b.provider!r} ({_where(b.fn)}) with the "
                f"same priority {a.priority}; give one a higher priority, or switch one off with "
                f"torchax.plugins.disable({b.provider!r}) or TORCHAX_PLUGINS=-{b.provider}"
            )
        return willing[0]

    def explain(
        self,
        op: Any,
        platform: str,
        dtype: torch.dtype | None = None,
        call: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> list[Verdict]:
        """Each candidate with the reason why it is taken or passed over, in the order in which they are asked."""
        verdicts, taken = [], None
        for entry in self._by_op.get(op_name(op), ()):
            refusal = _refusal(entry, platform, dtype, call)
            if refusal is not None:
                verdicts.append(Verdict(entry, False, refusal))
            elif taken is None:
                taken = entry
                verdicts.append(Verdict(entry, True, f"first whose conditions hold ({entry.conditions})"))
            elif entry.priority == taken.priority:
                verdicts.append(Verdict(entry, False, f"tie with plugin {taken.provider!r}: an error when called"))
            else:
                verdicts.append(Verdict(entry, False, f"lower priority ({entry.priority}) than the one taken"))
        return verdicts

    def nearest(self, op: Any, n: int = 3) -> list[str]:
        """Registered ops with the most similar names."""
        name = op_name(op)
        packet = name.split(".")[0]
        overloads = [o for o in self._by_op if o.split(".")[0] == packet and o != name]
        return (
            overloads + [o for o in difflib.get_close_matches(name, list(self._by_op), n, 0.6) if o not in overloads]
        )[:n]


def _refusal(
    entry: Lowering, platform: str, dtype: torch.dtype | None, call: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> str | None:
    if entry.platforms and platform not in entry.platforms:
        return f"serves platform {'/'.join(entry.platforms)}, not {platform}"
    if entry.dtypes and dtype is not None and dtype not in entry.dtypes:
        return f"does not serve dtype {str(dtype).removeprefix('torch.')}"
    if entry.when is None or call is None:
        return None
    try:
        if entry.when(*call[0], **call[1]):
            return None
        words = getattr(entry.when, "refusal", None)
        return (words and words(*call[0], **call[1])) or f"its predicate {getattr(entry.when, '__name__', '')} says no"
    except Exception as error:
        raise PluginError(
            f"{entry.op}: the predicate {_where(entry.when)} of plugin {entry.provider!r} raised {type(error).__name__}: {error}; "
            f"mend it, or switch the plugin off with TORCHAX_PLUGINS=-{entry.provider}"
        ) from error


def _same_conditions(a: Lowering, b: Lowering) -> bool:
    return (a.platforms, a.dtypes, a.when, a.priority) == (b.platforms, b.dtypes, b.when, b.priority)


def _where(fn: Callable[..., Any]) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', repr(fn))}"


REGISTRY = Registry()
