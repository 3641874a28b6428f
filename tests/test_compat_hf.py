"""transformers' ViTMAE, before and after `patch`."""

import copy
import pickle

import pytest
import torch
from peers import without

from sma_fast import compat


@pytest.fixture
def vit_mae():
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError as error:
        without(str(error))
    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=48,
        image_size=32,
        patch_size=4,
        mask_ratio=0.7,
        initializer_range=0.2,
    )
    return ViTMAEForPreTraining(config).eval()


@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.float64, None])
def test_vit_mae_computes_the_same(vit_mae, noise_dtype):
    # in double: sums in another order hardly differ, whatever the processor
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    noise = None if noise_dtype is None else torch.rand(3, 64, dtype=noise_dtype)
    vit_mae.double()

    def step():
        vit_mae.zero_grad()
        torch.manual_seed(5)
        output = vit_mae(images, noise=noise)
        output.loss.backward()
        return output, {k: p.grad for k, p in vit_mae.named_parameters() if p.grad is not None}

    before, grads_before = step()
    assert compat.patch(vit_mae) == ["vit.embeddings.random_masking"]
    after, grads = step()
    assert torch.equal(after.mask, before.mask)
    assert before.mask.sum(1).tolist() == [45.0] * 3
    for found, expected in ((after.loss, before.loss), (after.logits, before.logits)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads, grads_before, rtol=1e-9, atol=1e-9)
    vit_mae.config.mask_ratio = 0.5
    assert vit_mae(images, noise=noise).mask.sum(1).tolist() == [32.0] * 3
    for model in (copy.deepcopy(vit_mae), pickle.loads(pickle.dumps(vit_mae))):
        model.config.mask_ratio = 0.25  # its own, not the original's
        assert model(images, noise=noise).mask.sum(1).tolist() == [16.0] * 3
        assert vit_mae(images, noise=noise).mask.sum(1).tolist() == [32.0] * 3
        assert compat.patch(model) == ["vit.embeddings.random_masking"]
    vit_mae.config.mask_ratio = 0.7
    compat.unpatch(vit_mae)
    assert torch.equal(step()[0].logits, before.logits)


def test_hf_noise_that_float32_cannot_tell_apart(vit_mae):
    noise = 0.5 + torch.randperm(64)[None].double() * 1e-12
    x = torch.randn(1, 64, 3)
    theirs = vit_mae.vit.embeddings.random_masking(x, noise)
    ours = compat.hf_random_masking(x, noise, mask_ratio=0.7)
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(compat.hf_random_masking(x, noise)[1].sum(1), torch.tensor([48.0]))


def test_hf_noise_on_another_device():
    ours = compat.hf_random_masking(torch.empty(2, 8, 3, device="meta"), torch.rand(2, 8))
    assert [t.device.type for t in ours] == ["meta"] * 3 and ours[0].shape == (2, 2, 3)


def test_patched_vit_mae_compiles(vit_mae):
    compat.patch(vit_mae)
    images, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 64)
    compiled = torch.compile(vit_mae.vit.embeddings, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, noise), vit_mae.vit.embeddings(images, noise))
