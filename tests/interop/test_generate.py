"""`generate` of compiled transformers models with a static cache: two programs, the tokens of CPU, a cache in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchax
import transformers


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_two_programs_for_a_conversation(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    compiled = torchax.compile(copy.deepcopy(model).to("jax"))
    options = {"max_length": 16, "do_sample": False, "cache_implementation": "static"}
    said = torch.randint(1, 40, (2, 3))
    for _ in range(3):  # each prompt is what was said so far, padded on the left to the bucket
        prompt = torch.nn.functional.pad(said, (10 - said.shape[1], 0))
        mask = (prompt != 0).long()
        want = model.generate(prompt, attention_mask=mask, **options)
        got = compiled.generate(prompt.to("jax"), attention_mask=mask.to("jax"), **options)
        assert got.device.type == "jax" and torch.equal(got.cpu(), want)
        said = torch.cat([said, want[:, 10:13]], 1)
    info = compiled.cache_info()
    assert info.misses == info.programs == 2, info.reasons
    assert info.hits == 3 * 2 - 2  # of each text the prompt is one call, all other tokens are another


def test_the_cache_is_written_in_place_and_donated() -> None:
    torch.manual_seed(0)
    model = llama().eval().to("jax")
    compiled = torchax.compile(model)
    cache = transformers.StaticCache(config=model.config, max_cache_len=8)
    tokens = torch.randint(1, 40, (1, 6), device="jax")
    with torch.no_grad():
        compiled(tokens[:, :4], past_key_values=cache)
        compiled(tokens[:, 4:5], past_key_values=cache)
        keys = cache.layers[0].keys
        before = keys.jax()
        last = compiled(tokens[:, 5:], past_key_values=cache).logits
        assert cache.layers[0].keys is keys and before.is_deleted()
        torch.testing.assert_close(last[:, -1], model(tokens).logits[:, -1], rtol=1e-4, atol=1e-5)
    assert compiled.cache_info().misses == 2


def test_an_argument_that_is_overwritten_and_passed_twice() -> None:
    array = torch.arange(3.0, device="jax").jax()  # two tensors will happen to hold it

    @torchax.compile
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x + y

    for _ in range(2):
        a, b = torchax.Tensor(array), torchax.Tensor(array)
        assert fn(a, b).tolist() == [1, 3, 5] and b.tolist() == [0, 1, 2]
    kept = torchax.compile(lambda x: x.add_(1), donate_state=False)
    c = torch.zeros(2, device="jax")
    before = c.jax()
    kept(c)
    assert before.tolist() == [0, 0] and c.tolist() == [1, 1]
