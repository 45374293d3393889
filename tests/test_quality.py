"""Samples are measured as the definitions say, and told from noise."""

import json
import math
import os
import re
import sys

import numpy as np
import pytest
import tokenizers
import torch

import evaluate
import quality
import sample
from data import open_corpus
from judge import judge_texts, load_judge, read_features
from weights import load_checkpoint

# Samples beside held-out text


def test_divergence_is_the_textbooks_and_knows_its_bounds():
    a, b = (np.array([[1, 2, 3, 1, 2]]), np.array([[1, 2, 1, 2, 9]]))
    p = {(1, 2): 2 / 4, (2, 3): 1 / 4, (3, 1): 1 / 4}
    q = {(1, 2): 2 / 4, (2, 1): 1 / 4, (2, 9): 1 / 4}
    mean = {g: (p.get(g, 0) + q.get(g, 0)) / 2 for g in p | q}
    want = sum(v * math.log2(v / mean[g]) / 2 for x in (p, q) for g, v in x.items())
    assert quality.divergence(a, b, 2, 10) == pytest.approx(want)
    assert quality.divergence(a, a, 3, 10) == pytest.approx(0)
    far = np.array([[7, 8, 7, 8, 7]])
    assert quality.divergence(a, far, 2, 10) == pytest.approx(1)


def test_repetition_and_shuffling_are_far_from_the_text():
    g = np.random.default_rng(0)
    steps = g.choice([1, 2, 7], p=[0.6, 0.3, 0.1], size=(400, 40))
    text = np.cumsum(steps, axis=1) % 50  # what follows a token is one of three
    real, fresh = text[:200], text[200:]
    repeated = np.repeat(fresh[:1], 200, axis=0)
    shuffled = g.permuted(fresh, axis=1)
    scores = [quality.divergence(x, real, 2, 50) for x in (fresh, repeated, shuffled)]
    assert scores[0] < 0.1 < 0.3 < min(scores[1:])


def test_unigram_entropy_of_a_sample():
    ids = np.array([[1, 1, 1, 1], [1, 2, 3, 4]])
    assert quality.unigram_entropy(ids) == pytest.approx(math.log(4) / 2)


def test_code_parses_without_its_torn_first_and_last_line():
    assert quality.code_that_parses("rn x\n    a = 1\n    if a:\n        pass\n   foo(")
    assert not quality.code_that_parses("x\n  a = = 1\n y")
    assert not quality.code_that_parses("one line")


def test_gen_ranks_held_out_text_before_noise(run, tmp_path, capsys):
    state = load_checkpoint(str(run), "--ckpt")
    corpus = open_corpus(state["args"]["data"], state["tokenizer"], str(tmp_path))
    blocks = corpus.blocks("val", 16)
    noise = torch.randint(200, blocks.shape)
    for name, ids in (("real", blocks), ("noise", noise)):
        lines = [json.dumps({"ids": row}) + "\n" for row in ids.tolist()]
        (tmp_path / name).write_text("".join(lines))
    files = [str(tmp_path / name) for name in ("real", "noise")]
    flags = ["gen", *files, "--ckpt", str(run), "--cache", str(tmp_path)]
    quality.gen(evaluate.parser().parse_args(flags))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert float(rows[0][0]) == 0 and float(rows[1][0]) > 0.5


@pytest.mark.parametrize("line", ["{", '{"text": "x"}', '{"ids": [1]}', '{"ids": [1, 2, 999]}'])
def test_a_line_that_is_no_sample_is_named(tmp_path, line):
    file = tmp_path / "s.jsonl"
    file.write_text('{"ids": [1, 2, 3]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"s\.jsonl:2"):
        quality.read_samples(str(file), 258)


def test_samples_of_different_lengths_are_not_compared(run, tmp_path):
    for n in (3, 4):
        (tmp_path / str(n)).write_text(json.dumps({"ids": [1] * n}) + "\n")
    flags = ["gen", str(tmp_path / "3"), str(tmp_path / "4"), "--ckpt", str(run)]
    with pytest.raises(ValueError, match="samples of 4 tokens beside those of 3"):
        quality.gen(evaluate.parser().parse_args([*flags, "--cache", str(run)]))


def test_seeds_have_a_line_with_their_mean_and_deviation(run, tmp_path, capsys):
    rows = np.random.default_rng(0).integers(250, size=(4, 9))
    for name, ids in [("a-1", rows), ("a-2", rows[:2]), ("b", rows)]:
        lines = [json.dumps({"ids": row.tolist()}) for row in ids]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    gen(run, *(tmp_path / f"{name}.jsonl" for name in ("a-1", "b", "a-2")))
    table = capsys.readouterr().out.split("differ in a last -number\n")[1]
    head, line = (re.split(" {2,}", text.strip()) for text in table.splitlines()[:2])
    entropies = [quality.unigram_entropy(ids) for ids in (rows, rows[:2])]
    mean, deviation = map(float, line[1 + head.index("entropy")].split(" +- "))
    assert line[:2] == ["a", "2"], "b is alone"
    assert mean == pytest.approx(np.mean(entropies), abs=6e-4)
    assert deviation == pytest.approx(np.std(entropies, ddof=1), abs=6e-4)


# MAUVE and generative perplexity

EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    """A GPT-2 of random weights on bytes that reads 24 tokens, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(3)
    sizes = dict(vocab_size=257, n_positions=24, n_embd=32, n_layer=2, n_head=2)
    ends = dict(bos_token_id=256, eos_token_id=256, initializer_range=0.3)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, EOS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(judge_folder):
    return load_judge(str(judge_folder))


def gen(run, *flags) -> None:
    places = ["--ckpt", str(run), "--cache", str(run), "--device", "cpu"]
    args = evaluate.parser().parse_args(["gen", *map(str, flags), *places])
    args.main(args)


def table(capsys) -> dict[str, dict[str, str]]:
    """The cells of the printed table, by the name of the row and of the column."""
    lines = capsys.readouterr().out.replace("gen. ppl", "ppl").replace(" +- ", "+-").splitlines()
    columns = lines[0].split("  of ")[0].split()
    rows = {}
    for line in lines[1:]:
        cells = line.split(maxsplit=len(columns))
        if len(cells) > len(columns) and cells[0].replace(".", "").isdecimal():
            rows[cells[-1]] = dict(zip(columns, cells))
    return rows


def write_ids(file, rows) -> str:
    file.write_text("".join(json.dumps({"ids": [int(i) for i in row]}) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def blocks(run):
    """Held-out blocks (n, 16) of the run's corpus."""
    state = load_checkpoint(str(run), "--ckpt")
    return open_corpus(state["args"]["data"], state["tokenizer"], str(run)).blocks("val", 16)


TEXTS = [
    "a", "two words", "", f"{EOS}starts and ends{EOS}", f"mid{EOS}dle{EOS}{EOS}x",
    "longer than the twenty-four tokens that are read", "é\n\tbytes",
]  # fmt: skip


def plain_perplexity(judge, texts) -> float:
    """Text by text and token by token: the next token's probability after each prefix."""
    nats = []
    for text in texts:
        ids, ends = judge.tokenizer.encode(text)[:24], 0
        for i, token in enumerate(ids):
            ends += token == 256
            if i == 0 or (token == 256 and ends > 1):
                continue
            with torch.no_grad():
                logits = judge.model(torch.tensor([ids[:i]])).logits[0, -1]
            nats.append(-logits.double().log_softmax(0)[token].item())
    return math.exp(sum(nats) / len(nats))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_generative_perplexity_is_that_of_token_after_token(judge, batch_size):
    texts = [text for text in TEXTS if text]
    _, perplexity = judge_texts(judge, texts, batch_size, True)
    assert perplexity == pytest.approx(plain_perplexity(judge, texts), rel=1e-5)


def test_long_texts_weigh_by_their_tokens_not_as_texts(judge):
    texts = ["ab", "c" * 20]
    each = [judge_texts(judge, [text], 1, True)[1] for text in texts]
    _, both = judge_texts(judge, texts, 2, True)
    assert math.log(both) == pytest.approx((math.log(each[0]) + 19 * math.log(each[1])) / 20)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(judge):
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(judge.model.config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    _, perplexity = judge_texts(judge._replace(model=model), ["some text"], 4, True)
    assert perplexity == pytest.approx(257, rel=1e-6)


@pytest.mark.parametrize("scored", [False, True])
def test_features_are_the_last_state_of_each_text_alone(judge, scored):
    texts = [text for text in TEXTS if text]
    features, _ = judge_texts(judge, texts, 4, scored)
    for text, row in zip(texts, features):
        ids = torch.tensor([judge.tokenizer.encode(text)[:24]])
        with torch.no_grad():
            want = judge.model.transformer(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(torch.from_numpy(row), want, rtol=1e-4, atol=1e-5)


def test_features_are_those_of_mauve_text(judge):
    theirs = pytest.importorskip("mauve.utils")
    texts = [text for text in TEXTS if text]
    ids = [torch.tensor([judge.tokenizer.encode(text)[:24]]) for text in texts]
    want = theirs.featurize_tokens_from_model(judge.model.base_model, ids, 3).numpy()
    found, _ = judge_texts(judge, texts, 16, False)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_texts_that_have_no_token_or_no_prediction_are_refused(judge):
    with pytest.raises(ValueError, match="no token of ''"):
        judge_texts(judge, ["a", ""], 2, False)
    with pytest.raises(ValueError, match="texts of one token"):
        judge_texts(judge, ["a", "b"], 2, True)


def write_features(folder, name, array) -> str:
    np.save(folder / name, array)
    return str(folder / name)


def test_mauve_of_features_tells_a_law_from_its_wrecks(run, blocks, tmp_path, capfd):
    pytest.importorskip("mauve")
    g = np.random.default_rng(0)
    centres = g.normal(size=(12, 8)) * 4

    def draw(n):
        return (centres[g.integers(12, size=n)] + g.normal(size=(n, 8))).astype("f4")

    reference, fresh = draw(300), draw(300)
    sets = {"same": reference, "fresh": fresh, "shuffled": g.permuted(fresh, axis=1)}
    sets["repeated"] = np.repeat(fresh[:1], 300, axis=0)
    ids = np.resize(blocks.numpy(), (300, 16))
    samples = [write_ids(tmp_path / name, ids) for name in sets]
    files = [write_features(tmp_path, f"{name}.npy", rows) for name, rows in sets.items()]
    truth = write_features(tmp_path, "reference.npy", reference)
    saved = tmp_path / "scores.json"
    gen(run, *samples, "--features", *files, "--reference-features", truth, "--json", saved)
    out = capfd.readouterr()
    found = json.loads(saved.read_text())
    score = {row["text"].split("/")[-1]: row["mauve"] for row in found["rows"]}
    assert score["same"] == pytest.approx(1) and 0.9 < score["fresh"] < 1
    assert score["shuffled"] < 0.5 and score["repeated"] < 0.1
    assert score["(training text)"] is None, "its features are of no file"
    assert found["rows"][0]["clusters"] == 30 and "30 clusters" in out.out
    assert len(found["rows"][1]["mauve_runs"]) == 3
    assert "clustering" not in out.out + out.err, "faiss is silent"
    assert out.err.count("\n") == 1 and "MAUVE of 300 texts; the paper's is of 5008" in out.err
    for name in ("scaling 5", "3 k-means seeds from 25", "beside 300 held-out texts", truth):
        assert name in out.out


def test_each_run_of_mauve_has_the_scaling_asked_for_and_its_own_seed(monkeypatch):
    package = pytest.importorskip("mauve")
    real, runs = package.compute_mauve, []

    def watched(*args, **kwargs):
        runs.append((kwargs["seed"], kwargs["mauve_scaling_factor"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(package, "compute_mauve", watched)
    rows = np.random.default_rng(0).normal(size=(20, 3)).astype("f4")
    flags = evaluate.parser().parse_args(["gen", "x", "--mauve-scaling", "2"])
    quality.mauve_all({"x": rows, quality.HELD_OUT: rows}, flags)
    assert runs == [(25, 2), (26, 2), (27, 2)]
    assert evaluate.parser().parse_args(["gen"]).mauve_scaling == 5


def test_no_warning_where_samples_are_as_many_as_the_papers(capsys, monkeypatch):
    pytest.importorskip("mauve")
    flags = evaluate.parser().parse_args(["gen", "x", "--mauve-seeds", "1"])
    monkeypatch.setattr(quality, "mauve", lambda *args: ([0.5], 501))
    rows = np.zeros((5008, 2), "f4")
    quality.mauve_all({"x": rows, quality.HELD_OUT: rows}, flags)
    assert capsys.readouterr().err == ""
    quality.mauve_all({"x": rows, quality.HELD_OUT: rows[1:]}, flags)
    assert "MAUVE of 5007 texts" in capsys.readouterr().err


def test_gen_judges_texts_with_a_model_of_a_folder(run, judge_folder, judge, tmp_path, capsys):
    pytest.importorskip("mauve")
    state = load_checkpoint(str(run), "--ckpt")
    corpus = open_corpus(state["args"]["data"], state["tokenizer"], str(run))
    fresh = corpus.blocks("train", 16, 140)[:-1:2][:60]
    repeated = fresh[:1].repeat(60, 1)
    noise = torch.randint(33, 127, fresh.shape)
    named = {"fresh": fresh, "repeated": repeated, "noise": noise}
    samples = [write_ids(tmp_path / name, ids) for name, ids in named.items()]
    saved = tmp_path / "features"
    flags = ["--mauve", "--gen-ppl", "--features-model", judge_folder, "--save-features", saved]
    gen(run, *samples, *flags)
    rows = {name.split("/")[-1]: row for name, row in table(capsys).items()}
    score = {name: row["MAUVE"].split("+-")[0] for name, row in rows.items()}
    assert float(score["fresh"]) > 0.8 and float(score["(training text)"]) > 0.8
    assert float(score["repeated"]) < 0.1
    assert score["(held-out text)"] == "-"
    texts = [bytes(row).decode() for row in noise.tolist()]
    want = plain_perplexity(judge, texts)
    assert float(rows["noise"]["ppl"]) == pytest.approx(want, rel=1e-4)
    held_out = corpus.blocks("val", 16, 60)
    want = plain_perplexity(judge, [bytes(row).decode() for row in held_out.tolist()])
    assert float(rows["(held-out text)"]["ppl"]) == pytest.approx(want, rel=1e-3, abs=0.01)

    # the files it wrote give the same numbers without the model
    files = [str(saved / f"{name}.npy") for name in named]
    assert {file.name for file in saved.iterdir()} == {
        "fresh.npy", "repeated.npy", "noise.npy", "training.npy", "held-out.npy"
    }  # fmt: skip
    given = ["--features", *files, "--reference-features", saved / "held-out.npy"]
    gen(run, *samples, *given, "--gen-ppl", "--features-model", judge_folder)
    assert table(capsys)["(training text)"]["MAUVE"] == "-", "its features are of no file"
    gen(run, *samples, *given)
    again = {name.split("/")[-1]: row for name, row in table(capsys).items()}
    assert all(again[name]["MAUVE"] == rows[name]["MAUVE"] for name in named)


def test_the_reference_is_held_out_blocks_as_many_as_samples(run, judge_folder, tmp_path, capsys):
    pytest.importorskip("mauve")
    state = load_checkpoint(str(run), "--ckpt")
    corpus = open_corpus(state["args"]["data"], state["tokenizer"], str(run))
    file = write_ids(tmp_path / "s", corpus.blocks("train", 16, 20))
    flags = ["--mauve", "--features-model", judge_folder, "--save-features", tmp_path]
    gen(run, file, "--num", 7, *flags)
    assert "beside 7 held-out texts" in capsys.readouterr().out
    rows = np.load(tmp_path / "held-out.npy")
    texts = [bytes(row).decode() for row in corpus.blocks("val", 16, 7).tolist()]
    want, _ = judge_texts(load_judge(str(judge_folder)), texts, 7, False)
    np.testing.assert_allclose(rows, want, rtol=1e-5)


# What cannot be read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", b"", "not an .npy file"),
        ("text", b"1 2 3\n", "not an .npy file"),
        ("flat", np.zeros(3, "f4"), "float32 of shape \\(3,\\)"),
        ("nothing", np.zeros((0, 4), "f4"), "shape \\(0, 4\\)"),
        ("ids", np.zeros((3, 4), "i8"), "int64 of shape"),
        ("words", np.array([["a"]]), "<U1 of shape"),
        ("infinite", np.array([[0, 0], [1, np.inf]], "f4"), "row 1 is not finite"),
        ("huge", np.array([[0, 1e300]]), "row 0 is not finite"),
    ],
)
def test_a_file_that_holds_no_features_is_named(tmp_path, name, content, message):
    file = tmp_path / f"{name}.npy"
    file.write_bytes(content) if isinstance(content, bytes) else np.save(file, content)
    with pytest.raises(ValueError, match=f"{name}.npy: .*{message}"):
        read_features(str(file))


def test_a_torn_or_damaged_npy_is_no_features(tmp_path):
    file = tmp_path / "f.npy"
    np.save(file, np.ones((5, 4), "f4"))
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], whole[:4], whole.replace(b"(5, 4)", b"(5, *)")):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="f.npy: not an .npy file of numbers, or cut short"):
            read_features(str(file))
    np.savez(tmp_path / "z.npy.npz", a=np.ones((2, 2)))
    with pytest.raises(ValueError, match="not an .npy file"):
        read_features(str(tmp_path / "z.npy.npz"))


def test_no_pickle_in_a_feature_file_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    np.save(tmp_path / "bomb.npy", np.array([[Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="bomb.npy: not an .npy file of numbers"):
        read_features(str(tmp_path / "bomb.npy"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "a.npy", "b.npy"], "--features: 2 files for 1 samples files"),
        (["--features", "missing.npy"], "missing.npy"),
        (["--features", "two.npy", "--reference-features", "two.npy"], "2 rows for 3 samples"),
        (["--features", "four.npy", "--reference-features", "two.npy"], "4 rows for 3 samples"),
        (["--features", "three.npy", "--reference-features", "wide.npy"],
         "s.jsonl are 2 wide, those of the reference 5"),
        (["--num", "4"], "s.jsonl: 3 samples, fewer than --num 4"),
        (["--num", "0"], "--num 0: at least 1"),
        (["--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--mauve-seeds", "0"], "--mauve-seeds 0: at least 1"),
        (["--mauve-scaling", "nan"], "--mauve-scaling nan: a number above 0"),
        (["--nfe", "4"], "--nfe: for samples that are written here"),
        (["--top-p", "0.9"], "--top-p: for samples that are written here"),
        (["--out", "o.jsonl"], "--out: for samples that are written here"),
        (["--features", "three.npy", "--reference-features", "two.npy", "--save-features", "."],
         "all features are given"),
    ],
)  # fmt: skip
def test_gen_says_what_cannot_be(run, tmp_path, monkeypatch, flags, message):
    pytest.importorskip("mauve")
    monkeypatch.chdir(tmp_path)
    for name, shape in {"two": (2, 2), "three": (3, 2), "four": (4, 2), "wide": (9, 5)}.items():
        np.save(f"{name}.npy", np.ones(shape, "f4"))
    write_ids(tmp_path / "s.jsonl", [[1, 2, 3, 4]] * 3)
    with pytest.raises((ValueError, OSError), match=message):
        gen(run, "s.jsonl", *flags)


def test_two_sample_files_do_not_share_one_feature_file(run, tmp_path):
    names = [tmp_path / "a.jsonl", tmp_path / "a.txt"]
    with pytest.raises(ValueError, match="would write one .npy"):
        gen(run, *names, "--save-features", tmp_path)


def one_line(error) -> bool:
    return "\n" not in str(error.value)


def test_a_model_that_cannot_be_had_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    hub = pytest.importorskip("huggingface_hub")

    def no_network(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "snapshot_download", no_network)
    with pytest.raises(
        FileNotFoundError, match="--features-model gpt2-large: .*ConnectionError"
    ) as e:
        load_judge("gpt2-large")
    assert one_line(e) and "into a folder and name that" in str(e.value)


@pytest.mark.parametrize("damage", ["empty", "no weights", "torn weights", "a weight less", "code"])
def test_a_damaged_model_folder_is_one_line(judge_folder, tmp_path, damage):
    safetensors = pytest.importorskip("safetensors.torch")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in judge_folder.iterdir() if damage != "empty" else ():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "a weight less":
        held = safetensors.load_file(weights)
        held.pop(next(name for name in held if "c_attn.weight" in name))
        safetensors.save_file(held, weights, metadata={"format": "pt"})
    elif damage == "code":
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="--features-model .*model: not a causal") as e:
        load_judge(str(folder))
    assert one_line(e)


def test_a_package_that_is_absent_is_named_with_its_command(run, tmp_path, monkeypatch):
    file = write_ids(tmp_path / "s", [[1, 2, 3, 4]])
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ValueError, match="pip install mauve-text") as e:
        gen(run, file, "--mauve")
    assert one_line(e)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        gen(run, file, "--gen-ppl")


# A checkpoint alone


def test_a_checkpoint_alone_writes_its_samples_and_goes_on(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "s.jsonl"
    flags = ["--out", out, "--num", 5, "--nfe", 3, "--length", 16, "--batch-size", 2, "--seed", 4]
    real, calls = sample.generate, []

    def dies(*args, **kwargs):
        calls.append(len(kwargs["seeds"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        gen(run, *flags)
    assert len(out.read_text().splitlines()) == 2
    gen(run, *flags)
    assert calls == [2, 2, 2, 1], "the two that were there are not made again"
    rows = table(capsys)
    assert rows[str(out)]["samples"] == "5" and len(rows) == 3
    written = out.read_bytes()

    monkeypatch.undo()
    places = ["--ckpt", str(run), "--device", "cpu", "--out", str(tmp_path / "other.jsonl")]
    theirs = [str(flag) for flag in flags[2:]]
    sample.main(sample.parser().parse_args([*places, *theirs]))
    assert written == (tmp_path / "other.jsonl").read_bytes(), "as sample.py writes them"


def test_only_results_are_on_stdout_when_samples_are_written(run, tmp_path, capsys):
    gen(run, "--out", tmp_path / "s.jsonl", "--num", 2, "--nfe", 2, "--length", 8)
    out = capsys.readouterr()
    assert out.out.startswith(" 2-grams") and "tokens per second" in out.err


def test_a_checkpoint_alone_makes_as_many_samples_as_the_paper(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "main", lambda args: asked.append((args.num, args.cache)))
    with pytest.raises(FileNotFoundError):
        gen(run, "--out", tmp_path / "s.jsonl")
    assert asked == [(5008, "none")]


def test_no_samples_and_nowhere_to_write_them_is_one_line(run):
    with pytest.raises(ValueError, match="no samples: name files of sample.py --out"):
        gen(run)


# Quality against speed


def test_tradeoff_tells_each_cell_and_draws_all_of_them(run, tmp_path, capsys):
    picture = tmp_path / "tradeoff.svg"
    flags = ["tradeoff", str(run), "--cache", str(run), "--num", "5", "--seeds", "2"]
    flags += ["--blocks", "4", "16", "--budgets", "0.5", "--thresholds", "0.9"]
    args = evaluate.parser().parse_args([*flags, "--picture", str(picture)])
    args.main(args)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[1], row[2]) for row in rows] == [
        ("4", "budget"), ("16", "budget"), ("4", "threshold"), ("16", "threshold"),
    ]  # fmt: skip
    assert [float(row[4]) for row in rows[:2]] == [8, 8], "passes: half of 16 tokens"
    assert 4 <= float(rows[2][4]) <= 16 and 1 <= float(rows[3][4]) <= 16
    assert all(0 <= float(row[6]) <= 1 for row in rows)
    assert picture.read_text().count("<use") >= 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing-here"], "nothing-here: no such file"),
        (["--thresholds", "1.5"], "1.5 is not above 0"),
        (["--budgets", "nan"], "nan is not above 0"),
        (["--blocks", "0"], "--blocks 0"),
        (["--num", "0"], "--num 0"),
    ],
)
def test_tradeoff_names_what_cannot_be(run, flags, message):
    place = [] if flags[0] == "nothing-here" else [str(run)]
    rest = ["--cache", str(run), "--num", "1", "--seeds", "1", "--budgets", "0.5"]
    place, flags = (place, flags) if place else (flags, [])
    args = evaluate.parser().parse_args(["tradeoff", *place, *rest, *flags])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        args.main(args)
