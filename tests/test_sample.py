"""The command line writes, goes on with and refuses what it should."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from published import write_dream, write_tokenizer

import data
import sample
import tracing
import train
from model import DREAM_SIZES, Dream, DreamConfig


def test_template_of_prompt_and_infill():
    tokenizer = data.bytes_tokenizer()
    assert sample.template(tokenizer, 5, prompt="ab") == [97, 98, 257, 257, 257]
    assert sample.template(tokenizer, 9, infill="a[MASK][MASK]b[MASK]") == [97, 257, 257, 98, 257]
    for bad in ({"infill": "nothing"}, {"prompt": "abcde"}, {"infill": "a[MASK]bcdefg"}):
        with pytest.raises(ValueError, match="--prompt|--infill"):
            sample.template(tokenizer, 5, **bad)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the quick brown fox. " * 200)
    flags = "--sm --config nano --tokenizer bytes --steps 2 --batch-size 2 --eval-batches 1".split()
    places = ["--data", str(folder / "text.txt"), "--cache", str(folder), "--out", str(folder)]
    train.main(train.parse([*flags, *places]))
    return folder / "ckpt.pt"


def run(checkpoint, *flags):
    return sample.main(sample.parser().parse_args(["--ckpt", str(checkpoint), *flags]))


def test_command_line_writes_samples_that_keep_the_prompt(checkpoint, tmp_path, capsys):
    out = tmp_path / "samples.jsonl"
    run(
        checkpoint,
        "--num",
        "3",
        "--batch-size",
        "2",
        "--prompt",
        "ab",
        "--nfe",
        "4",
        "--out",
        str(out),
    )
    printed = capsys.readouterr().out
    samples = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(samples) == 3 and all(s["text"].startswith("ab") for s in samples)
    assert all(len(s["ids"]) == 32 and 257 not in s["ids"] for s in samples)
    assert "tokens per second" in printed and "4 steps" in printed


def test_command_line_fills_in_place(checkpoint, capsys):
    run(checkpoint, "--infill", "x = [MASK][MASK] + 1", "--dtype", "float32")
    text = capsys.readouterr().out.split("\n")[1]
    assert "[MASK]" not in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--nfe", "0"],
        ["--nfe", "-3"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--num", "0"],
        ["--length", "33"],
        ["--length", "-1"],
        ["--temperature", "-1"],
        ["--prompt", "x" * 40],
        ["--infill", "no mask"],
        ["--ckpt", "absent"],
        ["--batch-size", "0"],
        ["--eta", "1.5", "--strategy", "remdm-cap"],
        ["--eta", "-0.1", "--strategy", "remdm-rescale"],
        ["--eta", "0.2", "--strategy", "remdm-loop"],
        ["--eta", "0.1"],
        ["--eta", "0.1", "--strategy", "remdm-conf"],
        ["--alg-temp", "0.5"],
        ["--alg-temp", "0.5", "--strategy", "origin"],
        ["--alg-temp", "-1", "--strategy", "entropy"],
        ["--nfe", "33", "--strategy", "entropy"],
        ["--nfe", "31", "--prompt", "ab", "--strategy", "topk_margin"],
        ["--t-on", "0.05", "--t-off", "0.1"],
        ["--alpha-on", "1"],
        ["--preset", "remdm-paper", "--strategy", "mdlm"],
        ["--preset", "remdm-paper", "--eta", "0.1"],
        ["--prompt", "a", "--infill", "[MASK]"],
        ["--sm-schedule", "linear", "--no-sm"],
        ["--sm-switch", "1.5", "--sm-schedule", "step"],
    ],
)
def test_bad_flag_is_named(checkpoint, flags):
    with pytest.raises((ValueError, OSError), match=flags[0]):
        run(checkpoint, *flags)


# Runs of the command line

BULK = "--num 7 --batch-size 3 --nfe 6 --dtype float32 --device cpu --seed 5".split()


@pytest.fixture(scope="module")
def bulk(checkpoint):
    out = checkpoint.parent / "bulk.jsonl"
    run(checkpoint, *BULK, "--out", str(out))
    return out.read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 4, 6])
def test_a_stopped_run_goes_on_to_the_same_file(checkpoint, bulk, tmp_path, kept):
    lines = bulk.splitlines(keepends=True)
    assert [json.loads(line)["index"] for line in lines] == list(range(7))
    assert len({str(json.loads(line)["ids"]) for line in lines}) == 7
    out = tmp_path / "f.jsonl"
    out.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
    run(checkpoint, *BULK, "--out", str(out))
    assert out.read_bytes() == bulk
    run(checkpoint, *BULK, "--out", str(out))  # nothing is left to do
    assert out.read_bytes() == bulk


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "6"],
        ["--nfe", "7"],
        ["--strategy", "remdm-cap"],
        ["--temperature", "0.9"],
        ["--top-p", "0.9"],
        ["--prompt", "a"],
        ["--length", "31"],
        ["--no-sm"],
        ["--sm-schedule", "linear"],
        ["--reuse-unchanged"],
        ["--dtype", "bfloat16"],
    ],
    ids=" ".join,
)
def test_a_file_of_another_run_is_refused_and_kept(checkpoint, bulk, tmp_path, flags):
    out = tmp_path / "f.jsonl"
    out.write_bytes(bulk)
    with pytest.raises(ValueError, match="--out"):
        run(checkpoint, *BULK, "--out", str(out), *flags)
    assert out.read_bytes() == bulk


def test_a_file_of_other_weights_is_refused(checkpoint, bulk, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    for w in (*state["model"].values(), *state["ema"]):
        if w.shape == (258,):  # the head's bias; the embedding stays
            w[65] += 9.0
    torch.save(state, tmp_path / "ckpt.pt")
    out = tmp_path / "f.jsonl"
    out.write_bytes(bulk)
    with pytest.raises(ValueError, match="--out"):
        run(tmp_path / "ckpt.pt", *BULK, "--out", str(out))


def test_two_processes_write_the_file_of_one(checkpoint, bulk, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    out = tmp_path / "f.jsonl"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = ["--", str(Path(sample.__file__)), "--ckpt", str(checkpoint), *BULK, "--out", str(out)]
    done = subprocess.run(
        [*launcher, "--nproc_per_node", "2", *job],
        env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == bulk
    assert done.stdout.count("7 samples") == 1


def test_soft_masking_flags_are_refused_for_a_binary_checkpoint(checkpoint, tmp_path):
    flags = "--config nano --tokenizer bytes --steps 1 --batch-size 2 --eval-batches 1".split()
    text = checkpoint.parent / "text.txt"
    places = ["--data", str(text), "--cache", str(checkpoint.parent), "--out", str(tmp_path)]
    train.main(train.parse([*flags, *places]))
    for bad in (["--sm-schedule", "step"], ["--reuse-unchanged"]):
        with pytest.raises(ValueError, match=f"{bad[0]}.*binary"):
            run(tmp_path / "ckpt.pt", *bad)


# The model in a folder, as a user talks to it

ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "NO_COLOR")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dream")
    write_tokenizer(folder, n := 600)
    sizes = DREAM_SIZES["dream-tiny"] | {"vocab_size": n + 30, "mask_id": n + 23, "n_layers": 1}
    torch.manual_seed(0)
    write_dream(folder, Dream(DreamConfig(**sizes)), shards=2)
    return folder


def answer_once(folder, *flags):
    command = [sys.executable, sample.__file__, "--model", str(folder), "--new-tokens", "8", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120)


def test_a_message_is_answered_with_and_without_soft_masking(folder):
    plain = answer_once(folder, "--prompt", "hello", "--budget", "1/2")
    assert plain.returncode == 0 and plain.stderr == ""
    soft = answer_once(folder, "--prompt", "hello", "--budget", "1/2", "--omegas", "0.9,1,-9")
    assert soft.returncode == 0 and "\x1b" not in soft.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x", "--budget", "3/2"], "--budget 3/2"),
        (["--prompt", "x", "--budget", "1/0"], "--budget 1/0"),
        (["--prompt", "x", "--omegas", "1"], "--omegas"),
        (["--prompt", "x", "--omegas", "2,1,-1"], "omega_s 2.0"),
        (["--prompt", "x", "--k", "2"], "--k 2"),
        (["--prompt", "x" * 3000], "takes 512"),
        ([], "--prompt or --chat"),
    ],
)
def test_a_wrong_flag_of_an_answer_is_one_line(folder, flags, message):
    result = answer_once(folder, *flags)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_chat_through_a_pipe_prints_answers_alone(folder):
    command = [sys.executable, sample.__file__, "--model", str(folder), "--chat"]
    result = subprocess.run(
        [*command, "--new-tokens", "8"], input="hello\n\nagain\n", capture_output=True, text=True,
        env=ENV, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == "" and "\x1b" not in result.stdout
    assert result.stdout


def in_a_terminal(folder, keys, term="xterm-256color", flags=("--chat", "--new-tokens", "64")):
    """Run in a pseudo-terminal; `keys` are (what to wait for, what to type then)."""
    pty = pytest.importorskip("pty")
    command = [sys.executable, sample.__file__, "--model", str(folder), *flags]
    command += ["--omegas", "0.9,1,-9"]
    child, fd = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whatever a job in the background inherits
        os.execve(sys.executable, command, {**ENV, "TERM": term})
    shown, at = b"", 0
    for awaited, typed in [*keys, (None, b"")]:
        while awaited is None or awaited not in shown[at:]:
            if not select.select([fd], [], [], 60)[0]:
                os.kill(child, signal.SIGKILL)
                pytest.fail(f"nothing more after {shown[-300:]}")
            try:
                more = os.read(fd, 65536)
            except OSError:  # the other side is closed
                more = b""
            if not more:
                break
            shown += more
        if awaited in (None, b"") or awaited not in shown[at:]:
            break
        at = shown.index(awaited, at) + len(awaited)
        if typed:
            time.sleep(0.3)  # as a person: a signal just before input() waits would not wake it
            os.write(fd, typed)
    os.close(fd)
    return shown.decode(errors="replace"), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_chat_in_a_terminal_shows_the_answer_forming_and_leaves_it_clean(folder):
    shown, status = in_a_terminal(
        folder, [(b"> ", b"hello\n"), (b"\x1b[?25h", b""), (b"> ", b"\x04")]
    )
    assert status == 0
    assert tracing.MASK_SIGN in shown or "\x1b[38;5;" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is back"
    assert shown.rindex("\x1b[0m") > shown.rindex("\x1b[38;5;")


def test_chat_in_a_terminal_without_colours_has_no_escapes(folder):
    shown, status = in_a_terminal(folder, [(b"> ", b"hello\n"), (b"> ", b"\x04")], term="dumb")
    assert status == 0 and "\x1b" not in shown


def test_ctrl_c_stops_the_answer_and_twice_leaves(folder):
    keys = [(b"> ", b"hello\n"), (b"\x1b[38;5;", b"\x03"), (b"> ", b"\x03")]
    shown, status = in_a_terminal(folder, keys)
    assert status == 130 and "\x1b[?25h" in shown and "Traceback" not in shown


def test_watched_samples_form_in_the_terminal_and_are_those_of_a_batch(checkpoint, tmp_path):
    flags = ["--num", "2", "--nfe", "4", "--dtype", "float32"]
    out = tmp_path / "watched.jsonl"
    shown, status = in_a_terminal(checkpoint, [], flags=[*flags, "--watch", "--out", str(out)])
    assert status == 0 and shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 2
    assert shown.count("\x1b[38;5;") > 8, "soft masks in greys"
    run(checkpoint, *flags, "--omegas", "0.9,1,-9", "--out", str(tmp_path / "plain.jsonl"))
    assert out.read_text() == (tmp_path / "plain.jsonl").read_text()


# Files that are not ours


def two_steps(ckpt, *flags):
    sample.main(sample.parser().parse_args(["--ckpt", str(ckpt), "--nfe", "2", *map(str, flags)]))


def test_a_file_that_is_not_of_this_run_is_left_alone(checkpoint, tmp_path):
    notes = tmp_path / "notes"
    notes.write_text("my notes, no newline")
    with pytest.raises(ValueError, match="line 1 is not sample 0"):
        two_steps(checkpoint, "--out", notes)
    assert notes.read_text() == "my notes, no newline"
    with pytest.raises(ValueError, match="not a file"):
        two_steps(checkpoint, "--out", "/dev/null")
    with pytest.raises(ValueError, match="--trace .*exists"):
        two_steps(checkpoint, "--trace", notes)
    with pytest.raises(ValueError, match="same file"):
        two_steps(checkpoint, "--out", tmp_path / "new", "--trace", tmp_path / "new")


def test_a_link_stays_a_link_and_what_is_there_is_kept(checkpoint, tmp_path, capsys):
    file, link = tmp_path / "samples.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(file)
    two_steps(checkpoint, "--out", link, "--num", 2)
    two_steps(checkpoint, "--out", link, "--num", 3)
    assert link.is_symlink() and len(file.read_text().splitlines()) == 3
    capsys.readouterr()
    two_steps(checkpoint, "--out", link, "--num", 1)
    assert "0 samples" in capsys.readouterr().out and len(file.read_text().splitlines()) == 3


@pytest.mark.parametrize("k", ["3", 0, -1, 2.5])
def test_a_damaged_softmask_json_is_named(checkpoint, tmp_path, k):
    file = tmp_path / "softmask.json"
    file.write_text(json.dumps({"k": k, "omega_s": 0.5, "omega_a": 1.0, "omega_b": -1.0}))
    with pytest.raises(ValueError, match="--omegas|k = "):
        two_steps(checkpoint, "--omegas", file)
