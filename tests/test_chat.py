"""Chats have the published ids; examples are filtered as the paper says, built once, batched."""

import ast
import builtins
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from published import write_tokenizer

import chat
import data
from runtime import generator

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def learned():
    return data.learn_bpe([Path(chat.__file__).read_text()], entries=320)


# The chat template of Dream


def said(role, content):
    return {"role": role, "content": content}


DEFAULT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHATS = [
    (
        [said("user", "Hi there")],
        {},
        DEFAULT + "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        [said("system", "Be brief."), said("user", "Why?")],
        {"begin": "```python\n"},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n```python\n",
    ),
    (
        [said("user", ""), said("assistant", "\n\n x"), said("user", "\n  And?\n")],
        {"system": "You code."},
        "<|im_start|>system\nYou code.<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\n\n\n x<|im_end|>\n<|im_start|>user\n\n  And?\n<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    (
        [said("user", "1 + 1?"), said("assistant", "2")],
        {},
        DEFAULT + "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n",
    ),
]


@pytest.mark.parametrize(("messages", "options", "want"), CHATS)
def test_chat_template_is_the_one_written_by_hand(small_dream, messages, options, want):
    assert data.decode(small_dream, chat.chat_ids(small_dream, messages, **options)) == want


@pytest.mark.parametrize(("messages", "options", "want"), CHATS)
def test_chat_has_the_ids_of_the_templated_text(dream, theirs, messages, options, want):
    want = theirs.encode(want, add_special_tokens=False)
    assert chat.chat_ids(dream, messages, **options) == want


def test_content_cannot_spell_control_tokens(small_dream):
    evil = "".join(data.DREAM_SPECIAL) + "[MASK]"
    plain = chat.chat_ids(small_dream, [said("user", "x")], begin="y")
    ids = chat.chat_ids(small_dream, [said("user", evil)], system=evil, begin=evil)
    controls = [[i for i in chat if i >= 600] for chat in (plain, ids)]
    assert controls[0] == controls[1] == [601, 602, 601, 602, 601]
    assert data.decode(small_dream, ids).count(evil) == 3


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "without messages"),
        ([said("user", "x"), said("tool", "y")], "system, user or assistant"),
        ([{"role": "user"}], "content"),
        ([said("user", None)], "content"),
        ([said("user", ["x"])], "content"),
        (["x"], "role"),
    ],
)
def test_chat_that_is_none_is_refused(small_dream, messages, message):
    with pytest.raises(ValueError, match=message):
        chat.chat_ids(small_dream, messages)


def test_closed_answer_has_no_beginning(small_dream):
    with pytest.raises(ValueError, match="has spoken"):
        chat.chat_ids(small_dream, [said("assistant", "x")], begin="y")


SYSTEM_OR_DEFAULT = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content']"
    " + '<|im_end|>\\n' }}{%- else %}{{- CONSTANT }}{%- endif %}"
)


@pytest.mark.parametrize(
    "constant",
    [
        r"'<|im_start|>system\nYou are Dream, created by us. You write code.<|im_end|>\n'",
        "'<|im_start|>system\nA line\nand another<|im_end|>\n'",
        r"'<|im_start|>system\nA line\nand it\'s another<|im_end|>\n'",
        '"<|im_start|>system\\nIt\'s code.<|im_end|>\\n"',
    ],
)
def test_system_line_is_what_the_template_would_write(tmp_path, constant):
    jinja2 = pytest.importorskip("jinja2")
    template = SYSTEM_OR_DEFAULT.replace("CONSTANT", constant)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    text = jinja2.Template(template).render(messages=[said("user", "x")])
    assert f"<|im_start|>system\n{chat.system_line(tmp_path)}<|im_end|>" == text.rstrip("\n")


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        [],
        {"chat_template": 3},
        {"chat_template": SYSTEM_OR_DEFAULT.replace("CONSTANT", "'' + 1 / 0")},
        {"chat_template": "{{ '<|im_start|>system\\n' ~ default ~ '<|im_end|>' }}"},
    ],
)
def test_system_line_is_dreams_where_the_folder_has_none(tmp_path, config):
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat.system_line(tmp_path) == "You are a helpful assistant."


def test_damaged_tokenizer_config_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        chat.system_line(tmp_path)


def test_answer_ends_with_its_turn_and_shows_no_control_tokens(small_dream):
    start, end, eot, mask = (
        small_dream.encode_single_token(t)
        for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|mask|>")
    )
    text = data.encode(small_dream, "a <|im_end|> ☃")
    for stop in ([], [end, *text], [eot, eot], [end, eot]):
        ids = torch.tensor([start, *text, mask, *stop])
        assert chat.answer(small_dream, ids) == "a <|im_end|> ☃[MASK]"
    assert chat.answer(small_dream, [end]) == chat.answer(small_dream, []) == ""


# The template spelled as text


TEXT_CHATS = [
    ([said("user", "Hi")], {}, "### user\nHi\n### assistant\n"),
    (
        [said("system", "Be brief."), said("user", "Why?")],
        {"begin": "So", "system": "unused"},
        "### system\nBe brief.\n### user\nWhy?\n### assistant\nSo",
    ),
    (
        [said("user", "1?"), said("assistant", "2\n"), said("user", "<|endoftext|>")],
        {},
        "### user\n1?\n### assistant\n2\nEND### user\n<|endoftext|>\n### assistant\n",
    ),
    (
        [said("user", "1?"), said("assistant", "2")],
        {},
        "### user\n1?\n### assistant\n2END",
    ),
]


@pytest.mark.parametrize(("messages", "options", "want"), TEXT_CHATS)
def test_other_tokenizers_spell_the_roles_and_end_answers_with_end_of_text(
    learned, messages, options, want
):
    for tokenizer in (data.bytes_tokenizer(), learned):
        ids = chat.chat_ids(tokenizer, messages, **options)
        parts = "".join("END" if i == tokenizer.eot_token else chr(0) for i in ids)
        assert parts.count("END") == want.count("END")
        pieces, rest = [], list(ids)
        while tokenizer.eot_token in rest:
            at = rest.index(tokenizer.eot_token)
            pieces, rest = [*pieces, rest[:at]], rest[at + 1 :]
        texts = [data.decode(tokenizer, piece) for piece in [*pieces, rest]]
        assert "END".join(texts) == want


def test_answer_in_text_ends_with_end_of_text(learned):
    for tokenizer in (data.bytes_tokenizer(), learned):
        chat_of_two = [said("user", "x"), said("assistant", "a ☃\n### user\n")]
        ids, prompt = chat.example(tokenizer, chat_of_two)
        assert chat.answer(tokenizer, [*ids[prompt:], 65]) == "a ☃\n### user\n"
    ids = [*data.encode(learned, "ab"), learned.n_vocab, learned.eot_token, 65]
    assert chat.answer(learned, ids) == "ab[MASK]"


# Examples

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}" + DEFAULT + "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERED = [
    [said("user", "Add 1 and 2."), said("assistant", "def add():\n    return 1 + 2\n")],
    [
        said("system", "You are terse."),
        said("user", "naïve e\u0301?"),
        said("assistant", "Yes."),
        said("user", "\n\n  Sure?\n"),
        said("assistant", "  Sure.\n\n"),
    ],
    [said("user", ""), said("assistant", "1"), said("assistant", "2")],
]


@pytest.mark.parametrize("messages", ANSWERED)
def test_example_has_the_ids_of_transformers_template(dream, theirs, messages):
    pytest.importorskip("jinja2")
    ids, prompt = chat.example(dream, messages, chat.DEFAULT_SYSTEM)
    asked = {"chat_template": TEMPLATE, "tokenize": False}
    whole = theirs.apply_chat_template(messages, **asked)
    before = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, **asked)
    assert ids.dtype == np.uint32
    assert ids.tolist() == theirs.encode(whole, add_special_tokens=False)
    assert ids[:prompt].tolist() == theirs.encode(before, add_special_tokens=False)


def test_prompt_of_an_example_is_the_one_that_answers_are_asked_with(small_dream, learned):
    for tokenizer in (small_dream, learned, data.bytes_tokenizer()):
        for content in ("", "\n\n x", "fine"):
            messages = [said("user", "x"), said("assistant", content)]
            ids, prompt = chat.example(tokenizer, messages, "Be.")
            assert ids[:prompt].tolist() == chat.chat_ids(tokenizer, messages[:-1], "Be.")
            assert chat.answer(tokenizer, ids[prompt:]) == content


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "not the assistant's"),
        ([said("user", "x")], "not the assistant's"),
        ([said("assistant", "x"), said("user", "x")], "not the assistant's"),
        ([said("assistant", "x")], "no message before"),
        ([said("tool", "x"), said("assistant", "x")], "system, user or assistant"),
    ],
)
def test_example_needs_an_answer_and_what_it_answers(small_dream, messages, message):
    with pytest.raises(ValueError, match=message):
        chat.example(small_dream, messages, "")


# Preparation

BYTES = {"name": "bytes"}
MARKS = len("### user\n" + "\n### assistant\n")  # bytes of a prompt around its text


def pair(prompt="please", response="certainly"):
    return {"messages": [said("user", prompt), said("assistant", response)]}


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def prepare(tmp_path, data_, tokenizer=BYTES, **options):
    names = data_ if isinstance(data_, list) else [str(data_)]
    options = {"system": chat.DEFAULT_SYSTEM} | options
    return chat.open_chats(names, tokenizer, str(tmp_path / "cache"), **options)


def texts(chats, split):
    """(prompt, response) of all examples of a split, in their order."""
    pairs = []
    for i in range(chats.count(split)):
        ids, prompt = chats.example(split, i)
        pairs.append(tuple(data.decode(chats.tokenizer, part) for part in np.split(ids, [prompt])))
    return pairs


def all_texts(chats):
    return sorted(texts(chats, "train") + texts(chats, "val"))


def as_text(prompt, response):
    return f"### user\n{prompt}\n### assistant\n", f"{response}<|endoftext|>"


def total(chats):
    counts = [Counter(count) for count in chats.meta["counts"].values()]
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def test_every_row_becomes_one_example_and_one_in_100_is_held_out(tmp_path):
    rows = [(f"question {i}", f"answer {i}" * (1 + i % 7)) for i in range(350)]
    chats = prepare(tmp_path, write_rows(tmp_path / "a.jsonl", [pair(*row) for row in rows]))
    assert (chats.count("train"), chats.count("val")) == (347, 3)
    assert all_texts(chats) == sorted(as_text(*row) for row in rows)
    numbers = [int(re.search(r"\d+", prompt)[0]) for prompt, _ in texts(chats, "train")]
    assert numbers != sorted(numbers), "shuffled"
    for split in ("train", "val"):
        lengths = [len((a + b).encode()) - 12 for a, b in texts(chats, split)]
        assert chats.lengths(split).tolist() == lengths  # end-of-text is one token, not 13
        assert chats.lengths(split).dtype == np.int64
    assert chats.example("train", 0)[0].dtype == np.int64
    assert chats.ids["train"].dtype == np.uint16


def test_chosen_numbers_are_sampled_anew_with_another_seed(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [pair(f"{i}", "answer") for i in range(1000)])
    sizes = {"train_examples": 50, "val_examples": 4}
    one, two = (prepare(tmp_path, file, seed=seed, **sizes) for seed in (1, 2))
    again = chat.open_chats([file], BYTES, str(tmp_path / "b"), system=chat.DEFAULT_SYSTEM, **sizes)
    assert (one.count("train"), one.count("val")) == (50, 4) == (two.count("train"), 4)
    assert texts(one, "train") == texts(again, "train") and texts(one, "val") == texts(again, "val")
    assert set(texts(one, "train")) != set(texts(two, "train"))
    assert not set(texts(one, "train")) & set(texts(one, "val"))
    numbers = [int(re.search(r"\d+", prompt)[0]) for prompt, _ in texts(one, "train")]
    assert 300 < np.mean(numbers) < 700, "from all of the file"


def test_long_examples_are_left_out_from_the_first_token_too_many(tmp_path):
    room = 2048 - MARKS - len("certainly") - 1
    rows = [pair("x" * room), pair("y" * (room + 1)), pair("z")] * 100
    chats = prepare(tmp_path, write_rows(tmp_path / "a.jsonl", rows))
    assert total(chats) == {
        "rows": 300, "bad": 0, "tool calls": 0, "too long": 100, "short response": 0, "kept": 200,
    }  # fmt: skip
    lengths = [*chats.lengths("train"), *chats.lengths("val")]
    assert max(lengths) == 2048
    assert {prompt[len("### user\n")] for prompt, _ in all_texts(chats)} == {"x", "z"}


def test_short_responses_are_counted_with_their_ending(tmp_path, small_folder):
    rows = [pair("q", "xyz"), pair("q", "wxyz"), pair("q", "vwxyz")] * 100
    chats = prepare(tmp_path, write_rows(tmp_path / "a.jsonl", rows))
    assert total(chats)["short response"] == 100
    assert {r for _, r in all_texts(chats)} == {"vwxyz<|endoftext|>", "wxyz<|endoftext|>"}
    spec = {"name": "dream", "folder": str(small_folder)}
    dream = data.load_tokenizer(spec)
    contents = ["123", "12", "1234"]
    assert [len(data.encode(dream, text)) for text in contents] == [3, 2, 4]
    rows = [pair("q", text) for text in contents] * 100
    chats = prepare(tmp_path, write_rows(tmp_path / "b.jsonl", rows), spec)
    assert total(chats)["short response"] == 100, "im_end and a newline make three tokens five"
    assert {r for _, r in all_texts(chats)} == {"123<|im_end|>\n", "1234<|im_end|>\n"}


@pytest.mark.parametrize("tag", ["<tool_call>", "</tool_call>"])
def test_tool_calls_in_any_message_are_left_out_before_tokenizing(tmp_path, tag, monkeypatch):
    rows = [{"messages": [said("system", "s"), *pair()["messages"]]} for _ in range(6)]
    for row, at in zip(rows, (0, 1, 2)):
        row["messages"][at]["content"] = f"a{tag}b"
    seen, encode = [], chat.encode_array
    monkeypatch.setattr(chat, "encode_array", lambda t, text: seen.append(text) or encode(t, text))
    chats = prepare(tmp_path, write_rows(tmp_path / "a.jsonl", rows))
    assert total(chats)["tool calls"] == 3 and total(chats)["kept"] == 3
    assert seen and not any(tag in text for text in seen)


def test_report_has_the_counts_and_the_tokens(tmp_path):
    rows = [pair("q" * i, "r" * (i + 4)) for i in range(1000, 1200)] + [pair("q", "r")]
    chats = prepare(tmp_path, write_rows(tmp_path / "a.jsonl", rows), max_tokens=2200)
    head, train, val, tokens = chats.report().splitlines()
    assert re.split(r"  +", head.strip()) == ["rows", *chat.FILTERS, "kept"]
    counts = chats.meta["counts"]
    for line, split in ((train, "train"), (val, "val")):
        values = [int(word.replace(",", "")) for word in line.split()[1:]]
        assert line.split()[0] == split and values == list(counts[split].values())
        assert values[0] == sum(values[1:])
    parts = [chats.example("train", i) for i in range(chats.count("train"))]
    prompts, whole = sum(p for _, p in parts), sum(len(ids) for ids, _ in parts)
    assert f"{prompts:,} of prompts, {whole - prompts:,} of responses" in tokens


def test_data_sets_are_mixed_and_each_is_held_out_from(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    rows = {kind: [pair(f"{kind}{i}", "response") for i in range(200)] for kind in "abc"}
    write_rows(folder / "deep" / "a.jsonl", rows["a"])
    (folder / "README.md").write_text("no rows")
    table = pyarrow.table({"messages": [r["messages"] for r in rows["b"]], "id": [1] * 200})
    parquet.write_table(table, folder / "b.parquet", row_group_size=70)
    alone = write_rows(tmp_path / "c.txt", [row | {"id": 3} for row in rows["c"]])
    chats = prepare(tmp_path, [str(folder), alone])
    want = [as_text(f"{kind}{i}", "response") for kind in "abc" for i in range(200)]
    assert all_texts(chats) == sorted(want)
    held = [prompt[len("### user\n")] for prompt, _ in texts(chats, "val")]
    assert len(held) == 6 and held.count("c") == 2


def test_a_byte_order_mark_blank_lines_and_other_names_of_roles_are_read(tmp_path):
    file = tmp_path / "a.jsonl"
    message = {"role": "Assistant", "content": "response", "weight": 1}
    row = json.dumps({"messages": [{"role": "HUMAN", "content": "x"}, message]})
    file.write_bytes(f"\ufeff{row}\n\n  \n{row}\r\n{row}".encode())
    assert all_texts(prepare(tmp_path, file)) == [as_text("x", "response")] * 3


BAD = [
    "{",
    "[1]",
    "null",
    "\\x00\\xff",
    "[" * 100_000,
    '{"messages": ' + "[" * 100_000,
    json.dumps({"text": "x"}),
    json.dumps({"messages": "x"}),
    json.dumps({"messages": []}),
    json.dumps({"messages": ["x"]}),
    json.dumps({"messages": [said("user", "x")]}),
    json.dumps({"messages": [said("assistant", "x")]}),
    json.dumps({"messages": [said("tool", "x"), said("assistant", "response")]}),
    json.dumps({"messages": [said("user", None), said("assistant", "response")]}),
    json.dumps({"messages": [said("user", "\ud800"), said("assistant", "response")]}),
    json.dumps({"messages": [{"role": ["user"], "content": "x"}, said("assistant", "response")]}),
]


@pytest.mark.parametrize("line", BAD)
def test_bad_row_is_named_by_file_and_line(tmp_path, line, capsys):
    file = tmp_path / "a.jsonl"
    good = json.dumps(pair()) + "\n"
    file.write_bytes((good + "\n" + good).encode() + line.encode() + b"\n" + good.encode() * 2)
    for most in (None, 0):
        with pytest.raises(ValueError, match=r"a\.jsonl:4: .*--max-bad 1 ") as caught:
            prepare(tmp_path, file, max_bad=most)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not list((tmp_path / "cache").glob("chat-*"))
    chats = prepare(tmp_path, file, max_bad=1)
    assert total(chats)["bad"] == 1 and total(chats)["kept"] == 4
    (said_on_stderr,) = capsys.readouterr().err.splitlines()
    assert f"{file}:4: " in said_on_stderr and said_on_stderr.startswith("1 bad row")
    with pytest.raises(ValueError, match=r"a\.jsonl:4"):
        prepare(tmp_path, file)  # from the cache


def test_one_bad_row_in_100_is_admitted(tmp_path):
    for bad, fine in ((2, True), (3, False)):
        rows = [pair()] * (299 - bad) + [{}] * bad
        file = write_rows(tmp_path / f"{bad}.jsonl", rows)
        if fine:
            assert total(prepare(tmp_path, file))["bad"] == 2
        else:
            with pytest.raises(ValueError, match=r"3\.jsonl:297: .*3 of 299"):
                prepare(tmp_path, file)


def test_binary_garbage_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 40)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not JSON"):
        prepare(tmp_path, file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), r"no \.jsonl"),
        (lambda p: p.write_text("\n \n"), "no rows"),
        (
            lambda p: p.write_text(json.dumps(pair())),
            r"no example left to validate with; of 0 rows",
        ),
        (lambda p: write_rows(p, [pair("q", "no")] * 9), "left to train on.* 8 with a response of"),
        (lambda p: write_rows(p, [pair("q" * 3000)] * 9), r"8 of more than 2048 tokens \(--max-le"),
    ],
)
def test_data_without_examples_say_why(tmp_path, make, message):
    make(tmp_path / "a.jsonl")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        prepare(tmp_path, tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value) and "a.jsonl" in str(caught.value)
    assert not list((tmp_path / "cache").glob("chat-*"))


@pytest.mark.parametrize("damage", ["truncated", "no column", "garbage"])
def test_unusable_parquet_is_named(tmp_path, damage):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "d.parquet"
    column = "text" if damage == "no column" else "messages"
    parquet.write_table(pyarrow.table({column: [pair()["messages"]] * 99}), file)
    if damage != "no column":
        os.truncate(file, 60) if damage == "truncated" else file.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"d\.parquet"):
        prepare(tmp_path, file)


# The cache


def changes(chats):
    return [(file.name, file.stat().st_mtime_ns) for file in sorted(chats.folder.iterdir())]


def test_examples_are_built_once_and_again_when_what_decides_them_changes(tmp_path, small_folder):
    file = write_rows(tmp_path / "a.jsonl", [pair(f"{i}", "response") for i in range(20)])
    first = prepare(tmp_path, file)
    times = changes(first)
    assert changes(prepare(tmp_path, file)) == times
    assert [name for name, _ in times] == [
        "meta.json", "train.bin", "train.npy", "val.bin", "val.npy",
    ]  # fmt: skip
    dream = {"name": "dream", "folder": str(small_folder)}
    ways = [{"max_tokens": 100}, {"train_examples": 5}, {"seed": 2}, {"system": "x"}]
    folders = {prepare(tmp_path, file, **way).folder for way in [*ways, {"tokenizer": dream}]}
    assert len(folders | {first.folder}) == 6
    write_rows(tmp_path / "a.jsonl", [pair("another", "response")] * 2)
    assert {prompt for prompt, _ in all_texts(prepare(tmp_path, file))} == {
        "### user\nanother\n### assistant\n"
    }


def test_dreams_vocabulary_decides_not_where_it_is(tmp_path, small_folder):
    file = write_rows(tmp_path / "a.jsonl", [pair()] * 3)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, entries in ((one, 600), (two, 600)):
        folder.mkdir()
        write_tokenizer(folder, entries)
    first, same = (prepare(tmp_path, file, {"name": "dream", "folder": str(f)}) for f in (one, two))
    assert same.folder == first.folder
    write_tokenizer(two, 500)
    assert prepare(tmp_path, file, {"name": "dream", "folder": str(two)}).folder != first.folder


@pytest.mark.parametrize("name", ["train.bin", "val.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
def test_damaged_cache_is_built_again(tmp_path, name, damage):
    file = write_rows(tmp_path / "a.jsonl", [pair(f"{i}", "response") for i in range(20)])
    chats = prepare(tmp_path, file)
    whole, bad = all_texts(chats), chats.folder / name
    if damage == "missing":
        bad.unlink()
    elif damage == "truncated":
        os.truncate(bad, bad.stat().st_size - 4)
    else:
        bad.write_bytes(b"\x93{garbage")
    assert all_texts(prepare(tmp_path, file)) == whole


def test_ids_beyond_the_vocabulary_name_the_damaged_folder(tmp_path):
    chats = prepare(tmp_path, write_rows(tmp_path / "a.jsonl", [pair()] * 3))
    file = chats.folder / "val.bin"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(ValueError, match="damaged; delete it"):
        prepare(tmp_path, tmp_path / "a.jsonl").example("val", 0)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_build_that_stops_leaves_nothing_half_done(tmp_path, monkeypatch, stop):
    file = write_rows(tmp_path / "a.jsonl", [pair(f"{i}", "response") for i in range(20)])
    with monkeypatch.context() as patch:

        def stopped(*_):
            raise stop

        patch.setattr(chat.np, "save", stopped)
        with pytest.raises((KeyboardInterrupt, OSError), match="No space left|^$") as caught:
            prepare(tmp_path, file)
    assert "make room" in str(caught.value) or stop is KeyboardInterrupt
    assert not list((tmp_path / "cache").glob("chat-*"))
    assert total(prepare(tmp_path, file))["kept"] == 20


# The hub


@pytest.fixture
def hub(monkeypatch):
    """hub(**splits) lets datasets.load_dataset return these splits; the calls are in hub.calls."""
    datasets = pytest.importorskip("datasets")

    def put(**splits):
        def load(*name):
            put.calls.append(name)
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
            )

        monkeypatch.setattr(datasets, "load_dataset", load)

    put.calls = []
    put.datasets = datasets
    return put


def test_hub_data_without_a_test_split_hold_out_one_row_in_100(tmp_path, hub):
    hub(train=[pair(f"{i}", "response") | {"id": "x", "source": "y"} for i in range(200)])
    chats = prepare(tmp_path, chat.CHATS["dream"][:1])
    assert hub.calls == [("allenai/tulu-3-sft-mixture", None)]
    assert (chats.count("train"), chats.count("val")) == (198, 2)
    assert all_texts(chats) == sorted(as_text(str(i), "response") for i in range(200))
    times = changes(chats)
    assert changes(prepare(tmp_path, chat.CHATS["dream"][:1])) == times
    hub(train=[pair("another", "response")] * 200)
    assert prepare(tmp_path, chat.CHATS["dream"][:1]).folder != chats.folder


def test_smoltalk_is_validated_on_its_own_test_split(tmp_path, hub):
    rows = {s: [pair(f"{s} {i}", "response") for i in range(120)] for s in ("train", "test")}
    hub(**rows)
    chats = prepare(tmp_path, chat.CHATS["dream"][1:])
    assert hub.calls == [("HuggingFaceTB/smoltalk", "all")]
    for split, name in (("train", "train"), ("val", "test")):
        want = [as_text(f"{name} {i}", "response") for i in range(120)]
        assert sorted(texts(chats, split)) == sorted(want)


def test_ling_coders_roles_are_ours(tmp_path, hub):
    messages = [{"role": "HUMAN", "content": "x"}, {"role": "ASSISTANT", "content": "response"}]
    hub(train=[{"mid": "1", "messages": messages, "tags": ["a"], "languages": ["b"]}] * 3)
    chats = prepare(tmp_path, chat.CHATS["dream-coder"])
    assert hub.calls == [("inclusionAI/Ling-Coder-SFT", None)]
    assert all_texts(chats) == [as_text("x", "response")] * 3


def test_bad_row_of_the_hub_is_named_by_its_number(tmp_path, hub):
    fine = [pair()] * 5
    hub(train=[*fine, {"messages": [said("user", "x")]}], test=fine)
    with pytest.raises(ValueError, match="owner/name:part row 5: the last message is not"):
        prepare(tmp_path, ["owner/name:part"])
    hub(train=fine, test=[*fine, {"messages": [said("user", "x")]}])
    with pytest.raises(ValueError, match="owner/name test row 5: the last message is not"):
        prepare(tmp_path, ["owner/name"])


@pytest.mark.parametrize("splits", [{"test": [pair()]}, {"train": [{"text": "x"}]}])
def test_hub_data_without_messages_are_refused(tmp_path, hub, splits):
    hub(**splits)
    with pytest.raises(ValueError, match='no column "messages" in its train split'):
        prepare(tmp_path, ["owner/name"])


def test_files_come_before_the_hub(tmp_path, hub, monkeypatch):
    hub(train=[pair("hub")] * 3)
    (tmp_path / "owner").mkdir()
    write_rows(tmp_path / "owner" / "name", [pair("file")] * 3)
    monkeypatch.chdir(tmp_path)
    chats = prepare(tmp_path, ["owner/name"])
    assert all_texts(chats) == [as_text("file", "certainly")] * 3 and not hub.calls


def test_hub_that_is_not_reached_is_told_from_data_that_are_not_there(tmp_path, hub, monkeypatch):
    def fail(error):
        def load(*_):
            raise error

        monkeypatch.setattr(hub.datasets, "load_dataset", load)

    for error in (ConnectionError("no\nroute"), TimeoutError(), RuntimeError("503")):
        fail(error)
        with pytest.raises(data.Unreachable, match=r"owner/name: .*parquet.* --data") as caught:
            prepare(tmp_path, ["owner/name"])
        assert "\n" not in str(caught.value)
    not_found = hub.datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist\non the Hub")
    for error in (not_found, ValueError("BuilderConfig 'x' not found.\nAvailable: [all]")):
        fail(error)
        with pytest.raises(ValueError, match="owner/name: no file, folder or data set") as caught:
            prepare(tmp_path, ["owner/name"])
        assert "\n" not in str(caught.value) and not isinstance(caught.value, data.Unreachable)


@pytest.mark.parametrize("name", ["", "nothing", "a/b/c", "./owner/name", "chats/train.jsonl"])
def test_what_is_no_name_of_the_hub_is_a_missing_file(tmp_path, hub, name):
    with pytest.raises(FileNotFoundError, match=re.escape(f"--data {name}: no such file")):
        prepare(tmp_path, [name])
    assert not hub.calls


def test_datasets_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="owner/name .*pip install datasets") as caught:
        prepare(tmp_path, ["owner/name"])
    assert not isinstance(caught.value, data.Unreachable)


# The standard library

SOURCE = r'''
class A:
    @property
    # why
    def f(self, x=")"):
        """Say it.

          Twice."""

        def g():
            "Inner."
            return """text
at the margin"""

        return g  # done

    def only(self):
        """Nothing else."""

    def one(self): "On its line."; return 1

    async def h(self):
        r"""Wait\d"""; y = 2
        return y

    def none(self):
        return 3
'''


def test_functions_are_cut_at_their_docstring():
    (outer, inner) = sorted(chat.functions(SOURCE))
    assert outer == (
        3,
        '@property\n# why\ndef f(self, x=")"):\n    """Say it.\n\n      Twice."""',
        '@property\n# why\ndef f(self, x=")"):\n\n    def g():\n        "Inner."\n'
        '        return """text\nat the margin"""\n\n    return g  # done',
    )
    head = 'def g():\n    "Inner."'
    assert inner == (10, head, 'def g():\n    return """text\nat the margin"""')
    assert list(chat.functions("def f(:")) == list(chat.functions("\0")) == []


@pytest.fixture
def few_files(monkeypatch):
    """The standard library is some of its files, held out and not."""
    source = data.stdlib_source()
    held = [f for f in source.files if data.held_out(str(f.relative_to(source.root)))]
    small = [f for f in held if f.stat().st_size < 50_000][:6]
    source.files = sorted({*small, *(source.root / f"{n}.py" for n in ("bisect", "textwrap"))})
    monkeypatch.setattr(chat, "stdlib_source", lambda: source)
    return source


def test_standard_library_asks_for_functions_that_the_corpus_holds_out(tmp_path, few_files):
    chats = chat.open_chats(None, BYTES, str(tmp_path / "cache"), system="", max_tokens=10_000)
    trees = {f: ast.parse(f.read_text()) for f in few_files.files}
    names = {
        held: {
            node.name
            for f, tree in trees.items()
            if data.held_out(str(f.relative_to(few_files.root))) == held
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for held in (True, False)
    }
    seen = {}
    for split, held in (("train", False), ("val", True)):
        for prompt, response in texts(chats, split):
            (function,) = ast.parse(response.removesuffix("<|endoftext|>")).body
            assert function.name in names[held]
            request = prompt.removeprefix("### user\n").removesuffix("\n### assistant\n")
            assert ast.get_docstring(ast.parse(request).body[0]) is not None
            seen.setdefault(split, set()).add(prompt)
    assert {"indent", "shorten"} <= {re.search(r"def (\w+)", p)[1] for p in seen["train"]}
    assert seen["val"] and not seen["train"] & seen["val"]
    assert total(chats)["bad"] == 0
    assert chats.meta["counts"]["val"]["rows"] == chat._stdlib_rows(few_files)[1].n


# Batches


def test_numbers_of_eos_are_uniform_from_0_to_50():
    draws = chat.draw_eos(10_000, generator(0))
    counts = np.bincount(draws, minlength=51)
    assert len(counts) == 51 and counts.min() > 0
    expected = 10_000 / 51
    assert ((counts - expected) ** 2 / expected).sum() < 86.7, "99.9 % of chi-square, 50 degrees"
    assert set(chat.draw_eos(100, generator(1), most=1)) == {0, 1}
    assert chat.draw_eos(9, generator(2)) == chat.draw_eos(9, generator(2))


def test_a_batch_is_its_examples_with_eos_in_the_response_and_padding_in_nothing():
    g, eos, limit = np.random.default_rng(0), 99, 40
    for _ in range(50):
        sizes = g.integers(2, 45, 5)
        examples = [(g.integers(0, 90, n, dtype=np.uint32), int(g.integers(1, n))) for n in sizes]
        examples = [(ids, min(prompt, limit - 1)) for ids, prompt in examples]
        counts = g.integers(0, 9, 5).tolist()
        batch = chat.collate(examples, counts, eos, limit)
        assert batch.x0.dtype == torch.int64
        assert batch.response.dtype == batch.attend.dtype == torch.bool
        lengths = [min(limit, n + k) for n, k in zip(sizes, counts)]
        assert batch.x0.shape == batch.response.shape == batch.attend.shape == (5, max(lengths))
        for row, (ids, prompt) in enumerate(examples):
            want = [*ids.tolist(), *[eos] * 100][: max(lengths)]
            own = range(max(lengths))
            if len(ids) + counts[row] > limit:
                want = [*ids.tolist(), *[eos] * counts[row]][:limit]
            assert batch.x0[row].tolist() == want
            assert batch.attend[row].tolist() == [i < lengths[row] for i in own]
            assert batch.response[row].tolist() == [prompt <= i < lengths[row] for i in own]


def test_a_prompt_without_room_for_a_response_is_refused():
    with pytest.raises(ValueError, match="a prompt of 8 tokens leaves none of 8"):
        chat.collate([(np.arange(12), 8)], [3], 0, 8)


@pytest.fixture(scope="module")
def lengths():
    return np.random.default_rng(0).lognormal(6, 0.7, 4003).astype(np.int64)


def test_an_epoch_has_each_example_once(lengths):
    order = chat.batches_by_length(lengths, 8, seed=1, epoch=0)
    assert order.shape == (500, 8)
    assert len(np.unique(order)) == 4000 and order.min() >= 0 and order.max() < 4003
    assert (np.diff(lengths[order], axis=1) <= 0).all(), "the longest first"


def test_epochs_and_seeds_differ_and_come_back(lengths):
    a, again, epoch, seed = (
        chat.batches_by_length(lengths, 8, *by) for by in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert np.array_equal(a, again)
    for other in (epoch, seed):
        same = {frozenset(row) for row in a.tolist()} & {frozenset(row) for row in other.tolist()}
        assert len(same) < 5
    left_out = set(range(4003)) - set(a.flatten().tolist())
    assert left_out != set(range(4003)) - set(epoch.flatten().tolist())


def test_batches_by_length_pad_little_and_come_in_no_order(lengths):
    def waste(order):
        sizes = lengths[order]
        return 1 - sizes.sum() / (sizes.max(axis=1) * sizes.shape[1]).sum()

    ours = chat.batches_by_length(lengths, 8, seed=1, epoch=0)
    at_random = np.random.default_rng(0).permutation(4000).reshape(500, 8)
    assert waste(ours) < 0.15 * waste(at_random)
    assert waste(ours.reshape(-1, 2)) < waste(ours), "micro-batches are of similar length too"
    longest = lengths[ours].max(axis=1)
    assert abs(np.corrcoef(np.arange(500), longest)[0, 1]) < 0.15
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.15


def test_few_examples_repeat_in_one_batch():
    order = chat.batches_by_length(np.array([3, 9, 5]), 8, seed=0, epoch=4)
    assert order.shape == (1, 8)
    assert sorted(Counter(order[0].tolist()).values()) == [2, 3, 3]
