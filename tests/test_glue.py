"""
evaluate.py glue: metrics against scikit-learn and SciPy, readers on files laid out as the real ones and on
damaged ones, pairs as BERT and RoBERTa see them, the whole subcommand on toy tasks, killed and run again.
"""
import os
import re
import shutil

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import transformers

import conftest
import evaluate
from conftest import at_step, flags, records, refused, same
from evaluate import GLUE, encode_examples, glue_score, read_glue
from model import (Encoder, VisionLanguageModel, bert_tokenizer, load_checkpoint, read_checkpoint,
                   save_checkpoint)
from server import write_parquet

HEADERS = { # of the raw files, and the columns of texts and label in them
    "sst2": "sentence label", "wnli": "index sentence1 sentence2 label",
    "rte": "index sentence1 sentence2 label",
    "qnli": "index question sentence label", "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mrpc": "Quality|#1 ID|#2 ID|#1 String|#2 String",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
            "sentence2_parse sentence1 sentence2 label1 gold_label"}
WORDS = {0: ["bad", "awful", "poor"], 1: ["good", "great", "fine"], 2: ["blue", "green", "red"]}
FILLER = ["the", "film", "is", "a", "story", "of", "two", "people", "and", "their", "long", "way"]
ODD = ['"no', "a\u2028b\x85c"] # no quotes of the format, and no line ends
SHAPE = dict(embed_dim=32, num_heads=2, depth=2, norm_first=False, positions="learned", embed_norm=True,
             vocab_size=40, max_length=64, token_types=2)


def example(task, i, rng):
    """Texts whose last one is about its class, and the class, for stsb the score."""
    classes = 2 if task == "stsb" else len(GLUE[task].classes)
    texts = [" ".join(rng.choice(FILLER + ODD, rng.integers(2, 7))) for _ in GLUE[task].columns[:-1]]
    texts[-1] += " " + rng.choice(WORDS[i % classes])
    return texts, [0.8, 4.6][i % 2] if task == "stsb" else i % classes


def write_raw(glue_dir, task, sizes=(32, 12), seed=0):
    """A task as its archive unpacks."""
    rng, columns = np.random.default_rng(seed), GLUE[task].columns
    header = HEADERS.get(task, "source label star sentence")
    header = header.split("|" if task == "mrpc" else " ")
    splits = ["train", "dev_matched", "dev_mismatched"] if task == "mnli" else ["train", "dev"]
    folder = os.path.join(glue_dir, GLUE[task].title)
    end = "\r\n" if task == "wnli" else "\n" # as Windows writes
    os.makedirs(folder, exist_ok=True)
    for split, size in zip(splits, [*sizes, 10]):
        more = [f"label{k}" for k in range(2, 6)] if split.startswith("dev_") else []
        names = header[:-1] + more + header[-1:]
        lines = [] if task == "cola" else ["\t".join(names)]
        for i in range(size):
            texts, label = example(task, i, rng)
            label = GLUE[task].classes[label] if GLUE[task].classes else f"{label:.3f}"
            cells = dict(zip(columns, [*texts, label]))
            lines.append("\t".join(cells.get(name, "x") for name in names))
        encoding = "utf-8-sig" if task == "mrpc" else "utf-8"
        with open(os.path.join(folder, f"{split}.tsv"), "w", encoding=encoding, newline="") as f:
            f.write(end.join(lines) + end)


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    glue_dir = str(tmp_path_factory.mktemp("glue"))
    for task in GLUE:
        write_raw(glue_dir, task)
    return glue_dir


def tokenizer_text():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *sum(WORDS.values(), []), *"0123456789x"]
    return bert_tokenizer({word: i for i, word in enumerate(words)})


@pytest.fixture
def run(raw, tmp_path, monkeypatch):
    """run(**flags) -> what the subcommand returns; text.pt is a toy BERT with a pooler."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    encoder = Encoder("text", pooler=True, **SHAPE)
    torch.nn.init.normal_(encoder.pooler_weight, std=0.2)
    save_checkpoint("text.pt", encoder, tokenizer=tokenizer_text())

    def run(**changes):
        knobs = dict(task="sst2", glue_dir=raw, ckpt="text.pt", out_dir="run", device="cpu", dtype="float32",
                     max_length=32, batch_size=8, epochs=2, lr=1e-3, log_interval=1) | changes
        return evaluate.main(["glue", *flags(knobs)])
    return run


THEIRS = {"matthews": lambda p, y: sklearn.metrics.matthews_corrcoef(y, p),
          "f1": lambda p, y: sklearn.metrics.f1_score(y, p, zero_division=0),
          "accuracy": lambda p, y: sklearn.metrics.accuracy_score(y, p),
          "spearman": lambda p, y: scipy.stats.spearmanr(p, y).statistic,
          "pearson": lambda p, y: scipy.stats.pearsonr(p, y).statistic}


@pytest.mark.filterwarnings("ignore:A single label was found") # scikit-learn's, who answers all the same
@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize("n", [2, 10, 1000])
def test_metrics_are_those_of_the_libraries(task, n):
    for seed in range(20):
        rng = np.random.default_rng((n, seed))
        if task == "stsb": # many ties on both sides
            y, p = rng.integers(0, 6, n) / 2, np.round(rng.normal(size=n) + seed, seed % 3)
            if np.ptp(y) == 0 or np.ptp(p) == 0:
                continue
        else:
            y, p = rng.integers(0, len(GLUE[task].classes), (2, n))
        for metric in GLUE[task].metrics:
            assert glue_score(task, p, y, metric) == pytest.approx(100 * THEIRS[metric](p, y), abs=1e-9)
        assert glue_score(task, p, y) == glue_score(task, p, y, GLUE[task].metrics[0])


@pytest.mark.parametrize("task", GLUE)
def test_raw_and_parquet_are_the_same(task, raw, tmp_path):
    """The hub's columns and class numbers, from what the raw files say by name."""
    hub = {"mnli": ["premise", "hypothesis"], "qnli": ["question", "sentence"],
           "qqp": ["question1", "question2"], "cola": ["sentence"],
           "sst2": ["sentence"]}.get(task, ["sentence1", "sentence2"])
    ours, rng = read_glue(task, raw), np.random.default_rng(0)
    assert [*ours] == (["train", "dev_matched", "dev_mismatched"] if task == "mnli" else ["train", "dev"])
    expected = [example(task, i, rng) for i in range(32)]
    assert ours["train"][0] == [tuple(texts) for texts, _ in expected]
    assert ours["train"][1].tolist() == pytest.approx([label for _, label in expected])
    for split, (texts, labels) in ours.items():
        rows = [dict(zip(hub, pair), label=label, idx=i)
                for i, (pair, label) in enumerate(zip(texts, labels.tolist()))]
        path = f"{tmp_path}/{task}/{split.replace('dev', 'validation')}-00000-of-00001.parquet"
        write_parquet(path, rows)
    theirs = read_glue(task, str(tmp_path))
    for split in ours:
        assert ours[split][0] == theirs[split][0] and np.array_equal(ours[split][1], theirs[split][1])
        assert ours[split][1].dtype == theirs[split][1].dtype


def test_torn_rows_of_qqp(tmp_path, capsys):
    """Up to one in a thousand is left out and named."""
    write_raw(tmp_path, "qqp", (2000, 8))
    train = tmp_path / "QQP" / "train.tsv"
    lines = train.read_text().strip().split("\n")
    train.write_text("\n".join([*lines[:700], lines[700][:20], *lines[701:]]) + "\n")
    assert len(read_glue("qqp", str(tmp_path))["train"][0]) == 1999
    assert "left out: [701]" in capsys.readouterr().out


DAMAGED = [ # file, what happens to its lines, what is said
    ("CoLA/train.tsv", lambda x: ["source\tlabel\tstar\tsentence", *x], "line 1: label 'label', not 0 or 1"),
    ("CoLA/train.tsv", lambda x: [*x[:3], x[3].partition("\t")[2]], "is damaged"),
    ("SST-2/train.tsv", lambda x: x[1:], ": columns"),
    ("SST-2/dev.tsv", lambda x: x[:1], "is damaged"),
    ("STS-B/train.tsv", lambda x: [x[0], x[1][:x[1].rindex("\t")] + "\t5.1"], "line 2: label '5.1', not a"),
    ("WNLI/train.tsv", lambda x: [*x, "1\tcaf\xe9\tx\t1"], "cannot be read")] # no UTF-8


@pytest.mark.parametrize("file, change, said", DAMAGED)
def test_damaged_files(run, raw, tmp_path, file, change, said):
    """Refused with file and line before anything is trained or written, whichever of the tasks it is."""
    path = shutil.copytree(raw, tmp_path / "data") / file
    lines = path.read_text("latin-1").strip().split("\n")
    path.write_text("\n".join(change(lines)) + "\n", "latin-1")
    error = refused(run, task="all", glue_dir="data")
    assert file in error and said in error
    assert not os.path.exists("run")


WRONG = [
    (dict(glue_dir="none"), "GLUE's sst2: no none/SST-2/train.tsv, none/SST-2/dev.tsv. .*hf download"),
    (dict(ckpt="image.pt"), "image.pt is an encoder for image, and glue needs one for text"),
    (dict(ckpt="mute.pt"), "mute.pt has no tokenizer"),
    (dict(max_length=128), "--max_length=128, but text.pt has 64 positions"),
    (dict(task="all", glue_dir="few", batch_size=16), "wnli: --batch_size=16, but there are 8")] # the last


@pytest.mark.parametrize("changes, said", WRONG)
def test_wrong_input(run, raw, changes, said):
    write_raw(shutil.copytree(raw, "few"), "wnli", (8, 12))
    save_checkpoint("image.pt", Encoder("image", depth=1, **conftest.SHAPE))
    save_checkpoint("mute.pt", Encoder("text", **SHAPE))
    before = sorted(os.listdir())
    assert re.search(said, refused(run, **changes))
    assert sorted(os.listdir()) == before


def test_pairs_as_bert_sees_them(bert):
    """bert-base-uncased's vocabulary: as transformers, cut pairs and padding included."""
    reference = transformers.BertTokenizerFast(bert.tokenizer.get_vocab())
    words = "A plane is taking off while seven émigrés, unimpressed, watch the runway's lights".split()
    lengths = (3, 4), (12, 2), (2, 12), (12, 12), (9, 10), (1, 1)
    pairs = [(" ".join(words[:a]), " ".join(words[-b:])) for a, b in lengths]
    for texts in pairs, [(a,) for a, _ in pairs]:
        for length in 8, 13, 24, 64:
            theirs = reference(*[list(side) for side in zip(*texts)], truncation="longest_first",
                               max_length=length, padding=True, return_tensors="pt")
            ids, mask, segments = encode_examples(bert, texts, length)
            assert torch.equal(ids, theirs["input_ids"])
            assert torch.equal(~mask, theirs["attention_mask"].bool())
            assert torch.equal(segments, theirs["token_type_ids"])


def test_pairs_as_roberta_sees_them(gpt2):
    """<s> a </s></s> b </s>, the longer cut first."""
    a, b = (row[1:-1] for row in gpt2.ids(["one two three four", "five six"], 99))
    texts = [("one two three four", "five six"), ("five six", "five six")]
    ids, mask, segments = encode_examples(gpt2, texts, 64)
    assert ids[0].tolist() == [0, *a, 2, 2, *b, 2] and not segments.any()
    assert ids[1].tolist() == [0, *b, 2, 2, *b, 2, 1, 1] and mask[1].tolist() == [False] * 8 + [True] * 2
    for room, (m, n) in {9: (3, 2), 8: (2, 2), 7: (2, 1), 6: (1, 1)}.items():
        assert encode_examples(gpt2, texts[:1], room)[0][0].tolist() == [0, *a[:m], 2, 2, *b[:n], 2]
    assert encode_examples(gpt2, [("one two three four",)], 5)[0][0].tolist() == [0, *a[:3], 2]


def test_a_task_is_learned(run, capsys, tmp_path):
    """What stays is the best epoch's encoder, which other scripts read, with its head."""
    write_raw("data", "sst2", (96, 24))
    metrics = run(glue_dir="data", epochs=6, lr=3e-3)["tasks"]["sst2"]
    assert metrics["accuracy"] > 90 # chance is 50
    steps, epochs = ([r for r in records(tmp_path / "run/sst2") if k in r] for k in ("loss", "epoch"))
    assert len(steps) == 72 and [r["epoch"] for r in epochs] == list(range(1, 7))
    # linear: up over 10 % of the steps, then down in equal parts
    rates = [r["lr"] for r in steps]
    assert np.diff(rates[:7]) == pytest.approx([3e-3 / 7] * 6)
    assert np.diff(rates[7:]) == pytest.approx([-3e-3 / 65] * 64)
    assert metrics["epoch"] == 1 + np.argmax([r["val_accuracy"] for r in epochs])
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("text.pt "))
    assert row[1:] == ["-"] * 8 + [f"{metrics['accuracy']:.2f}"] + ["-"] * 3 # no averages of a part
    kept = read_checkpoint("run/sst2/ckpt.pt")
    assert sorted(os.listdir("run/sst2")) == ["ckpt.pt", "lock", "log.jsonl"] and "optimizer" not in kept
    assert kept["step"] == 12 * metrics["epoch"] and kept["best"] == metrics
    encoder, head, data = load_checkpoint("run/sst2/ckpt.pt"), kept["head"], read_glue("sst2", "data")
    ids, mask, segments = encode_examples(encoder.tokenizer, data["dev"][0], 32)
    pooled = torch.tanh(encoder(ids, mask)[:, 0] @ head["0.weight"].T + head["0.bias"])
    found = (pooled @ head["3.weight"].T + head["3.bias"]).argmax(1)
    assert glue_score("sst2", found, data["dev"][1]) == pytest.approx(metrics["accuracy"])


@pytest.mark.parametrize("task", ["stsb", "wnli"])
def test_every_tensor_learns(run, task):
    """The table of segments in both rows, and the whole encoder; its pooler is kept, and starts the head. Of
    a multimodal checkpoint it is the text tower."""
    both = VisionLanguageModel(dict(conftest.SHAPE, depth=1), dict(SHAPE, pooler=True), token_types=True)
    both.text_encoder.load_state_dict(load_checkpoint("text.pt").state_dict())
    save_checkpoint("both.pt", both, tokenizer=tokenizer_text())
    run(task=task, ckpt="both.pt", epochs=1, lr=0, out_dir="start")
    run(task=task, epochs=1, max_length=16)
    start, before, after = (read_checkpoint(path) for path in (
        f"start/{task}/ckpt.pt", "text.pt", f"run/{task}/ckpt.pt"))
    assert torch.equal(start["head"]["0.weight"], before["model"]["pooler_weight"])
    before, after = before["model"], after["model"]
    assert same(start["model"], before)
    for k in before:
        assert torch.equal(before[k], after[k]) == k.startswith("pooler_"), k
    decayed = before["type_embed.weight"] * (1 - 1e-4) # all that a row without a gradient would do
    assert not torch.isclose(after["type_embed.weight"], decayed, rtol=1e-3).all(1).any()


def test_all_tasks_continue(run, tmp_path, monkeypatch, capsys):
    """Stopped in the third task: the same command skips two, continues one exactly, and fills the table."""
    calls, tasks, train = [], [*GLUE], evaluate.train_epochs
    monkeypatch.setattr(evaluate, "train_epochs",
                        lambda run, *rest, **more: calls.append(run.args.task) or train(run, *rest, **more))

    def stop_the_third():
        if len(calls) == 3:
            raise KeyboardInterrupt
    command = dict(task="all", epochs=2, save_interval=5)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        at_step(m, evaluate, 6, stop_the_third)
        run(**command)
    third = tasks[2]
    assert calls == tasks[:3] and read_checkpoint(f"run/{third}/ckpt.pt")["step"] == 5
    # AdamW as in the thesis' code, all decayed, no layer apart
    group, = read_checkpoint(f"run/{third}/ckpt.pt")["optimizer"]["param_groups"]
    settings = [group[k] for k in ("betas", "eps", "weight_decay", "peak_lr")]
    assert settings == [(0.9, 0.98), 1e-6, 0.1, 1e-3]
    first = read_checkpoint("run/mnli/ckpt.pt")
    calls.clear()
    capsys.readouterr()
    result = run(**command)
    said = capsys.readouterr().out
    assert calls == tasks[2:] # two are finished already
    assert same(first, read_checkpoint("run/mnli/ckpt.pt"))
    assert [*result["tasks"]] == tasks and {*result["tasks"]["mnli"]} == {"matched", "mismatched", "epoch"}
    scores = [next(iter(result["tasks"][t].values())) for t in tasks]
    means = [np.mean(scores[:8]), np.mean(scores)]
    assert [result["score"], result["score_with_wnli"]] == pytest.approx(means)
    row = next(line.split() for line in said.splitlines() if line.startswith("text.pt "))
    in_order = [scores[0], result["tasks"]["mnli"]["mismatched"], *scores[1:], *means]
    assert row[1:] == [f"{x:.2f}" for x in in_order]
    # neither the stop nor the order of tasks means anything: each starts from the same weights
    run(**command | dict(task=third, out_dir="alone"))
    whole, resumed = (read_checkpoint(f"{out}/{third}/ckpt.pt") for out in ("alone", "run"))
    assert [k for k in {*whole} - {"minutes", "settings"} if not same(whole[k], resumed[k])] == []
    whole, resumed = ([(r["step"], r.get("loss")) for r in records(tmp_path / out / third)]
                      for out in ("alone", "run"))
    assert whole == resumed
    calls.clear()
    assert run(**command) == result and not calls
    save_checkpoint("text.pt", Encoder("text", **SHAPE), tokenizer=tokenizer_text())
    assert "the encoder has changed" in refused(run, **command)


def test_changes_after_a_task_is_done(run, capsys):
    """Settings that decide its score are refused, even with --resume; so are other examples without it."""
    run(task="rte")
    write_raw("other", "rte", seed=1)
    assert "the examples of rte has changed" in refused(run, task="rte", glue_dir="other")
    assert "--lr=0.001, not --lr=0.002" in refused(run, task="rte", lr=2e-3, resume=True)
    assert run(task="rte", glue_dir="other", resume=True)["tasks"]["rte"]
    assert run(task="wnli", resume=True)["tasks"]["wnli"]["epoch"] > 0 # not begun: no error
