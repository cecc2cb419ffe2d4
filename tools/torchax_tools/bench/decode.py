"""`generate` of a transformers Llama with a static cache against a decoding loop written by hand in JAX, per token."""

from __future__ import annotations

import copy
import cProfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchax

from .measure import Row, times

LAYERS, WIDTH, HEADS, KEY_HEADS, VOCABULARY = 4, 256, 8, 4, 512
PROMPT, NEW = 16, 48
_SIZE = WIDTH // HEADS

Weights = dict[str, jax.Array]
Cache = tuple[jax.Array, jax.Array]  # [layers, key heads, length, size] each


def _norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * weight


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding of [heads, length, size]."""
    angles = positions[:, None] * 10_000.0 ** (-jnp.arange(0, _SIZE, 2, dtype=jnp.float32) / _SIZE)
    cos, sin = (jnp.concatenate([f(angles)] * 2, -1) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-b, a], -1) * sin


def forward(w: Weights, cache: Cache, tokens: jax.Array, start: jax.Array) -> tuple[jax.Array, Cache]:
    """The next token after `tokens` (1-d), which begin at position `start`, and the cache after them."""
    keys, values = cache
    positions = start + jnp.arange(tokens.shape[0])
    seen = jnp.arange(keys.shape[2]) <= positions[:, None]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(LAYERS):
        name = f"model.layers.{i}."
        project = lambda part, y, name=name: y @ w[f"{name}{part}.weight"].T
        y = _norm(x, w[name + "input_layernorm.weight"])
        heads = lambda part, n, y=y, project=project: (
            project("self_attn." + part, y).reshape(-1, n, _SIZE).swapaxes(0, 1)
        )
        q, k = (_rotate(heads(part, n), positions) for part, n in (("q_proj", HEADS), ("k_proj", KEY_HEADS)))
        at = (i, 0, start, 0)
        keys = jax.lax.dynamic_update_slice(keys, k[None], at)
        values = jax.lax.dynamic_update_slice(values, heads("v_proj", KEY_HEADS)[None], at)
        grouped = q.reshape(KEY_HEADS, HEADS // KEY_HEADS, -1, _SIZE)
        scores = jnp.einsum("kgld,ksd->kgls", grouped, keys[i]) * _SIZE**-0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
        out = jnp.einsum("kgls,ksd->kgld", weights, values[i]).reshape(HEADS, -1, _SIZE).swapaxes(0, 1)
        x = x + project("self_attn.o_proj", out.reshape(-1, WIDTH))
        y = _norm(x, w[name + "post_attention_layernorm.weight"])
        x = x + project("mlp.down_proj", jax.nn.silu(project("mlp.gate_proj", y)) * project("mlp.up_proj", y))
    return jnp.argmax(_norm(x[-1], w["model.norm.weight"]) @ w["lm_head.weight"].T).astype(jnp.int32), (keys, values)


def _by_hand(w: Weights, prompt: jax.Array) -> Callable[[], list[jax.Array]]:
    step = jax.jit(forward, donate_argnums=1)

    def generate() -> list[jax.Array]:
        cache = (jnp.zeros((LAYERS, KEY_HEADS, PROMPT + NEW, _SIZE)),) * 2
        cache = (cache[0], jnp.copy(cache[1]))
        token, cache = step(w, cache, prompt, jnp.int32(0))
        tokens = [token]
        for position in range(PROMPT, PROMPT + NEW - 1):
            token, cache = step(w, cache, token[None], jnp.int32(position))
            tokens.append(token)
        return tokens

    return generate


def decode() -> Iterator[Row]:
    """Seconds per new token, the prompt included; greedy."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
    heads: dict[str, Any] = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "num_hidden_layers": LAYERS,
    }
    none: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    on_cpu: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **none)).eval()
    weights = {k: jnp.asarray(v.detach().numpy()) for k, v in on_cpu.state_dict().items()}
    prompt = torch.randint(1, VOCABULARY, (1, PROMPT))
    ours = torchax.compile(copy.deepcopy(on_cpu).to("jax"))
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    on_device = {**options, "attention_mask": torch.ones_like(prompt).to("jax")}
    on_jax = prompt.to("jax")
    mine = lambda: ours.generate(on_jax, **on_device, cache_implementation="static")
    by_hand = _by_hand(weights, jnp.asarray(prompt[0].numpy(), jnp.int32))
    cpu = lambda: on_cpu.generate(prompt, **options)
    expected, found = mine()[0, PROMPT:].tolist(), np.array(by_hand()).tolist()
    if expected != found:
        raise ArithmeticError(f"the two loops give other tokens: {expected} and {found}")
    a, b, c = (s / NEW for s in times(mine, by_hand, cpu, rounds=7, batch=0.2))
    yield Row("decode", "Llama, per token", a / b, "x", "JAX loop", 1.15, a, b, c)
    mine_calls, by_hand_calls = (_calls(side) / NEW for side in (mine, by_hand))
    name = "the same: calls in Python, per token"  # which do not depend on how busy the machine is
    yield Row("decode", name, mine_calls / by_hand_calls, "x", "JAX loop", None, mine_calls, by_hand_calls, counted="")


def _calls(side: Callable[[], object]) -> int:
    """Calls of Python and C functions, as cProfile counts them."""
    profile = cProfile.Profile()
    profile.runcall(side)
    return sum(entry.callcount for entry in profile.getstats())
