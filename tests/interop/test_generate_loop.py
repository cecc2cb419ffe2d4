"""The compiled loop of `generate` gives what transformers' own loop gives on CPU; what it does not know goes through that."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torchax
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torchax_interop._choosing import Choice, State, taken_apart
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.streamers import BaseStreamer

SIZES: dict[str, Any] = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
HEADS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.3, **SIZES, **HEADS}
GREEDY: dict[str, Any] = {"cache_implementation": "static", "do_sample": False, "max_new_tokens": 9}


@functools.cache
def models(name: str) -> tuple[Any, Any]:
    """(on CPU, compiled)."""
    torch.manual_seed(1)
    if name == "llama":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(max_position_embeddings=64, **SMALL))
    elif name == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **SIZES)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.MistralConfig(sliding_window=16, head_dim=8, max_position_embeddings=64, **SMALL)
        model = transformers.MistralForCausalLM(config)
    model.eval()
    return model, torchax.compile(copy.deepcopy(model).to("jax"))


PROMPT = torch.tensor([[3, 9, 27, 5, 15], [0, 0, 7, 21, 8]])  # the second row is padded on the left
MASK = (PROMPT != 0).long()


def both(name: str = "llama", prompt: torch.Tensor = PROMPT, mask: Any = MASK, **options: Any) -> tuple[Any, Any]:
    """What `generate` gives on CPU, and compiled."""
    cpu, compiled = models(name)
    options = {**GREEDY, **options}
    there = None if mask is None else mask.to("jax")
    return cpu.generate(prompt, attention_mask=mask, **options), compiled.generate(
        prompt.to("jax"), attention_mask=there, **options
    )


def same(name: str = "llama", loops: bool = True, **options: Any) -> torch.Tensor:
    """Both give the same tokens, by the compiled loop, or by transformers' own if `loops` is False; those tokens."""
    compiled = models(name)[1]
    before = compiled.cache_info()
    want, got = both(name, **options)
    assert got.device.type == "jax" and got.dtype == want.dtype and got.tolist() == want.tolist()
    after = compiled.cache_info()
    calls = after.hits + after.misses - before.hits - before.misses
    assert (calls <= 2) == loops, after.reasons
    return want


def stop(name: str = "llama") -> int:
    """A token that ends the first row after some turns, and not the second."""
    first, second = free(name).tolist()
    return next(t for t in first[1:] if t not in second and t != first[0])


def free(name: str = "llama") -> torch.Tensor:
    """The nine tokens after the prompts if nothing ends them."""
    return models(name)[0].generate(PROMPT, attention_mask=MASK, **GREEDY)[:, 5:]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_end_at_different_turns(name: str) -> None:
    tokens = free(name)
    ended = same(name, eos_token_id=stop(name))
    assert (ended[0, 5:] == 0).any() and ended.shape[1] == 14
    assert same(name, eos_token_id=[stop(name), int(tokens[1, 2])]).shape[1] < 14
    same(name, eos_token_id=int(tokens[0, 0]), max_new_tokens=None, max_length=9)


def test_one_token_and_no_mask() -> None:
    same(max_new_tokens=1)
    same(mask=None, prompt=PROMPT[:1])
    same(num_return_sequences=1, prompt=PROMPT[:1], mask=MASK[:1], eos_token_id=int(free()[0, 4]))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"encoder_repetition_penalty": 1.5},
        {"min_new_tokens": 4},
        {"min_length": 8},
        {"forced_eos_token_id": 5, "forced_bos_token_id": 7},
        {"suppress_tokens": [9, 17], "begin_suppress_tokens": [10, 31]},
        {"bad_words_ids": [[34], [34, 36], [17, 17]]},
        {"sequence_bias": [[[34, 36], -20.0], [[3], 2.0]]},
        {"renormalize_logits": True, "remove_invalid_values": True},
        {"do_sample": True, "top_k": 1, "temperature": 0.7, "typical_p": 0.9},
        {"do_sample": True, "top_k": 0, "top_p": 1e-4},
        {"do_sample": True, "top_k": 0, "min_p": 0.9999, "epsilon_cutoff": 1e-3},
    ],
    ids=lambda o: "-".join(o),
)
def test_processors(options: dict[str, Any]) -> None:
    tokens = same(eos_token_id=stop(), **options)[:, 5:]
    if "do_sample" not in options and "renormalize_logits" not in options:
        assert tokens[:, :9].tolist() != both(eos_token_id=stop())[0][:, 5:].tolist()


def test_what_only_the_buffer_holds_does_not_count() -> None:
    ids, one = torch.tensor([[3, 9, 0, 0]]), torch.ones(1, dtype=torch.long)
    penalty = logits_process.RepetitionPenaltyLogitsProcessor(2.0)
    choice = {"processors": [taken_apart(penalty)], "criteria": [], "pad": None, "sample": False}
    state = State(ids, torch.tensor(2), ids[:, 1], one, {})
    logits = torch.tensor([[[1.0, 0.9, 0.0, 1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 1.7]]])
    assert Choice(choice).token(state, logits, {}).ids.tolist() == [[3, 9, 0, 0]]
    assert Choice(choice).token(state, logits[..., [1, 0, 2, 3, 4, 5, 6, 7, 8, 9]], {}).ids.tolist() == [[3, 9, 1, 0]]


def test_other_numbers_need_no_other_program() -> None:
    compiled = models("llama")[1]
    options = {**GREEDY, "do_sample": True, "top_k": 5}
    prompt = PROMPT.to("jax")
    compiled.generate(prompt, temperature=0.9, top_p=0.9, **options)
    before = compiled.cache_info().misses
    compiled.generate(prompt, temperature=1.4, top_p=0.5, **options)
    assert compiled.cache_info().misses == before


def test_sampling() -> None:
    cpu, compiled = models("llama")
    plain = copy.deepcopy(cpu).to("jax")  # transformers' own loop, each op by itself
    options = {**GREEDY, "do_sample": True, "temperature": 1.5, "top_k": 12, "top_p": 0.95}
    drawn = []
    for model in (compiled, plain, compiled):
        torch.manual_seed(3)
        drawn.append(model.generate(PROMPT.to("jax"), attention_mask=MASK.to("jax"), **options).tolist())
    assert drawn[0] == drawn[1] == drawn[2]
    assert compiled.generate(PROMPT.to("jax"), attention_mask=MASK.to("jax"), **options).tolist() != drawn[0]
    # the distribution of the first token
    many = PROMPT[:1].repeat(4000, 1)
    found = compiled.generate(many.to("jax"), **{**options, "max_new_tokens": 1})[:, 5].cpu()
    scores = cpu(PROMPT[:1]).logits[:, -1] / 1.5
    warpers: list[Any] = [logits_process.TopKLogitsWarper(12), logits_process.TopPLogitsWarper(0.95)]
    for warper in warpers:
        scores = warper(PROMPT[:1], scores)
    expected = scores.softmax(-1)[0]
    counts = torch.bincount(found, minlength=40) / 4000
    assert (counts[expected == 0] == 0).all() and (counts - expected).abs().max() < 0.04


class Said(BaseStreamer):
    def __init__(self) -> None:
        self.put_, self.ended = [], 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.put_.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("turn", [None, 3])
def test_a_streamer_gets_every_token(turn: int | None) -> None:
    _, compiled = models("llama")
    prompt, mask, eos = PROMPT[:1], MASK[:1], None if turn is None else int(free()[0, turn])
    said = [Said(), Said()]
    options = {**GREEDY, "eos_token_id": eos, "pad_token_id": 0}
    want = models("llama")[0].generate(prompt, attention_mask=mask, streamer=said[0], **options)
    got = compiled.generate(prompt.to("jax"), attention_mask=mask.to("jax"), streamer=said[1], **options)
    assert got.tolist() == want.tolist() and said[0].put_ == said[1].put_ and said[1].ended == 1
    before = compiled.cache_info().misses
    compiled.generate(prompt.to("jax"), attention_mask=mask.to("jax"), **options)
    assert compiled.cache_info().misses == before  # with and without a streamer, one program


def test_a_text_of_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchax_interop import _generate

    monkeypatch.setattr(_generate, "_TURNS", 3)
    want, got = both()
    assert got.tolist() == want.tolist()
    want, got = both(eos_token_id=stop())
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_cache_goes_on_afterwards(name: str, eos: bool) -> None:
    cpu, compiled = models(name)
    options = {**GREEDY, "cache_implementation": None, "return_dict_in_generate": True, "max_new_tokens": 4}
    ends = {"eos_token_id": stop(name)} if eos else {}
    prompt, results = PROMPT[:1], []
    for model, device in ((cpu, "cpu"), (compiled, "jax")):
        cache: Any = transformers.StaticCache(config=cpu.config, max_cache_len=16)
        first = model.generate(prompt.to(device), cache=cache, **options, **ends)
        assert type(first).__name__ == "GenerateDecoderOnlyOutput" and first.cache is cache and first.scores is None
        longer = torch.cat([first.sequences.cpu(), torch.tensor([[11, 12]])], 1)
        second = model.generate(longer.to(device), cache=cache, **options)
        count = lambda layer: (int(layer.cumulative_length), getattr(layer, "cumulative_length_int", None))
        counts = [(type(layer).__name__, *count(layer)) for layer in cache.layers]
        results.append((first.sequences.tolist(), second.sequences.tolist(), counts))
        keys = [layer.keys.cpu()[:, :, : results[0][2][0][1]] for layer in cache.layers]
        results[-1] += (keys,)
    assert results[0][:3] == results[1][:3]
    torch.testing.assert_close(results[1][3], results[0][3], rtol=1e-4, atol=1e-5)


def test_windows_that_do_not_fill_up() -> None:
    same("mistral")
    before = models("mistral")[1].cache_info().misses
    same("mistral")
    assert models("mistral")[1].cache_info().misses == before
    same("mistral", loops=False, max_new_tokens=14)  # this one does


def test_a_second_turn_compiles_nothing(compile_counter: Any) -> None:
    compiled, prompt, mask = models("llama")[1], PROMPT.to("jax"), MASK.to("jax")
    first, second = free().tolist()
    for turn in (1, 2, 3):  # texts of different lengths: the first row ends at this turn, the second at once
        compile_counter.reset()
        eos = [first[turn], second[0]]
        text = compiled.generate(prompt, attention_mask=mask, eos_token_id=eos, pad_token_id=0, **GREEDY)
        assert text.shape[1] == 6 + turn
        assert compile_counter.count == 0 or turn == 1


class Forbid(logits_process.LogitsProcessor):
    """Python that looks at the text."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, sum(input_ids[0].tolist()) % 40] = -float("inf")
        return scores


class AtSix(stopping_criteria.StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 8, device=input_ids.device)


def test_what_goes_through_transformers_own_loop() -> None:
    compiled = models("llama")[1]
    same(loops=False, logits_processor=logits_process.LogitsProcessorList([Forbid()]))
    same(loops=False, stopping_criteria=stopping_criteria.StoppingCriteriaList([AtSix()]))
    same(loops=False, no_repeat_ngram_size=2)
    same(loops=False, num_beams=2)
    want, got = both(output_scores=True, output_logits=True, return_dict_in_generate=True)
    assert got.sequences.tolist() == want.sequences.tolist() and len(got.scores) == len(want.scores) == 9
    torch.testing.assert_close(torch.stack(got.logits).cpu(), torch.stack(want.logits), rtol=1e-4, atol=1e-4)
    reasons = " ".join(compiled.cache_info().reasons)
    for name in ("Forbid", "AtSix", "NoRepeatNGram", "output_scores"):
        assert f"generate ran token by token: {name}" in reasons


def test_what_cannot_be_recorded_goes_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    warper: Any = logits_process.TopKLogitsWarper
    own = warper.__call__

    def asks(self: Any, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return own(self, input_ids, scores) if scores.sum() > -1e9 else scores

    monkeypatch.setattr(warper, "__call__", asks)
    model = torchax.compile(copy.deepcopy(models("llama")[0]).to("jax"))
    want = models("llama")[0].generate(PROMPT, attention_mask=MASK, **{**GREEDY, "do_sample": True, "top_k": 1})
    for _ in range(2):
        got = model.generate(
            PROMPT.to("jax"), attention_mask=MASK.to("jax"), **{**GREEDY, "do_sample": True, "top_k": 1}
        )
        assert got.tolist() == want.tolist()
    assert "TracerEscaped" in model.cache_info().reasons[-1]


def test_stop_strings() -> None:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
    words = Tokenizer(BPE({c: i for i, c in enumerate(letters)}, []))
    words.decoder = Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    tokens = free()
    strings = [letters[tokens[0, 2]] + letters[tokens[0, 3]], letters[tokens[1, 5]]]
    assert same(stop_strings=strings, tokenizer=tokenizer).shape[1] == 9
    same(stop_strings=strings, tokenizer=tokenizer, eos_token_id=stop())
    same(loops=False, stop_strings=["longerthantheprompt", *strings], tokenizer=tokenizer)
