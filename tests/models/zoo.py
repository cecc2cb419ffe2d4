"""The models that must run: each a small configuration with random weights, its inputs, and how it generates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from models import nets

BATCH, LENGTH, VOCABULARY = 2, 8, 96


@dataclasses.dataclass(frozen=True)
class Model:
    """One row of the table.

    Attributes:
        name: how tests call it.
        build: the module; called with a seed set.
        inputs: keyword arguments of `forward`, on CPU.
        loss_kwargs: what `forward` needs beyond `inputs` to give a loss; without, the loss is made here.
        generate: keyword arguments of `generate` without the inputs; None if the model cannot.
        prompt: the inputs that `generate` takes.
        tied: pairs of parameter names that are one parameter.
        compiles: whether all its shapes are known while it is traced.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    loss_kwargs: Callable[[dict[str, torch.Tensor]], dict[str, Any]] | None = None
    generate: dict[str, Any] | None = None
    prompt: tuple[str, ...] = ("input_ids", "attention_mask")
    tied: tuple[tuple[str, str], ...] = ()
    compiles: bool = True


def tokens(low: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(low, VOCABULARY, (BATCH, length))


def left_padded() -> dict[str, torch.Tensor]:
    """Tokens of which the second row begins with two of padding."""
    ids, mask = tokens(), torch.ones(BATCH, LENGTH, dtype=torch.long)
    ids[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def right_padded() -> dict[str, torch.Tensor]:
    ids, mask = tokens(), torch.ones(BATCH, LENGTH, dtype=torch.long)
    ids[1, -2:], mask[1, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def causal_labels(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = inputs["input_ids"]
    return {"labels": ids.masked_fill(inputs["attention_mask"] == 0, -100) if "attention_mask" in inputs else ids}


LM = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NEW = {"max_new_tokens": 5, "do_sample": False}


def causal(
    name: str, model: str, config: str, tied: bool = False, generate: dict[str, Any] | None = None, **options: Any
) -> Model:
    def build() -> nn.Module:
        return getattr(hf, model)(getattr(hf, config)(**{**LM, "tie_word_embeddings": tied, **options}))

    ties = (("model.embed_tokens.weight", "lm_head.weight"),) if tied else ()
    return Model(name, build, left_padded, causal_labels, NEW | (generate or {}), tied=ties)


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.15,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
            relative_attention_num_buckets=8, dropout_rate=0.0, feed_forward_proj="gated-gelu",
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    for block in model.decoder.block:  # else the tied embedding makes it repeat one token
        block.layer[-1].DenseReluDense.wo.weight.data *= 4
    return model


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            image_size=16, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
        )
    )  # fmt: skip


def clip() -> nn.Module:
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = hf.CLIPTextConfig(
        vocab_size=VOCABULARY, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0, **layers
    )
    vision = hf.CLIPVisionConfig(image_size=16, patch_size=8, **layers)
    return hf.CLIPModel(hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))


def clip_inputs() -> dict[str, torch.Tensor]:
    inputs = right_padded()
    inputs["input_ids"][:, -3] = 2  # the end of the text, where CLIP reads its embedding
    return {**inputs, "pixel_values": torch.randn(BATCH, 3, 16, 16)}


def whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16,
            max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
            suppress_tokens=[4, 5], begin_suppress_tokens=[6], init_std=0.15,
        )
    )  # fmt: skip


def mamba() -> nn.Module:
    return hf.MambaForCausalLM(
        hf.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, conv_kernel=3, time_step_rank=4,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def packed() -> dict[str, torch.Tensor]:
    ids, lengths = torch.randint(1, 40, (4, LENGTH)), torch.tensor([5, 8, 3, 7])
    return {"tokens": ids.masked_fill(torch.arange(LENGTH) >= lengths[:, None], 0), "lengths": lengths}


def cross() -> dict[str, torch.Tensor]:
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -3:] = True
    return {
        "query": torch.randn(BATCH, 5, 32),
        "key": torch.randn(BATCH, LENGTH, 24),
        "value": torch.randn(BATCH, LENGTH, 20),
        "padding": padding,
    }


ZOO = {
    model.name: model
    for model in (
        Model("resnet18", nets.ResNet18, lambda: {"x": torch.randn(4, 3, 64, 64)}),
        *(
            Model(f"unet-{up}", lambda up=up: nets.UNet(up), lambda: {"x": torch.randn(2, 3, 16, 16)})
            for up in ("transposed", "nearest", "bilinear", "bicubic")
        ),
        *(
            model
            for cell in ("LSTM", "GRU")
            for model in (
                Model(cell.lower(), lambda cell=cell: nets.TextClassifier(cell), lambda: {"tokens": packed()["tokens"]}),
                Model(f"{cell.lower()}-packed", lambda cell=cell: nets.TextClassifier(cell), packed, compiles=False),
            )
        ),
        Model("encoder", lambda: nets.EncoderClassifier(False), lambda: {"tokens": packed()["tokens"]}),
        Model("encoder-norm-first", lambda: nets.EncoderClassifier(True), lambda: {"tokens": packed()["tokens"]}),
        Model("attention", nets.SelfAttention, lambda: {"x": torch.randn(BATCH, LENGTH, 32)}),
        Model("attention-cross", nets.CrossAttention, cross),
        causal("llama", "LlamaForCausalLM", "LlamaConfig"),
        causal("llama-static-cache", "LlamaForCausalLM", "LlamaConfig", generate={"cache_implementation": "static"}),
        causal("mistral", "MistralForCausalLM", "MistralConfig", sliding_window=6),
        causal("mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
        causal("qwen2", "Qwen2ForCausalLM", "Qwen2Config", tied=True),
        causal("gemma", "GemmaForCausalLM", "GemmaConfig", tied=True, head_dim=8, num_key_value_heads=1),
        Model(
            "gpt2", gpt2, left_padded, causal_labels, NEW, tied=(("transformer.wte.weight", "lm_head.weight"),)
        ),
        Model(
            "bert", bert, right_padded, causal_labels,
            tied=(("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),),
        ),
        Model(
            "t5", t5, lambda: {**right_padded(), "labels": tokens()}, lambda inputs: {}, NEW,
            tied=(("shared.weight", "encoder.embed_tokens.weight"), ("shared.weight", "decoder.embed_tokens.weight")),
        ),
        Model("vit", vit, lambda: {"pixel_values": torch.randn(BATCH, 3, 16, 16)}, lambda inputs: {"labels": torch.tensor([1, 4])}),
        Model("clip", clip, clip_inputs, lambda inputs: {"return_loss": True}),
        Model(
            "whisper", whisper,
            lambda: {"input_features": torch.randn(BATCH, 8, 32), "decoder_input_ids": tokens(length=6)},
            lambda inputs: {"labels": inputs["decoder_input_ids"]}, NEW, prompt=("input_features",),
            tied=(("model.decoder.embed_tokens.weight", "proj_out.weight"),),
        ),
        Model(
            "mamba", mamba, lambda: {"input_ids": tokens()}, causal_labels, NEW, prompt=("input_ids",),
            tied=(("backbone.embeddings.weight", "lm_head.weight"),),
        ),
    )
}  # fmt: skip
