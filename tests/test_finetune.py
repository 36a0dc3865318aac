"""
evaluate.py finetune: learning rates, augmentation and loss against hand-made numbers and plain
formulas; then the whole subcommand on toy pictures, killed, resumed and given wrong input.

    pytest tests/test_finetune.py -m slow      # more of the places where it may stop, and workers
"""
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from conftest import SHAPE, flags, losses, records, refused, same, slow, stopped_at
from model import Encoder, load_checkpoint, read_checkpoint, save_checkpoint
from prepare_imagenet import Pairs
from test_loops import with_bad_pictures


def defaults(**changes):
    return SimpleNamespace(**{**vars(evaluate.get_args(["finetune"])), **changes})


def test_learning_rates_of_seeds_table_3():
    encoder = Encoder("image", depth=6, embed_norm=True, **SHAPE)
    head = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 5))
    groups = evaluate.parameter_groups(encoder, head, defaults(task="imagenet"))
    rates = {g["layer"]: g["peak_lr"] for g in groups}
    assert [f"{rates[layer]:.1e}" for layer in range(8)] == [
        "2.3e-04", "2.8e-04", "3.5e-04", "4.3e-04", "5.3e-04", "6.6e-04", "8.1e-04", "1.0e-03"]
    names = {id(p): n for n, p in [*encoder.named_parameters(), *head.named_parameters("head")]}
    by_name = {names[id(p)]: g for g in groups for p in g["params"]}
    assert len(by_name) == len(names) == sum(len(g["params"]) for g in groups) # each once
    layers = {"patch_embed.proj.weight": 0, "cls_token": 0, "embed_norm.weight": 0,
              "blocks.0.mlp.fc1.weight": 1, "blocks.5.norm2.bias": 6, "head.0.weight": 7, "head.1.weight": 7}
    assert {n: by_name[n]["layer"] for n in layers} == layers
    for n, group in by_name.items():
        is_decayed = n.endswith("weight") and "norm" not in n and n != "head.0.weight"
        assert group["weight_decay"] == (0.01 if is_decayed else 0.0), n
    for changes, decay in (dict(task="cifar10"), 0.75), (dict(layer_decay=0.5), 0.5):
        rate = evaluate.parameter_groups(encoder, head, defaults(**changes))[0]["peak_lr"]
        assert rate == pytest.approx(1e-3 * decay ** 7), changes


def test_augmentation(tiny_data):
    """Another in each epoch, or none."""
    flip, augment, _, erase = evaluate.train_transform().transforms
    assert (augment.num_ops, augment.magnitude, flip.p, erase.p) == (2, 9, 0.5, 0.25)
    pairs = Pairs(tiny_data, "toy", "train")
    plain, dataset = (evaluate.LabelledImages(pairs.images, torch.from_numpy(pairs.labels), 32, defaults(
        augment=augment)) for augment in ("none", "default"))
    image, label, _ = dataset[0, 5, 5]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == pairs.labels[5]
    assert not torch.equal(dataset[1, 5, 5][0], image)
    unchanged = evaluate.normalize(evaluate.eval_image(pairs.images[5], 32)[None])[0]
    assert torch.equal(plain[0, 0, 5][0], unchanged)


def test_mixed_targets():
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 16, 16).contiguous() # image i is all i
    kinds = []
    for seed in range(300):
        mixed, targets = evaluate.mix(images, torch.eye(8), np.random.default_rng(seed))
        # each pixel is a mixture of two images, the mean of all pixels the mixture that the target names
        assert torch.allclose(mixed.mean((1, 2, 3)), targets @ torch.arange(8.0), atol=1e-4)
        kinds.append("none" if torch.equal(mixed, images) else
                     "cutmix" if torch.equal(mixed, mixed.round()) else "mixup")
    shares = [kinds.count(kind) / 300 for kind in ("none", "mixup", "cutmix")]
    assert shares == pytest.approx([0.1, 0.45, 0.45], abs=0.1) # cutmix of an empty box is none


@pytest.fixture(scope="session")
def colours(tiny_data, tmp_path_factory):
    """The toy pictures in six classes that are easily learned, their colours, numbered 10, 20 .. 60."""
    data_dir = str(tmp_path_factory.mktemp("colours"))
    shutil.copytree(os.path.join(tiny_data, "toy"), os.path.join(data_dir, "toy"))
    for split in "train", "val", "test":
        path = os.path.join(data_dir, "toy", f"{split}_labels.npy")
        np.save(path, 10 + 10 * (np.load(path) // 4))
    return data_dir


@pytest.fixture
def run(colours, tmp_path, monkeypatch):
    """run(out, **flags) -> what the subcommand returns, after a run into that folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_checkpoint("encoder.pt", Encoder("image", depth=2, **SHAPE))

    def run(out="run", command="finetune", **changes):
        knobs = dict(task="toy", data_dir=colours, ckpt="encoder.pt", device="cpu", dtype="float32",
                     batch_size=16)
        if command == "finetune":
            knobs |= dict(out_dir=out, epochs=4, lr=3e-3, log_interval=1)
        return evaluate.main([command, *flags(knobs | changes)])
    return run


def test_finetuning_learns(run, tmp_path, colours, monkeypatch, capsys):
    """What stays is the first of the best epochs on val, as an Encoder that other scripts read: with its head
    it gives the reported number. The last epochs, which wreck the weights, change nothing."""
    share = evaluate.lr_share
    monkeypatch.setattr(evaluate, "lr_share", lambda step, *rest: share(step, *rest) if step < 69 else 1000.0)
    result = run(augment="none", epochs=25, json="new/result.json")
    said, metrics = capsys.readouterr().out, result["metrics"]
    assert metrics["top1"] > 60 and metrics["top5"] >= metrics["top1"] # chance is 17 %
    assert result["num_classes"] == 6 and result["split"] == "test" and result["chosen_on"] == "val"
    assert json.loads((tmp_path / "new/result.json").read_text()) == result
    log = records(tmp_path / "run")
    steps, epochs = [r for r in log if "loss" in r], [r for r in log if "epoch" in r]
    assert len(steps) == 75 and len(epochs) == 25 and steps[65]["loss"] < 0.7 * steps[0]["loss"]
    accuracies = [r["val_top1"] for r in epochs]
    assert result["epoch"] == 1 + accuracies.index(max(accuracies)) < 25
    assert ["encoder.pt", f"{metrics['top1']:.2f}", "-"] in [line.split() for line in said.splitlines()]
    kept, pairs = read_checkpoint("run/best.pt"), Pairs(colours, "toy", "test")
    assert kept["best"]["epoch"] == result["epoch"] and kept["step"] == 3 * result["epoch"]
    features = evaluate.image_features(load_checkpoint("run/best.pt"), pairs, 5, torch.device("cpu"),
                                       torch.float32)
    head = kept["head"]
    x = torch.nn.functional.layer_norm(features, (32,), head["0.weight"], head["0.bias"], eps=1e-6)
    found = np.array(kept["classes"])[(x @ head["1.weight"].T + head["1.bias"]).argmax(1)]
    assert 100 * (found == pairs.labels).mean() == pytest.approx(metrics["top1"])


def test_linear_probe(run, tmp_path, monkeypatch, capsys):
    """The encoder stays as it was, bit for bit. --augment=none extracts the features once. Augmentation that
    does nothing goes through the encoder at each step, and learns the same."""
    calls, forward = [], Encoder.forward
    monkeypatch.setattr(Encoder, "forward",
                        lambda self, x, *rest: (calls.append(len(x)), forward(self, x, *rest))[1])
    monkeypatch.setattr(evaluate, "PUBLISHED_VISION", {("toy", 12): {"theirs": (None, 50.0)}})
    result = run("cached", linear_probe=True, augment="none")
    assert [*result["published"]] == ["theirs"] # of this set, and of as many images
    said = capsys.readouterr().out
    assert sum(calls) == 48 + 12 + 12 # each picture once
    assert same(read_checkpoint("encoder.pt")["model"], read_checkpoint("cached/best.pt")["model"])
    assert ["encoder.pt", "-", f"{result['metrics']['top1']:.2f}"] in [x.split() for x in said.splitlines()]
    calls.clear()
    monkeypatch.setattr(evaluate, "train_image", lambda data, size, *_: evaluate.eval_image(data, size))
    monkeypatch.setattr(evaluate, "train_transform", lambda: lambda image: evaluate.normalize(image[None])[0])
    monkeypatch.setattr(evaluate, "MIX_SHARE", 0.0)
    run("plain", linear_probe=True)
    assert sum(calls) == 4 * 48 + 12 + 12
    a, b = (read_checkpoint(f"{out}/ckpt.pt") for out in ("cached", "plain"))
    assert a["best"] == b["best"]
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


# 5: amid an epoch, a step after a checkpoint; 9: at the end of the third epoch
@pytest.mark.parametrize("step, changes", [
    (5, {}), (9, dict(linear_probe=True)), slow(5, dict(num_workers=2)),
    slow(9, dict(linear_probe=True, augment="none"))])
def test_resume_is_exact(run, tmp_path, capsys, step, changes):
    changes = dict(changes, save_interval=4)
    result = run("whole", **changes)
    stopped_at(step, evaluate, run, "killed", **changes)
    assert read_checkpoint("killed/ckpt.pt")["step"] < 12
    run("killed", **changes) # the same command again
    for file in "ckpt.pt", "best.pt": # bit for bit
        whole, resumed = (read_checkpoint(f"{out}/{file}") for out in ("whole", "killed"))
        for k in {*whole} - {"minutes"}:
            assert same(whole[k], resumed[k]), (file, k)
    whole, resumed = (records(tmp_path / out) for out in ("whole", "killed"))
    assert [(r["step"], r.get("loss"), r.get("val_top1")) for r in whole] == [
        (r["step"], r.get("loss"), r.get("val_top1")) for r in resumed]
    capsys.readouterr()
    assert run("killed", **changes)["metrics"] == result["metrics"] # finished: the table comes again
    said = capsys.readouterr().out
    assert "\nencoder.pt " in said and "\nstep " not in said


def test_bad_pictures(run, tmp_path, colours, capfd):
    """Grey and named in training and evaluation; too many of those that are measured on end it."""
    data_dir = with_bad_pictures(colours, tmp_path / "data", (3, 40))
    path = tmp_path / "data" / "toy" / "val_images.bin"
    content = path.read_bytes()
    path.write_bytes(bytes(20) + content[20:])
    run(data_dir=data_dir, num_workers=1)
    assert {i for r in records(tmp_path / "run") for i in r.get("unreadable", [])} == {3, 40}
    assert capfd.readouterr().err.count("val_images.bin: picture 0 of 12 cannot be read") == 1
    path.write_bytes(bytes(len(content)))
    assert "12 of 12 pictures cannot be read" in refused(run, "second", data_dir=data_dir)


def test_loss_by_hand(run, tmp_path, monkeypatch):
    """Minus sum of t log p, t the mixed targets smoothed by 0.1, mean over the batch: of the six classes and
    the pictures given here, by the weights that --lr=0 leaves as they are."""
    images, targets = torch.randn(48, 3, 32, 32), torch.softmax(3 * torch.randn(48, 6), 1)
    monkeypatch.setattr(evaluate, "mix", lambda *_: (images, targets))
    run(batch_size=48, epochs=1, lr=0)
    model, head = load_checkpoint("run/ckpt.pt"), torch.nn.Sequential(torch.nn.LayerNorm(32, eps=1e-6),
                                                                      torch.nn.Linear(32, 6))
    head.load_state_dict(read_checkpoint("run/ckpt.pt")["head"])
    p = torch.softmax(head(model(images)[:, 1:].mean(1)), 1)
    by_hand = -((0.9 * targets + 0.1 / 6) * p.log()).sum() / 48 # not / 288
    assert losses(tmp_path / "run") == pytest.approx([by_hand.item()], rel=1e-5)


WRONG = [ # flags, what the message says
    ("knn", dict(ckpt="text.pt"), "text.pt is an encoder for text.*distill_image.py"),
    ("knn", dict(image_encoder="beitv2"), "are each an encoder"),
    ("finetune", dict(task="cifar10"), "data set cifar10"),
    ("finetune", dict(data_dir="no_labels"), "has no labels in its split val"),
    ("finetune", dict(data_dir="strange"), r"the labels \[7, 8\] of its split test"),
    ("finetune", dict(data_dir="alone"), "neither a val nor a test split"),
    ("finetune", dict(batch_size=100), "--batch_size=100, but there are 48")]


@pytest.mark.parametrize("command, changes, said", WRONG)
def test_wrong_input(run, colours, text_data, command, changes, said):
    """Refused before anything is written."""
    shutil.copy(f"{text_data}/teacher.pt", "text.pt")
    for name in "no_labels", "strange", "alone":
        shutil.copytree(colours, name)
    os.remove("no_labels/toy/val_labels.npy")
    np.save("strange/toy/test_labels.npy", np.r_[np.full(10, 20), 8, 7])
    for split in "val", "test":
        os.remove(f"alone/toy/{split}_images.idx")
    before = sorted(os.listdir())
    error = refused(run, command=command, **changes)
    assert re.search(said, error, re.S), error
    assert sorted(os.listdir()) == before
