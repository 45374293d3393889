"""Jobs of several processes: the curves of one process, exact accounts, harmless deaths."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
import training
import weights

ROOT = Path(train.__file__).parent
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1"
}
FLAGS = (
    "--sm --sm-start 2 --k 2 --config nano --tokenizer bytes --steps 12 --global-batch 8 "
    "--warmup 2 --eval-every 6 --eval-batches 99 --log-every 1 --save-every 5 "
    "--dtype float32 --device cpu"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"the number {i} is followed by {i + 1}.\n" for i in range(2000)))
    return file


def job(processes, text, out, *flags, restarts=0, given=FLAGS):
    """Start train.py on so many processes; gloo on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node", str(processes), "--max-restarts", str(restarts)]
    places = ["--data", str(text), "--cache", str(text.parent / "cache"), "--out", str(out)]
    program = [sys.executable] if processes == 1 else launcher
    return subprocess.Popen(
        [*program, str(ROOT / "train.py"), *given, *places, *flags],
        env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [e["loss"] for e in metrics(folder) if "loss" in e]


def assert_same_weights(a, b):
    a, b = (weights.load_checkpoint(str(f), "--ckpt") for f in (a, b))
    assert a["step"] == b["step"]
    for x, y in zip(a["ema"], b["ema"]):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-3)
    assert torch.equal(a["generator"], b["generator"])


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """The undisturbed run on one process."""
    folder = tmp_path_factory.mktemp("one")
    finish(job(1, text, folder))
    return folder


def test_two_processes_give_the_curve_and_the_validation_of_one(one, text, tmp_path):
    printed = finish(job(2, text, tmp_path, "--batch-size", "2"))
    assert losses(tmp_path) == pytest.approx(losses(one), rel=1e-5)
    a, b = ([e for e in metrics(f) if "val_nelbo_2pass" in e] for f in (one, tmp_path))
    for x, y in zip(a, b):  # an odd number of batches, the last of them short
        assert x == pytest.approx(y, rel=1e-5)
    assert_same_weights(one, tmp_path)
    assert printed.count("validation    nats a token") == 1, "only rank 0 speaks"
    assert len(weights.load_checkpoint(str(tmp_path), "--ckpt")["rng"]) == 2


def test_a_run_changes_its_number_of_processes(one, text, tmp_path):
    finish(job(2, text, tmp_path, "--steps", "5"))
    # the schedule is that of 12 steps from here on, as it is for the run that is compared
    finish(job(1, text, tmp_path, "--resume", "--steps", "7", given=[]))
    printed = finish(job(4, text, tmp_path, "--resume", "--steps", "12", given=[]))
    assert "saved by 1 processes, resumed by 4" in printed
    assert losses(tmp_path)[:2] == pytest.approx(losses(one)[:2], rel=1e-5)
    assert [e["step"] for e in metrics(tmp_path) if "loss" in e] == list(range(1, 13))


def ranks_of(process):
    """Process ids of the ranks, in the order of their ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for pid in children:
        env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = [e for e in env if e.startswith(b"RANK=")]
        if rank:
            ranks[int(rank[0][5:])] = int(pid)
    return [ranks[r] for r in sorted(ranks)]


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logged(folder, steps):
    file = folder / "metrics.jsonl"
    return lambda: file.exists() and file.read_text().count('"loss"') >= steps


@pytest.fixture(scope="module")
def long(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    finish(job(2, text, folder, *LONG))
    return losses(folder)


LONG = "--steps 100 --save-every 7 --eval-every 50".split()


@pytest.mark.parametrize("trial", range(int(os.environ.get("KILL_TRIALS", "2"))))
def test_a_killed_rank_ends_the_job_and_resuming_ends_as_if_undisturbed(
    long, text, tmp_path, trial
):
    chance = random.Random(trial)
    process = job(2, text, tmp_path, *LONG)
    wait_for(logged(tmp_path, chance.randrange(8, 60)), process)
    time.sleep(chance.random() * 0.05)
    os.kill(ranks_of(process)[trial % 2], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    checkpoints = list(tmp_path.glob("*.pt"))  # a save that was cut off leaves another name
    assert checkpoints
    for file in checkpoints:
        state = weights.load_checkpoint(str(file), "--ckpt")
        assert state["step"] >= 7 and state["step"] % 7 == 0
    finish(job(2, text, tmp_path, "--resume", given=[]))
    assert losses(tmp_path)[: state["step"]] == long[: state["step"]]
    assert losses(tmp_path) == pytest.approx(long, rel=1e-6)


def test_torchrun_restarts_go_on_from_the_last_save(one, text, tmp_path):
    process = job(2, text, tmp_path, restarts=1)
    wait_for(logged(tmp_path, 6), process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    finish(process)
    assert [e["step"] for e in metrics(tmp_path) if "loss" in e] == list(range(1, 13))
    assert losses(tmp_path) == pytest.approx(losses(one), rel=1e-5)
    assert_same_weights(one, tmp_path)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(text, tmp_path):
    process = job(2, text, tmp_path, "--steps", "100000", "--eval-every", "100000")
    wait_for(logged(tmp_path, 3), process)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "--resume" in errors
    state = weights.load_checkpoint(str(tmp_path), "--ckpt")
    assert state["step"] == metrics(tmp_path)[-1]["step"] and len(state["rng"]) == 2


def test_batch_that_does_not_divide_is_refused(text, tmp_path):
    process = job(2, text, tmp_path / "out", "--global-batch", "7")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (
        "--global-batch 7: no multiple of 2 processes" in errors and not (tmp_path / "out").exists()
    )


def test_port_in_use_is_named(text, tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / "train.py"), *FLAGS, "--out", str(tmp_path / "out")]
        result = subprocess.run(command, env=ENV | env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and port in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_shares_are_equal_and_micro_batches_as_large_as_allowed():
    def share(size, **flags):
        args = train.parse([])
        for name, value in flags.items():
            setattr(args, name, value)
        training.share_batch(args, size)
        return args.global_batch, args.grad_accum

    assert share(1, batch_size=4, grad_accum=3) == (12, 3)
    assert share(2, batch_size=4, grad_accum=3) == (24, 3)
    assert share(4, batch_size=32, global_batch=512) == (512, 4)
    assert share(1, batch_size=32, global_batch=512) == (512, 16)
    assert share(1, batch_size=5, global_batch=12) == (12, 3)
    with pytest.raises(ValueError, match="no multiple of 3"):
        share(3, batch_size=32, global_batch=512)


def test_activation_checkpointing_changes_no_gradient():
    from model import SIZES, DiT, DiTConfig

    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = DiT(DiTConfig(30, dropout=0.3, **SIZES["nano"])).train()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        model.checkpoint_activations = on
        torch.manual_seed(1)
        model.hidden(model.embed(torch.arange(20)[None])).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
