"""`generate` of a compiled transformers model: the prompt is one program, all tokens after it are another.

Transformers' own loop (`GenerationMixin._sample`) prepares and chooses every token in Python. Where that Python is known to
do nothing but compute (see `_choosing`), over a static cache, the loop is a `torch.while_loop` in a compiled function here,
with buffers of fixed shapes. Everything else goes through transformers' loop, in which every call of the model is a program.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torchax.errors import DataDependentShape, TracerEscaped

from ._choosing import Choice, State, is_one_of, taken_apart, unknown
from ._tree import flatten, is_object

_TURNS = 64  # tokens per call: the host comes back in between, so that a long text can be interrupted
_OPTIONS = {"on_retrace", "donate_state", "compiler_options", "keep_unused", "inline"}


class NotLoopable(Exception):
    """Between two tokens the model does something that the compiled loop does not."""


# of a recording; transformers' loop will raise it again if it is the user's
_UNEXPECTED = (NotLoopable, TracerEscaped, DataDependentShape, AttributeError, LookupError, TypeError)


def generation(kind: type, options: dict[str, Any]) -> Generation | None:
    """What runs `generate` for compiled modules of a class; None where transformers' loop is the only one.

    Args:
        kind: the class of the module.
        options: as for `compile`; with those that speak of the arguments of the module, transformers' loop is kept.
    """
    mixin = getattr(sys.modules.get("transformers.generation.utils"), "GenerationMixin", None)
    if mixin is None or not issubclass(kind, mixin) or not set(options) <= _OPTIONS:
        return None
    takes = {
        "_sample": {"input_ids", "logits_processor", "stopping_criteria", "generation_config", "model_kwargs"},
        "_prefill": {"input_ids", "generation_config", "model_kwargs"},
        "prepare_inputs_for_generation": {"input_ids", "next_sequence_length", "attention_mask"},
        "_update_model_kwargs_for_generation": {"outputs", "model_kwargs", "is_encoder_decoder"},
    }
    for name, parameters in takes.items():
        function = getattr(mixin, name, None)
        if function is None or getattr(kind, name, None) is not function:  # the model has its own way
            return None
        if not parameters <= set(inspect.signature(function).parameters):  # a transformers that we do not know
            return None
    return Generation(options)


class Generation:
    """The two programs of a compiled model.

    Attributes:
        model: the compiled module.
        programs: what is compiled.
        refusals: why calls went through transformers' loop.
    """

    def __init__(self, options: dict[str, Any]):
        from .compile import Compiled

        self.model: Any = None
        self.begin, self.go_on = Compiled(self._begin, **options), Compiled(self._go_on, **options)
        self.programs = [self.begin, self.go_on]
        self.refusals: dict[str, None] = {}
        self._hopeless: dict[Any, str] = {}  # kinds of calls that could not be recorded, with the reason
        self._proven: set[Any] = set()  # those that could

    def clear(self) -> None:
        """Forget all programs, and what could not be one."""
        for program in self.programs:
            program.cache_clear()
        for notes in (self.refusals, self._hopeless, self._proven):
            notes.clear()

    def sample(self, slow: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin._sample`; `slow` is transformers' own."""
        bound = inspect.signature(slow).bind(*args, **kwargs)
        bound.apply_defaults()
        given: dict[str, Any] = bound.arguments
        kind = tuple(type(x) for x in (*given["logits_processor"], *given["stopping_criteria"]))
        refusal = _refusal(self.model, given) or self._hopeless.get(kind)
        if refusal is None:
            restore = (lambda: None) if kind in self._proven else _snapshot(given["model_kwargs"])
            try:
                result = self._run(given, given["model_kwargs"])
                self._proven.add(kind)
                return result
            except _UNEXPECTED as error:  # while recording: nothing has been run, and what was written is put back
                if kind in self._proven:
                    raise
                refusal = self._hopeless[kind] = f"{type(error).__name__}: {error}"
                restore()
        self.refusals[f"generate ran token by token: {refusal}"] = None
        return slow(*args, **kwargs)

    def _run(self, given: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """All tokens, from arguments in which `_refusal` has found nothing."""
        model, config, streamer = self.model, given["generation_config"], given.get("streamer")
        prompt: torch.Tensor = given["input_ids"]
        begun, size = prompt.shape[1] + 1, _size(given)
        lengths = [c for c in given["stopping_criteria"] if hasattr(c, "max_length")]
        ends = [c for c in given["stopping_criteria"] if not hasattr(c, "max_length")]
        choice = {
            "processors": [taken_apart(p) for p in given["logits_processor"]],
            "criteria": [taken_apart(c) for c in ends],
            "pad": config._pad_token_tensor if any(hasattr(c, "eos_token_id") for c in ends) else None,
            "sample": bool(config.do_sample),
        }
        cache = next(x for x in kwargs.values() if is_object(type(x)))
        logits = None
        if any(layer.is_initialized for layer in cache.layers):  # it goes on from a text before
            logits = model._prefill(prompt, config, kwargs).logits
        with _windows_as_static(cache) as filled:
            state, going, mask, grown = self.begin(
                prompt, kwargs, choice, size, getattr(config, "_mask_length", -1), logits
            )
            rest = {k: v for k, v in kwargs.items() if k not in grown}
            asked, turns = begun, _TURNS if streamer is None else 1
            with getattr(model, "_optimize_model_for_decode", contextlib.nullcontext)():
                while True:
                    following: Any = None
                    if asked < size:  # before the last is looked at, so that the device is never idle
                        asked = min(asked + turns, size)
                        following = self.go_on(state, mask, rest, choice, torch.tensor(asked))
                    if streamer is not None:
                        streamer.put(state.tokens.cpu())
                    if following is None or (ends and not going.item()):  # then what follows has done nothing
                        break
                    state, going = following
            length = int(state.length) if ends else size
            filled(length - (1 if logits is None else begun))
        if streamer is not None:
            streamer.end()
        for criterion in lengths:  # which warn of texts that are longer than the model knows
            criterion(torch.empty((1, min(length, size - 1)), device="meta"), None)
        ids = state.ids.to(prompt.device)
        if length < size:  # cut on the host, where no program is needed for each length
            ids = ids.cpu()[:, :length].contiguous().to(prompt.device)
        if not config.return_dict_in_generate:
            return ids
        kind: Any = sys.modules["transformers.generation.utils"].GenerateDecoderOnlyOutput
        return kind(sequences=ids, **{next(k for k in kwargs if kwargs[k] is cache): cache})

    # ------------------------------------------------------------------ what is compiled
    def _begin(
        self, prompt: torch.Tensor, kwargs: dict[str, Any], choice: Any, size: int, mask_length: int, logits: Any
    ) -> Any:
        """The prompt and the first token: (state, whether a row goes on, mask of the whole text, names of what grows)."""
        before = dict(kwargs)
        outputs: Any = types.SimpleNamespace(logits=logits)
        if logits is None:
            _own_counters(kwargs)
            settings = types.SimpleNamespace(prefill_chunk_size=None, _mask_length=mask_length)
            outputs = self.model._prefill(prompt, settings, kwargs)
        columns, grown = self._columns(outputs, before)
        rows, length = prompt.shape
        mask = before.get("attention_mask")
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones((rows, size - 1 - length))], -1)
        ids = torch.nn.functional.pad(prompt, (0, size - length))
        ones = torch.ones(rows, dtype=torch.long, device=ids.device)
        state = State(ids, torch.tensor(length, device=ids.device), prompt[:, -1], ones, columns)
        state = Choice(choice).token(state, outputs.logits, columns)
        return state, (state.unfinished != 0).any(), mask, grown

    def _go_on(self, state: State, mask: Any, kwargs: dict[str, Any], choice: Any, until: torch.Tensor) -> Any:
        """Further tokens, until all rows are finished or there are `until` tokens: (state, whether a row goes on)."""
        if mask is not None:
            kwargs = {**kwargs, "attention_mask": mask}

        def going(state: State) -> torch.Tensor:
            return (state.length < until) & (state.unfinished != 0).any()

        def turn(state: State) -> tuple[State]:
            before, given = _python_state(kwargs), {**kwargs, **state.columns}
            inputs = self.model.prepare_inputs_for_generation(state.tokens[:, None], next_sequence_length=1, **given)
            outputs = self.model(**inputs, return_dict=True)
            columns, _ = self._columns(outputs, given)
            if columns.keys() != state.columns.keys():
                raise NotLoopable(f"{sorted(columns)} grow with the text, and before {sorted(state.columns)}")
            if _python_state(kwargs) != before:
                raise NotLoopable("the model changes attributes of the cache that are not values of tensors")
            return (Choice(choice).token(state, outputs.logits, columns),)

        (state,) = torch.while_loop(going, turn, (state,))
        return state, (state.unfinished != 0).any()

    def _columns(self, outputs: Any, kwargs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
        """What grows with the text: the new column of each by its name, and all names, that of the mask included.

        Raises:
            NotLoopable: something changes otherwise.
        """
        given = {k: v for k, v in kwargs.items() if k != "attention_mask"}
        fields = outputs if isinstance(outputs, dict) else {}
        after = self.model._update_model_kwargs_for_generation(fields, dict(given), is_encoder_decoder=False)
        if after.keys() != given.keys():
            raise NotLoopable(f"{sorted(after.keys() ^ given.keys())} come or go while generating")
        changed = [k for k in given if after[k] is not given[k]]
        for name in changed:
            new, old = after[name], given[name]
            known = isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor)
            if not known or new.shape != (*old.shape[:-1], old.shape[-1] + 1):
                raise NotLoopable(f"{name!r} does not grow by one column with each token")
        masks = tuple(k for k in kwargs if k == "attention_mask")
        return {k: after[k][..., -1:] for k in changed}, (*changed, *masks)


def _size(given: dict[str, Any]) -> int:
    """The largest length of the text."""
    lengths = [c.max_length for c in given["stopping_criteria"] if hasattr(c, "max_length")]
    return max(min(lengths, default=0), given["input_ids"].shape[1] + 1)


def _refusal(model: Any, given: dict[str, Any]) -> str | None:
    """Why transformers' loop must serve a call with these arguments of `_sample`; None if it need not."""
    config, ids, kwargs = given["generation_config"], given["input_ids"], given["model_kwargs"]
    asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "prefill_chunk_size")
    for name in (*asked, "is_assistant"):
        if getattr(config, name, None):
            return f"{name} is set"
    if given.get("synced_gpus"):
        return "synced_gpus is set"
    if model.config.is_encoder_decoder:
        return "the model has an encoder"
    if ids.dtype != torch.long or ids.ndim != 2 or 0 in ids.shape or kwargs.get("inputs_embeds") is not None:
        return "the prompt is not a table of tokens"
    reason = unknown(given["logits_processor"], given["stopping_criteria"], ids.shape[1])
    if reason is not None:
        return reason
    caches = [x for x in kwargs.values() if is_object(type(x))]
    if not kwargs.get("use_cache") or len(caches) != 1 or not is_one_of(caches[0], "cache_utils", {"StaticCache"}):
        return 'the cache is not a static one (cache_implementation="static")'
    known = {"StaticLayer", "StaticSlidingWindowLayer"}
    if not all(is_one_of(layer, "cache_utils", known) for layer in caches[0].layers):
        return "the cache has layers of a kind that is not known"
    if getattr(caches[0], "offloading", False):
        return "the cache is offloaded"
    if min(layer.max_cache_len for layer in caches[0].layers) < _size(given) - 1:
        return "the text may outgrow the cache, or the window of one of its layers"
    return None


# ---------------------------------------------------------------------- the cache
def _own_counters(kwargs: dict[str, Any]) -> None:
    """Copies of a new cache's counters, which begin on the host: written there, each would be waited for."""
    for cache in _objects(kwargs):
        vars(cache).update({k: v.clone() for k, v in vars(cache).items() if isinstance(v, torch.Tensor)})


@functools.cache
def _open_window() -> type:
    """A layer with a window that is not full yet: as a static one of the same length, whose counter is a tensor alone."""
    utils: Any = sys.modules["transformers.cache_utils"]
    return type("StaticLayer", (utils.StaticLayer,), {"is_sliding": True})


@contextlib.contextmanager
def _windows_as_static(cache: Any) -> Any:
    """Within, layers with a window count in tensors; gives a function that adds what was counted to their Python counters."""
    layers = [(layer, type(layer)) for layer in cache.layers if hasattr(layer, "cumulative_length_int")]

    def filled(more: int) -> None:
        for layer, _ in layers:
            layer.cumulative_length_int += more

    for layer, _ in layers:
        layer.__class__ = _open_window()
    try:
        yield filled
    finally:
        for layer, kind in layers:
            layer.__class__ = kind


def _snapshot(kwargs: dict[str, Any]) -> Callable[[], None]:
    """Gives a function that puts caches back to what they are now; keys and values after that do not count."""
    attributes = [(c, dict(vars(c))) for c in _objects(kwargs)]
    tensors = [t for _, values in attributes for t in values.values() if isinstance(t, torch.Tensor) and t.ndim == 0]
    counters = [(t, t.clone()) for t in tensors]

    def restore() -> None:
        for cache, values in attributes:
            vars(cache).clear()
            vars(cache).update(values)
        for t, value in counters:
            t.copy_(value)

    return restore


def _objects(kwargs: dict[str, Any]) -> list[Any]:
    """Caches among the arguments, and their layers."""
    found: list[Any] = []
    flatten(kwargs, [], None, found)
    return found


def _python_state(kwargs: dict[str, Any]) -> list[Any]:
    """Everything but the values of tensors."""
    leaves: list[Any] = []
    flatten(kwargs, leaves)
    return [id(x) if isinstance(x, torch.Tensor) else x for x in leaves]
