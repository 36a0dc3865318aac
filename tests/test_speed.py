"""
What makes a step fast and small, as far as a machine without a GPU can tell: the target takes no more memory
than two layers, torch.compile finds one graph and stays with it, CUDA's kernels will take the attention bias.

    pytest tests/test_speed.py
"""
import weakref

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import distill_image
from model import Encoder, VisionLanguageModel, feature_target, kept_patches, random_patch_mask
from test_loops import records, run, teacher # two of them fixtures
from test_model import IMAGE, TEXT, assert_close, randn, shake

TEXT = {**TEXT, "depth": 2}


def ids_of(B, T):
    """ids (B, T) and their padding_mask, lengths from 2 on."""
    generator = torch.Generator().manual_seed(T)
    lengths = torch.randint(2, T + 1, (B, 1), generator=generator)
    return torch.randint(1, 50, (B, T), generator=generator), torch.arange(T) >= lengths


# -----------------------------------------------------------------------------
# the target, summed as the layers come


@pytest.mark.parametrize("instance_norm", [True, False])
def test_target_in_passing_equals_that_of_the_list(instance_norm):
    """Values and gradients, of all blocks and of the last, with and without padding, patches left out and
    embeddings made elsewhere."""
    image, text = (shake(Encoder(m, **{**c, "depth": 3})) for m, c in (("image", IMAGE), ("text", TEXT)))
    images, (ids, mask) = randn(4, 3, 32, 32), ids_of(4, 9)
    kept = kept_patches(random_patch_mask(4, 16, 0.5, torch.Generator().manual_seed(0)))
    for encoder, x, more in ((image, images, {}), (image, images, dict(kept=kept)), (text, ids, {}),
                             (text, ids, dict(padding_mask=mask)),
                             (image, image.embed(images).detach(), dict(embedded=True))):
        for n in (1, 2, 3):
            padding_mask, gradients = more.get("padding_mask"), []
            out = encoder(x, target_layers=n, instance_norm=instance_norm, **more)
            by_list = feature_target(encoder(x, return_layers=True, **more)[-n:], padding_mask, instance_norm)
            with torch.no_grad():
                alone = encoder(x, target_layers=n, instance_norm=instance_norm, **more)
            for other in (by_list, alone):
                assert_close(out, other, 1e-6)
            for y in (out, by_list):
                encoder.zero_grad()
                (y * randn(*y.shape)).sum().backward()
                gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
            for a, b in zip(*gradients, strict=True):
                assert_close(a, b, 1e-5 * b.abs().max().item())


def test_target_keeps_two_layers_at_most():
    encoder, layers, most = Encoder("image", **{**IMAGE, "depth": 6}), [], 0

    def note(module, args, out):
        nonlocal most
        layers.append(weakref.ref(out))
        most = max(most, sum(layer() is not None for layer in layers))
    for block in encoder.blocks:
        block.register_forward_hook(note)
    with torch.no_grad():
        encoder(randn(2, 3, 32, 32), target_layers=6)
        assert len(layers) == 6 and most == 2
        encoder(randn(2, 3, 32, 32), return_layers=True)
        assert most == 6


@pytest.mark.parametrize("share_embed, times", [(True, 1), (False, 2)])
def test_shared_embedding_runs_once(share_embed, times):
    teacher, student = (Encoder("image", **IMAGE) for _ in range(2))
    args, calls = distill_image.get_args(["--preset=shared_encoder", f"--share_embed={share_embed}"]), []
    for encoder in (teacher, student):
        encoder.patch_embed.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    plain = torch.autocast("cpu", enabled=False)
    distill_image.feature_loss(student, teacher, randn(2, 3, 32, 32), args, plain)
    assert len(calls) == times and not calls[0] # and without a graph


# -----------------------------------------------------------------------------
# attention bias


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("attn_bias", ["alibi", "relative", "relative_each"])
def test_bias_is_one_that_fused_kernels_take(modality, attn_bias):
    """On CUDA memory-efficient attention (flash takes no bias) wants the keys next to each other in memory;
    else torch writes out all logits. Nothing is repeated for each sample that is the same for all."""
    encoder = Encoder(modality, **{**(IMAGE if modality == "image" else TEXT), "attn_bias": attn_bias})
    T = 17 if modality == "image" else 9
    for dtype in (torch.float32, torch.bfloat16):
        bias = encoder.attention_bias(T).to(dtype)
        assert bias.shape == (1, 3, T, T) and bias.stride()[-2:] in ((T, 1), (12, 1))
    bias = encoder.attention_bias(T, torch.zeros(4, T, dtype=torch.bool))
    assert bias.shape == (4, 3, T, T) and bias.stride(-1) == 1
    if modality == "image":
        kept = kept_patches(random_patch_mask(4, 16, 0.5, torch.Generator().manual_seed(0)))
        assert encoder.attention_bias(T, None, 0, F.pad(kept + 1, (1, 0))).stride(-1) == 1


# -----------------------------------------------------------------------------
# torch.compile: Dynamo alone, so no compiler is needed


@pytest.fixture
def graphs():
    """graphs(model, batches) -> how many graphs torch.compile makes of these calls, backward included; it
    raises where a graph would break, for instance where the host waits for a number."""
    def count(model, batches, grad=True, **more):
        counter = CompileCounter()
        torch._dynamo.reset()
        expected = [model(*batch, **more) for batch in batches]
        model.compile(fullgraph=True, backend=counter)
        for batch, right in zip(batches, expected):
            with torch.set_grad_enabled(grad):
                out = model(*batch, **more)
                for a, b in zip(*((x,) if torch.is_tensor(x) else x for x in (out, right)), strict=True):
                    assert_close(a, b, 1e-5)
                if grad:
                    sum(x.sum() for x in ((out,) if torch.is_tensor(out) else out)).backward()
        return counter.frame_count
    yield count
    torch._dynamo.reset()


CALLS = [dict(), dict(target_layers=2), dict(return_layers=True)]


@pytest.mark.parametrize("more", CALLS, ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_encoders_are_one_graph(graphs, more, grad):
    images, kept = [(randn(4, 3, 32, 32, seed=i),) for i in range(3)], torch.arange(7).expand(4, -1)
    text = [ids_of(4, 9)] * 3
    for model, batches, words in ((Encoder("image", **IMAGE), images, more),
                                  (Encoder("image", **IMAGE, attn_bias="relative"), images, more),
                                  (Encoder("image", **IMAGE), images, {**more, "kept": kept}),
                                  (Encoder("text", **TEXT), [(ids,) for ids, _ in text], more),
                                  (Encoder("text", **TEXT, attn_bias="alibi"), text, more)):
        assert graphs(model, batches, grad, **words) == 1


@pytest.mark.parametrize("kwargs", [dict(token_types=True, head_dim=7, align_levels=2),
                                    dict(shared_kind="mlp"), dict(shared_kind="projection")], ids=str)
def test_students_are_one_graph(graphs, kwargs):
    batches = [(randn(4, 3, 32, 32, seed=i), *ids_of(4, 9)) for i in range(3)]
    assert graphs(VisionLanguageModel(IMAGE, TEXT, **kwargs), batches) == 1


def test_text_of_any_length_is_two_graphs(graphs):
    """Captions are padded to the longest of their batch: the second length makes a graph for all lengths, so
    there is nothing to gain from padding further."""
    batches = [(randn(4, 3, 32, 32), *ids_of(4, T)) for T in (9, 12, 5, 7, 10, 9, 3)]
    assert graphs(VisionLanguageModel(IMAGE, TEXT), batches) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name, knobs, most", [("features", {}, [2, 2]), ("views", {}, [2, 0]),
                                               ("queue", dict(micro_batch_size=8), [4, 2])])
def test_loops_compile_each_model_once(run, tmp_path, monkeypatch, name, knobs, most):
    """Student and teacher: one graph for training, one for validation; captions of any length and the pass
    without a graph that gradient caching makes double that. The losses are those without torch.compile."""
    counters, compile_module = [], torch.nn.Module.compile

    def counted(module):
        counters.append(CompileCounter())
        compile_module(module, fullgraph=True, backend=counters[-1])
    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    torch._dynamo.reset()
    for compiled in ("false", "true"):
        run(name, compiled, max_steps=9, eval_interval=4, compile=compiled, **knobs)
    losses = [[r["loss"] for r in records(tmp_path / out) if "loss" in r] for out in ("false", "true")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert [c.frame_count for c in counters] == most
