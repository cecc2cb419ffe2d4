"""Rules that say how a model's parameters lie on a mesh: by name pattern, or ready-made."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jax.sharding import Mesh, PartitionSpec

from ._mesh import as_spec, axes_of, size_of


@dataclasses.dataclass
class Entry:
    """A parameter or buffer, as rules see it.

    Attributes:
        names: its qualified names; more than one where it is tied.
        owner: the module that holds it under the first name.
        leaf: its name there.
        tensor: itself.
        spec: what earlier rules have said, else None.
    """

    names: list[str]
    owner: torch.nn.Module
    leaf: str
    tensor: torch.Tensor
    spec: PartitionSpec | None = None

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter rather than a buffer."""
        return isinstance(self.tensor, torch.nn.Parameter)

    def path(self, name: str) -> str:
        """The name without its last part."""
        return name.rpartition(".")[0]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How parameters are divided; made by `fsdp`, `tensor_parallel`, `data_parallel` and `by_name`.

    Attributes:
        assign: sets `Entry.spec` of the entries that it is about.
        batch: mesh axes that the batch is divided over.
    """

    assign: Callable[[list[Entry], Mesh], None]
    batch: tuple[str, ...] = ()


Rules = Any  # a Rule, a sequence of Rules and (pattern, spec) pairs, or a mapping of pattern to spec


def entries_of(model: torch.nn.Module) -> list[Entry]:
    """Every parameter and buffer once, with all its names."""
    found: dict[int, Entry] = {}
    for prefix, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            if id(tensor) in found:
                found[id(tensor)].names.append(name)
            else:
                found[id(tensor)] = Entry([name], module, leaf, tensor)
    return list(found.values())


def as_rules(rules: Rules) -> list[Rule]:
    """What users pass, as a list of rules to apply one after the other."""
    if isinstance(rules, Rule):
        return [rules]
    if isinstance(rules, Mapping):
        return [by_name(rules.items())]
    result: list[Rule] = []
    pairs: list[Any] = []
    for x in rules:
        if isinstance(x, Rule):
            if pairs:
                result.append(by_name(pairs))
            pairs = []
            result.append(x)
        elif isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str | re.Pattern):
            pairs.append(x)
        else:
            raise TypeError(
                "rules are made by fsdp(), tensor_parallel(), data_parallel(), or are pairs of a pattern and a partition "
                f"spec, (\"*.weight\", ('model', None)); got {x!r}"
            )
    return [*result, by_name(pairs)] if pairs else result


def by_name(pairs: Iterable[tuple[str | re.Pattern[str], Any]], batch: Any = ()) -> Rule:
    """Parameters and buffers laid out by their qualified names; the first pattern that matches counts.

    Args:
        pairs: (pattern, spec). A string is a glob (``"*.q_proj.weight"``), a compiled regular expression is searched for. The spec
            is a `PartitionSpec`, a tuple of axis names and None, or None for a replicated tensor.
        batch: mesh axes that the batch is divided over.

    Raises:
        ValueError: (when applied) a pattern matches nothing.
    """
    table = [(pattern, as_spec(spec)) for pattern, spec in pairs]

    def assign(entries: list[Entry], mesh: Mesh) -> None:
        matched = set()
        for entry in entries:
            hits = [i for i, (pattern, _) in enumerate(table) if any(_matches(pattern, n) for n in entry.names)]
            matched.update(hits)
            if hits and entry.spec is None:
                entry.spec = table[hits[0]][1]
        for i, (pattern, _) in enumerate(table):
            if i not in matched:
                shown = pattern if isinstance(pattern, str) else pattern.pattern
                raise ValueError(f"the rule {shown!r} matches no parameter; there are {_some_names(entries)}")

    return Rule(assign, axes_of(batch))


def _matches(pattern: str | re.Pattern[str], name: str) -> bool:
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern.search(name) is not None


def _some_names(entries: list[Entry], n: int = 8) -> str:
    names = [e.names[0] for e in entries]
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def data_parallel(axis: Any = "data") -> Rule:
    """Every device holds the whole model; the batch is divided over `axis`."""

    def assign(entries: list[Entry], mesh: Mesh) -> None:
        _require(mesh, axes_of(axis))

    return Rule(assign, axes_of(axis))


def fsdp(axis: Any = "data", *, min_size: int = 1024) -> Rule:
    """Parameters, their gradients and the optimizer's state divided over the axis that the batch is divided over.

    Of each parameter the largest dimension is divided that `axis` divides evenly and no earlier rule has taken.

    Args:
        axis: a mesh axis, or a tuple of them.
        min_size: parameters of fewer elements stay whole on every device.

    Raises:
        ValueError: (when applied) nothing can be divided.
    """
    axes = axes_of(axis)

    def assign(entries: list[Entry], mesh: Mesh) -> None:
        _require(mesh, axes)
        n, done = size_of(mesh, axes), 0
        for entry in entries:
            shape = tuple(entry.tensor.shape)
            if not entry.is_parameter or entry.tensor.numel() < max(min_size, 1):
                continue
            dims = list(entry.spec or ()) + [None] * (len(shape) - len(entry.spec or ()))
            if {a for d in dims for a in axes_of(d)} & set(axes):
                continue
            free = [i for i, d in enumerate(dims) if not axes_of(d) and shape[i] % n == 0]
            if free:
                dims[max(free, key=lambda i: shape[i])] = axes[0] if len(axes) == 1 else axes
                entry.spec = PartitionSpec(*dims)
                done += 1
        if not done:
            raise ValueError(
                f"fsdp({axis!r}) found no parameter of at least {min_size} elements with a dimension that {n} devices divide "
                f"evenly; there are {_some_names(entries)}. Lower min_size, or use a mesh of another size"
            )

    return Rule(assign, axes)


_COLUMN = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "c_attn", "q_attn",
    "query", "key", "value", "query_key_value", "dense_h_to_4h", "linear1", "w1", "w3", "wi", "wi_0", "wi_1",
    "intermediate.dense", "lin1", "q_lin", "k_lin", "v_lin", "SelfAttention.q", "SelfAttention.k", "SelfAttention.v",
    "EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v",
)  # fmt: skip
_ROW = (
    "o_proj", "out_proj", "down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "linear2", "w2", "wo", "output.dense",
    "attention.dense", "self_attention.dense", "lin2", "out_lin", "SelfAttention.o", "EncDecAttention.o",
)  # fmt: skip
_VOCABULARY = (
    "embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings", "lm_head", "embed_out", "decoder.embed_tokens",
)  # fmt: skip


def tensor_parallel(axis: str = "model", *, column: Iterable[str] = (), row: Iterable[str] = ()) -> Rule:
    """Products of matrices divided within each layer, for models built as those of `transformers` are.

    Layers that widen (queries, keys, values, the first layers of an MLP) are divided by their outputs, those that narrow
    again by their inputs, embeddings and the output layer by vocabulary (where the axis divides it; else they stay whole).
    Known are the names that LLaMA, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX, OPT, BERT, T5, DistilBERT, torch.nn.Transformer and
    their like use.

    Args:
        axis: the mesh axis.
        column: further names of layers to divide by their outputs, as ends of qualified names (``"mlp.expand"``).
        row: further names of layers to divide by their inputs.

    Raises:
        ValueError: (when applied) no layer has a known name, or a dimension cannot be divided.
    """
    columns, rows = (*column, *_COLUMN), (*row, *_ROW)

    def assign(entries: list[Entry], mesh: Mesh) -> None:
        _require(mesh, (axis,))
        done = 0
        for entry in entries:
            if entry.spec is not None or not entry.is_parameter:
                continue
            dim = _divided_dimension(entry, columns, rows, mesh.shape[axis])
            if dim is not None:
                entry.spec = PartitionSpec(*[axis if i == dim else None for i in range(entry.tensor.dim())])
                done += 1
        if not done:
            raise ValueError(
                f"tensor_parallel({axis!r}) knows no layer of this model by its name; there are {_some_names(entries)}. Name them with "
                "column=(...) and row=(...), or give patterns"
            )

    return Rule(assign)


def _divided_dimension(entry: Entry, columns: tuple[str, ...], rows: tuple[str, ...], n: int) -> int | None:
    dims = entry.tensor.dim()
    if entry.leaf in ("in_proj_weight", "in_proj_bias"):  # torch.nn.MultiheadAttention
        return 0
    path = entry.path(entry.names[0])
    if dims == 3 and entry.leaf in (
        "gate_up_proj",
        "up_proj",
        "down_proj",
        "gate_proj",
    ):  # experts, one after the other
        return 0
    if any(_ends(entry.path(name), _VOCABULARY) for name in entry.names):
        return 0 if entry.tensor.shape[0] % n == 0 else None
    outputs, inputs = (1, 0) if type(entry.owner).__name__ == "Conv1D" else (0, 1)
    if dims == 1:
        return 0 if _ends(path, columns) and not _ends(path, rows) else None
    if dims != 2:
        return None
    if _ends(path, rows):
        return inputs
    return outputs if _ends(path, columns) else None


def _ends(path: str, names: Iterable[str]) -> bool:
    dotted = "." + path
    return any(dotted.endswith("." + name) for name in names)


def _require(mesh: Mesh, axes: tuple[str, ...]) -> None:
    if missing := [a for a in axes if a not in mesh.shape]:
        raise ValueError(f"the rule is about mesh axes {missing}; the mesh has {dict(mesh.shape)}")


__all__ = ["Rule", "by_name", "data_parallel", "fsdp", "tensor_parallel"]
