"""
distill_text.py beside what all loops share (test_loops.py): the loss beside padding, sequences, the agreement
of neighbours, the table at the end; its checkpoints embed text and start other students.

    pytest tests/test_text.py
"""
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import distill_multimodal
import distill_text
from conftest import MULTIMODAL, flags, records, refused
from distill_text import Sequences, feature_loss, neighbour_agreement
from model import Encoder, feature_target, load_checkpoint
from prepare_owt import Tokens
from test_cli import commands_in, parse_command

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
    """CLS, the stream without a gap, SEP; the last one padded."""
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


def test_neighbour_agreement():
    """Four texts on a circle, by the teacher at 0, 10, 30 and 180 degrees: neighbours 1, 0, 1, 2. By the
    student at 0, 50, 30 and 180: nearest 2, 2, 1, 1, second 1, 0, 0, 2. So @1 the third agrees, @2 all do."""
    def points(*degrees):
        return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])
    teacher, student = points(0, 10, 30, 180), points(0, 50, 30, 180)
    assert [neighbour_agreement(student, teacher, k) for k in (1, 2, 3)] == [25, 100, 100]
    assert neighbour_agreement(5 * teacher.half(), teacher, 1) == 100 # any norm, any dtype
    assert neighbour_agreement(F.pad(student, (0, 3)), teacher, 1) == 25
    alike = [neighbour_agreement(torch.ones(4, 2), teacher, k) for k in (1, 2, 3)]
    assert alike == pytest.approx([100 / 3, 200 / 3, 100])
    assert neighbour_agreement(torch.full((4, 2), math.nan), teacher, 1) == 0


# -----------------------------------------------------------------------------
# the loop, and what its checkpoint is good for


def test_table_at_the_end(run, tmp_path, capsys):
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
        for name, row in (("distilled", done), ("before", begun)):
            numbers = f"{row['val_loss']:.4f} +{row['agreement_1']:.1f} +{row['agreement_10']:.1f}"
            assert re.search(f"^{name}.* {numbers}$", said, re.M)
        assert re.search(rf"^chance +{100 / (n - 1):.1f} +{1000 / (n - 1):.1f}$", said, re.M)
        assert parse_command(commands_in(said)[-1]).command == "glue"


def test_checkpoint_starts_other_students(run, tmp_path, tiny_data, encoder):
    """It embeds text; it is distill_multimodal.py's text encoder, and a teacher of this script again, but not
    its own."""
    checkpoint, path = run("text", max_steps=2), tmp_path / "run" / "ckpt.pt"
    student = load_checkpoint(path)
    ids, mask = student.tokenizer.encode(["a red circle .", "a green cross and a blue square ."], 32)
    assert student.max_length == 32 and student.tokenizer.text == encoder.tokenizer.text
    embeddings = student.encode_text(ids, mask)
    assert embeddings.shape == (2, 32) and embeddings.norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert torch.allclose(embeddings[:1], student.encode_text(ids[:1, :(~mask[0]).sum()]), atol=1e-6)
    words = dict(MULTIMODAL, data_dir=tiny_data, out_dir=tmp_path / "both", image_init="random",
                 kd_loss="none", align_loss="contrastive", text_init=path, text_depth=2, max_length=16,
                 max_steps=1, lr=0)
    distill_multimodal.main(distill_multimodal.get_args(flags(words)))
    both = load_checkpoint(tmp_path / "both" / "ckpt.pt")
    for k, v in both.text_encoder.state_dict().items():
        assert torch.equal(v, checkpoint["model"][k]), k
    assert both.tokenizer.text == checkpoint["tokenizer"]
    half = run("text", "half", teacher=path, depth=1, max_steps=1, lr=0)["model"]
    assert torch.equal(half["blocks.0.mlp.fc1.weight"], checkpoint["model"]["blocks.0.mlp.fc1.weight"])
    assert "--out_dir" in refused(run, "text", teacher=path)
