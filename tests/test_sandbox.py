import gzip
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import sandbox
from sandbox import protections, run_program, run_programs

BENCHMARKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "benchmarks"
HERE = protections()
WALLED = all(HERE.values())
GOOD = "def f(x):\n    return x + 1\n"
TESTS = "def check(g):\n    assert g(1) == 2\ncheck(f)"
walled = pytest.mark.skipif(not WALLED, reason="this machine lacks some of the protections")


@pytest.fixture
def public():
    """A folder that every user can enter and write to, as those of tmp_path are not."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_a_correct_program_passes():
    verdict = run_program(GOOD, TESTS)
    assert verdict.passed and verdict.status == "passed" and verdict.error == ""
    assert 0 < verdict.seconds < 3


def test_the_standard_library_can_be_used_in_an_empty_folder():
    program = (
        "import collections, dataclasses, heapq, math, os, random, re, sys, tempfile, typing\n"
        "import decimal, email.message, encodings.cp037, fractions, hashlib, itertools\n"
        "assert os.listdir() == [] and os.getcwd() == os.environ['HOME'] == tempfile.gettempdir()\n"
        "assert sys.stdin.read() == ''\n"
        "open('own.txt', 'w').write('text')\n"
        "@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\n"
    )
    verdict = run_program(program, "assert open('own.txt').read() == 'text' and A().x == 1")
    assert verdict.passed, verdict.error


def test_the_main_guard_does_not_run():
    program = GOOD + "if __name__ == '__main__':\n    raise SystemExit(input())"
    assert run_program(program, TESTS).passed


@pytest.mark.parametrize(
    ("program", "tests", "word"),
    [
        ("def f(x):\n    return x", TESTS, "AssertionError"),
        (GOOD, "assert f(1) == 3", "assert f(1) == 3"),
        ("def f(x:\n", TESTS, "SyntaxError"),
        ("f = lambda x: 1 / 0", TESTS, "ZeroDivisionError"),
        ("def f(x): return f(x)", TESTS, "RecursionError"),
        ("x = '\x00'", "", "null"),
        ("x = '\ud800'", "", "surrogates"),
        ("# -*- coding: no-such -*-\nx = (", "", "SyntaxError"),
        ("import numpy", "", "ModuleNotFoundError"),
        ("f = input", TESTS, "EOFError"),
        ("(" * 5000 + ")" * 5000, "", "SyntaxError"),
        ("import sandbox", "", "ModuleNotFoundError"),
    ],
)
def test_a_wrong_program_fails_and_says_why(program, tests, word):
    verdict = run_program(program, tests)
    assert not verdict.passed and verdict.status == "failed"
    assert word in verdict.error


FORGERIES = {
    "leaves at once": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "exit in the function": "def f(x): raise SystemExit(0)",
    "_exit in the function": "import os\ndef f(x): os._exit(0)",
    "interrupt in the function": "def f(x): raise KeyboardInterrupt",
    "marker": "print('passed', 'd', flush=True)\nimport os; os._exit(0)",
    "marker on every descriptor": (
        "import os, time\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n"
        "    except OSError: pass\ntime.sleep(0.2); os._exit(0)"
    ),
    "the runner's word on every descriptor": (
        "import os, time\nfor fd in range(64):\n    try: os.write(fd, b'd')\n"
        "    except OSError: pass\ntime.sleep(0.2); os._exit(0)"
    ),
    "the runner's word and a guess": (
        "import os, time\nfor text in b'd', bytes(16):\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, text)\n        except OSError: pass\n    time.sleep(0.2)\n"
        "os._exit(0)"
    ),
    "a verdict on every descriptor": (
        'import os, time\ntext = b\'{"status": "passed", "error": "", "seconds": 1, "held": {}}\'\n'
        "for fd in range(64):\n    try: os.write(fd, text)\n"
        "    except OSError: pass\ntime.sleep(0.2); os._exit(0)"
    ),
    "own check": "def check(g): pass\ndef f(x): return 0",
    "builtins": (
        "import builtins\nbuiltins.AssertionError = None\nbuiltins.all = lambda x: True\n"
        "builtins.exit = builtins.quit = builtins.abs = lambda *x: 0\ndef f(x): return 0"
    ),
    "closes everything": "import os\nos.closerange(0, 1024)\n" + GOOD,
    "closes and opens": (
        "import os, socket\nos.closerange(0, 1024)\n"
        "ends = [socket.socketpair() for _ in range(4)]\n" + GOOD
    ),
    "replaces streams": "import sys\nsys.stdout = sys.stderr = None\ndef f(x): return 0",
    "excepthook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): return 0",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "walks frames": (
        "import sys\nframe, found = sys._getframe(), []\nwhile frame:\n"
        "    found += [v for v in frame.f_locals.values() if type(v) is bytes and len(v) == 16]\n"
        "    frame = frame.f_back\nimport os\nfor token in found or [bytes(16)]:\n"
        "    for fd in range(3, 64):\n        try: os.write(fd, token)\n"
        "        except OSError: pass\ndef f(x): return 0"
    ),
    "kills itself": "import os; os.kill(os.getpid(), 9); os._exit(0)",
    "dies of a fault": "import ctypes; ctypes.string_at(0)",
    "a child goes on": "import os\nif os.fork(): os._exit(0)\n" + GOOD,
    "a child alone gets it right": "import os\nok = os.fork() == 0\ndef f(x): return 1 + ok",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_pass_cannot_be_forged_by(name):
    tests = TESTS + "\nassert all([f(1) == 2]) and abs(f(1) - 2) < 1"
    assert not run_program(FORGERIES[name], tests, timeout=1.0).passed


def test_tests_have_the_real_builtins():
    program = "import builtins\nbuiltins.all = builtins.abs = lambda x: 0 * len(str(x)) or 1e-9"
    assert run_program(program, "assert not all([0])\nassert abs(-2) == 2").passed


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in set(signal.Signals) - {9, 19}:\n"
        "    signal.signal(s, lambda *a: None)\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import threading\ndef g():\n    while True: pass\n"
        "t = threading.Thread(target=g); t.start(); t.join()",
        "10 ** 10 ** 10",
        "import re; re.match('(a+)+b', 'a' * 60)",
    ],
)
def test_an_endless_program_is_stopped_in_time(program):
    start = time.monotonic()
    verdict = run_program(program, "", timeout=0.5)
    assert verdict.status == "timed out"
    assert time.monotonic() - start < 3


def test_threads_left_running_do_not_outlive_the_tests():
    program = (
        GOOD + "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()"
    )
    start = time.monotonic()
    assert run_program(program, TESTS).passed
    assert time.monotonic() - start < 3


def test_a_memory_hog_is_stopped():
    verdict = run_program("x = bytearray(3 << 30)", "")
    assert verdict.status == "killed" and "MemoryError" in verdict.error
    verdict = run_program("x = []\nwhile True: x.append(bytearray(1 << 20))", "", memory=1 << 27)
    assert verdict.status == "killed" and "MemoryError" in verdict.error
    assert run_program("x = bytearray(1 << 29)", "").passed


def test_recursion_without_bound_ends_in_a_verdict():
    program = "import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda x: max([x], key=f)"
    verdict = run_program(program, "f(1)")
    assert verdict.status in ("killed", "failed")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_loud_program_is_stopped(stream):
    program = f"import sys\nwhile True: sys.{stream}.write('x' * 65536)"
    verdict = run_program(program, "", timeout=10.0)
    assert verdict.status == "killed" and "printed more than" in verdict.error
    assert verdict.seconds < 5 and len(verdict.error) < 5000


def test_an_error_text_is_bounded():
    verdict = run_program("raise ValueError('x' * 10 ** 6)", "")
    assert verdict.status == "failed" and len(verdict.error) <= 4000


@walled
def test_a_disk_cannot_be_filled():
    one = "with open('big', 'wb') as f:\n    while True: f.write(bytes(1 << 20))"
    many = "for i in range(10 ** 6): open(str(i), 'wb').write(bytes(1 << 20))"
    empty = "for i in range(10 ** 6): open(str(i), 'wb').close()"
    for program in one, many, empty:
        verdict = run_program(program, "", timeout=20.0)
        assert verdict.status == "failed" and "OSError" in verdict.error


@walled
def test_nothing_can_be_written_outside(public):
    here = public / "harm.txt"
    for path in here, Path("/tmp/sandbox-harm.txt"), Path("/dev/shm/sandbox-harm.txt"):
        verdict = run_program(f"open({str(path)!r}, 'w').write('harm')", "")
        assert verdict.status == "failed" and not path.exists()
    here.write_text("kept")
    here.chmod(0o666)
    for attack in f"os.unlink({str(here)!r})", f"os.truncate({str(here)!r}, 0)":
        assert run_program(f"import os\n{attack}", "").status == "failed"
    assert here.read_text() == "kept"


@walled
def test_rights_cannot_be_won_back(public):
    program = f"""
import ctypes, os
libc = ctypes.CDLL(None)
done = [libc.mount(b"none", b"/", None, 32 | 4096, None), libc.umount2(b"/proc", 2)]
done += [libc.unshare(0x20000), libc.setuid(0), libc.chroot(b"/"), libc.umount2(b".", 2)]
assert set(done) == {{-1}}
libc.unshare(0x10000000)
libc.unshare(0x20000)
assert libc.mount(b"none", b"/", None, 32 | 4096, None) == -1
open({str(public / "harm")!r}, "w")
"""
    verdict = run_program(program, "")
    assert verdict.status == "failed" and "Read-only file system" in verdict.error
    assert not (public / "harm").exists()


@walled
def test_the_environment_and_other_processes_cannot_be_seen(monkeypatch):
    monkeypatch.setenv("API_SECRET", "hunter2")
    program = f"""
import glob, os
seen = repr(os.environ)
for path in [f"/proc/{{os.getppid()}}/environ", "/proc/{os.getpid()}/environ"] + glob.glob(
    "/proc/[0-9]*/environ"
):
    try: seen += open(path).read()
    except OSError: pass
"""
    verdict = run_program(program, "assert 'hunter2' in seen")
    assert verdict.status == "failed"
    assert run_program("import os", "assert not any('CUDA' in k for k in os.environ)").passed


@walled
def test_no_process_outside_can_be_killed():
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        program = f"""
import os, signal
for pid in (os.getppid(), {os.getpid()}, {os.getppid()}, {bystander.pid}, -1):
    for number in (15, 9):
        try: os.kill(pid, number)
        except OSError: pass
os._exit(0)
"""
        assert not run_program(program, "").passed
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@walled
def test_a_fork_bomb_is_contained():
    before = len([p for p in os.listdir("/proc") if p.isdigit()])
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    pairs = [
        (bomb, ""),
        (GOOD + "import os, time; time.sleep(0.3); os.fork() or os._exit(0)", TESTS),
    ]
    first, second = run_programs(pairs, workers=2, timeout=1.5)
    assert first.status == "timed out"
    assert second.passed, second  # the bomb has not used up what the other may start
    assert len([p for p in os.listdir("/proc") if p.isdigit()]) < before + 20
    many = "import os, time\nfor _ in range(100): os.fork() or time.sleep(9)"
    assert "BlockingIOError" in run_program(many, "").error


@walled
def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert run_program(program, "").status == "failed"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        for _ in range(100):
            time.sleep(0.05)
            open({path!r}, "a").write("x")
time.sleep(0.3)
"""


def without_namespaces(tmp_path: Path):
    """The module as it works where the kernel grants no namespace."""
    copy = tmp_path / "sandbox_bare.py"
    text = Path(sandbox.__file__).read_text()
    assert text.count("libc.unshare(") == 1
    copy.write_text(text.replace("libc.unshare(", "(lambda flags: -1)("))
    spec = importlib.util.spec_from_file_location("sandbox_bare", copy)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sandbox_bare"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux finds all descendants")
def test_a_daemon_is_killed_where_there_are_no_namespaces(tmp_path, public):
    bare = without_namespaces(tmp_path)
    assert not bare.protections()["no network"]
    path = public / "ticks"
    for ending in "", "os._exit(0)":
        bare.run_program(DAEMON.format(path=str(path)) + ending, "")
        ticks = path.stat().st_size if path.exists() else 0
        time.sleep(0.3)
        assert (path.stat().st_size if path.exists() else 0) == ticks


def test_verdicts_are_the_same_without_namespaces(tmp_path):
    bare = without_namespaces(tmp_path)
    assert bare.run_program(GOOD, TESTS).passed
    assert bare.run_program("while True: pass", "", timeout=0.3).status == "timed out"
    for name in "leaves at once", "marker on every descriptor", "closes everything":
        assert not bare.run_program(FORGERIES[name], TESTS).passed


@walled
def test_a_daemon_dies_with_the_program(tmp_path):
    marks = [shutil.which("sleep"), "61.25"]
    program = f"""
import os, subprocess
if os.fork() == 0:
    os.setsid()
    subprocess.Popen({marks!r}, start_new_session=True)
    os._exit(0)
os.wait()
"""
    assert run_program(program, "").passed
    lines = [Path(p, "cmdline") for p in Path("/proc").iterdir() if p.name.isdigit()]
    found = []
    for line in lines:
        try:
            found.append(line.read_bytes())
        except OSError:
            continue
    assert not any(b"61.25" in text for text in found)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_it_works_for_a_user_without_rights(public):
    python = "/usr/bin/python3"
    if (
        not Path(python).exists()
        or subprocess.run(
            [python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]
        ).returncode
    ):
        pytest.skip("no Python of the system that other users can run")
    shutil.copy(sandbox.__file__, public)
    script = f"""
import json, os
from sandbox import *
victim = os.path.join({str(public)!r}, "victim")
open(victim, "w").write("kept")
held = protections()
out = [run_program({GOOD!r}, {TESTS!r}).passed]
out += [run_program("import os; os._exit(0)", "").passed]
if held["no file can be written but its own"]:
    out += [run_program(f"open({{victim!r}}, 'w').write('harm')", "").passed]
    out += [run_program(f"open('/proc/{{os.getpid()}}/environ').read()", "").passed]
    fork = "import os, time\\nfor _ in range(100): os.fork() or time.sleep(9)"
    out += [run_program(fork, "").passed if held["limited processes"] else False]
print(json.dumps([out, open(victim).read(), held]))
"""
    result = subprocess.run(
        [python, "-c", script],
        cwd=public,
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        env={"HOME": "/"},
    )
    assert result.returncode == 0, result.stderr
    out, text, held = json.loads(result.stdout)
    assert out[0] and not any(out[1:]) and text == "kept"
    assert not held["a user of its own, without rights"]


def test_concurrent_programs_keep_their_order_and_leave_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sleep = "import time; time.sleep({})"
    pairs = [(sleep.format((5 - i) / 10), f"assert {i} % 2, 'number {i}'") for i in range(6)]
    verdicts = run_programs(pairs, workers=3)
    assert [v.passed for v in verdicts] == [False, True] * 3
    assert all(f"number {i}" in verdicts[i].error for i in (0, 2, 4))
    run_program("import os\nos.mkdir('a'); open('a/b', 'w').close(); os.chmod('a', 0)", "")
    assert list(tmp_path.iterdir()) == []
    assert run_programs([]) == []


def test_the_caller_keeps_its_limits_signals_and_folder():
    def state():
        names = [n for n in dir(resource) if n.startswith("RLIMIT_")]
        limits = {n: resource.getrlimit(getattr(resource, n)) for n in names}
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
        descriptors = sorted(os.listdir("/proc/self/fd")) if sandbox.LINUX else None
        return limits, handlers, os.getcwd(), os.getuid(), dict(os.environ), descriptors

    before, threads = state(), threading.active_count()
    run_programs([(GOOD, TESTS), ("while True: pass", "")], timeout=0.5)
    assert state() == before and threading.active_count() == threads


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_or_death_of_the_caller_ends_all_programs_at_once(tmp_path, number):
    script = (
        "from sandbox import run_programs\n"
        "run_programs([('import time\\nwhile True: time.sleep(1)', '')] * 6, 2, timeout=61.5)"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(sandbox.__file__).parent,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    start = time.monotonic()
    caller.send_signal(number)
    trouble = caller.communicate(timeout=10)[1]
    assert time.monotonic() - start < 5
    if number == signal.SIGINT:
        assert b"KeyboardInterrupt" in trouble and list(tmp_path.iterdir()) == []
    time.sleep(0.5)
    if sandbox.LINUX:
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    environ = (process / "environ").read_bytes()
                except OSError:
                    continue
                assert str(tmp_path).encode() not in environ


def test_a_sandbox_that_does_not_work_is_no_failure_of_the_program():
    with pytest.raises(RuntimeError, match="does not work"):
        run_program(GOOD, TESTS, processes="many")
    with pytest.raises(RuntimeError, match="does not work"):
        run_programs([(GOOD, TESTS)] * 3, processes="many")


def test_the_protections_are_told():
    command = [sys.executable, sandbox.__file__]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    assert lines == [("yes " if there else "NO  ") + name for name, there in HERE.items()]


def test_wrong_limits_are_told():
    with pytest.raises(ValueError, match="memroy"):
        run_program("", "", memroy=1)
    with pytest.raises(ValueError, match="timeout"):
        run_program("", "", timeout=0)
    with pytest.raises(ValueError, match="memroy"):
        run_programs([("", "")], memroy=1)


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not here")
def test_reference_programs_pass():
    with gzip.open(BENCHMARKS / "HumanEval.jsonl.gz", "rt") as f:
        tasks = [json.loads(line) for line in f][::16]
    pairs = [
        (t["prompt"] + t["canonical_solution"], f"{t['test']}\ncheck({t['entry_point']})")
        for t in tasks
    ]
    with open(BENCHMARKS / "mbpp.jsonl") as f:
        tasks = [json.loads(line) for line in f]
    tasks = [t for t in tasks if 11 <= t["task_id"] <= 510 and t["task_id"] != 123][::25]
    # Task 123's reference is quadratic and needs seconds.
    pairs += [(t["code"], "\n".join([t["test_setup_code"], *t["test_list"]])) for t in tasks]
    verdicts = run_programs(pairs, timeout=10.0)
    assert [v for v in verdicts if not v.passed] == []
