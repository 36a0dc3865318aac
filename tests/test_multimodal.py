"""
The presets from files in the published layouts, and the teacher's targets on disk.

    pytest tests/test_multimodal.py             # teachers 32 wide, pictures of 32 px
    pytest tests/test_multimodal.py -m slow     # every preset at full size: 768 wide, 224 px
"""
import os
import shutil

import numpy as np
import pytest
import torch

import distill_multimodal
import model
from conftest import LOOPS, flags, records, refused, slow, write_ids, write_toy
from evaluate import EvalImages
from model import Encoder, load_encoder, load_pretrained, read_checkpoint
from prepare_imagenet import Pairs, normalize
from prepare_owt import load_tokenizer
from test_loops import lengthen_last_picture
from test_pretrained import FULL, published, trainer_file

SMALL = {**FULL, "D": 32, "h": 2, "img": 32}
WIDTH = dict(embed_dim=32, num_heads=2, img_size=32)
STEP = dict(data="toy", device="cpu", dtype="float32", max_steps=1, warmup_steps=0, log_interval=1)
FROZEN = {f"{modality}_encoder.{k}" for modality, names in (
    ("image", ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]),
    ("text", ["token_embed.weight", "pos_embed"])) for k in (*names, "embed_norm.weight", "embed_norm.bias")}


def publish(folder, vocabularies, names, **size):
    """A folder as --weights_dir has it: random weights in the published layouts, and tokenizers."""
    shutil.copytree(vocabularies, folder, dirs_exist_ok=True)
    for name in ("beitv2", "data2vec2_image", "data2vec2_text", "bert", "resnet50", *names):
        weights = published(name, **size)
        (folder / name).mkdir(exist_ok=True)
        torch.save(trainer_file(weights) if name.startswith("data2vec2") else weights,
                   folder / name / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory, weights_dir):
    return publish(tmp_path_factory.mktemp("small"), weights_dir, ["dino", "dinov3"], **SMALL)


@pytest.fixture
def small_configs(monkeypatch):
    """Published teachers are 32 wide and see 32 px."""
    for name, config in model.CONFIGS.items():
        monkeypatch.setitem(model.CONFIGS, name, {**config, "embed_dim": 32, "num_heads": 2, "img_size": 32})


@pytest.fixture
def small(small_configs, small_weights, tiny_data, tmp_path, monkeypatch):
    """small(preset, out, **changes) -> the checkpoint of a preset after a step of 16 pairs, 32 wide."""
    metrics = dict.fromkeys(("i2t_r10", "t2i_r10", "mean"), 0.0)
    monkeypatch.setattr(distill_multimodal.evaluate, "evaluate_retrieval", lambda *rest, **_: (metrics, 0, 0))
    monkeypatch.setattr(distill_multimodal.evaluate, "main", lambda command: None)

    def small(preset, out="run", **changes):
        knobs = dict(STEP, **WIDTH, preset=preset, weights_dir=small_weights, data_dir=tiny_data,
                     batch_size=16, out_dir=tmp_path / out)
        distill_multimodal.main(distill_multimodal.get_args(flags(knobs | changes)))
        return read_checkpoint(tmp_path / out / "ckpt.pt")
    return small


@pytest.fixture(scope="module")
def full_weights(tmp_path_factory, weights_dir):
    folder = tmp_path_factory.mktemp("full")
    yield publish(folder, weights_dir, [], **FULL)
    shutil.rmtree(folder) # 2 GB


@pytest.mark.parametrize("loop, preset, size, millions", [
    ("multimodal", "shre", 32, ""), ("multimodal", "smke", 32, ""),
    *(slow("multimodal", name, 32, "") for name in ("mmd2v2", "mmd2v2_7", "mmd2v2_7_2")),
    slow("image", "data2vec2", 224, "43.12M"), slow("image", "shared_encoder", 224, "29.54M"),
    slow("text", "bert", 224, "66.36M"), slow("text", "data2vec2", 224, "81.53M"),
    slow("multimodal", "mmd2v2_beit", 224, "117.56M"), slow("multimodal", "shre", 224, "114.98M"),
    slow("multimodal", "clip", 224, "110.66M"), slow("multimodal", "smke", 224, "117.17M")])
def test_preset(loop, preset, size, millions, request, tmp_path, capsys):
    """Steps as a user starts them, then validation; all but the frozen moves, and not far."""
    weights_dir = str(request.getfixturevalue("small_weights" if size == 32 else "full_weights"))
    args = vars(LOOPS[loop].get_args([f"--preset={preset}"]))
    steps = 1 if size == 32 else 3
    knobs = dict(STEP, preset=preset, weights_dir=weights_dir, data_dir=tmp_path, batch_size=2,
                 max_steps=steps, out_dir=tmp_path / "run")
    if size == 32:
        request.getfixturevalue("small_configs")
        knobs |= WIDTH
    # as little data as the steps need: the loss and the table of what is held out take longer than they do
    write_toy(tmp_path, range(6), range(2), range(2, 4))
    starts = {"": (args["teacher"], args["depth"])}
    if loop == "text":
        words = np.random.default_rng(0).integers(1000, 20000, 1600)
        write_ids(tmp_path / "toy", load_tokenizer(args["teacher"], None, weights_dir), words, words[:400])
    elif loop == "multimodal":
        starts = {"image_encoder.": (args["image_init"], args["depth"]),
                  "text_encoder.": (args["text_init"], args["text_depth"])}
    elif preset == "shared_encoder":
        knobs["knn"], starts = "toy", {}
    LOOPS[loop].main(LOOPS[loop].get_args(flags(knobs)))
    said, log = capsys.readouterr().out, records(tmp_path / "run")
    assert f"student {millions}" in said and ("chance" in said) == (loop == "multimodal")
    assert sum("loss" in r for r in log) == steps and [r["best"] for r in log if "best" in r]
    assert any("knn_toy_top1" in r for r in log) == (preset == "shared_encoder")
    weights = read_checkpoint(tmp_path / "run" / "ckpt.pt")["model"]
    for prefix, (name, depth) in starts.items():
        for k, v in load_pretrained(name, depth=depth, weights_dir=weights_dir).named_parameters():
            is_frozen = preset.startswith("mmd2v2") and prefix + k in FROZEN
            assert torch.equal(v, weights[prefix + k]) == is_frozen, k
            assert (v - weights[prefix + k]).abs().max() < 4 * steps * args["lr"] + 1e-4, k
    if preset == "smke": # S-SMKE's LayerScale, and that on its token types
        assert (weights["blocks.0.gamma_1"] - 0.2).abs().max() < 1e-3
        assert (weights["token_type_scale"] - 1e-5).abs().max() < 1e-3
    shutil.rmtree(tmp_path / "run") # 1.4 GB


def test_shared_blocks_from_the_text_model(small, small_weights):
    """Its last ones, eps and all, and trained then."""
    before, after = (small("mmd2v2_7_2", out, lr=lr, shared_init="text")
                     for out, lr in (("before", 0), ("after", 1e-3)))
    text = load_pretrained("data2vec2_text", str(small_weights / "data2vec2_text"))
    for k, v in text.blocks[-2:].state_dict().items():
        assert torch.equal(v, before["model"][f"blocks.{k}"]), k
        assert not torch.equal(v, after["model"][f"blocks.{k}"]), k
    assert before["config"]["shared"]["eps"] == 1e-5


def test_logits_need_a_head(small):
    assert "add --head" in refused(small, "shre", head=False)


@pytest.fixture
def cached(small, tiny_data, tmp_path):
    """cached(preset, out, **changes): small() with targets on disk -> the names of all such files."""
    shutil.copytree(os.path.join(tiny_data, "toy"), tmp_path / "data" / "toy")

    def cached(preset, out="run", **changes):
        small(preset, out, **{**dict(data_dir=tmp_path / "data", cache_targets=True, depth=1, text_depth=1),
                              **changes})
        return [name for name in os.listdir(tmp_path / "data") if "targets" in name]
    return cached


@pytest.fixture
def targets_seen(monkeypatch):
    """Grows by the targets of each batch that a loss is computed of."""
    seen, loss_terms = [], distill_multimodal.loss_terms
    monkeypatch.setattr(distill_multimodal, "loss_terms", lambda outputs, target, *rest: (
        seen.append(target), loss_terms(outputs, target, *rest))[1])
    return seen


@pytest.mark.parametrize("teacher", ["dino", "dinov3"])
def test_dino_as_teacher_and_start(teacher, small, small_weights):
    """The target is the normed CLS token; the student has its registers, frozen."""
    checkpoint = small("smke", teacher=teacher, final_norm=True, image_init=teacher, mask_ratio=0.5,
                       freeze_embeddings=True)
    images = normalize(torch.randint(0, 256, (2, 3, 32, 32)))
    args = distill_multimodal.get_args(flags(dict(WIDTH, teacher=teacher, weights_dir=small_weights)))
    target = distill_multimodal.teacher_target(distill_multimodal.load_teacher(args)[0], images, args,
                                               torch.autocast("cpu", enabled=False))
    encoder = load_pretrained(teacher, str(small_weights / teacher), final_norm=True)
    assert torch.allclose(target, encoder(images)[:, 0], atol=1e-6)
    before, after = encoder.state_dict(), checkpoint["model"]
    for key in ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight"):
        assert key not in before or torch.equal(before[key], after[f"image_encoder.{key}"])
    key = "blocks.0.mlp.fc1.bias"
    assert not torch.equal(before[key], after[f"image_encoder.{key}"])


def test_cached_targets(cached, small_weights, targets_seen, tmp_path, monkeypatch):
    """What the teacher says of each picture, whole, also if the run was killed meanwhile; a later run with
    other losses computes none."""
    counts, teacher_target = [], distill_multimodal.teacher_target

    def stopped(teacher, x, *rest):
        counts.append(len(x))
        if len(counts) == 3:
            raise KeyboardInterrupt
        return teacher_target(teacher, x, *rest)
    monkeypatch.setattr(distill_multimodal, "teacher_target", stopped)
    refused(cached, "smke")
    name, = cached("smke")
    assert counts == [16, 16, 16, 16, 12] # the third again, then the validation
    stored = np.fromfile(tmp_path / "data" / name, "<f2").reshape(-1, 32)
    images = EvalImages(Pairs(str(tmp_path / "data"), "toy", "train").images, 32).stack(range(48))
    # smke's target is before the final norm
    expected = load_encoder(f"beitv2:{small_weights / 'beitv2'}", "image")(normalize(images))[:, 0]
    assert stored.shape == (48, 32)
    assert np.abs(stored - expected.numpy()).max() < 2e-3 * expected.abs().max().item()
    monkeypatch.setattr(distill_multimodal, "write_targets", None) # would fail if they were written
    targets_seen.clear()
    assert cached("smke", "other", depth=3, align_loss="none") == [name]
    assert {tuple(x) for x in targets_seen[0].tolist()} <= {tuple(x) for x in stored.tolist()} # in training
    os.truncate(tmp_path / "data" / name, 2000) # half a copy
    assert name in refused(cached, "smke", "half")


@pytest.mark.parametrize("is_cached", [False, True])
def test_the_teacher_sees_its_own_size(run, monkeypatch, is_cached):
    """--teacher_size, in training as for targets on disk; the student sees --img_size."""
    sizes, forward = set(), Encoder.forward

    def watched(encoder, x, *rest, **more):
        if encoder.config["modality"] == "image":
            sizes.add((encoder.config["img_size"], x.shape[-1]))
        return forward(encoder, x, *rest, **more)
    monkeypatch.setattr(Encoder, "forward", watched)
    knobs = dict(image_init="random", img_size=16, max_steps=2, eval_interval=100, cache_targets=is_cached)
    run("both", teacher_size=32, **knobs)
    assert sizes == {(16, 16), (32, 32)}
    assert "--teacher_size=16" in refused(run, "both", "other", **knobs)


@pytest.mark.slow
def test_targets_of_others_are_never_read(cached, small_weights, tmp_path):
    """Another teacher, transform, dtype or state of the data set gets its own; of joined sets any part."""
    assert len(cached("smke", "first")) == 1
    other = tmp_path / "weights.pt"
    weights = torch.load(small_weights / "beitv2" / "pytorch_model.bin", weights_only=True)
    weights["blocks.11.norm2.bias"][0] += 1
    torch.save(weights, other)
    changes = dict(final_norm=True), dict(dtype="bfloat16"), dict(teacher=f"beitv2:{other}")
    for n, change in enumerate(changes):
        assert len(cached("smke", f"run{n}", **change)) == n + 2
    shutil.copytree(tmp_path / "data" / "toy", tmp_path / "data" / "second")
    for n in range(2):
        assert len(cached("smke", f"joined{n}", data="toy,second")) == n + 5
        lengthen_last_picture(tmp_path / "data" / "second")
    for n in range(2): # a CNN takes any size
        assert len(cached("shre", f"size{n}", teacher_size=32 + 32 * n)) == n + 7


def test_standardized_targets(run, targets_seen):
    """Over an epoch of all images every channel has mean 0 and standard deviation 1."""
    run("both", cache_targets=True, standardize=True, unit="image", max_steps=3, eval_interval=100)
    target = torch.cat(targets_seen[:3]) # 48 images; after them the validation
    assert target.mean(0).abs().max() < 1e-4 and (target.std(0) - 1).abs().max() < 1e-3
    assert 0.3 < targets_seen[3].std() < 3
