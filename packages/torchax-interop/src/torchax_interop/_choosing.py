"""The choice of a token in the compiled loop of `generate`: transformers' processors and criteria over buffers of fixed shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch


class State(NamedTuple):
    """What one token hands on to the next.

    Attributes:
        ids: int64 [rows, largest length]; what comes after the text is undefined.
        length: of the text, int64 [].
        tokens: the last of the text, int64 [rows].
        unfinished: 1 for rows that go on, else 0, int64 [rows].
        columns: the last column of what grows with the text (``position_ids``, ...), by name.
    """

    ids: torch.Tensor
    length: torch.Tensor
    tokens: torch.Tensor
    unfinished: torch.Tensor
    columns: dict[str, torch.Tensor]


# functions of the scores and of which tokens occur in the text
_OF_TOKENS = frozenset(
    (
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "RepetitionPenaltyLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
)
# of the scores and the last tokens: how many they look at
_OF_END: dict[str, Callable[[Any], int]] = {
    "NoBadWordsLogitsProcessor": lambda p: max(map(len, p.sequence_bias)) - 1,
    "SequenceBiasLogitsProcessor": lambda p: max(map(len, p.sequence_bias)) - 1,
}
# of the scores and the length of the text: (whether they do something, a length at which they do)
_OF_LENGTH: dict[str, Callable[[Any, torch.Tensor], tuple[torch.Tensor, int]]] = {
    "ForcedBOSTokenLogitsProcessor": lambda p, n: (n == 1, 1),
    "ForcedEOSTokenLogitsProcessor": lambda p, n: (n == p.max_length - 1, p.max_length - 1),
    "MinLengthLogitsProcessor": lambda p, n: (n < p.min_length, 0),
    "MinNewTokensLengthLogitsProcessor": lambda p, n: (
        n - p.prompt_length_to_skip < p.min_new_tokens,
        p.prompt_length_to_skip,
    ),
    "SuppressTokensAtBeginLogitsProcessor": lambda p, n: (n == p.begin_index, p.begin_index),
}
_PROCESSORS = _OF_TOKENS | _OF_END.keys() | _OF_LENGTH.keys()
# criteria of the last tokens: how many they look at
_CRITERIA: dict[str, Callable[[Any], int]] = {
    "EosTokenCriteria": lambda c: 1,
    "StopStringCriteria": lambda c: c.maximum_token_len,
}


def is_one_of(x: Any, module: str, names: Iterable[str]) -> bool:
    """Whether `x` is of one of these classes of transformers, and not of a subclass."""
    kind = type(x)
    return kind.__module__ == f"transformers.{module}" and kind.__name__ in names


def unknown(processors: Iterable[Any], criteria: Iterable[Any], length: int) -> str | None:
    """Why these cannot be part of the loop, for a prompt of this length; None if they can."""
    for p in processors:
        if not is_one_of(p, "generation.logits_process", _PROCESSORS):
            return f"{type(p).__name__} is Python code that the compiled loop does not know"
        ignored = getattr(p, "prompt_ignore_length", None)
        if isinstance(ignored, int) and ignored >= length:
            return "prompt_ignore_length is longer than the prompt"
        if type(p).__name__ in _OF_END and _OF_END[type(p).__name__](p) > length:
            return f"{type(p).__name__} looks at more tokens than the prompt has"
    ended = False
    for c in criteria:
        if is_one_of(c, "generation.stopping_criteria", {"MaxLengthCriteria"}):
            ended = True
        elif not is_one_of(c, "generation.stopping_criteria", _CRITERIA):
            return f"{type(c).__name__} is Python code that the compiled loop does not know"
        elif _CRITERIA[type(c).__name__](c) > length:
            return f"{type(c).__name__} looks at more tokens than the prompt has"
    return None if ended else "the text has no largest length"


def taken_apart(x: Any) -> tuple[type, dict[str, Any]]:
    """A processor or criterion as an argument: its numbers become tensors, so that other numbers need no other program."""
    number = lambda v: torch.tensor(v, dtype=torch.float64) if type(v) is float and math.isfinite(v) else v
    return type(x), {k: number(v) for k, v in vars(x).items()}


def _put_together(parts: tuple[type, dict[str, Any]]) -> Any:
    kind, attributes = parts
    x = object.__new__(kind)
    vars(x).update(attributes)
    return x


class Choice:
    """Chooses tokens from logits, as transformers' loop does.

    Args:
        choice: ``processors`` and ``criteria`` (other than of the length) as `taken_apart` gives them; ``pad``, the token of
            finished rows, or None; ``sample``, whether to draw.
    """

    def __init__(self, choice: dict[str, Any]):
        self.processors = [_put_together(p) for p in choice["processors"]]
        self.criteria = [_put_together(c) for c in choice["criteria"]]
        self.pad, self.sample = choice["pad"], choice["sample"]

    def token(self, state: State, logits: torch.Tensor, columns: dict[str, torch.Tensor]) -> State:
        """The next state, given the logits [rows, ..., vocabulary] for the next token, and what else there is in it."""
        scores = self._scores(state, logits[:, -1].to(copy=True, dtype=torch.float32))
        if self.sample:
            tokens = torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        unfinished = state.unfinished
        if self.pad is not None:
            tokens = tokens * unfinished + self.pad * (1 - unfinished)
        length = state.length + 1
        ids = state.ids.index_copy(1, state.length.view(1), tokens[:, None])
        for criterion in self.criteria:
            unfinished = unfinished & ~criterion(_at_the_end(ids, length), None)
        return State(ids, length, tokens, unfinished, columns)

    def _scores(self, state: State, scores: torch.Tensor) -> torch.Tensor:
        ids, length = state.ids, state.length
        for processor in self.processors:
            name = type(processor).__name__
            if name in _OF_TOKENS:
                after = torch.arange(ids.shape[1], device=ids.device) >= length
                scores = processor(torch.where(after, state.tokens[:, None], ids), scores)
            elif name in _OF_END:
                scores = processor(_at_the_end(ids, length), scores)
            else:
                active, example = _OF_LENGTH[name](processor, length)
                scores = torch.where(active, processor(ids.new_empty((ids.shape[0], example)), scores), scores)
        return scores


def _at_the_end(ids: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The text at the right of the buffer; at the left is its first token again."""
    places = torch.arange(ids.shape[1], device=ids.device) - (ids.shape[1] - length)
    return ids.index_select(1, places.clamp(min=0))
