"""Tokenizers lose nothing; corpora are built once, noticed when stale, drawn from reproducibly."""

import gzip
import json
import os
import random
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import data
from runtime import generator

TRICKY = "def f(x):\n\treturn  'naïve ☃ \U0001f600'  # <|endoftext|> [MASK]\r\n\x00\x7f"


@pytest.fixture(scope="module")
def learned():
    texts = Path(data.__file__).read_text().splitlines(keepends=True)
    return texts, data.learn_bpe(texts, entries=320)


def test_bytes_and_learned_tokenizers_round_trip_any_text(learned):
    for tokenizer in (data.bytes_tokenizer(), learned[1]):
        assert data.decode(tokenizer, data.encode(tokenizer, TRICKY)) == TRICKY
        assert tokenizer.eot_token not in data.encode(tokenizer, "<|endoftext|>")


def test_learned_tokenizer_segments_as_the_library_that_learned_it(learned):
    texts, ours = learned
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=319, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(texts, trainer)
    for text in [*texts, TRICKY, "range range(addition)  return\n\n\n  x"]:
        assert data.encode(ours, text) == theirs.encode(text).ids


def test_learned_tokenizer_has_the_entries_asked_for_with_end_of_text_last(learned):
    assert learned[1].n_vocab == 320 and learned[1].eot_token == 319
    assert data.vocab_size(learned[1]) == 321


def test_spec_survives_json_and_gives_the_same_tokenizer(learned):
    for tokenizer in (data.bytes_tokenizer(), learned[1]):
        again = data.load_tokenizer(json.loads(json.dumps(data.tokenizer_spec(tokenizer))))
        assert data.encode(again, TRICKY) == data.encode(tokenizer, TRICKY)
        assert again.n_vocab == tokenizer.n_vocab and again.eot_token == tokenizer.eot_token


def test_token_bytes_count_the_text_and_nothing_else(learned):
    for tokenizer in (data.bytes_tokenizer(), learned[1]):
        ids = torch.tensor(
            [*data.encode(tokenizer, TRICKY), tokenizer.eot_token, tokenizer.n_vocab]
        )
        assert data.token_bytes(tokenizer)[ids].sum() == len(TRICKY.encode())


def test_mask_shows_as_mask_and_broken_utf8_as_a_replacement():
    tokenizer = data.bytes_tokenizer()
    assert data.decode(tokenizer, [65, 257, 0xFF]) == "A[MASK]\ufffd"


def test_gpt2_tokenizer_has_the_public_ids():
    try:
        tokenizer = data.gpt2_tokenizer()
    except ValueError as error:
        pytest.skip(str(error))
    assert data.encode(tokenizer, "Hello world") == [15496, 995]
    assert tokenizer.eot_token == 50256 and data.vocab_size(tokenizer) == 50258
    assert data.token_bytes(tokenizer)[[15496, 995, 50256, 50257]].tolist() == [5, 6, 0, 0]


def test_stdlib_corpus_leaves_out_tests_and_vendored_code():
    source = data.stdlib_source()
    parts = {part for f in source.files for part in f.relative_to(source.root).parts}
    assert not parts & data.LEFT_OUT
    assert {"argparse.py", "dataclasses.py", "json"} <= parts
    shares = [data.held_out(str(f.relative_to(source.root))) for f in source.files]
    assert 0.02 < np.mean(shares) < 0.1


def write_texts(folder, n=60):
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.txt").write_text(f"document {i} " * 20)
    return folder


def test_streams_hold_every_document_once_with_end_of_text_between(tmp_path):
    folder = write_texts(tmp_path / "texts")
    corpus = data.open_corpus(str(folder), "bytes", str(tmp_path / "cache"))
    seen = []
    for split in ("train", "val"):
        ids = corpus.streams[split]
        assert len(ids) == corpus.meta["tokens"][split] and ids[-1] == 256
        texts = data.decode(corpus.tokenizer, ids).split(data.END_OF_TEXT)[:-1]
        seen += texts
        assert sum(len(t.encode()) for t in texts) == corpus.meta["bytes"][split]
    assert sorted(seen) == sorted(f.read_text() for f in folder.iterdir())
    assert corpus.meta["tokens"]["val"] > 0


def test_one_text_file_keeps_its_end_for_validation(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"{i:04} " for i in range(400)))
    corpus = data.open_corpus(str(file), "bytes", str(tmp_path / "cache"))
    train, val = (data.decode(corpus.tokenizer, corpus.streams[s][:-1]) for s in ("train", "val"))
    assert train + val == file.read_text()
    assert len(val) == 100


def test_jsonl_lines_are_documents(tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n\n" for i in range(100)))
    corpus = data.open_corpus(str(file), "bytes", str(tmp_path / "cache"))
    ends = sum(int((corpus.streams[s] == 256).sum()) for s in ("train", "val"))
    assert ends == 100 and corpus.meta["tokens"]["val"] > 0


def modification_times(corpus):
    return [(corpus.folder / f).stat().st_mtime_ns for f in ("train.bin", "val.bin", "meta.json")]


def test_corpus_is_built_once_and_again_when_its_source_changes(tmp_path):
    folder, cache = write_texts(tmp_path / "texts"), str(tmp_path / "cache")
    first = data.open_corpus(str(folder), "bytes", cache)
    times = modification_times(first)
    assert modification_times(data.open_corpus(str(folder), "bytes", cache)) == times
    (folder / "0.txt").write_text("new " * 1000)
    changed = data.open_corpus(str(folder), "bytes", cache)
    assert modification_times(changed) != times
    assert "new new" in data.decode(changed.tokenizer, changed.streams["train"])
    (folder / "1.txt").unlink()
    again = data.open_corpus(str(folder), "bytes", cache)
    assert again.meta["fingerprint"] != changed.meta["fingerprint"]


@pytest.mark.parametrize("damage", ["train.bin", "val.bin", "meta.json"])
def test_truncated_cache_is_built_again(tmp_path, damage):
    folder, cache = write_texts(tmp_path / "texts"), str(tmp_path / "cache")
    corpus = data.open_corpus(str(folder), "bytes", cache)
    whole = np.array(corpus.streams["train"])
    file = corpus.folder / damage
    os.truncate(file, file.stat().st_size // 2)
    assert np.array_equal(data.open_corpus(str(folder), "bytes", cache).streams["train"], whole)


def test_tokenizers_do_not_share_a_cache(tmp_path):
    folder, cache = write_texts(tmp_path / "texts"), str(tmp_path / "cache")
    by_bytes = data.open_corpus(str(folder), "bytes", cache)
    spec = data.tokenizer_spec(data.learn_bpe(["document 1 2 3 "] * 9, entries=270))
    learned = data.open_corpus(str(folder), spec, cache)
    assert by_bytes.folder != learned.folder
    assert learned.meta["tokens"]["train"] < by_bytes.meta["tokens"]["train"]


def test_batches_repeat_with_the_generator_and_stay_inside_the_stream(tmp_path):
    corpus = data.open_corpus(str(write_texts(tmp_path / "t")), "bytes", str(tmp_path / "c"))
    a, b = (corpus.batch(64, 50, generator(3)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (64, 50) and a.dtype == torch.int64
    g = generator(3)
    g_state = generator(0)
    g_state.set_state(g.get_state())
    assert torch.equal(corpus.batch(5, 50, g), corpus.batch(5, 50, g_state))
    whole = data.decode(corpus.tokenizer, corpus.streams["train"])
    assert all(data.decode(corpus.tokenizer, row) in whole for row in a)
    longest = corpus.meta["tokens"]["train"]
    assert torch.equal(
        corpus.batch(2, longest, g)[0], torch.tensor(corpus.streams["train"].astype(int))
    )


def test_blocks_are_in_order_without_overlap_and_spread_when_limited(tmp_path):
    corpus = data.open_corpus(str(write_texts(tmp_path / "t")), "bytes", str(tmp_path / "c"))
    stream = torch.tensor(corpus.streams["val"].astype(int))
    blocks = corpus.blocks("val", 40)
    assert torch.equal(blocks.flatten(), stream[: len(stream) // 40 * 40])
    few = corpus.blocks("val", 40, limit=3)
    assert few.shape == (3, 40) and torch.equal(few[0], blocks[0])
    assert torch.equal(few[2], blocks[2 * len(blocks) // 3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), r"no \.txt"),
        (lambda p: p.write_text(""), "no text"),
        (lambda p: p.write_bytes(b"caf\xe9"), "not UTF-8"),
    ],
)
def test_unusable_text_is_named(tmp_path, make, message):
    path = tmp_path / "input"
    make(path)
    with pytest.raises((ValueError, OSError), match=message):
        data.open_corpus(str(path), "bytes", str(tmp_path / "cache"))


@pytest.mark.parametrize("line", ["{", "[1]", '{"body": "x"}', '{"text": 3}'])
def test_bad_jsonl_line_is_named_by_number(tmp_path, line):
    file = tmp_path / "docs.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"docs\.jsonl:2"):
        data.open_corpus(str(file), "bytes", str(tmp_path / "cache"))


def test_short_corpus_says_how_short(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("just this")
    corpus = data.open_corpus(str(file), "bytes", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="10 tokens, a block takes 128"):
        corpus.need("train", 128)


def test_unknown_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose stdlib, gpt2 or bytes"):
        data.open_corpus(None, "words", str(tmp_path))


def test_few_jsonl_documents_hold_out_their_ends(tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i} " * 50}) + "\n" for i in range(3)))
    corpus = data.open_corpus(str(file), "bytes", str(tmp_path / "cache"))
    assert corpus.meta["tokens"]["val"] > 0
    assert corpus.meta["tokens"]["train"] > 0


def test_a_run_keeps_the_text_it_opened_when_the_corpus_is_built_again(tmp_path):
    folder, cache = write_texts(tmp_path / "texts"), str(tmp_path / "cache")
    corpus = data.open_corpus(str(folder), "bytes", cache)
    before = corpus.batch(8, 20, generator(0))
    (folder / "0.txt").write_text("short")
    data.open_corpus(str(folder), "bytes", cache)
    assert torch.equal(corpus.batch(8, 20, generator(0)), before)


def test_ids_beyond_the_vocabulary_name_the_damaged_folder(tmp_path):
    corpus = data.open_corpus(str(write_texts(tmp_path / "t")), "bytes", str(tmp_path / "c"))
    file = corpus.folder / "val.bin"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(ValueError, match="damaged; delete it"):
        corpus.blocks("val", 40)


# Large corpora: in pieces, in parallel, in several goes


def write_mixture(folder, n=40):
    """One file of each kind; returns the documents in the order in which they are read."""
    folder.mkdir()
    documents = {kind: [f"{kind} {i} ünï\n\n" * (i + 1) for i in range(n)] for kind in "bc"}
    with open(folder / "b.jsonl", "w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in documents["b"])
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": documents["c"]}), folder / "c.parquet")
    long = "".join(f"line {i} of ünï\n" + "\n \n" * (i % 3) for i in range(3000))
    (folder / "a.txt").write_text(long)
    return [long, *documents["b"], *documents["c"]]


def textbook_blocks(documents, tokenizer, length, held_out):
    """MDLM's blocks: every document and end-of-text, one after the other, cut, wrapped."""
    eot, blocks = tokenizer.eot_token, []
    for texts in (documents[:-held_out], documents[-held_out:]):
        stream = [i for text in texts for i in [*tokenizer.encode_ordinary(text), eot]]
        cuts = [stream[i : i + length - 2] for i in range(0, len(stream), length - 2)]
        blocks.append(torch.tensor([[eot, *c, eot] for c in cuts if len(c) == length - 2]))
    return blocks


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(data, "PIECE", 1000)
    monkeypatch.setattr(data, "SAVE_SECONDS", 0)


def interrupt(monkeypatch, left: list[int], calls: list[str]):
    """Let the left[0]-th text that is tokenized from here on end in Ctrl-C; `calls` notes them."""
    encode = data.encode_array

    def counted(tokenizer, text):
        calls.append(text)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return encode(tokenizer, text)

    monkeypatch.setattr(data, "encode_array", counted)


def test_wrapped_blocks_are_the_textbooks_whatever_the_form_of_the_files(tmp_path, small_pieces):
    documents = write_mixture(tmp_path / "texts")
    spec = data.tokenizer_spec(data.learn_bpe(["line 1 of ünï\n\n \n"] * 9, entries=300))
    where = (str(tmp_path / "texts"), spec, str(tmp_path / "cache"))
    corpus = data.open_corpus(*where, blocks="wrapped", split=7)
    want = textbook_blocks(documents, corpus.tokenizer, 32, held_out=7)
    for split, blocks in zip(("train", "val"), want):
        assert torch.equal(corpus.blocks(split, 32), blocks)
    assert corpus.meta["bytes"]["val"] == sum(len(text.encode()) for text in documents[-7:])
    rows = corpus.batch(200, 32, generator(0))
    assert all((want[0] == row).all(-1).any() for row in rows)
    assert len(rows.unique(dim=0)) > 100
    assert data.open_corpus(*where).meta == corpus.meta, "a corpus is taken in the form it has"
    assert data.open_corpus(*where, blocks="windows").meta["blocks"] == "windows"


@pytest.mark.parametrize("form", [{}, {"blocks": "wrapped", "split": 7}])
def test_a_build_that_stops_at_any_place_goes_on_from_there(
    tmp_path, small_pieces, monkeypatch, form
):
    write_mixture(tmp_path / "texts")
    cache = str(tmp_path / "cache")
    whole = data.open_corpus(str(tmp_path / "texts"), "bytes", str(tmp_path / "other"), **form)
    stops, calls = iter([3, 1, 20, 7, 40, 2]), []
    left = [next(stops)]
    interrupt(monkeypatch, left, calls)
    for again in stops:
        with pytest.raises(KeyboardInterrupt):
            data.open_corpus(str(tmp_path / "texts"), "bytes", cache, **form)
        left[0] = again
    left[0] = -1
    corpus = data.open_corpus(str(tmp_path / "texts"), "bytes", cache, **form)
    for split in ("train", "val"):
        assert np.array_equal(corpus.streams[split], whole.streams[split])
    assert corpus.meta == whole.meta
    twice = len(calls) - len(set(calls))
    assert twice < 40, "what was saved is not tokenized again"
    assert not (corpus.folder / "progress.json").exists()


def test_openwebtext_streams_through_datasets_and_goes_on_where_it_was_killed(
    tmp_path_factory, small_pieces, monkeypatch
):
    tmp_path = tmp_path_factory.mktemp("web")  # datasets would take "test" in a path for a split
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    documents = [f"document {i} of the web " * (i % 17 + 1) for i in range(300)]
    for i in range(3):
        table = pyarrow.table({"text": documents[100 * i : 100 * (i + 1)], "id": [i] * 100})
        parquet.write_table(table, tmp_path / f"train-0000{i}.parquet", row_group_size=30)
    monkeypatch.setattr(data, "OPENWEBTEXT", str(tmp_path))
    monkeypatch.setattr(data, "HELD_OUT_OPENWEBTEXT", 50)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    left = [170]
    interrupt(monkeypatch, left, [])
    with pytest.raises(KeyboardInterrupt):
        data.open_corpus("openwebtext", "bytes")
    corpus = data.open_corpus("openwebtext", "bytes")
    assert -170 < left[0] < -100, "about half of the documents were left"
    want = textbook_blocks(documents, corpus.tokenizer, 64, held_out=50)
    for split, blocks in zip(("train", "val"), want):
        assert torch.equal(corpus.blocks(split, 64), blocks)
    monkeypatch.setattr(data, "_hub_stream", None)
    assert data.open_corpus("openwebtext", "bytes").meta == corpus.meta, (
        "no network once it is there"
    )


def test_long_files_are_cut_where_tokens_are_not(tmp_path, small_pieces):
    text = "".join(f"x{i}\n\n\u2003 y\n" + "é" * (i % 50) + "\n" for i in range(500))
    text += "z" * 30_000 + "\n"  # a line longer than any piece
    (tmp_path / "a.txt").write_text(text)
    pieces = list(data._read_text(tmp_path / "a.txt", 0, len(text.encode())))
    assert "".join(p for p, _ in pieces) == text and len(pieces) > 10
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(p) for p, _ in pieces) < 10_000
    try:
        tokenizer = data.gpt2_tokenizer()
    except ValueError:
        tokenizer = data.learn_bpe([text], entries=400)
    short = text[: text.index("zz")]
    cut = [p for p, _ in pieces if "zz" not in p]
    ids = [i for p in cut for i in data.encode(tokenizer, p)]
    assert ids == tokenizer.encode_ordinary(short)[: len(ids)]


def test_too_few_documents_to_hold_out_are_counted(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for n in (2, 3):
        with pytest.raises(ValueError, match="hold out fewer"):
            data.open_corpus(str(tmp_path / "d.jsonl"), "bytes", str(tmp_path / "c"), split=n)
    corpus = data.open_corpus(str(tmp_path / "d.jsonl"), "bytes", str(tmp_path / "c"), split=1)
    assert data.decode(corpus.tokenizer, corpus.streams["val"]) == "two<|endoftext|>"


@pytest.mark.parametrize("damage", ["truncated", "no text column", "numbers"])
def test_unusable_parquet_is_named(tmp_path, damage):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "d.parquet"
    column = {"no text column": {"body": ["x"]}, "numbers": {"text": [1, 2]}}
    parquet.write_table(pyarrow.table(column.get(damage, {"text": ["x"] * 99})), file)
    if damage == "truncated":
        os.truncate(file, 60)
    with pytest.raises(ValueError, match=r"d\.parquet"):
        data.open_corpus(str(file), "bytes", str(tmp_path / "cache"))


def test_full_disk_keeps_what_was_tokenized(tmp_path, monkeypatch):
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "one"}\n' * 100)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        data.open_corpus(str(file), "bytes", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("meta.json"))


# Dream's tokenizer, beside transformers' tokenizer of the same files

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data"
# A part of Qwen2.5's list, and Dream's two at its end.
SPECIAL_IDS = {
    **{"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    **{"<|object_ref_start|>": 151646, "<|vision_pad|>": 151654, "<|video_pad|>": 151656},
    **{"<tool_call>": 151657, "</tool_call>": 151658, "<|fim_prefix|>": 151659},
    **{"<|file_sep|>": 151664, "<|beginoftext|>": 151665, "<|mask|>": 151666},
}


@pytest.fixture(scope="module")
def theirs(theirs):
    """Without transformers' own handling of special tokens; see `as_text`."""
    return theirs.backend_tokenizer


def as_text(theirs, texts):
    """Their ids where the spelling of a special token is text like any other."""
    theirs.encode_special_tokens = True
    ids = [encoding.ids for encoding in theirs.encode_batch(texts, add_special_tokens=False)]
    theirs.encode_special_tokens = False
    return ids


def nfc(text):
    return unicodedata.normalize("NFC", text)


def real_texts():
    folder = PUBLISHED / "benchmarks"
    names = ["mbpp.jsonl", "gsm8k_test.jsonl", "math500.jsonl"]
    lines = [line for name in names for line in (folder / name).read_text().splitlines()]
    lines += gzip.decompress((folder / "HumanEval.jsonl.gz").read_bytes()).decode().splitlines()
    values = [value for line in lines for value in json.loads(line).values()]
    wiki = [f.read_text() for f in (PUBLISHED / "text").glob("wikitext2_*.txt")]
    return wiki + [value for value in values if isinstance(value, str)]


def random_texts(theirs, n):
    """Assigned characters, with many marks, spaces, line ends, contractions and control tokens."""

    def known(c):  # their table of marks and compositions is that of an older Unicode than Python's
        after, apart = "\u0345" + c, unicodedata.normalize("NFD", c)
        return all(theirs.normalizer.normalize_str(s) == nfc(s) for s in (after, apart))

    kinds = {chr(c): unicodedata.category(chr(c)) for c in range(0x110000)}
    assigned = [c for c, kind in kinds.items() if kind not in ("Cn", "Cs", "Co") and known(c)]
    pools = [
        assigned,
        [c for c in assigned if kinds[c].startswith("M")],
        [c for c in assigned if c.isspace()],
        [c for c in assigned if kinds[c].startswith("N")],
        [chr(c) for c in range(0xE000, 0xE100)],  # private use
        [chr(c) for c in range(32, 383)],
        list("aeinouAEO\t\r\n  '"),
        ["'s", "'LL", "'ve", "'D", "\u017f", "\r\n", " \n", *data.DREAM_SPECIAL],
    ]
    draw = random.Random(0)
    return [
        "".join(draw.choice(draw.choice(pools)) for _ in range(draw.randint(1, 40)))
        for _ in range(n)
    ]


def test_dream_segments_random_text_as_transformers_does(dream, theirs):
    texts = [TRICKY, "", *random_texts(theirs, 10_000 if dream.n_vocab > 151_000 else 1000)]
    assert sum(nfc(text) != text for text in texts) > len(texts) / 10
    for text, want in zip(texts, as_text(theirs, texts), strict=True):
        ids = data.encode(dream, text)
        assert ids == want, ascii(text)
        assert data.decode(dream, ids) == nfc(text)


def test_dream_segments_real_text_as_transformers_does(dream, dream_folder, theirs):
    published = dream_folder.is_relative_to(PUBLISHED)
    texts = real_texts() if published else [Path(__file__).read_text()]
    for text, want in zip(texts, as_text(theirs, texts), strict=True):
        assert data.encode(dream, text) == want
        assert data.decode(dream, want) == nfc(text)


def test_dream_has_the_public_ids():
    if not PUBLISHED.exists():
        pytest.skip(f"{PUBLISHED} is absent: Qwen's vocabulary is no part of the project")
    dream = data.dream_tokenizer(PUBLISHED / "qwen")
    assert data.encode(dream, "Hello world Hello") == [9707, 1879, 21927]
    assert {text: dream.encode_single_token(text) for text in SPECIAL_IDS} == SPECIAL_IDS
    assert data.mask_id(dream) == 151666 and data.vocab_size(dream) == 151667
    assert data.decode(dream, [9707, 151666, 151667, 152063]) == "Hello[MASK]\ufffd\ufffd"


def test_small_dream_has_its_special_tokens_after_the_vocabulary(small_dream):
    assert [small_dream.encode_single_token(text) for text in data.DREAM_SPECIAL] == [
        *range(600, 624)
    ]
    assert set(SPECIAL_IDS) < set(data.DREAM_SPECIAL)
    assert data.mask_id(small_dream) == 623 and data.vocab_size(small_dream) == 624
    sizes = data.token_bytes(small_dream)
    ids = data.encode(small_dream, TRICKY)
    assert sizes[ids].sum() == len(TRICKY.encode()) and not sizes[600:].any()
    assert sizes.shape == (624,)


def test_only_dream_composes_characters(small_dream, learned):
    apart, composed = "e\u0301", "\u00e9"
    assert data.encode(small_dream, apart) == data.encode(small_dream, composed)
    for tokenizer in (data.bytes_tokenizer(), learned[1]):
        assert data.decode(tokenizer, data.encode(tokenizer, apart)) == apart
        assert data.mask_id(tokenizer) == tokenizer.n_vocab


def test_dream_comes_back_from_its_spec(small_dream, small_folder):
    spec = json.loads(json.dumps(data.tokenizer_spec(small_dream)))
    assert spec == {"name": "dream", "folder": str(small_folder)}
    again = data.load_tokenizer(spec)
    assert data.encode(again, TRICKY) == data.encode(small_dream, TRICKY)
    assert again.n_vocab == small_dream.n_vocab


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "binary", "empty", "list", "swapped"])
def test_damaged_dream_files_are_named(tmp_path, small_folder, name, damage):
    shutil.copytree(small_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / name
    lines = file.read_text().splitlines(keepends=True)
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        os.truncate(file, file.stat().st_size * 2 // 3)
    elif damage == "binary":
        file.write_bytes(b"\xff\xfe" + file.read_bytes())
    elif damage == "swapped" and name == "merges.txt":
        file.write_text("".join([*lines[:-2], lines[-1], lines[-2]]))
    else:
        texts = {"empty": "{}", "list": "[1]", "swapped": '{"a": 0, "b": 2}'}
        file.write_text(texts[damage])
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(name)) as caught:
        data.dream_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("damage", ["{", "[]", '[{"finished": true}, "0"]', "tokens", "finished"])
def test_a_damaged_state_of_a_build_costs_a_new_start_and_nothing_else(
    tmp_path, small_pieces, monkeypatch, damage
):
    write_mixture(tmp_path / "texts")
    where = (str(tmp_path / "texts"), "bytes", str(tmp_path / "cache"))
    interrupt(monkeypatch, [60], [])
    with pytest.raises(KeyboardInterrupt):
        data.open_corpus(*where)
    (file,) = (tmp_path / "cache").rglob("progress.json")
    state, check = json.loads(file.read_text())
    state |= {"tokens": {"train": -5, "val": "x"}} if damage == "tokens" else {"finished": True}
    file.write_text(json.dumps([state, check]) if damage.isalpha() else damage)
    corpus = data.open_corpus(*where)
    whole = data.open_corpus(*where[:2], str(tmp_path / "other"))
    for split in ("train", "val"):
        assert np.array_equal(corpus.streams[split], whole.streams[split])
