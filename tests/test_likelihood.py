"""Windows over a text count each token once, and what stands beside it changes no token's loss."""

import json
import math
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise

import data
import evaluate
import likelihood
import train
import training
from model import SIZES, DiT, DiTConfig
from runtime import generator
from softmask import SoftMask, corrupt, diffusion_loss
from weights import build_model

CPU = (torch.device("cpu"), torch.float32)
EOT = 256
LENGTHS = [(1, 1), (5, 1), (5, 2), (5, 3), (5, 5), (8, 7)]  # a window's, and its stride


def edges_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def corpus_of(folder, sizes):
    """A corpus of bytes, held out whole: documents of these sizes, end-of-text included."""
    stream = np.random.default_rng(0).integers(EOT, size=sum(sizes)).astype(np.uint16)
    stream[edges_of(sizes)[1:] - 1] = EOT
    stream.tofile(folder / "val.bin")
    meta = {"blocks": "windows", "dtype": "uint16", "source": "it"}
    meta["tokens"] = {"train": 0, "val": len(stream)}
    return data.Corpus(folder, data.bytes_tokenizer(), meta)


def batches_of(corpus, length, stride, kept=True):
    edges = corpus.documents("val")
    plan = likelihood.windows(edges if kept else edges[[0, -1]], length, stride)
    plan = np.column_stack([np.zeros(len(plan), np.int64), plan])
    return likelihood.Windows(corpus, ["val"], plan)


SIZES_OF_DOCUMENTS = [*range(1, 40), *[3] * 40]


# What a window is


@pytest.mark.parametrize(("length", "stride"), LENGTHS)
@pytest.mark.parametrize("sizes", [[1], [7], [5, 5], [1, 20, 4, 6, 5, 1], [40, 3, 11]])
def test_each_token_is_counted_once_and_has_its_context(sizes, length, stride):
    edges = edges_of(sizes)
    counted = np.zeros(edges[-1], int)
    for start, first, stop in likelihood.windows(edges, length, stride):
        counted[first:stop] += 1
        document = np.searchsorted(edges, start, "right") - 1
        assert stop <= edges[document + 1] and start < stop <= start + length
        assert first == start == edges[document] or first - start == length - stride
    assert (counted == 1).all()


@pytest.mark.parametrize(("length", "stride"), LENGTHS)
@pytest.mark.parametrize("kept", [True, False])
def test_batches_hold_the_text_its_responses_and_nothing_else(tmp_path, length, stride, kept):
    corpus = corpus_of(tmp_path, SIZES_OF_DOCUMENTS)
    said, seen = [], 0
    for x0, response, attend in batches_of(corpus, length, stride, kept):
        assert (attend | ~response).all() and response.any(1).all()
        assert not (~attend[:, :-1] & attend[:, 1:]).any()  # padding is on the right
        said.append(x0[response])
        seen += int(attend.sum())
        ends = (x0 == EOT) & attend
        if kept:  # an end of text is the last of a window
            assert not (ends[:, :-1] & attend[:, 1:]).any()
    said = torch.cat(said)
    stream = torch.from_numpy(corpus.streams["val"].astype(np.int64))
    assert torch.equal(said.sort().values, stream.sort().values)
    assert seen > len(said) if stride < length else seen == len(said)


def test_documents_end_with_their_end_of_text(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 4)  # a document's end may lie anywhere in a piece
    sizes = [4, 1, 3, 9]
    corpus = corpus_of(tmp_path, sizes)
    assert corpus.documents("val").tolist() == edges_of(sizes).tolist()
    assert corpus.documents("train").tolist() == [0]
    corpus.streams["val"] = corpus.streams["val"][:-1]  # one that does not end
    assert corpus.documents("val").tolist() == [0, 4, 5, 8, 16]


def test_lengths_do_not_go_with_the_times_of_a_batch(tmp_path):
    """The rows of a batch get times in rising order."""
    batches = batches_of(corpus_of(tmp_path, SIZES_OF_DOCUMENTS), 40, 40)
    widths = [attend.sum(1) for _, _, attend in batches]
    for own in widths:
        assert len(own.unique()) == 1 or not torch.equal(own, own.sort().values)
    for shorter, longer in pairwise(widths):
        assert shorter.max() <= longer.min()  # and yet they are alike


# The loss over windows


def sums_of(model, batches, softmask=None):
    return training.batch_sums(model, batches, softmask, *CPU, at_least_one=False)


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (1, 1)])
@pytest.mark.parametrize("kept", [True, False])
def test_an_untrained_network_has_the_uniform_law_in_every_mode(tmp_path, length, stride, kept):
    model = DiT(DiTConfig(EOT + 2, **SIZES["nano"]))
    sizes = [*range(1, 60), *[3] * 1000]
    batches = batches_of(corpus_of(tmp_path, sizes), length, stride, kept)
    sums, counts = sums_of(model, batches)
    assert sum(counts) == sum(sizes)
    g, log_v = generator(training.EVAL_SEED), math.log(EOT + 1)
    for batch, total in zip(batches, sums, strict=True):
        t, noise = training.draw_masks(batch[0], g, training.B_L, training.B_H)
        masked = (noise < 0.999 * t[:, None]) & batch[1]
        assert total == pytest.approx(float((masked / t[:, None]).sum()) * log_v, rel=1e-5)
    mean, error = training.mean_and_error(sums, counts)
    assert abs(mean - log_v) < 4 * error and error < log_v / 10


@pytest.mark.parametrize("soft", [False, True])
def test_padding_context_and_neighbours_change_no_token(tmp_path, tiny, soft):
    """Each window alone, without padding, gives the sum of its batch."""
    model = tiny(vocab_size=EOT + 2, block_size=8)
    softmask = SoftMask(2, omega_s=0.7) if soft else None
    batches = batches_of(corpus_of(tmp_path, [1, 2, 7, 8, 9, 30, 3, 3]), 8, 5)
    sums, _ = sums_of(model, batches, softmask)
    g = generator(training.EVAL_SEED)
    for (x0, response, attend), total in zip(batches, sums, strict=True):
        t, noise = training.draw_masks(x0, g, training.B_L, training.B_H)
        noise[~response] = 2.0
        alone = 0.0
        for row in range(len(x0)):
            n = int(attend[row].sum())
            one = x0[row : row + 1, :n], t[row : row + 1], noise[row : row + 1, :n]
            with torch.no_grad():
                alone += diffusion_loss(model, *one, softmask).item()
        assert not attend.all() and total == pytest.approx(alone, rel=1e-4)


class Copier:
    """Knows a token from the one `period` before, where that is not masked, and else nothing."""

    mask_id, vocab_size, mask_eps, training = EOT + 1, EOT + 2, 1e-3, False
    embedding, head = torch.eye(EOT + 2), torch.nn.Identity()

    def __init__(self, period):
        self.period, self.seen = period, []

    def eval(self):
        pass

    def train(self, mode):
        pass

    def embed(self, tokens):
        self.seen.append(tokens)
        return F.embedding(tokens, self.embedding)

    def hidden(self, embeddings, sigma, attend=None):
        return 60 * F.pad(embeddings, (0, 0, self.period, 0))[:, : embeddings.shape[1]]

    def logits(self, rows):
        return rows - 1e6 * self.embedding[self.mask_id]


@pytest.fixture
def repeating(tmp_path):
    corpus = corpus_of(tmp_path, [1000])
    corpus.streams["val"] = np.tile(np.arange(10, dtype=np.uint16), 2000)
    return corpus


def test_context_is_given_and_used(repeating):
    """With the ten tokens before as context nothing is left to learn after the first window."""
    model = Copier(10)
    batches = batches_of(repeating, 20, 10)
    sums, counts = sums_of(model, batches)
    for (x0, response, _), xt in zip(batches, model.seen, strict=True):
        masked = xt == model.mask_id
        assert torch.equal(xt[~masked], x0[~masked]) and not masked[~response].any()
    first = [i for i, (_, response, _) in enumerate(batches) if response.all(1).any()]
    assert sum(counts) == 20000 and len(first) == 1
    assert sum(s for i, s in enumerate(sums) if i not in first) == pytest.approx(0, abs=1e-3)
    alone, error = training.mean_and_error(*sums_of(model, batches_of(repeating, 10, 10)))
    assert abs(alone - math.log(EOT + 1)) < 4 * error and error < alone / 10


def test_a_response_keeps_its_masked_token_in_fine_tuning(tiny):
    """Only windows go without: `nelbo` is what it was."""
    model, x0 = tiny(), torch.randint(10, (32, 6))
    response, attend = torch.zeros(32, 6, dtype=torch.bool), torch.ones(32, 6, dtype=torch.bool)
    response[:, 4:] = True
    g, total = generator(training.EVAL_SEED), 0.0
    t, noise = training.draw_masks(x0, g, 0.2, 0.8)
    assert not corrupt(x0, t, noise, model.mask_id, 1e-3)[1][response].view(32, 2).any(1).all()
    with torch.no_grad():
        total = diffusion_loss(model, x0, t, noise, None, None, response, attend).item()
    mean, _ = training.nelbo(model, [(x0, response, attend)], None, *CPU, b_l=0.2, b_h=0.8)
    assert mean == pytest.approx(total / 64)


# Errors and differences


def test_the_error_is_that_of_a_ratio_of_sums():
    sums, counts = np.array([12.0, 7.0, 30.0]), np.array([4, 2, 9])
    mean, error = training.mean_and_error(list(sums), list(counts))
    residuals = sums - sums.sum() / counts.sum() * counts
    assert mean == pytest.approx(49 / 15)
    assert error == pytest.approx(math.sqrt(1.5 * (residuals**2).sum()) / 15)
    _, plain = training.mean_and_error([12.0, 8.0, 4.0], [4, 4, 4])  # 3, 2 and 1 nats a token
    assert plain == pytest.approx(1 / math.sqrt(3))


def test_a_difference_has_the_error_of_the_pairs():
    """Batches of four tokens at 2 and 10 nats; half and one nat more."""
    assert likelihood.paired([10.0, 44.0], [8.0, 40.0], [4, 4]) == (0.75, 0.25)
    assert training.mean_and_error([8.0, 40.0], [4, 4]) == (6.0, 4.0)


# The command


def ppl(run, *flags, others=()):
    out = run.with_name("rows.json")
    flags = ["--cache", str(run), "--dtype", "float32", "--json", str(out), *map(str, flags)]
    args = evaluate.parser().parse_args(["ppl", "--ckpt", *map(str, [run, *others]), *flags])
    args.main(args)
    return json.loads(out.read_text())


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"item {i}: bytes. " for i in range(60)))
    return tmp_path / "book.txt"


@pytest.fixture
def stories(tmp_path):
    """90 documents of unlike lengths, and their bytes."""
    texts = [f"item {i}: " + "some words. " * (i % 9) for i in range(90)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "stories.jsonl").write_text("".join(lines))
    return tmp_path / "stories.jsonl", [len(text) for text in texts]


@pytest.fixture
def trained(run, tmp_path):
    """The run with weights that tell tokens apart, and soft masks that are half prediction."""
    state = torch.load(run / "ckpt.pt", weights_only=True)
    model = build_model(state, ema=False)
    randomise(model)
    state |= {"model": model.state_dict(), "ema": None}
    state["softmask"]["state"]["raw_s"].zero_()
    torch.save(state, tmp_path / "trained.pt")
    return tmp_path / "trained.pt"


@pytest.fixture(scope="module")
def binary(run, tmp_path_factory):
    """Another run on the same text, binary."""
    folder = tmp_path_factory.mktemp("binary")
    flags = "--config nano --tokenizer bytes --steps 1 --batch-size 2 --eval-batches 1".split()
    places = ["--data", str(run / "text.txt"), "--cache", str(run), "--out", str(folder)]
    train.main(train.parse([*flags, *places, "--dtype", "float32"]))
    return folder


def test_a_stride_of_a_whole_window_is_the_default(run, book):
    default = ppl(run, "--data", book)
    assert ppl(run, "--data", book, "--stride", 32) == default
    assert ppl(run, "--stride", 32) == ppl(run)
    size = book.stat().st_size + 2
    assert default["tokens"] == size - default["left_out"] and default["context"] == 0


@pytest.mark.parametrize("boundaries", ["joined", "kept"])
def test_windows_of_a_file_leave_nothing_out_and_add_no_end(run, book, boundaries):
    """The file is one document, though its end is held out where it is trained on."""
    found = ppl(run, "--data", book, "--stride", 8, "--boundaries", boundaries)
    assert found["tokens"] == book.stat().st_size + 1  # and its end-of-text
    assert (found["left_out"], found["documents"], found["context"]) == (0, 1, 24)
    assert data.open_corpus(str(book), "bytes", str(run)).meta["split"] == "ends"  # for training


@pytest.mark.parametrize("flags", [("--boundaries", "kept"), ("--stride", 9)])
def test_bits_per_byte_are_of_the_bytes_of_the_text(run, stories, flags):
    file, sizes = stories
    found = ppl(run, "--data", file, *flags)
    (row,) = found["rows"]
    assert (found["documents"], found["left_out"]) == (90, 0)
    assert found["tokens"] == sum(sizes) + 90  # a document's end is a token without a byte
    bits = row["nats"] * found["tokens"] / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(bits / sum(sizes))
    assert row["perplexity"] == pytest.approx(math.exp(row["nats"]))
    assert row["perplexity_error"] == pytest.approx(row["perplexity"] * row["nats_error"])


def test_kept_and_joined_boundaries_are_not_the_same(run, trained, stories):
    flags = ["--cache", run, "--data", stories[0], "--stride", 20]
    kept, joined = (ppl(trained, *flags, "--boundaries", b) for b in ("kept", "joined"))
    assert kept["rows"][0]["nats"] != joined["rows"][0]["nats"]
    assert kept["tokens"] == joined["tokens"] and kept["documents"] == joined["documents"]


def test_the_uniform_law_costs_the_same_in_the_shortest_windows(run, stories, tmp_path):
    state = torch.load(run / "ckpt.pt", weights_only=True)
    for name in ("head.weight", "head.bias"):
        state["model"][name].zero_()
    torch.save(state | {"ema": None}, tmp_path / "uniform.pt")
    flags = ["--cache", run, "--data", stories[0], "--boundaries", "kept", "--passes", 1]
    (row,) = ppl(tmp_path / "uniform.pt", *flags, "--block-size", 2, "--stride", 1)["rows"]
    assert abs(row["nats"] - math.log(EOT + 1)) < 4 * row["nats_error"]
    assert row["nats_error"] < 1


def test_a_part_of_the_windows_says_what_it_left_out(run, stories):
    file, sizes = stories
    found = ppl(run, "--data", file, "--boundaries", "kept", "--batches", 1)
    assert 0 < found["tokens"] < found["left_out"] < sum(sizes) + 90
    assert found["tokens"] + found["left_out"] == sum(sizes) + 90
    assert found["rows"][0]["nats_error"] is None  # of a single batch: JSON has no NaN


def test_the_same_weights_differ_by_nothing(run, tmp_path):
    shutil.copy(run / "ckpt.pt", tmp_path / "copy.pt")
    a, b = ppl(run, others=[tmp_path / "copy.pt"])["rows"]
    assert (b["difference"], b["difference_error"]) == (0, 0)
    assert {k: b[k] for k in a if k != "checkpoint"} == {k: a[k] for k in a if k != "checkpoint"}


@pytest.mark.parametrize("flags", [(), ("--boundaries", "kept", "--stride", "20")])
def test_rows_are_those_of_each_model_alone(run, trained, binary, stories, flags):
    flags = ["--cache", str(run), "--data", stories[0], *flags]
    rows = ppl(trained, "--passes", "both", *flags, others=[binary])["rows"]
    assert [row["passes"] for row in rows] == [1, 2, 1] and "difference" not in rows[0]
    alone = [ppl(trained, *flags, "--passes", passes)["rows"][0] for passes in "12"]
    alone.append(ppl(binary, *flags)["rows"][0])
    for row, own in zip(rows, alone, strict=True):
        assert own.items() <= row.items()
    for row in rows[1:]:
        assert row["difference"] == pytest.approx(row["nats"] - rows[0]["nats"])
        assert row["difference"] != 0 and row["difference_error"] > 0
    assert rows[1]["difference_error"] < rows[1]["nats_error"] / 2  # what they share cancels


def test_the_table_is_text_or_markdown(run, binary, capsys):
    ppl(run, others=[binary])
    says, head, *rows = capsys.readouterr().out.splitlines()
    assert "tokens counted" in says and "windows of 32, context 0" in says
    assert str(binary) in rows[-1] and len(rows[-1]) == len(head), "columns end together"
    assert len(rows[0]) == head.index("bits per byte") + len("bits per byte"), "no difference yet"
    ppl(run, "--markdown", others=[binary])
    _, *lines = capsys.readouterr().out.splitlines()
    assert all(line.count("|") == 7 for line in lines) and len(lines) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stride", "0"], "--stride 0: from 1 to the 32"),
        (["--stride", "33"], "--stride 33: from 1 to the 32"),
        (["--block-size", "8", "--stride", "9"], "--stride 9: from 1 to the 8"),
        (["--passes", "2"], "--passes 2: a binary"),
        (["--json", "/proc/none/rows.json"], "--json /proc/none"),
        (["--ckpt", "absent"], "--ckpt absent"),
    ],
)
def test_what_cannot_be_is_named(run, binary, flags, message):
    flags = ["ppl", "--ckpt", str(run), str(binary), "--cache", str(run), *flags]
    args = evaluate.parser().parse_args(flags)
    with pytest.raises((ValueError, OSError), match=message):
        args.main(args)


def test_both_passes_need_a_soft_mask(binary, run):
    with pytest.raises(ValueError, match="--passes both: a binary"):
        ppl(binary, "--passes", "both")


def test_a_text_shorter_than_a_window_needs_kept_boundaries(run, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="a block takes 32.*--block-size"):
        ppl(run, "--data", tmp_path / "short.txt", "--stride", 4)
    assert ppl(run, "--data", tmp_path / "short.txt", "--boundaries", "kept")["tokens"] == 6


def test_a_checkpoint_is_named_once(run):
    with pytest.raises(ValueError, match=r"--ckpt .*ckpt.pt: named twice"):
        ppl(run, others=[run / "ckpt.pt"])


def test_other_tokens_are_not_compared(run, tmp_path):
    state = torch.load(run / "ckpt.pt", weights_only=True)
    torch.save(state | {"tokenizer": {"name": "gpt2"}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="another tokenizer"):
        ppl(run, others=[tmp_path])


@pytest.mark.parametrize("flags", [["--stride", "8"], ["--boundaries", "kept"]])
def test_wrapped_blocks_stay_as_they_are(run, book, tmp_path, flags):
    data.open_corpus(str(book), "bytes", str(tmp_path), "wrapped")
    with pytest.raises(ValueError, match=f"{' '.join(flags)}: .* wrapped"):
        ppl(run, "--data", book, "--cache", tmp_path, *flags)
    found = ppl(run, "--data", book, "--cache", tmp_path)
    assert found["left_out"] + found["tokens"] * 30 // 32 == book.stat().st_size + 2


# One checkpoint


def printed(run, capsys, *flags):
    flags = ["ppl", "--ckpt", str(run), "--cache", str(run), "--dtype", "float32", *flags]
    args = evaluate.parser().parse_args(flags)
    args.main(args)
    last = capsys.readouterr().out.splitlines()[-1]
    return [float(n) for n in re.findall(r"[-+]?\d+\.\d+|nan", last.replace("+-", ""))]


def test_ppl_is_what_training_reported_for_both_passes(run, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [e for e in lines if "val_nelbo_2pass" in e][-1]
    for passes in ("1", "2"):
        nats, error, perplexity, _, bpb, _ = printed(run, capsys, "--passes", passes)
        assert nats == pytest.approx(last[f"val_nelbo_{passes}pass"], abs=1e-4)
        assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
        assert bpb == pytest.approx(nats / math.log(2), abs=1e-3)  # a token is a byte here
        assert 0 < error < nats


def test_ppl_of_other_text_uses_all_of_it(run, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("completely different " * 20)
    assert (
        len(printed(run, capsys, "--data", str(tmp_path / "other.txt"), "--block-size", "16")) == 6
    )


def test_bits_per_byte_counts_the_bytes_of_the_tokens_evaluated():
    blocks = torch.tensor([[0, 1, 2, 2]])
    sizes = torch.tensor([1, 3, 2])  # eight bytes in four tokens
    assert train.bits_per_byte(2 * math.log(2), blocks, sizes) == pytest.approx(1.0)


def test_validation_repeats_exactly_and_leaves_training_as_it_was():
    torch.manual_seed(0)
    model = DiT(DiTConfig(30, dropout=0.5, **SIZES["nano"])).train()
    blocks = torch.randint(29, (40, 32))
    state = torch.get_rng_state()
    a, b = (
        training.nelbo(model, train.in_batches(blocks), None, torch.device("cpu"), torch.float32)
        for _ in range(2)
    )
    assert a == b and model.training and torch.equal(state, torch.get_rng_state())


def test_untrained_network_scores_the_uniform_law():
    model = DiT(DiTConfig(30, **SIZES["nano"]))
    blocks = torch.randint(29, (320, 32))
    mean, error = training.nelbo(
        model, train.in_batches(blocks), None, torch.device("cpu"), torch.float32
    )
    assert abs(mean - math.log(29)) < 4 * error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt", "absent.pt"], "--ckpt absent"),
        (["--block-size", "33"], "--block-size 33"),
        (["--batches", "0"], "--batches 0"),
        (["--data", "absent.txt"], "--data absent"),
    ],
)
def test_bad_flag_is_named(run, capsys, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        printed(run, capsys, *flags)


def test_text_shorter_than_a_block_is_named(run, capsys, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="a block takes 32"):
        printed(run, capsys, "--data", str(tmp_path / "short.txt"))


def test_two_passes_need_a_soft_mask(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 100)
    flags = "--config nano --tokenizer bytes --steps 1 --batch-size 2 --eval-batches 1".split()
    places = [
        "--data",
        str(tmp_path / "text.txt"),
        "--cache",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    train.main(train.parse([*flags, *places]))
    with pytest.raises(ValueError, match="--passes 2: a binary checkpoint"):
        printed(tmp_path, capsys, "--passes", "2")
    assert data.open_corpus(str(tmp_path / "text.txt"), "bytes", str(tmp_path)).meta["tokens"]
