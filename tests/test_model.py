"""
model.py against slow second implementations; padding, parameter counts, checkpoints. Whole networks against
timm's and others' are tests/test_pretrained.py's.
"""
import atexit
import importlib.util
import math
import signal

import pytest
import torch
import torch.nn.functional as F

import model
import prepare_pairs
from conftest import assert_close, randn
from model import (Block, Encoder, VisionLanguageModel, alibi_bias, alibi_slopes, feature_target,
                   load_checkpoint, save_checkpoint)


def shake(module, seed=0):
    """Every parameter, norms and biases too, away from its initial value; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p + 0.2 * torch.randn(p.shape, generator=generator))
    return module.eval()


def test_import_leaves_the_program_alone(monkeypatch):
    """No hook at its end, and no signal taken: what it started is its own."""
    for module, name in ((atexit, "register"), (signal, "signal")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail(f"called with {args}"))
    spec = importlib.util.spec_from_file_location("another_model", model.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@torch.no_grad()
def test_alibi_by_hand():
    powers = [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5] # eight heads of n = 8, then every second of n = 16
    assert alibi_slopes(12).tolist() == pytest.approx([2 ** -p for p in powers])
    # two heads: slopes 1/16 and 1/256
    distance = torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    assert torch.equal(alibi_bias(2, length=3), torch.stack([-distance / 16, -distance / 256]))
    # CLS, then the 2 x 2 grid 0 1 / 2 3: 0 and 3 are two steps apart
    distance = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 2], [0, 1, 0, 2, 1], [0, 1, 2, 0, 1],
                             [0, 2, 1, 1, 0]])
    assert torch.equal(alibi_bias(2, grid=2), torch.stack([-distance / 16, -distance / 256]))
    # with equal queries and keys, attention is a softmax of the bias alone
    encoder = Encoder("text", 8, 1, 2, positions="none", attn_bias="alibi", max_length=6).eval()
    bias, attn, x = alibi_bias(2, length=4), encoder.blocks[0].attn, randn(1, 4, 8)
    attn.qkv.weight[:16] = 0
    attn.proj.weight.copy_(torch.eye(8))
    v = F.linear(x, attn.qkv.weight[16:])[0].view(4, 2, 4) # (T, h, d)
    by_hand = torch.einsum("hij,jhd->ihd", bias.softmax(-1), v).reshape(1, 4, 8)
    assert_close(attn(x, encoder.attention_bias(4)), by_hand, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("attn_bias", ["none", "alibi"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_padding_changes_no_other_token(attn_bias, norm_first):
    encoder = shake(Encoder("text", 48, 2, 3, norm_first=norm_first, attn_bias=attn_bias, vocab_size=50,
                            max_length=12))
    ids = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([7, 4])
    whole = [encoder(ids[i:i + 1, :n], return_layers=True) for i, n in enumerate(lengths)]
    for T, filler in ((7, 0), (7, 3), (12, 0)): # other padding, more padding
        padding_mask = torch.arange(T) >= lengths[:, None]
        layers = encoder(torch.where(padding_mask, filler, ids[:, :T]), padding_mask, return_layers=True)
        assert all(x.isfinite().all() for x in layers)
        for i, n in enumerate(lengths):
            for a, b in zip(layers, whole[i], strict=True):
                assert_close(a[i:i + 1, :n], b, 5e-5) # of values up to 7
    # and without the mask it would have changed them
    assert (encoder(ids[:, :7])[1, :4] - whole[1][-1][0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="13 tokens.*max_length=12"):
        encoder(torch.ones(1, 13, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("settings", [dict(attn_bias="none"), dict(attn_bias="alibi"),
                                      dict(attn_bias="relative"), dict(positions="rope", registers=2)])
def test_patches_left_out_are_as_if_never_attended_to(settings):
    encoder = shake(Encoder("image", embed_dim=24, depth=3, num_heads=3 if "attn_bias" in settings else 2,
                            img_size=32, patch_size=8, **settings))
    first = 1 + settings.get("registers", 0) # patches begin there
    images, hidden = randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, [0, 5, 6]], hidden[1, [2, 3, 15]] = True, True
    kept = (~hidden).nonzero()[:, 1].view(2, -1) # (2, 13)
    ours, x = encoder(images, kept=kept, return_layers=True), encoder.embed(images)
    tokens = F.pad(kept + first, (1, 0)) # of the output, registers are none of it
    bias = encoder.attention_bias(16 + first, F.pad(hidden, (first, 0)))
    for i, block in enumerate(encoder.blocks): # the slow way: all tokens, the hidden ones masked like padding
        x = block(x, bias, rope=getattr(encoder, "rope", None))
        assert_close(ours[i], x.gather(1, tokens[..., None].expand(-1, -1, 24)), 5e-5)
    assert_close(encoder(images, kept=torch.arange(16).expand(2, -1)), encoder(images), 5e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_of_the_cls_token_alone(norm_first):
    """The output, what its MLP gets, and every gradient are those of the whole block."""
    block, results = shake(Block(48, 3, norm_first=norm_first, layer_scale=0.2)), []
    real = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    for cls_only in (True, False):
        x, mlp_in = randn(3, 7, 48).requires_grad_(), []
        hook = block.mlp.register_forward_hook(lambda module, args, out: mlp_in.append(args[0][:, 0]))
        out = block(x, real[:, None, None], cls_only=cls_only)
        hook.remove()
        cls, hidden = out if cls_only else (out[:, 0], mlp_in[0])
        loss = (cls * randn(3, 48, seed=1)).sum() + (hidden * randn(3, 48, seed=2)).sum()
        results.append([cls, hidden, mlp_in[0], *torch.autograd.grad(loss, [x, *block.parameters()])])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-5 * max(1, b.abs().max().item()))


def reference_target(layers):
    """Eq. 36-38 with the library's own norms: (B, T, D) each."""
    normed = [F.instance_norm(x.float().transpose(1, 2)).transpose(1, 2) for x in layers]
    return F.layer_norm(torch.stack(normed).mean(0), layers[0].shape[-1:])


def test_feature_target():
    # by hand: two tokens, three channels; over its tokens each channel has mean 0, and deviation 1, 2, 0:
    # instance norm gives (1, 1, 0) and (-1, -1, 0). LayerNorm of (1, 1, 0): mean 2/3, variance 2/9 ->
    # (1/3, 1/3, -2/3) / sqrt(2)/3
    layer = torch.tensor([[[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0]]])
    expected = torch.tensor([1.0, 1.0, -2.0]) / math.sqrt(2)
    assert_close(feature_target([layer]), torch.stack([expected, -expected])[None], 1e-4)
    # by the library's norms
    layers = [3 * randn(2, 7, 16, seed=i) + i for i in range(3)]
    assert_close(feature_target(layers), reference_target(layers), 1e-5)
    half = [x.bfloat16() for x in layers]
    assert feature_target(half).dtype == torch.float32
    assert_close(feature_target(half), reference_target(half), 1e-5)
    # statistics over real tokens only
    padding_mask = torch.arange(7) >= torch.tensor([7, 4])[:, None]
    target = feature_target([x.masked_fill(padding_mask[..., None], 1e4) for x in layers], padding_mask)
    for i, n in enumerate((7, 4)):
        assert_close(target[i, :n], reference_target([x[i:i + 1, :n] for x in layers])[0], 1e-5)


IMAGE = dict(embed_dim=48, depth=2, num_heads=3, img_size=32, patch_size=8)
TEXT = dict(embed_dim=48, depth=1, num_heads=3, vocab_size=50, max_length=12)
S_SMKE = dict(shared=dict(layer_scale=0.2, key_bias=False), token_scale=1e-5, align_levels=2)
KINDS = {"transformer": {}, "smke": S_SMKE, "mlp": dict(shared_kind="mlp", align_levels=2),
         "projection": dict(shared_kind="projection", token_types=False)}


def student(**kwargs):
    torch.manual_seed(0)
    return shake(VisionLanguageModel(IMAGE, TEXT, **{"token_types": True, "head_dim": 10, **kwargs}))


def batch():
    ids = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    return randn(3, 3, 32, 32), ids, torch.arange(6) >= torch.tensor([6, 3, 4])[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_student(kind):
    """Embeddings are the CLS tokens, normed; padding is masked; every parameter gets a gradient."""
    net, (images, ids, padding_mask) = student(**KINDS[kind]), batch()
    outputs = net(images, ids, padding_mask)
    embeddings = net.encode_image(images), net.encode_text(ids, padding_mask)
    for emb, cls in zip(embeddings, outputs):
        assert emb.dtype == torch.float32
        assert_close(emb, cls / cls.square().sum(-1, keepdim=True).sqrt(), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert net.encode_image(images).dtype == net.encode_text(ids).dtype == torch.float32
    for i, a in enumerate(net(images[:1], ids[1:2, :3])):
        assert_close(a, outputs[i][i % 2:i % 2 + 1], 5e-5)
    levels = net.config["align_levels"]
    assert [x.shape[1] for x in outputs] == [48, 48, 10, 10] + [192, 192] * (levels - 1)
    sum((x * randn(*x.shape, seed=i)).sum() for i, x in enumerate(outputs)).backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == ["log_scale"] and net.log_scale.numel() == levels # only the contrastive loss uses it


@torch.no_grad()
def test_shared_mlp_and_projections_by_hand():
    """SHRe's three linear layers of the CLS token, of which the third is the head's; CLIP's of no bias."""
    net, (images, ids, padding_mask) = student(**KINDS["mlp"]), batch()
    w = net.state_dict()

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], 1e-6)

    outputs = net(images, ids, padding_mask)
    for k, x in enumerate((net.image_encoder(images), net.text_encoder(ids, padding_mask))):
        # text is row 0 of the token types
        inner = (x[:, 0] + w["token_type"][1 - k]) @ w["blocks.0.fc1.weight"].T + w["blocks.0.fc1.bias"]
        hidden = norm(F.gelu(inner), "blocks.0.norm")
        cls = hidden @ w["blocks.0.fc2.weight"].T + w["blocks.0.fc2.bias"]
        out = norm(cls, "head.0") @ w["head.1.weight"].T + w["head.1.bias"]
        for a, b in zip(outputs[k::2], (cls, out, inner), strict=True):
            assert_close(a, b, 1e-4)
    net = student(**KINDS["projection"])
    w = net.state_dict()
    assert {k for k in w if k.startswith(("blocks", "token_type"))} == {"blocks.0.weight", "blocks.1.weight"}
    text = net.text_encoder(ids, padding_mask)[:, 0] @ w["blocks.0.weight"].T
    image = net.image_encoder(images)[:, 0] @ w["blocks.1.weight"].T
    assert_close(net.encode_text(ids, padding_mask), F.normalize(text, dim=-1), 1e-6)
    assert_close(net.encode_image(images), F.normalize(image, dim=-1), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_an_encoder_pools_as_its_checkpoint_says(pool, tmp_path):
    """An image's mean is without CLS, a text's of all that is no padding. Loaded, it is frozen."""
    images, ids, padding_mask = batch()
    image, text = (shake(Encoder(m, **c, pool=pool)) for m, c in (("image", IMAGE), ("text", TEXT)))
    tokenizer = prepare_pairs.train_wordpiece(["a red square", "two blue circles"], 50)
    save_checkpoint(tmp_path / "image.pt", image)
    save_checkpoint(tmp_path / "text.pt", text, tokenizer=tokenizer)
    h, t = image(images), text(ids, padding_mask)
    expected = h[:, 0], t[:, 0]
    if pool == "mean":
        expected = h[:, 1:].mean(1), torch.stack([x[~m].mean(0) for x, m in zip(t, padding_mask)])
    image, text = load_checkpoint(tmp_path / "image.pt"), load_checkpoint(tmp_path / "text.pt")
    assert_close(image.encode_image(images), F.normalize(expected[0], dim=-1), 1e-6)
    assert_close(text.encode_text(ids, padding_mask), F.normalize(expected[1], dim=-1), 1e-6)
    assert not hasattr(image, "encode_text") and not hasattr(text, "encode_image")
    assert text.tokenizer.text == tokenizer and text.max_length == 12
    assert not text.training and not any(p.requires_grad for p in text.parameters())
