"""
model.py against timm, transformers and slow second implementations; padding, parameter counts, checkpoints.

    pytest tests/test_model.py
"""
import functools
import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F

import prepare_pairs
from model import (Encoder, Tokenizer, VisionLanguageModel, alibi_bias, alibi_slopes, feature_target,
                   load_checkpoint, load_weights, relative_position_index, save_atomic,
                   save_checkpoint, sincos_2d)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shake(module, seed=0):
    """Every parameter, norms and biases too, away from its initial value; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p + 0.2 * torch.randn(p.shape, generator=generator))
    return module.eval()


def assert_close(a, b, tolerance=1e-4):
    assert a.shape == b.shape, (a.shape, b.shape)
    assert (a - b).abs().max() <= tolerance, (a - b).abs().max()


# -----------------------------------------------------------------------------
# parity with reference code


@torch.no_grad()
def test_every_block_equals_timm_beit():
    beit = pytest.importorskip("timm.models.beit")
    theirs = shake(beit.Beit(img_size=32, patch_size=8, num_classes=0, embed_dim=48, depth=4, num_heads=3,
                             init_values=0.1, use_abs_pos_emb=False, use_shared_rel_pos_bias=True,
                             norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6)))
    ours = Encoder("image", 48, 4, 3, layer_scale=0.1, key_bias=False, positions="none", attn_bias="relative",
                   final_norm=True, img_size=32, patch_size=8).eval()
    weights = {k.replace("rel_pos_bias.", "").replace("fc_norm.", "norm."): v[None] if "table" in k else v
               for k, v in theirs.state_dict().items()}
    load_weights(ours, weights, "timm")
    images, theirs_layers = randn(2, 3, 32, 32), []
    for block in theirs.blocks:
        block.register_forward_hook(lambda m, args, out: theirs_layers.append(out))
    theirs.forward_features(images)
    ours_layers = ours(images, return_layers=True)
    assert len(ours_layers) == len(theirs_layers) == 4
    for a, b in zip(ours_layers, theirs_layers):
        assert_close(a, b)
    assert_close(ours(images), theirs.fc_norm(theirs_layers[-1])) # only the end is normed


@torch.no_grad()
def test_every_block_equals_timm_vit():
    vit = pytest.importorskip("timm.models.vision_transformer")
    theirs = shake(vit.VisionTransformer(img_size=32, patch_size=8, num_classes=0, embed_dim=48, depth=3,
                                         num_heads=3, mlp_ratio=2, no_embed_class=True))
    ours = Encoder("image", 48, 3, 3, mlp_ratio=2, positions="learned", final_norm=True, img_size=32,
                   patch_size=8).eval()
    load_weights(ours, theirs.state_dict(), "timm")
    images = randn(2, 3, 32, 32)
    for a, b in zip(ours(images, return_layers=True), theirs.forward_intermediates(
            images, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)):
        assert_close(a, torch.cat([b[1], b[0]], dim=1)) # timm gives patches and CLS apart
    assert_close(ours(images), theirs.forward_features(images))


def from_bert(weights):
    """transformers' BertModel -> the names of our Encoder."""
    names = {"embeddings.word_embeddings": "token_embed", "embeddings.token_type_embeddings": "type_embed",
             "embeddings.LayerNorm": "embed_norm", "attention.output.dense": "attn.proj",
             "attention.output.LayerNorm": "norm1", "intermediate.dense": "mlp.fc1",
             "output.dense": "mlp.fc2", "output.LayerNorm": "norm2", "encoder.layer": "blocks"}
    out, qkv = {}, ("query", "key", "value")
    for key, value in weights.items():
        if "attention.self.query" in key:
            new = key.replace("encoder.layer", "blocks").replace("attention.self.query", "attn.qkv")
            out[new] = torch.cat([weights[key.replace("query", part)] for part in qkv])
        elif key == "embeddings.position_embeddings.weight":
            out["pos_embed"] = value[None]
        elif "attention.self" not in key and "position_ids" not in key:
            for theirs, ours in names.items():
                key = key.replace(theirs, ours)
            out[key] = value
    return out


@torch.no_grad()
def test_every_layer_equals_transformers_bert():
    transformers = pytest.importorskip("transformers")
    theirs = shake(transformers.BertModel(transformers.BertConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=12, type_vocab_size=2), add_pooling_layer=False))
    ours = Encoder("text", 48, 3, 3, mlp_ratio=2, norm_first=False, eps=1e-12, positions="learned",
                   embed_norm=True, vocab_size=50, max_length=12, token_types=2).eval()
    load_weights(ours, from_bert(theirs.state_dict()), "transformers")
    ids = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    types = (torch.arange(9) > 4).long().expand(3, 9)
    padding_mask = torch.arange(9) >= torch.tensor([9, 6, 2])[:, None]
    for mask, token_types in itertools.product((None, padding_mask), (None, types)):
        real = torch.ones(3, 9, dtype=torch.bool) if mask is None else ~mask
        hidden = theirs(ids, attention_mask=None if mask is None else (~mask).long(),
                        token_type_ids=token_types, output_hidden_states=True).hidden_states
        assert_close(ours.embed(ids, token_types), hidden[0])
        layers = ours(ids, mask, return_layers=True, token_type_ids=token_types)
        for a, b in zip(layers, hidden[1:], strict=True):
            assert_close(a[real], b[real])
    assert (ours(ids, token_type_ids=types) - ours(ids)).abs().max() > 1e-2


def data2vec2(w, images, heads, grid):
    """data2vec 2.0: conv, + positions, CLS in front, LN; x = x + attn(x); r = norm1(x);
    x = norm2(r + mlp(r)). eps 1e-6."""
    B, D = len(images), w["cls_token"].shape[-1]
    d = D // heads

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"],
                 stride=images.shape[-1] // grid)
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"] # (B, N, D), row-major
    x = norm(torch.cat([w["cls_token"].expand(B, 1, D), x], dim=1), "embed_norm")
    layers = []
    for i in range(sum(k.endswith("norm1.weight") for k in w)):
        b = f"blocks.{i}."
        q, k, v = linear(x, b + "attn.qkv").split(D, dim=-1)
        out = []
        for h in range(heads):
            c = slice(h * d, (h + 1) * d)
            logits = q[..., c] @ k[..., c].transpose(1, 2) * d ** -0.5
            weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
            out.append(weights @ v[..., c])
        r = norm(x + linear(torch.cat(out, dim=-1), b + "attn.proj"), b + "norm1")
        hidden = linear(r, b + "mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = norm(r + linear(hidden, b + "mlp.fc2"), b + "norm2")
        layers.append(x)
    return layers


@torch.no_grad()
def test_data2vec2_image_layout_equals_its_equations():
    ours = shake(Encoder("image", 48, 3, 3, norm_first=False, embed_norm=True, img_size=32, patch_size=8))
    images = randn(2, 3, 32, 32)
    for a, b in zip(ours(images, return_layers=True), data2vec2(ours.state_dict(), images, 3, 4),
                    strict=True):
        assert_close(a, b)
    assert torch.equal(ours(images), ours(images, return_layers=True)[-1]) # no final norm


# -----------------------------------------------------------------------------
# positions and biases


def test_sincos_positions_equal_their_formula():
    D, grid = 16, 3
    ours = sincos_2d(grid, D)
    for row, col, half, k in itertools.product(range(grid), range(grid), range(2), range(D // 4)):
        angle = (col, row)[half] * 10000 ** (-k / (D // 4)) # first half the column, second the row
        patch, channel = row * grid + col, half * D // 2 + k
        assert abs(ours[patch, channel] - math.sin(angle)) < 1e-6
        assert abs(ours[patch, channel + D // 4] - math.cos(angle)) < 1e-6


def test_cls_token_of_an_image_has_no_position():
    encoder = shake(Encoder("image", 48, 1, 3, img_size=32, patch_size=8))
    x = encoder.embed(torch.zeros(1, 3, 32, 32))
    assert torch.equal(x[:, 0], encoder.cls_token[0])
    assert_close(x[:, 1:] - encoder.patch_embed.proj.bias, encoder.pos_embed, 1e-5)


def test_alibi_slopes_of_12_heads():
    powers = [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5] # eight heads of n = 8, then every second of n = 16
    assert alibi_slopes(12).tolist() == pytest.approx([2 ** -p for p in powers])
    assert alibi_slopes(8).tolist() == pytest.approx([2.0 ** -p for p in range(1, 9)])


def test_alibi_bias_by_hand():
    # two heads: slopes 1/16 and 1/256
    distance = torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    assert torch.equal(alibi_bias(2, length=3), torch.stack([-distance / 16, -distance / 256]))
    # CLS, then the 2 x 2 grid 0 1 / 2 3: 0 and 3 are two steps apart
    distance = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 2], [0, 1, 0, 2, 1], [0, 1, 2, 0, 1],
                             [0, 2, 1, 1, 0]])
    assert torch.equal(alibi_bias(2, grid=2), torch.stack([-distance / 16, -distance / 256]))


def test_relative_position_index():
    beit = pytest.importorskip("timm.models.beit")
    for grid in (2, 3, 14):
        index, rows = relative_position_index(grid)
        assert torch.equal(index, beit.gen_relative_position_index((grid, grid)))
        assert rows == int(index.max()) + 1
    assert rows == 732


@torch.no_grad()
def test_alibi_is_added_to_the_logits():
    """With equal queries and keys, attention is a softmax of the bias alone."""
    encoder = Encoder("text", 8, 1, 2, positions="none", attn_bias="alibi", max_length=6).eval()
    bias = encoder.attention_bias(4)[0] # (h, 4, 4)
    assert torch.equal(bias, alibi_bias(2, length=6)[:, :4, :4])
    attn = encoder.blocks[0].attn
    attn.qkv.weight[:16] = 0
    attn.proj.weight.copy_(torch.eye(8))
    x = randn(1, 4, 8)
    v = F.linear(x, attn.qkv.weight[16:])[0].view(4, 2, 4) # (T, h, d)
    by_hand = torch.einsum("hij,jhd->ihd", bias.softmax(-1), v).reshape(1, 4, 8)
    assert_close(attn(x, bias[None]), by_hand, 1e-6)


# -----------------------------------------------------------------------------
# padding


KINDS = list(itertools.product(("none", "alibi"), (True, False)))


def text_encoder(attn_bias, norm_first, **kwargs):
    return shake(Encoder("text", 48, 2, 3, norm_first=norm_first, positions="learned", attn_bias=attn_bias,
                         vocab_size=50, max_length=12, **kwargs))


@torch.no_grad()
@pytest.mark.parametrize("attn_bias,norm_first", KINDS)
def test_padding_changes_no_other_token(attn_bias, norm_first):
    encoder = text_encoder(attn_bias, norm_first)
    ids = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([7, 4])
    whole = [encoder(ids[i:i + 1, :n], return_layers=True) for i, n in enumerate(lengths)]
    for T, filler in ((7, 0), (7, 3), (12, 0)): # other padding, more padding
        padding_mask = torch.arange(T) >= lengths[:, None]
        layers = encoder(torch.where(padding_mask, filler, ids[:, :T]), padding_mask, return_layers=True)
        assert all(x.isfinite().all() for x in layers)
        for i, n in enumerate(lengths):
            for a, b in zip(layers, whole[i], strict=True):
                assert_close(a[i:i + 1, :n], b, 1e-5)
    # and without the mask it would have changed them
    assert (encoder(ids[:, :7])[1, :4] - whole[1][-1][0]).abs().max() > 1e-3


@pytest.mark.parametrize("attn_bias", ["none", "alibi", "relative"])
@torch.no_grad()
def test_patches_left_out_are_as_if_never_attended_to(attn_bias):
    model = shake(Encoder("image", embed_dim=24, depth=3, num_heads=3, img_size=32, patch_size=8,
                          attn_bias=attn_bias))
    images, hidden = randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, [0, 5, 6]], hidden[1, [2, 3, 15]] = True, True
    kept = (~hidden).nonzero()[:, 1].view(2, -1) # (2, 13)
    ours, x, tokens = (model(images, kept=kept, return_layers=True), model.embed(images),
                       F.pad(kept + 1, (1, 0)))
    bias = model.attention_bias(17, F.pad(hidden, (1, 0)))
    for i, block in enumerate(model.blocks): # the slow way: all tokens, the hidden ones masked as padding is
        x = block(x, bias)
        assert_close(ours[i], x.gather(1, tokens[..., None].expand(-1, -1, 24)), 1e-5)
    assert_close(model(images, kept=torch.arange(16).expand(2, -1)), model(images), 1e-5)


def test_text_longer_than_max_length_is_an_error():
    with pytest.raises(ValueError, match="13 tokens.*max_length=12"):
        text_encoder("none", True)(torch.ones(1, 13, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_encode_pools_real_tokens(pool):
    encoder = text_encoder("none", True, pool=pool)
    ids, padding_mask = torch.arange(1, 13).view(2, 6), torch.arange(6) >= torch.tensor([6, 4])[:, None]
    h = encoder(ids, padding_mask)
    expected = h[:, 0] if pool == "cls" else torch.stack([h[0].mean(0), h[1, :4].mean(0)])
    assert_close(encoder.encode(ids, padding_mask), F.normalize(expected, dim=-1), 1e-6)


# -----------------------------------------------------------------------------
# feature target


def reference_target(layers):
    """Eq. 36-38 with the library's own norms: (B, T, D) each."""
    normed = [F.instance_norm(x.float().transpose(1, 2)).transpose(1, 2) for x in layers]
    return F.layer_norm(torch.stack(normed).mean(0), layers[0].shape[-1:])


def test_feature_target_equals_the_library_norms():
    layers = [3 * randn(2, 7, 16, seed=i) + i for i in range(3)]
    assert_close(feature_target(layers), reference_target(layers), 1e-5)
    padding_mask = torch.arange(7) >= torch.tensor([7, 4])[:, None]
    padded = [x.masked_fill(padding_mask[..., None], 1e4) for x in layers]
    target = feature_target(padded, padding_mask)
    for i, n in enumerate((7, 4)):
        assert_close(target[i, :n], reference_target([x[i:i + 1, :n] for x in layers])[0], 1e-5)


def test_feature_target_of_half_precision_is_float32():
    layers = [randn(2, 7, 16, seed=i).bfloat16() for i in range(2)]
    assert feature_target(layers).dtype == torch.float32
    assert_close(feature_target(layers), reference_target(layers), 1e-5)


def test_feature_target_by_hand():
    # two tokens, three channels; over its tokens each channel has mean 0, and deviation 1, 2, 0: instance
    # norm gives (1, 1, 0) and (-1, -1, 0). LayerNorm of (1, 1, 0): mean 2/3, variance 2/9 ->
    # (1/3, 1/3, -2/3) / sqrt(2)/3
    layer = torch.tensor([[[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0]]])
    expected = torch.tensor([1.0, 1.0, -2.0]) / math.sqrt(2)
    assert_close(feature_target([layer]), torch.stack([expected, -expected])[None], 1e-4)


# -----------------------------------------------------------------------------
# the vision-language student


IMAGE = dict(embed_dim=48, depth=2, num_heads=3, img_size=32, patch_size=8)
TEXT = dict(embed_dim=48, depth=1, num_heads=3, vocab_size=50, max_length=12, positions="learned")


def student(**kwargs):
    torch.manual_seed(0)
    return shake(VisionLanguageModel(IMAGE, TEXT,
                                     **{"shared_depth": 1, "token_types": True, "head_dim": 10, **kwargs}))


def batch():
    ids = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    return randn(3, 3, 32, 32), ids, torch.arange(6) >= torch.tensor([6, 3, 4])[:, None]


@torch.no_grad()
def test_student_outputs():
    model, (images, ids, padding_mask) = student(), batch()
    image_cls, text_cls, image_out, text_out = model(images, ids, padding_mask)
    assert image_cls.shape == text_cls.shape == (3, 48) and image_out.shape == text_out.shape == (3, 10)
    for emb, cls in ((model.encode_image(images), image_cls),
                     (model.encode_text(ids, padding_mask), text_cls)):
        assert emb.dtype == torch.float32
        assert_close(emb, cls / cls.square().sum(-1, keepdim=True).sqrt(), 1e-6)
    # padding is masked in the shared block too
    assert_close(text_cls[1:2], model(images[:1], ids[1:2, :3])[1], 1e-5)
    assert torch.equal(student(head_dim=0)(images, ids)[2], student(head_dim=0)(images, ids)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode_image(images).dtype == torch.float32


def test_word_classifier_starts_at_chance():
    """Its loss at the start is the logarithm of the vocabulary, whatever the embedding."""
    words = VisionLanguageModel(IMAGE, TEXT, words=True).words
    assert_close(words(randn(4, 48)).log_softmax(1), torch.full((4, 50), -math.log(50)), 1e-6)


@torch.no_grad()
def test_token_types_and_shared_blocks_matter():
    model, (images, ids, padding_mask) = student(), batch()
    before = model(images, ids, padding_mask)
    model.token_type[1] += randn(48) # the image's row
    after = model(images, ids, padding_mask)
    assert (before[0] - after[0]).abs().max() > 1e-3 and torch.equal(before[1], after[1])
    model.blocks[0].mlp.fc2.bias += 1
    assert not torch.equal(after[0], model(images, ids, padding_mask)[0])
    assert not torch.equal(after[1], model(images, ids, padding_mask)[1])
    assert "token_type" not in student(token_types=False).state_dict()


S_SMKE = dict(shared=dict(layer_scale=0.2, key_bias=False), token_scale=1e-5, align_levels=2)


@pytest.mark.parametrize("norm_first", [True, False])
@torch.no_grad()
def test_levels_of_a_shared_block(norm_first):
    """The inner level is what GELU gets in the last shared block, of the CLS token; the other outputs are
    those of a model without it."""
    model = student(align_levels=2, shared_depth=2, shared=dict(norm_first=norm_first))
    seen = []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda m, args, out: seen.append(out))
    images, ids, padding_mask = batch()
    outputs = model(images, ids, padding_mask)
    in_block = [x[:, 0] for x in seen if x.ndim == 3] # of image, of text
    assert_close(outputs[4], in_block[0], 1e-6)
    assert_close(outputs[5], in_block[1], 1e-6)
    assert outputs[4].shape == (3, 192) and model.log_scale.shape == (2,)
    one = student(shared_depth=2, shared=dict(norm_first=norm_first))
    one.load_state_dict({**model.state_dict(), "log_scale": model.log_scale[0]})
    assert len(one(images, ids, padding_mask)) == 4
    for a, b in zip(one(images, ids, padding_mask), outputs):
        assert torch.equal(a, b)


@torch.no_grad()
def test_shared_mlp_by_hand():
    """SHRe's three linear layers of the CLS token: the third is the head's."""
    model, (images, ids, padding_mask) = student(shared_kind="mlp", align_levels=2), batch()
    w = model.state_dict()

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    outputs = model(images, ids, padding_mask)
    encoded = (model.image_encoder(images), model.text_encoder(ids, padding_mask))
    for k, x in enumerate(encoded): # text is row 0 of the token types
        inner = (x[:, 0] + w["token_type"][1 - k]) @ w["blocks.0.fc1.weight"].T + w["blocks.0.fc1.bias"]
        hidden = norm(inner * (1 + torch.erf(inner / math.sqrt(2))) / 2, "blocks.0.norm")
        cls = hidden @ w["blocks.0.fc2.weight"].T + w["blocks.0.fc2.bias"]
        out = norm(cls, "head.0") @ w["head.1.weight"].T + w["head.1.bias"]
        for a, b in zip(outputs[k::2], (cls, out, inner), strict=True):
            assert_close(a, b, 1e-4)
    assert_close(model.encode_image(images), F.normalize(outputs[0], dim=-1), 1e-6)


@torch.no_grad()
def test_projections_of_clip():
    model, (images, ids, padding_mask) = student(shared_kind="projection", token_types=False), batch()
    w = model.state_dict()
    assert {k for k in w if k.startswith("blocks")} == {"blocks.0.weight", "blocks.1.weight"} # no bias
    text = model.text_encoder(ids, padding_mask)[:, 0] @ w["blocks.0.weight"].T
    image = model.image_encoder(images)[:, 0] @ w["blocks.1.weight"].T
    assert_close(model.encode_text(ids, padding_mask), F.normalize(text, dim=-1), 1e-6)
    assert_close(model.encode_image(images), F.normalize(image, dim=-1), 1e-6)


def test_token_types_with_a_scale():
    """S-SMKE's: a LayerScale of 1e-5 on what is added."""
    torch.manual_seed(0)
    model = VisionLanguageModel(IMAGE, TEXT, token_types=True, **S_SMKE)
    assert model.token_type_scale.tolist() == pytest.approx([1e-5] * 48)
    x = randn(2, 5, 48)
    plain = VisionLanguageModel(IMAGE, TEXT, **{**S_SMKE, "token_scale": None})
    plain.blocks.load_state_dict(model.blocks.state_dict())
    for modality in (0, 1):
        typed = plain.shared_levels(x + 1e-5 * model.token_type[modality], modality)
        assert_close(model.shared_levels(x, modality)[0], typed[0], 1e-6)
    text, image = (model.shared_levels(1e-3 * x, modality)[0] for modality in (0, 1))
    assert not torch.equal(text, image)


@pytest.mark.parametrize("kwargs", [{}, S_SMKE, dict(shared_kind="mlp", align_levels=2),
                                    dict(shared_kind="projection")], ids=str)
def test_every_parameter_gets_a_gradient(kwargs):
    model = student(**kwargs)
    sum((x * randn(*x.shape, seed=i)).sum() for i, x in enumerate(model(*batch()))).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == ["log_scale"] # only the contrastive loss uses it
    assert model.config["align_levels"] == model.log_scale.numel()


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_of_the_published_models():
    with torch.device("meta"):
        image = {depth: Encoder("image", depth=depth, norm_first=False, embed_norm=True) for depth in (6, 12)}
        bert = Encoder("text", depth=6, norm_first=False, eps=1e-12, positions="learned", embed_norm=True,
                       token_types=2)
    assert count(image[12].blocks[0]) == 7_087_872
    assert round(count(image[6]) / 1e6, 2) == 43.12
    # with the fixed positions
    assert round((count(image[12]) + image[12].pos_embed.numel()) / 1e6, 2) == 85.80
    assert round(count(bert) / 1e6, 2) == 66.36


def test_parameter_counts_of_the_multimodal_systems():
    """SHRe_T with a shared Transformer and S-SMKE are published as 117M, with the shared MLP as 114.2M: image
    42.3, text 66.4, shared 5.5. Ours has 115.0: text and shared MLP are the same, but these six image blocks
    have 43.1M, as the thesis says of its image student."""
    image = dict(depth=6, norm_first=False, embed_norm=True)
    bert = dict(depth=6, norm_first=False, eps=1e-12, positions="learned", embed_norm=True, token_types=2)
    gpt2 = dict(depth=5, norm_first=False, eps=1e-5, positions="learned", embed_norm=True, vocab_size=50265)
    block = dict(layer_scale=0.2, key_bias=False)
    with torch.device("meta"):
        mlp = VisionLanguageModel(image, bert, head_dim=1000, shared_kind="mlp", align_levels=2)
        shre = VisionLanguageModel(image, bert, head_dim=1000, shared=block, align_levels=2)
        smke = VisionLanguageModel(image, bert, head_dim=768, token_types=True,
                                   **{**S_SMKE, "shared": block})
        clip = VisionLanguageModel(image, bert, shared_kind="projection")
        mmd2v2 = VisionLanguageModel({**image, "depth": 5}, gpt2, shared=dict(norm_first=False))
    millions = [round(count(m) / 1e6, 2) for m in (mlp, shre, smke, clip, mmd2v2)]
    assert millions == [114.98, 117.34, 117.17, 110.66, 117.56]
    parts = (mlp.image_encoder, mlp.text_encoder, mlp.blocks, mlp.head)
    assert [round(count(m) / 1e6, 2) for m in parts] == [43.12, 66.36, 4.73, 0.77] # the last two: 5.5


def test_init_is_berts_and_scales_with_the_width():
    for D, std in ((768, 0.02), (192, 0.04)):
        encoder = Encoder("image", D, 1, 3, img_size=32, patch_size=8)
        for m in encoder.modules():
            if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)):
                assert m.weight.std().item() == pytest.approx(std, rel=0.05) and m.bias.abs().max() == 0


# -----------------------------------------------------------------------------
# checkpoints and atomic files


TOKENIZER = prepare_pairs.train_wordpiece(["a red square", "two blue circles"], 50)


@torch.no_grad()
def test_checkpoint_round_trip(tmp_path):
    model, (images, ids, padding_mask), path = student(), batch(), str(tmp_path / "ckpt.pt")
    save_checkpoint(path, model, tokenizer=TOKENIZER, step=3)
    loaded = load_checkpoint(path)
    assert isinstance(loaded, VisionLanguageModel) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    assert torch.equal(loaded.encode_text(ids, padding_mask), model.encode_text(ids, padding_mask))
    assert (loaded.img_size, loaded.max_length) == (32, 12)
    texts = ["a red circle", "blue"]
    for a, b in zip(loaded.tokenizer.encode(texts, 12), Tokenizer(TOKENIZER).encode(texts, 12), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [dict(token_types=True, **S_SMKE), dict(shared_kind="mlp", align_levels=2),
                                    dict(shared_kind="projection")], ids=str)
def test_checkpoint_of_every_kind(tmp_path, kwargs):
    model, (images, ids, padding_mask), path = student(**kwargs), batch(), str(tmp_path / "ckpt.pt")
    save_checkpoint(path, model)
    loaded = load_checkpoint(path)
    for a, b in zip(loaded(images, ids, padding_mask), model(images, ids, padding_mask), strict=True):
        assert torch.equal(a, b)
    checkpoint = torch.load(path, weights_only=True) # as it was before there were kinds
    for k in ("shared_kind", "token_scale", "align_levels"):
        del checkpoint["config"][k]
    old = student(shared=dict(norm_first=False))
    torch.save({**checkpoint, "config": {**checkpoint["config"], "shared": {"norm_first": False}},
                "model": old.state_dict()}, path)
    assert torch.equal(load_checkpoint(path).encode_image(images), old.encode_image(images))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_image_only_checkpoint(tmp_path, pool):
    model, images = shake(Encoder("image", **IMAGE, pool=pool)), batch()[0]
    save_checkpoint(str(tmp_path / "ckpt.pt"), model)
    loaded = load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert loaded.img_size == 32 and not hasattr(loaded, "encode_text") and not hasattr(loaded, "tokenizer")
    h = model(images)
    assert_close(loaded.encode_image(images),
                 F.normalize(h[:, 0] if pool == "cls" else h[:, 1:].mean(1), dim=-1), 1e-6)


@torch.no_grad()
def test_text_only_checkpoint(tmp_path):
    model = text_encoder("none", True)
    save_checkpoint(str(tmp_path / "ckpt.pt"), model, tokenizer=TOKENIZER)
    loaded = load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert not hasattr(loaded, "encode_image") and loaded.max_length == 12
    text = loaded.tokenizer.encode(["a red square", "blue"], 12)
    assert torch.equal(loaded.encode_text(*text), F.normalize(model(*text)[:, 0], dim=-1))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_checkpoints_that_are_none(tmp_path):
    path = str(tmp_path / "ckpt.pt")

    def message():
        with pytest.raises(SystemExit) as e:
            load_checkpoint(path)
        assert path in str(e.value)
        return str(e.value)

    assert "--preset=tiny" in message() # the command that makes one
    save_checkpoint(path, student())
    with open(path, "rb+") as f:
        f.truncate(os.path.getsize(path) // 2)
    assert "cut short" in message()
    open(path, "w").close()
    assert "cannot be read" in message()
    for foreign in ({"model": {}}, [1, 2], torch.zeros(3), {"format": 99}):
        torch.save(foreign, path)
        assert "not a checkpoint of this repository" in message()
    for rest in ({}, {"format": 2, "kind": "Encoder", "config": {}, "model": {}}):
        torch.save({**rest, "step": Hostile(str(tmp_path / "pwned"))}, path)
        assert "cannot be read" in message()
        assert os.listdir(tmp_path) == ["ckpt.pt"] # and nothing of it was run


def test_weights_that_do_not_fit_are_named(tmp_path):
    model, other = student(), student().state_dict()
    other["head.1.weight"] = torch.zeros(11, 48)
    other["heads.weight"] = other.pop("token_type")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SystemExit) as e:
        load_weights(model, other, "some.pt")
    for part in ("some.pt", "1 missing: token_type", "1 unexpected: heads.weight",
                 "head.1.weight (11, 48), not (10, 48)"):
        assert part in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) # nothing was half loaded
    path = str(tmp_path / "ckpt.pt")
    save_checkpoint(path, model)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "model": other}, path)
    with pytest.raises(SystemExit, match="mis-shaped"):
        load_checkpoint(path)


def test_save_atomic_keeps_the_old_file(tmp_path):
    path = str(tmp_path / "new folder" / "file")
    save_atomic(path, lambda f: f.write(b"old"))

    def dies(f):
        f.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_atomic(path, dies)
    assert os.listdir(os.path.dirname(path)) == ["file"] and open(path, "rb").read() == b"old"
    save_atomic(path, lambda f: f.write(b"new"))
    assert os.listdir(os.path.dirname(path)) == ["file"] and open(path, "rb").read() == b"new"
