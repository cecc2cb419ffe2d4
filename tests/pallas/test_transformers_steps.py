"""Which kernels a train step of a `transformers` model uses, as the TPU compiler sees it; the model's code is as it comes."""

from __future__ import annotations

import pytest
import torch
import torchax
from torchax import interop

pytest.importorskip("torchax_ops_pallas")
transformers = pytest.importorskip("transformers")


def _model():
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        num_hidden_layers=2,
        max_position_embeddings=256,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def _step(model):
    def step(ids, **options):
        loss = model(ids, labels=ids, **options).loss
        loss.backward()
        return loss.detach()

    return step


@pytest.mark.tpu_aot
@pytest.mark.parametrize("scanned", [False, True])
def test_a_step_without_a_mask_uses_the_causal_kernel(scanned):
    pytest.importorskip("libtpu")
    with torch.device("meta"):
        model = _model()
        if scanned:
            model.model.layers = interop.scan_layers(model.model.layers)
    ids = torch.zeros(2, 128, dtype=torch.int64, device="meta")
    with torchax.config.override(pallas="required"):
        found = interop.aot_compile(_step(model), (ids,), "v5e:2x2", mesh={"data": 1})
    assert list(found.kernels.values()) == [2] * 3 and all("splash" in name for name in found.kernels)


def test_positions_of_packed_sequences_and_masks_still_count():
    """What is known is used, what is given is obeyed: equal to CPU."""
    torch.manual_seed(0)
    model = _model()
    ours = _model().to("jax")
    ours.load_state_dict(model.state_dict())
    ids = torch.randint(0, 64, (2, 12))
    packed = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    run = torchax.compile(lambda ids, **options: ours(ids, **options).logits)
    for options in ({}, {"position_ids": packed}, {"attention_mask": mask}):
        found = run(ids.to("jax"), **{k: t.to("jax") for k, t in options.items()})
        torch.testing.assert_close(found.cpu(), model(ids, **options).logits, rtol=1e-4, atol=1e-4)
