"""Models as PyTorch users have them beside the same models by hand in JAX, and what the TPU compiler makes of both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.nn as nn
from jax.sharding import NamedSharding, PartitionSpec
from torchax.interop import aot_compile, fsdp

from .by_hand import decoders, encoders, nets, pairs
from .measure import Row, failed
from .models import Reader, UNet
from .topology import chips, compared, compiled_for

BATCH, LENGTH, VOCABULARY, LAYERS, WIDTH, HEADS = 2, 256, 512, 2, 256, 4
_CHIP = "v5e:2x2"
_DIVIDED = ("TransformerEncoder", "Llama")  # fully sharded, the batch over the same chips


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, twice.

    Attributes:
        name: as in the report.
        build: the module, without dropout.
        inputs: of both; tokens are int64.
        by_hand: the function of weights and inputs.
        call: how the module is called with the inputs, and gives what `by_hand` gives.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    by_hand: Callable[..., jax.Array]
    call: Callable[..., torch.Tensor] = lambda model, *inputs: model(*inputs)


def _tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (BATCH, length))


def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
_SIZES |= {"num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH}


def _decoder(name: str, family: str, like: decoders.Llama, **options: Any) -> Case:
    def build() -> nn.Module:
        import transformers

        sizes = {**_SIZES, "num_key_value_heads": like.key_heads, "max_position_embeddings": LENGTH}
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
        config = getattr(transformers, family + "Config")(**{**sizes, "rms_norm_eps": 1e-6, **options})
        return getattr(transformers, family + "ForCausalLM")(config)

    return Case(name, build, lambda: (_tokens(),), like, _logits)


def _hugging_face(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**options))

    return build


def _clip() -> nn.Module:
    import transformers

    sizes = {k: v for k, v in _SIZES.items() if k != "vocab_size"}
    text = {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "eos_token_id": 3, "bos_token_id": 1}
    vision = {**sizes, "image_size": 64, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def _captions() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = _tokens(64)
    tokens[:, 50] = 3
    return tokens, torch.randn(BATCH, 3, 64, 64)


def cases() -> Iterator[Case]:
    """All models."""
    pixels = lambda size: lambda: (torch.randn(BATCH, 3, size, size),)
    yield Case("U-Net", UNet, pixels(64), nets.unet)
    yield Case("LSTM", Reader, lambda: (torch.randint(0, 100, (8, 20)),), nets.reader)
    yield Case(
        "TransformerEncoder",
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True),
            LAYERS,
            enable_nested_tensor=False,
        ),
        lambda: (torch.randn(BATCH, LENGTH, WIDTH),),
        functools.partial(encoders.torch_encoder, LAYERS, HEADS),
    )
    yield Case(
        "MultiheadAttention",
        lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        lambda: (torch.randn(BATCH, LENGTH, WIDTH),),
        lambda w, x: encoders.multihead(w, "", HEADS, x),
        lambda model, x: model(x, x, x, need_weights=False)[0],
    )
    llama = decoders.Llama(LAYERS, HEADS, 2)
    yield _decoder("Llama", "Llama", llama)
    yield _decoder("Mistral", "Mistral", dataclasses.replace(llama, window=64), sliding_window=64)
    yield _decoder(
        "Mixtral", "Mixtral", dataclasses.replace(llama, chosen=2), num_local_experts=4, num_experts_per_tok=2
    )
    yield _decoder("Qwen", "Qwen2", llama, tie_word_embeddings=True)
    gemma = decoders.Llama(LAYERS, HEADS, 1, act=jax.nn.gelu, embedding_scale=WIDTH**0.5, norm_offset=1.0)
    yield _decoder("Gemma", "Gemma", gemma, head_dim=WIDTH // HEADS)
    no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    yield Case(
        "GPT-2",
        _hugging_face(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS,
            n_head=HEADS, bos_token_id=1, eos_token_id=2, **no_dropout,
        ),
        lambda: (_tokens(),),
        functools.partial(decoders.gpt2, LAYERS, HEADS),
        _logits,
    )  # fmt: skip
    yield Case(
        "Mamba",
        _hugging_face(
            "MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        lambda: (_tokens(16),),
        functools.partial(decoders.mamba, LAYERS),
        _logits,
    )  # fmt: skip
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    yield Case(
        "BERT",
        _hugging_face("BertForMaskedLM", "BertConfig", **_SIZES, **no_dropout, max_position_embeddings=LENGTH),
        lambda: (_tokens(),),
        functools.partial(encoders.bert, LAYERS, HEADS),
        lambda model, tokens: model(input_ids=tokens).logits,
    )
    sizes = {k: v for k, v in _SIZES.items() if k != "vocab_size"}
    yield Case(
        "ViT",
        _hugging_face(
            "ViTForImageClassification", "ViTConfig", **sizes, **no_dropout, image_size=64, patch_size=8, num_labels=10
        ),
        pixels(64),
        functools.partial(encoders.vit, LAYERS, HEADS),
        lambda model, x: model(pixel_values=x).logits,
    )
    yield Case(
        "CLIP",
        _clip,
        _captions,
        functools.partial(encoders.clip, LAYERS, HEADS, 3),
        lambda model, tokens, x: model(input_ids=tokens, pixel_values=x).logits_per_image,
    )
    yield Case(
        "T5",
        _hugging_face(
            "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=WIDTH, d_kv=WIDTH // HEADS,
            d_ff=2 * WIDTH, num_layers=LAYERS, num_decoder_layers=LAYERS, num_heads=HEADS, dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        ),
        lambda: (_tokens(), _tokens()),
        functools.partial(pairs.t5, LAYERS, HEADS, 32),
        lambda model, tokens, answer: model(input_ids=tokens, decoder_input_ids=answer, use_cache=False).logits,
    )  # fmt: skip
    yield Case(
        "Whisper",
        _hugging_face(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCABULARY, d_model=WIDTH,
            encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
            encoder_ffn_dim=2 * WIDTH, decoder_ffn_dim=2 * WIDTH, num_mel_bins=16, max_source_positions=LENGTH,
            max_target_positions=LENGTH, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=3,
        ),
        lambda: (torch.randn(BATCH, 16, 2 * LENGTH), _tokens()),
        functools.partial(pairs.whisper, LAYERS, HEADS),
        lambda model, x, tokens: model(input_features=x, decoder_input_ids=tokens, use_cache=False).logits,
    )  # fmt: skip


def arrays(tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, jax.Array]:
    """Weights as `by_hand` takes them."""
    return {name: jnp.asarray(t.detach().numpy()) for name, t in tensors}


def as_jax_users(inputs: tuple[torch.Tensor, ...]) -> list[jax.Array]:
    """The inputs with tokens of 32 bits."""
    return [jnp.asarray(t.numpy(), jnp.int32 if t.dtype == torch.int64 else None) for t in inputs]


def zoo() -> Iterator[Row]:
    """Mean square of the result and gradients of all parameters, compiled for one v5e chip; of `_DIVIDED` for two, too."""
    for case in cases():
        for n in (1, 2) if case.name in _DIVIDED else (1,):
            title = case.name if n == 1 else f"{case.name}, {n} chips"
            try:
                yield from _compared(case, title, n)
            except Exception as error:
                yield failed("zoo", title, error)


def _compared(case: Case, title: str, n: int) -> Iterator[Row]:
    torch.manual_seed(0)
    model, inputs = case.build().train(), case.inputs()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(*inputs: torch.Tensor) -> Any:
        loss = case.call(model, *inputs).square().mean()
        return loss, torch.autograd.grad(loss, parameters)

    named = list(model.named_parameters())
    trained, fixed = (arrays((k, p) for k, p in named if p.requires_grad is kind) for kind in (True, False))
    mesh = chips(_CHIP, n)
    layout = {name: _divided(a.shape, n) for name, a in trained.items()}
    placed = {name: NamedSharding(mesh, spec) for name, spec in layout.items()}

    @functools.partial(jax.jit, out_shardings=(None, placed))
    def by_hand(trained: dict[str, jax.Array], fixed: dict[str, jax.Array], *inputs: jax.Array) -> Any:
        return jax.value_and_grad(lambda w: jnp.square(case.by_hand({**w, **fixed}, *inputs)).mean())(trained)

    ours = aot_compile(step, inputs, _CHIP, mesh={"data": n}, shardings=None if n == 1 else fsdp(min_size=1))
    given = as_jax_users(inputs)
    specs = (layout, PartitionSpec(), *(PartitionSpec("data" if n > 1 else None) for _ in given))
    yield from compared("zoo", title, ours, compiled_for(by_hand, (trained, fixed, *given), mesh, specs), "JAX")


def _divided(shape: tuple[int, ...], n: int) -> PartitionSpec:
    """As `fsdp` divides a parameter: the largest dimension that the chips divide evenly."""
    fitting = [i for i, size in enumerate(shape) if size % n == 0] if n > 1 else []
    if not fitting:
        return PartitionSpec()
    chosen = max(fitting, key=lambda i: shape[i])
    return PartitionSpec(*("data" if i == chosen else None for i in range(len(shape))))
