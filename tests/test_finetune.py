"""
evaluate.py finetune: learning rates, augmentation and loss against hand-made numbers, timm and plain
formulas; then the whole subcommand on toy pictures, killed, resumed and given wrong input.

    pytest tests/test_finetune.py
    pytest tests/test_finetune.py -m slow      # killed at random
"""
import json
import math
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.auto_augment
import torch

import evaluate
from conftest import slow
from model import Encoder, VisionLanguageModel, load_checkpoint, read_checkpoint, save_checkpoint
from prepare_imagenet import Pairs
from test_loops import flags, kill_and_resume, records, same, signal_at, with_bad_pictures

SHAPE = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2)


# -----------------------------------------------------------------------------
# learning rates


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
    decayed = {n for n, g in by_name.items() if g["weight_decay"]}
    assert decayed == {n for n in by_name if n.endswith("weight") and "norm" not in n
                       and n != "head.0.weight"}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.01}


def test_layer_decay_by_task():
    encoder, head = Encoder("image", depth=1, **SHAPE), torch.nn.Linear(32, 2)
    rate_0 = lambda **changes: evaluate.parameter_groups(encoder, head, defaults(**changes))[0]["peak_lr"]
    assert rate_0(task="cifar10") == rate_0(task="cifar100") == pytest.approx(1e-3 * 0.75 ** 2)
    assert rate_0(task="digits") == rate_0(task="imagenet") == pytest.approx(1e-3 * 0.81 ** 2)
    assert rate_0(task="imagenet", layer_decay=0.5, lr=4.0) == pytest.approx(1.0)
    encoder.requires_grad_(False) # the linear probe: nothing but the head
    assert [g["peak_lr"] for g in evaluate.parameter_groups(encoder, head, defaults())] == [1e-3, 1e-3]


def test_shared_position_table():
    """BEiTv2's relative positions serve every block: the head's rate, as in BEiT's own finetuning, and no
    decay."""
    encoder = Encoder("image", depth=2, positions="learned", attn_bias="relative", layer_scale=0.1, **SHAPE)
    groups = evaluate.parameter_groups(encoder, torch.nn.Linear(32, 2), defaults())
    of = lambda p: next(g for g in groups if any(q is p for q in g["params"]))
    table = of(encoder.relative_position_bias_table)
    assert (table["layer"], table["weight_decay"]) == (3, 0.0)
    assert (of(encoder.pos_embed)["layer"], of(encoder.pos_embed)["weight_decay"]) == (0, 0.0)
    assert (of(encoder.blocks[1].gamma_1)["layer"], of(encoder.blocks[1].gamma_1)["weight_decay"]) == (2, 0.0)


def test_schedule():
    shares = [evaluate.lr_share(step, 4, 20) for step in range(20)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and shares[12] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in zip(shares[4:], shares[5:]))
    assert evaluate.lr_share(0, 0, 1) == 1.0


# -----------------------------------------------------------------------------
# augmentation


def test_rand_augment_is_two_operations_of_magnitude_9():
    """Of 0 .. 10, as timm counts: where both packages have the operation, it changes as much."""
    flip, augment, _, erase = evaluate.train_transform().transforms
    assert (augment.num_ops, augment.magnitude, augment.num_magnitude_bins) == (2, 9, 11)
    assert flip.p == 0.5 and erase.p == 0.25
    at_9 = {name: float(values(11, 224, 224)[9]) if values(11, 224, 224) is not None else None
            for name, (values, _) in augment._AUGMENTATION_SPACE.items()}
    levels = timm.data.auto_augment
    assert at_9["Rotate"] == pytest.approx(abs(levels._rotate_level_to_arg(9, {})[0]))
    assert at_9["ShearX"] == at_9["ShearY"] == pytest.approx(abs(levels._shear_level_to_arg(9, {})[0]))
    for name in "Brightness", "Color", "Contrast", "Sharpness": # timm's factor is 1 +- as much
        assert at_9[name] == pytest.approx(abs(1 - levels._enhance_increasing_level_to_arg(9, {})[0]))
    assert at_9["TranslateX"] / 224 == pytest.approx(0.45 * 0.9, abs=0.01)
    assert at_9["Posterize"] == 4 and levels._posterize_increasing_level_to_arg(9, {})[0] == 1 # as is said


def test_training_images_are_functions_of_their_index(tiny_data):
    pairs = Pairs(tiny_data, "toy", "train")
    dataset = evaluate.LabelledImages(pairs.images, torch.from_numpy(pairs.labels), 32, defaults())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [dataset[0, p, p] for p in range(24)]
    assert torch.equal(torch.get_rng_state(), state) # nobody else's randomness is touched
    torch.rand(7)
    for p, (image, label, bad) in enumerate(first):
        again = dataset[0, p, p]
        assert torch.equal(again[0], image) and again[1] == label == pairs.labels[p]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        assert not torch.equal(dataset[1, p, p][0], image)
    plain = evaluate.LabelledImages(pairs.images, torch.from_numpy(pairs.labels), 32,
                                    defaults(augment="none"))
    assert torch.equal(plain[0, 0, 5][0],
                       evaluate.normalize(evaluate.eval_image(pairs.images[5], 32)[None])[0])


def test_mixed_targets():
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 16, 16).contiguous() # image i is all i
    one_hot = torch.eye(8)
    kinds = []
    for seed in range(300):
        mixed, targets = evaluate.mix(images, one_hot, np.random.default_rng(seed))
        again = evaluate.mix(images, one_hot, np.random.default_rng(seed))
        assert torch.equal(mixed, again[0]) and torch.equal(targets, again[1])
        assert torch.allclose(targets.sum(1), torch.ones(8)) and (targets >= 0).all()
        # each pixel is a mixture of two images, the mean of all pixels the mixture that the target names
        assert torch.allclose(mixed.mean((1, 2, 3)), targets @ torch.arange(8.0), atol=1e-4)
        kinds.append("none" if torch.equal(mixed, images) else
                     "cutmix" if torch.equal(mixed, mixed.round()) else "mixup")
    assert kinds.count("none") == pytest.approx(30, abs=20) # cutmix of an empty box among them
    assert kinds.count("mixup") == pytest.approx(135, abs=35) \
        and kinds.count("cutmix") == pytest.approx(135, abs=35)


# -----------------------------------------------------------------------------
# the subcommand


@pytest.fixture(scope="session")
def colours(tiny_data, tmp_path_factory):
    """The toy pictures, to be told apart by colour: six classes, numbered 10, 20 .. 60, that little training
    suffices for."""
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

    def run(out="run", **changes):
        knobs = dict(task="toy", data_dir=colours, ckpt="encoder.pt", out_dir=out, device="cpu",
                     dtype="float32", batch_size=16, epochs=4, lr=3e-3, log_interval=1)
        return evaluate.main(["finetune",
                              *flags({k: v for k, v in (knobs | changes).items() if v is not None})])
    return run


def stop_at(monkeypatch, step, run):
    """run(), stopped at the start of this step, as if by a kill."""
    lr_share = evaluate.lr_share

    def stopping(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return lr_share(now, *rest)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(evaluate, "lr_share", stopping)
        run()


def test_finetuning_learns(run, tmp_path, capsys):
    result = run(augment="none", epochs=25, json="new/result.json")
    said = capsys.readouterr().out
    # chance is 17 %
    assert result["metrics"]["top1"] > 60 and result["metrics"]["top5"] >= result["metrics"]["top1"]
    assert result["classes"] == 6 and result["split"] == "test" and result["chosen_on"] == "val"
    assert json.loads((tmp_path / "new/result.json").read_text()) == result
    log = records(tmp_path / "run")
    steps, epochs = [r for r in log if "loss" in r], [r for r in log if "epoch" in r]
    assert [r["step"] for r in steps] == list(range(1, 76)) \
        and [r["epoch"] for r in epochs] == list(range(1, 26))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"] and steps[-1]["lr"] < 0.01 * max(r["lr"] for r in steps)
    # the best epoch is kept: the first of highest accuracy on val, and not the last
    accuracies = [r["val_top1"] for r in epochs]
    assert result["epoch"] == 1 + accuracies.index(max(accuracies))
    lines = said.splitlines()
    assert [line.split()[:5] for line in lines if line.startswith("layer ")] == [
        ["layer", str(k), "learning", "rate", f"{3e-3 * 0.81 ** (3 - k):.1e}"] for k in range(4)]
    assert ["encoder.pt", f"{result['metrics']['top1']:.2f}", "-"] in [line.split() for line in lines]
    assert "published" not in said # nobody published anything on this set


def test_best_checkpoint_is_an_encoder(run, colours, monkeypatch):
    """best.pt is of the best epoch, and an Encoder that other scripts read: with its head it gives the
    reported number. The last epoch, which wrecks the weights, changes nothing."""
    monkeypatch.setattr(evaluate, "lr_share", lambda step, *_: 1.0 if step < 60 else 1000.0)
    result = run(augment="none", epochs=21)
    assert result["epoch"] < 21 and result["metrics"]["top1"] > 50
    kept = read_checkpoint("run/best.pt")
    assert kept["best"]["epoch"] == result["epoch"] and kept["step"] == 3 * result["epoch"]
    encoder = load_checkpoint("run/best.pt")
    before, last = load_checkpoint("encoder.pt"), read_checkpoint("run/ckpt.pt")
    assert not any(torch.equal(a, b) for a, b in zip(encoder.parameters(), before.parameters()) if a.ndim > 1)
    assert last["step"] == last["max_steps"] == 63
    pairs = Pairs(colours, "toy", "test")
    features = evaluate.image_features(encoder, pairs, 5, torch.device("cpu"), torch.float32)
    head = kept["head"]
    x = torch.nn.functional.layer_norm(features, (32,), head["0.weight"], head["0.bias"], eps=1e-6)
    found = np.array(kept["classes"])[(x @ head["1.weight"].T + head["1.bias"]).argmax(1)]
    assert 100 * (found == pairs.labels).mean() == pytest.approx(result["metrics"]["top1"])


def test_linear_probe(run, capsys):
    """The encoder stays as it was, bit for bit; only the head's learning rate is printed."""
    result = run(linear_probe=True, augment="none", epochs=6)
    said = capsys.readouterr().out
    before, kept = read_checkpoint("encoder.pt"), read_checkpoint("run/best.pt")
    assert same(before["model"], kept["model"]) and result["linear_probe"]
    assert [line.split()[:2] for line in said.splitlines() if line.startswith("layer ")] == [["layer", "3"]]
    assert ["encoder.pt", "-", f"{result['metrics']['top1']:.2f}"] \
        in [line.split() for line in said.splitlines()]


def test_cached_features_change_nothing(run, tmp_path, monkeypatch):
    """--augment=none extracts the features once. Augmentation that does nothing goes through the encoder at
    each step, and learns the same."""
    calls = []
    forward = Encoder.forward
    monkeypatch.setattr(Encoder, "forward",
                        lambda self, x, *rest: (calls.append(len(x)), forward(self, x, *rest))[1])
    run("cached", linear_probe=True, augment="none")
    assert sum(calls) == 48 + 12 + 12 # each picture once
    calls.clear()
    monkeypatch.setattr(evaluate, "train_image", lambda data, size, *_: evaluate.eval_image(data, size)[None])
    monkeypatch.setattr(evaluate, "train_transform", lambda: lambda image: evaluate.normalize(image[None])[0])
    monkeypatch.setattr(evaluate, "MIX_SHARE", 0.0)
    run("plain", linear_probe=True)
    assert sum(calls) == 4 * 48 + 12 + 12
    a, b = (read_checkpoint(f"{out}/ckpt.pt") for out in ("cached", "plain"))
    for k in a["head"]:
        assert torch.allclose(a["head"][k], b["head"][k], atol=1e-5), k
    assert a["best"] == b["best"]
    losses = [[r["loss"] for r in records(tmp_path / out) if "loss" in r] for out in ("cached", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("probe", [False, True])
def test_micro_batches_change_nothing(run, tmp_path, probe):
    for out, micro in ("whole", 0), ("parts", 4):
        run(out, linear_probe=probe, micro_batch_size=micro, epochs=2)
    losses = [[r["loss"] for r in records(tmp_path / out) if "loss" in r] for out in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# 5: amid an epoch, a step after a checkpoint; 9: at the end of the third epoch
@pytest.mark.parametrize("step, changes", [
    (5, {}), slow(9, {}), slow(5, dict(num_workers=2)), (5, dict(linear_probe=True)),
    slow(9, dict(linear_probe=True, augment="none"))])
def test_resume_is_exact(run, tmp_path, monkeypatch, step, changes):
    changes = dict(changes, save_interval=4)
    run("whole", **changes)
    stop_at(monkeypatch, step, lambda: run("killed", **changes))
    assert read_checkpoint("killed/ckpt.pt")["step"] < 12
    run("killed", **changes) # the same command again
    for file in "ckpt.pt", "best.pt": # bit for bit
        whole, resumed = (read_checkpoint(f"{out}/{file}") for out in ("whole", "killed"))
        for k in {*whole} - {"minutes"}:
            assert same(whole[k], resumed[k]), (file, k)
    whole, resumed = (records(tmp_path / out) for out in ("whole", "killed"))
    assert [(r["step"], r.get("loss"), r.get("val_top1")) for r in whole] == [
        (r["step"], r.get("loss"), r.get("val_top1")) for r in resumed]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(run, monkeypatch, capsys, number):
    run("whole")
    with monkeypatch.context() as m, pytest.raises(SystemExit) as ended:
        signal_at(m, evaluate, "lr_share", 4, number)
        run("parts")
    assert ended.value.code == 128 + number
    assert read_checkpoint("parts/ckpt.pt")["step"] == 5
    result = run("parts")
    whole, resumed = (read_checkpoint(f"{out}/ckpt.pt") for out in ("whole", "parts"))
    assert all(same(whole[k], resumed[k]) for k in {*whole} - {"minutes"})
    capsys.readouterr()
    assert run("parts")["metrics"] == result["metrics"] # finished: nothing is trained, the table comes again
    assert "step " not in capsys.readouterr().out.partition("epochs of")[2].partition("\n")[2]


@pytest.mark.parametrize("workers", [0, slow(2)])
def test_bad_pictures(run, tmp_path, colours, capfd, workers):
    """They are grey, in training and in evaluation, and named."""
    data_dir = with_bad_pictures(colours, tmp_path / "data", (3, 40))
    with open(tmp_path / "data" / "toy" / "val_images.bin", "r+b") as f:
        f.write(bytes(20))
    run(data_dir=data_dir, num_workers=workers)
    log = records(tmp_path / "run")
    assert {i for r in log for i in r.get("unreadable", [])} == {3, 40} and "val_top1" in log[-1]
    said = capfd.readouterr().err
    assert said.count("val_images.bin: picture 0 of 12 cannot be read: grey in its place") == 1


@pytest.mark.slow
def test_killed_at_random(run, tmp_path, colours):
    """SIGKILL at random moments, a checkpoint after every step: in the end the same weights."""
    knobs = dict(epochs=40, save_interval=1)
    run("whole", **knobs)
    words = flags(dict(task="toy", data_dir=colours, ckpt=tmp_path / "encoder.pt", out_dir=tmp_path / "parts",
                       device="cpu", dtype="float32", batch_size=16, lr=3e-3, log_interval=1, **knobs))
    resumed = kill_and_resume("evaluate.py", ["finetune", *words], tmp_path / "parts", 0.5)
    whole = read_checkpoint("whole/ckpt.pt")
    assert all(same(whole[k], resumed[k]) for k in ("model", "head", "optimizer", "best"))


def test_loss_by_hand(run, tmp_path, monkeypatch):
    """Minus sum of t log p, t the mixed targets smoothed by 0.1, mean over the batch: of the six classes and
    the pictures given here, by the weights that --lr=0 leaves as they are."""
    images, generator = torch.randn(48, 3, 32, 32), torch.Generator().manual_seed(1)
    targets = torch.softmax(3 * torch.randn(48, 6, generator=generator), 1)
    monkeypatch.setattr(evaluate, "mix", lambda *_: (images, targets))
    run(batch_size=48, epochs=1, lr=0, micro_batch_size=12)
    kept, model = read_checkpoint("run/ckpt.pt"), load_checkpoint("run/ckpt.pt")
    head = torch.nn.Sequential(torch.nn.LayerNorm(32, eps=1e-6), torch.nn.Linear(32, 6))
    head.load_state_dict(kept["head"])
    p = torch.softmax(head(model(images)[:, 1:].mean(1)), 1).tolist()
    smooth = (0.9 * targets + 0.1 / 6).tolist()
    by_hand = -sum(t * math.log(q) for row in zip(smooth, p) for t, q in zip(*row)) / 48 # not / 288
    loss, = [r["loss"] for r in records(tmp_path / "run") if "loss" in r]
    assert loss == pytest.approx(by_hand, rel=1e-5)


def test_smoothing_and_warmup_count(run, tmp_path, monkeypatch):
    first = []
    for out, knobs, warmup in ("a", {}, 0.1), ("b", dict(smoothing=0.5), 0.1), ("c", {}, 0.5):
        monkeypatch.setattr(evaluate, "WARMUP_SHARE", warmup)
        run(out, epochs=1, augment="none", **knobs)
        first.append(records(tmp_path / out)[0])
    assert first[0]["loss"] != first[1]["loss"] and first[0]["loss"] == first[2]["loss"]
    assert first[2]["lr"] < first[0]["lr"]


def test_other_settings(run, monkeypatch):
    stop_at(monkeypatch, 7, lambda: run())
    shutil.copy("encoder.pt", "same.pt")
    for resume in (False, True): # what makes the model is refused all the same
        for changes, said in ((dict(ckpt="same.pt"), "--ckpt=encoder.pt, not --ckpt=same.pt"),
                              (dict(linear_probe=True), "--linear_probe=False, not --linear_probe=True")):
            with pytest.raises(SystemExit, match=said):
                run(resume=resume, **changes)
    with pytest.raises(SystemExit, match="--weight_decay="):
        run(weight_decay=0.5)
    kept = torch.load("encoder.pt")
    save_checkpoint("encoder.pt", Encoder("image", depth=3, **SHAPE)) # another encoder under the old name
    with pytest.raises(SystemExit, match="the encoder has changed"):
        run()
    torch.save(kept, "encoder.pt")
    assert run(resume=True, weight_decay=0.5, epochs=5)["epochs"] == 5
    assert {g["weight_decay"] for g in read_checkpoint("run/ckpt.pt")["optimizer"]["param_groups"]} \
        == {0.0, 0.5}


def test_bad_step_keeps_the_last_good_checkpoint(run, monkeypatch):
    loss, calls = evaluate.F.cross_entropy, []

    def nan_at_5(*args, **kwargs):
        calls.append(1)
        return loss(*args, **kwargs) * (math.nan if len(calls) == 5 else 1)
    with monkeypatch.context() as m, pytest.raises(
            SystemExit, match="loss, norm not finite at step 5"):
        m.setattr(evaluate.F, "cross_entropy", nan_at_5)
        run(log_interval=100)
    kept = read_checkpoint("run/ckpt.pt")
    assert kept["step"] == 3 and all(v.isfinite().all() for v in kept["model"].values())
    assert run()["epochs"] == 4


def test_autocast(run, tmp_path):
    run(dtype="bfloat16", epochs=2, grad_clip=0.01)
    assert all(r["loss"] < 4 for r in records(tmp_path / "run") if "loss" in r)


def test_image_encoder_of_a_multimodal_checkpoint(run):
    torch.manual_seed(0)
    model = VisionLanguageModel(dict(depth=1, **SHAPE),
                                dict(embed_dim=32, num_heads=2, depth=1, vocab_size=50))
    save_checkpoint("both.pt", model)
    run(ckpt="both.pt", linear_probe=True, augment="none", epochs=1)
    assert same(read_checkpoint("run/ckpt.pt")["model"], model.image_encoder.state_dict())


def test_published_rows(run, colours, capsys):
    """On the thesis' three sets, and there only."""
    shutil.copytree(os.path.join(colours, "toy"), "data/cifar10")
    result = run(task="cifar10", data_dir="data", epochs=1)
    assert result["published"]["DistilData2Vec2"] == (97.7, 93.2) and len(result["published"]) == 3
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["DistilData2Vec2,", "published", "97.70", "93.20"] in lines
    assert {task: len(rows) for task, rows in evaluate.PUBLISHED_VISION.items()} == {
        "imagenet": 4, "cifar10": 3, "cifar100": 3}


WRONG_OF_BOTH = [ # flags, what the message says
    (dict(ckpt="text.pt"), "text.pt is an encoder for text.*distill_image.py"),
    (dict(ckpt="none.pt"), "at none.pt"), (dict(encoder="beitv2"), "are each an encoder"),
    (dict(ckpt=None, encoder="beitv2:none.pth"), "no weights at none.pth"),
    (dict(device="gpu"), "is no device"), (dict(task="cifar10"), "data set cifar10"),
    (dict(data_dir="no_labels"), "has no labels in its split val"),
    (dict(data_dir="strange"), r"no training image has the label 7, which test has \(2 such"),
    (dict(data_dir="alone"), "neither a val nor a test split")]
WRONG = [("knn", *case) for case in WRONG_OF_BOTH] + [("finetune", *case) for case in WRONG_OF_BOTH + [
    (dict(batch_size=100), "--batch_size=100, but there are 48"),
    (dict(micro_batch_size=5), "does not divide --batch_size=16"),
    (dict(linear_probe=True, layer_decay=0.9), "--layer_decay: a linear probe"),
    (dict(resume=True), "no run/ckpt.pt")]]


@pytest.mark.parametrize("command, changes, said", WRONG)
def test_wrong_input(run, colours, command, changes, said):
    """Refused before anything is written."""
    save_checkpoint("text.pt", Encoder("text", embed_dim=32, num_heads=2, depth=1, vocab_size=50))
    for name in "no_labels", "strange", "alone":
        shutil.copytree(colours, name)
    os.remove("no_labels/toy/val_labels.npy")
    np.save("strange/toy/test_labels.npy", np.r_[np.full(10, 20), 8, 7])
    with open("alone/toy/meta.json") as f:
        meta = json.load(f)
    with open("alone/toy/meta.json", "w") as f:
        json.dump(meta | {"splits": {"train": meta["splits"]["train"]}}, f)
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as e:
        if command == "finetune":
            run(**changes)
        knobs = dict(task="toy", data_dir=colours, ckpt="encoder.pt", device="cpu") | changes
        evaluate.main(["knn", *flags({k: v for k, v in knobs.items() if v is not None})])
    assert str(e.value.code).startswith("error: ") and re.search(said, e.value.code, re.S), e.value.code
    assert sorted(os.listdir()) == before
