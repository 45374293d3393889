"""Prompts to the letter, programs and answers out of completions, and the tables of scores."""

import gzip
import itertools
import json
import random
import statistics
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

import pytest

import tasks
from runtime import layout

BENCHMARKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "benchmarks"


def published(name):
    file = BENCHMARKS / name
    if not file.exists():
        pytest.skip(f"{file} is absent: the benchmarks are no part of the project")
    return file


def write(folder, *rows, name="rows.jsonl", end="\n"):
    file = folder / name
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + end for row in rows)
    file.write_bytes(text.encode())
    return file


def passes(program, tests):
    """Whether a program passes; it runs in a process of its own."""
    code = f"exec({program!r} + chr(10) + {tests!r}, {{'__name__': 'tested'}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20)
    return done.returncode == 0


ADD = 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """The sum."""\n'
HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": ADD,
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3 and candidate(-1, 1) == 0\n",
}
MBPP = {
    "task_id": 12,
    "text": "Write a function to double.",
    "code": "def double(x):\r\n\treturn 2 * x",
    "test_list": ["assert double(1) == 2", "assert double(2) == 4", "assert double(-3) == -6"],
    "test_setup_code": "unit = double(1) \r\nassert unit == 2",
    "challenge_test_list": [],
}
MBPP_PLUS = {
    "task_id": 3,
    "code": "def double(x):\n    return 2 * x",
    "prompt": "Write a function to double.",
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "test_imports": ["import math"],
    "test_list": [*MBPP["test_list"][:2], "assert math.isclose(double(0.5), 1.0)"],
    "test": "import numpy\n\nfor i in range(100):\n    assert double(i) == i + i\n",
}
GSM8K = {"question": "How much is 2 and 3?", "answer": "2 + 3 = <<2+3=5>>5.\n#### 5"}
ASK = "Please reason step by step, and put your final answer within \\boxed{}."
MATH = {"answer": "\\frac{1}{2}", "prompt": f"What is half of $1$?\n{ASK}"}
ROWS = {
    "humaneval": HUMANEVAL,
    "humaneval+": HUMANEVAL,
    "mbpp": MBPP,
    "mbpp+": MBPP_PLUS,
    "gsm8k": GSM8K,
    "math500": MATH,
}


def one(task, folder, row=None, **options):
    return tasks.read_problems(task, write(folder, row or ROWS[task]), **options)[0]


# Prompts

USER_HUMANEVAL = '''\
Write a solution to the following problem and make sure that it passes the tests:
```from typing import List


def add(a: int, b: int) -> int:
    """The sum."""
'''
BEGINS_HUMANEVAL = '''Here is the completed function:
```python
from typing import List


def add(a: int, b: int) -> int:
    """The sum."""

'''
DOUBLE = "You are an expert Python programmer, and here is your task: Write a function to double. "
USER_MBPP = f"""{DOUBLE}Your code should pass these tests:

assert double(1) == 2
assert double(2) == 4
assert double(-3) == -6"""
USER_MBPP_PLUS = f"""{DOUBLE}Your code should pass these tests:

assert double(1) == 2
assert double(2) == 4
assert math.isclose(double(0.5), 1.0)"""
USER_MATH = r"""Please reason step by step, and put your final answer within \boxed{{}}. Problem:
What is half of $1$?

Solution:"""
BEGINS_MBPP = "Here is the completed function:\n```python\n"
ASKED = {
    "humaneval": ("HumanEval/7", USER_HUMANEVAL, BEGINS_HUMANEVAL, 768),
    "humaneval+": ("HumanEval/7", USER_HUMANEVAL, BEGINS_HUMANEVAL, 768),
    "mbpp": (12, USER_MBPP, BEGINS_MBPP, 512),
    "mbpp+": (3, USER_MBPP_PLUS, BEGINS_MBPP, 512),
    "gsm8k": (0, "Q: How much is 2 and 3?\nA:", "", 256),
    "math500": (0, USER_MATH, "", 512),
}


@pytest.mark.parametrize("task", ASKED)
def test_a_problem_is_asked_to_the_letter(task, tmp_path):
    problem = one(task, tmp_path)
    task_id, user, begins, most = ASKED[task]
    assert problem.task_id == task_id
    assert tasks.messages(problem) == [{"role": "user", "content": user}]
    assert problem.begins == begins
    assert tasks.TASKS[task].max_tokens == most


def test_math_problems_are_read_in_both_forms(tmp_path):
    hub = {"problem": "What is half of $1$?", "solution": "", "answer": "\\frac{1}{2}", "level": 1}
    assert one("math500", tmp_path, hub) == one("math500", tmp_path)


def test_the_published_problems_are_read():
    sizes = {
        "humaneval": ("HumanEval.jsonl.gz", 164),
        "mbpp": ("mbpp.jsonl", 500),
        "gsm8k": ("gsm8k_test.jsonl", 1319),
        "math500": ("math500.jsonl", 500),
    }
    for task, (name, n) in sizes.items():
        problems = tasks.read_problems(task, published(name))
        assert len(problems) == len({p.task_id for p in problems}) == n
        if task == "math500":
            assert all(p.user.count("Please reason") == 1 for p in problems)
        if task == "mbpp":
            assert [p.task_id for p in problems] == list(range(11, 511))


@pytest.mark.parametrize(
    ("task", "completion", "left"),
    [
        ("humaneval", "    return 1\ndef f():\n    pass\nprint(1)", "    return 1"),
        ("humaneval", "    return 1\r\nclass A: pass", "    return 1\r"),
        ("humaneval+", "    if a:\n        print(1)\n    # b\n", None),
        ("humaneval", "    return 1\n#", "    return 1"),
        ("humaneval", "    return 1\nif a", "    return 1"),
        ("humaneval", "    return 1\nprint()", "    return 1"),
        ("humaneval", "def f(): return 1<|im_end|>\nand", "def f(): return 1"),
        ("mbpp", "def f():\n    pass\n```\nThis", "def f():\n    pass\n"),
        ("mbpp+", "class A: pass\nprint(1)", None),
        ("gsm8k", " It is 5.\n\nQ: What", " It is 5.\n\n"),
        ("math500", "\\boxed{1}\nProblem: 2", "\\boxed{1}\n"),
        ("math500", "", None),
    ],
)
def test_a_completion_ends_at_the_first_stop(task, completion, left):
    assert tasks.cut(task, completion) == (completion if left is None else left)
    assert tasks.cut(task, tasks.cut(task, completion)) == tasks.cut(task, completion)


# Programs

AFTER = [
    "",
    "\n```\n\nThis function adds, as asked.\n\n```python\nraise SystemExit(1)\n```",
    "\ndef another():\n    raise SystemExit(1)\n",
    "\nx = ((\n",
    '\nif __name__ == "__main__":\n    raise SystemExit(1)\n',
    "\nassert False\n",
    "\n\nThis function adds, as asked.",
    "\n# Test\nprint(add(1, 2))\nraise SystemExit(1)",
    "\n    if a ==",
]


@pytest.mark.parametrize("after", AFTER)
def test_what_follows_an_answer_does_no_harm(after, tmp_path):
    problem = one("humaneval", tmp_path)
    for solution in ("    return a + b", "    c = a + b\r\n    return c\r"):
        text, tests = tasks.program(problem, solution + after)
        assert passes(text, tests)
        assert "raise" not in text and "another" not in text


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "    return a - b",
        "    return",
        "return a + b",
        "```python\n    return a + b\n```",
        "Here it is:\n    return a + b",
        "```",
        "\0",
        "(" * 500,
    ],
)
def test_no_answer_and_a_wrong_one_do_not_pass(completion, tmp_path):
    assert not passes(*tasks.program(one("humaneval", tmp_path), completion))
    assert not passes(*tasks.program(one("mbpp", tmp_path), completion))


DEFINITIONS = """\
import os
from math import fsum as total
def decorated(f): return f
again, BASE = decorated, {}
BASE[0] = 0
START: int = BASE[0]
START += 0
@decorated
@again
def summed(xs, start):
    return total(xs) + start
unused = "a"
for i in range(3): pass
async def unused_too(): return add(1, 2)
"""


def test_a_program_keeps_what_it_needs_and_nothing_else(tmp_path):
    # The function is the answer's first line: later ones would be stops.
    problem = one("humaneval", tmp_path)._replace(prompt="")
    body = "def add(a: int, b: int) -> int:\n    return summed([a, b], START)\n"
    lines, statements = tasks._python(DEFINITIONS + body)
    text = tasks._needed(lines, statements, {"add"})
    assert passes(text, problem.tests)
    dropped = {line for line in (DEFINITIONS + body).split("\n") if line} - set(text.split("\n"))
    assert dropped == set(DEFINITIONS.split("\n")[-4:-1])
    text, tests = tasks.program(problem, "def add(a, b): return a + b\nfrom os import sep\nb = 1\n")
    assert passes(text, tests)
    assert text == "def add(a, b): return a + b\nfrom os import sep\nb = 1\n", "add has a name b"


def test_a_helper_of_the_prompt_stays_for_the_tests(tmp_path):
    helped = HUMANEVAL | {
        "prompt": "def helper(x):\n    return x\n\n\n" + ADD.split("\n\n\n")[1],
        "test": "def check(candidate):\n    assert helper(candidate(1, 2)) == 3\n",
    }
    assert passes(*tasks.program(one("humaneval", tmp_path, helped), "    return a + b"))


def test_mbpp_runs_its_imports_and_its_setup(tmp_path):
    text, tests = tasks.program(one("mbpp", tmp_path), MBPP["code"] + "\r\n```\r\nraise")
    assert text == "def double(x):\n\treturn 2 * x\n"
    assert "\r" not in tests and "assert unit == 2" in tests
    assert passes(text, tests)
    assert tests.endswith("\n".join(MBPP["test_list"]) + "\n")
    bare = one("mbpp", tmp_path, without(MBPP, "test_setup_code"))
    assert bare.tests == "\n".join(MBPP["test_list"]) + "\n"
    text, tests = tasks.program(one("mbpp+", tmp_path), MBPP_PLUS["code"])
    assert tests == "import math\n" + "\n".join(MBPP_PLUS["test_list"]) + "\n"
    assert passes(text, tests)


def test_full_tests_of_mbpp_plus_are_run_where_asked(tmp_path):
    lazy = "def double(x):\n    return 2 * x if x < 50 else 0\n"
    assert passes(*tasks.program(one("mbpp+", tmp_path), lazy))
    text, tests = tasks.program(one("mbpp+", tmp_path, full_tests=True), lazy)
    assert tests == "import math\n" + MBPP_PLUS["test"] + "\n"
    assert not passes(text, tests.replace("import numpy\n", ""))
    assert passes(MBPP_PLUS["code"], tests.replace("import numpy\n", ""))


@pytest.mark.parametrize(
    "after", ["", "\n```\nThat is it.", "\ndef more():\n    pass\n", "\nx = (\n"]
)
def test_published_solutions_of_humaneval_pass(after):
    file = published("HumanEval.jsonl.gz")
    rows = [json.loads(line) for line in gzip.open(file)]
    problems = tasks.read_problems("humaneval", file)
    for i in (2, 10, 32, 38, 50):
        assert passes(*tasks.program(problems[i], rows[i]["canonical_solution"] + after))
        assert not passes(*tasks.program(problems[i], after))


def test_published_solutions_of_humaneval_are_kept_whole():
    file = published("HumanEval.jsonl.gz")
    rows = [json.loads(line) for line in gzip.open(file)]
    for row, problem in zip(rows, tasks.read_problems("humaneval", file)):
        text, _ = tasks.program(problem, row["canonical_solution"] + "\n```")
        whole = row["prompt"] + "\n" + row["canonical_solution"]
        unindented = {line for line in whole.split("\n") if line[:1] not in ("", " ", "\t", "#")}
        assert unindented <= set(text.split("\n")), "all that a prompt defines"
        assert row["canonical_solution"].strip() in text


def test_published_solutions_of_mbpp_pass():
    file = published("mbpp.jsonl")
    rows = map(json.loads, file.read_text("utf-8").splitlines())
    codes = {row["task_id"]: row["code"] for row in rows}
    problems = {p.task_id: p for p in tasks.read_problems("mbpp", file)}
    for task_id in (11, 12, 57, 110, 367, 500, 510):
        text, tests = tasks.program(problems[task_id], codes[task_id] + "\r\n```\r\nDone.")
        assert passes(text, tests), task_id


# Numbers and expressions


@pytest.mark.parametrize(
    ("reference", "completion", "right"),
    [
        ("5", " 2 + 3 = 5", True),
        ("5", " She has 5 apples.", True),
        ("5", " The answer is $5.00.", True),
        ("5", " The answer is **5**", True),
        ("5", " 5\n\nQ: What is 6?\nA: 6", True),
        ("5", " 5, and then 6", False),
        ("5", " It is -5", False),
        ("5", " It is five", False),
        ("5", "", False),
        ("5", " It is 5...", True),
        ("5", " It is 5 ...", False),
        ("5", " It is 5.5", False),
        ("1,450,000", " $1,450,000.", True),
        ("1450000", " 1,450,000 dollars", True),
        ("1,450,000", " 1.450.000", False),
        ("-3", " -$3.0", True),
        ("18", "18.0000000000000000001", False),
        ("5", " 1.2.3", False),
    ],
)
def test_the_last_number_is_the_answer(reference, completion, right, tmp_path):
    problem = one("gsm8k", tmp_path, GSM8K | {"answer": f"#### {reference}"})
    assert tasks.is_right("gsm8k", problem, completion) is right


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("\\boxed{1} and \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\fbox{3}", "3"),
        ("\\boxed {3}", "3"),
        ("$\\boxed{\\left\\{1\\right.}$", "\\left\\{1\\right."),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        (
            "\\boxed{\\begin{pmatrix} 1 \\\\{2} \\end{pmatrix}}",
            "\\begin{pmatrix} 1 \\\\{2} \\end{pmatrix}",
        ),
        ("\\boxed{1} or \\boxed{\\frac{1}{2", "1"),
        ("\\boxed{}", ""),
        ("\\boxed{1\n}", "1\n"),
        ("1", None),
        ("\\boxed{1", None),
        ("Problem: \\boxed{1}", None),
    ],
)
def test_the_last_whole_box_holds_the_answer(completion, answer):
    assert tasks.extracted("math500", completion) == answer


def test_published_references_are_right_answers():
    for problem in tasks.read_problems("gsm8k", published("gsm8k_test.jsonl")):
        for form in (f"#### {problem.reference}", f" It is ${int(problem.reference):,}.00."):
            assert tasks.is_right("gsm8k", problem, form)
        assert not tasks.is_right("gsm8k", problem, f" It is {problem.reference}1")
    for problem in tasks.read_problems("math500", published("math500.jsonl")):
        for form in ("$\\boxed{%s}$", "\\fbox{ %s }.", "\\boxed{$%s$.}"):
            assert tasks.is_right("math500", problem, form % problem.reference)


RIGHT = [
    ("\\frac{14}{3}", "\\dfrac{14}{3}"),
    ("\\frac{14}{3}", "14/3"),
    ("\\frac 59", "\\frac{5}{9}"),
    ("\\frac{1}{2}", "0.5"),
    ("10,\\!080", "10080"),
    ("10080", "10,080"),
    ("\\$36", "36"),
    ("36", "\\$36"),
    ("90^\\circ", "90"),
    ("5.4 \\text{ cents}", "5.4"),
    ("15\\mbox{ cm}^2", "15 \\text{ cm}^2"),
    ("\\text{Evelyn}", "Evelyn"),
    ("x=5", "5"),
    ("\\left\\{1\\right.", " \\left\\{1\\right. "),
    ("p - q", "p-q"),
    ("(3,4]", "( 3 , 4 ]"),
    ("1,-2", "-2, 1"),
    ("42", "42."),
    ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}"),
    ("6r^2-4r-24", "2(3r^2-2r-12)"),
]
WRONG = [
    ("\\frac{14}{3}", "\\frac{3}{14}"),
    ("\\frac{14}{3}", "4.67"),
    ("(3,4]", "[3,4)"),
    ("42", "43"),
    ("42", "-42"),
    ("2k", "k"),
    ("\\text{east}", "west"),
    ("1,-2", "1"),
    ("3", ""),
    ("3", "x^{x^{ \\frac"),
    ("3", "\\begin{pmatrix}"),
]


@pytest.mark.parametrize(
    ("reference", "answer", "right"), [(*w, True) for w in RIGHT] + [(*w, False) for w in WRONG]
)
def test_expressions_are_compared_by_what_they_mean(reference, answer, right, tmp_path):
    pytest.importorskip("math_verify")
    problem = one("math500", tmp_path, MATH | {"answer": reference})
    assert tasks.is_right("math500", problem, f"So it is $\\boxed{{{answer}}}$.") is right


def test_expressions_are_compared_in_any_thread(tmp_path):
    pytest.importorskip("math_verify")
    problem, said = one("math500", tmp_path), []

    def ask(answer):
        said.append(tasks.is_right("math500", problem, f"\\boxed{{{answer}}}"))

    threads = [threading.Thread(target=ask, args=(a,)) for a in ("0.5", "2/4", "0.6")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == [False, True, True]


def test_a_comparison_that_does_not_end_is_wrong_and_the_next_is_made(tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    problem = one("math500", tmp_path)
    monkeypatch.setattr(tasks, "SECONDS", 0.01)
    assert not tasks.is_right("math500", problem, "\\boxed{9^{9^{9^9}}}")
    monkeypatch.undo()
    assert tasks.is_right("math500", problem, "\\boxed{0.5}")


def test_without_math_verify_equal_texts_alone_count(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    monkeypatch.setattr(tasks, "_checker", lru_cache(tasks._checker.__wrapped__))
    problem = one("math500", tmp_path)
    assert tasks.is_right("math500", problem, "\\boxed{\\frac{1}{2}}")
    assert not tasks.is_right("math500", problem, "\\boxed{0.5}")
    assert not tasks.is_right("math500", problem, "\\boxed{0.6}")
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "pip install math-verify" in said


# Bad input


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize(
    ("task", "rows", "says"),
    [
        ("humaneval", [HUMANEVAL, HUMANEVAL], ":2: task_id 'HumanEval/7' a second time"),
        ("humaneval", [HUMANEVAL, without(HUMANEVAL, "test")], ':2: no text "test"'),
        ("humaneval", [MBPP_PLUS], ':1: no text "task_id"'),
        ("humaneval+", ["", "{"], ":2: no object of JSON"),
        ("humaneval", ["[1]"], ":1: no object of JSON"),
        ("mbpp", [MBPP_PLUS], ':1: no text "text"'),
        ("mbpp", [MBPP | {"task_id": True}], ':1: no whole number "task_id"'),
        ("mbpp", [MBPP | {"test_list": "assert"}], ':1: no list of texts "test_list"'),
        ("mbpp", [MBPP | {"test_list": [1]}], ':1: no list of texts "test_list"'),
        ("mbpp", [MBPP | {"task_id": 1}], ": no problem, task_id 11 to 510, in it"),
        ("mbpp", [MBPP, MBPP], ":2: task_id 12 a second time"),
        ("mbpp+", [MBPP], ':1: no text "prompt"'),
        ("gsm8k", [MATH], ':1: no text "question"'),
        ("gsm8k", [GSM8K | {"answer": "5"}], ':1: no "####"'),
        ("math500", [GSM8K], ':1: no text "prompt"'),
        ("math500", [without(MATH, "answer")], ':1: no text "answer"'),
        ("math500", [], ": no problem in it"),
        ("math", [MATH], "math: no benchmark; they are humaneval, humaneval"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(task, rows, says, tmp_path):
    file = write(tmp_path, *rows)
    with pytest.raises(ValueError) as error:
        tasks.read_problems(task, file)
    said = str(error.value)
    assert said.startswith(says if task not in tasks.TASKS else f"{file}{says}"), said
    assert "\n" not in said


def test_files_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.jsonl: no such file"):
        tasks.read_problems("mbpp", tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match="no such file"):
        tasks.read_problems("mbpp", tmp_path)
    file = tmp_path / "cut.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode())[:-12])
    with pytest.raises(ValueError, match="cut.jsonl.gz: not gzip, or cut short"):
        tasks.read_problems("humaneval", file)
    file.write_bytes(b"PAR1\0\xff")
    with pytest.raises(ValueError, match="cut.jsonl.gz:1: no object of JSON"):
        tasks.read_problems("humaneval", file)


def test_a_file_is_read_by_its_content(tmp_path):
    plain = tasks.read_problems("humaneval", write(tmp_path, HUMANEVAL))
    file = tmp_path / "zipped.jsonl"
    file.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    assert tasks.read_problems("humaneval", file) == plain
    file = write(tmp_path, "\ufeff" + json.dumps(HUMANEVAL), "", end="\r\n")
    assert tasks.read_problems("humaneval", file) == plain


def test_completions_are_read_by_task(tmp_path):
    rows = [GSM8K, GSM8K, GSM8K]
    problems = tasks.read_problems("gsm8k", write(tmp_path, *rows))
    lines = [(2, " a"), (0, " b"), (2, "")]
    file = write(tmp_path, *[{"task_id": i, "completion": c, "seed": 1} for i, c in lines])
    found = tasks.read_completions(file, problems)
    assert found == {0: [" b"], 2: [" a", ""]} and list(found) == [0, 2]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{"task_id": 12, "completion": ""}, {"task_id": 13, "completion": ""}],
            ":2: task_id 13 is none",
        ),
        ([{"task_id": "12", "completion": ""}], ':1: no whole number "task_id"'),
        ([{"task_id": 12}], ':1: no text "completion"'),
        ([{"completion": ""}], ':1: no whole number "task_id"'),
        ([{"task_id": [12], "completion": ""}], ':1: no whole number "task_id"'),
        (["nothing"], ":1: no object of JSON"),
        ([], ": no completion in it"),
    ],
)
def test_completions_of_nothing_are_refused(rows, says, tmp_path):
    problem = one("mbpp", tmp_path)
    file = write(tmp_path, *rows, name="said.jsonl")
    with pytest.raises(ValueError) as error:
        tasks.read_completions(file, [problem])
    assert str(error.value).startswith(f"{file}{says}"), error.value


# Scores


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c <= n:
                draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert tasks.pass_at_k(n, c, k) == pytest.approx(statistics.mean(map(any, draws)))
    for n, c, k in ((0, 0, 1), (3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match=f"pass@{k} of {n} completions, {c} of them right"):
            tasks.pass_at_k(n, c, k)


TABLE = """\
| NFE budget | Feedback | HumanEval | MBPP+ | GSM8K |
| --- | --- | ---: | ---: | ---: |
| 1/4 | Binary | 20.0 (+- 10.0) | 50.0 | - |
|  | SM | 30.0 (+- 14.1) | - | - |
|  | Gain | +10.0 | - | - |
| 1/1 | Binary | - | 60.0 | 12.3 |
|  | SM | - | 58.5 | 12.3 |
|  | Gain | - | -1.5 | +0.0 |
"""


def test_a_table_is_laid_out_as_the_papers():
    scores = [
        ("mbpp+", 0.25, "binary", 0, 0.5),
        ("mbpp+", 1, "binary", 0, 0.6),
        ("mbpp+", "1/1", "sm", 0, 0.585),
        ("humaneval", 1 / 4, "binary", 0, 0.1),
        ("humaneval", 1 / 4, "binary", 1, 0.2),
        ("humaneval", 1 / 4, "binary", 2, 0.3),
        ("humaneval", 1 / 4, "SM", 0, 0.2),
        ("humaneval", "1/4", "SM", 1, 0.4),
        ("gsm8k", 1.0, "binary", 7, 0.12345),
        ("gsm8k", 1.0, "sm", 7, 0.12341),
    ]
    names = ("task", "budget", "feedback", "seed", "score")
    scores = [dict(zip(names, score)) for score in scores]
    assert layout(tasks.table(tasks.summary(scores)), markdown=True, left=2) == TABLE
    random.Random(0).shuffle(scores)
    assert layout(tasks.table(tasks.summary(scores)), markdown=True, left=2) == TABLE, (
        "in any order"
    )
    with pytest.raises(ValueError, match="the second of its seed"):
        tasks.summary([*scores, scores[0]])
    for bad in ({"task": "math"}, {"feedback": "soft"}):
        with pytest.raises(ValueError, match="a task is one of humaneval"):
            tasks.summary([scores[0] | bad])


def test_a_table_as_text_has_its_columns_under_each_other():
    scores = [
        {"task": task, "budget": budget, "feedback": feedback, "seed": seed, "score": score}
        for task, budget, feedback, seed, score in [
            ("gsm8k", "threshold 0.9", "sm", 0, 0.5),
            ("gsm8k", "1/2", "binary", 0, 0.1),
            ("humaneval", "1/2", "binary", 0, 1.0),
            ("gsm8k", "1/2", "binary", 1, 0.2),
        ]
    ]
    assert layout(tasks.table(tasks.summary(scores)), left=2).splitlines() == [
        "NFE budget     Feedback  HumanEval          GSM8K",
        "1/2            Binary        100.0  15.0 (+- 7.1)",
        "               SM                -              -",
        "               Gain              -              -",
        "threshold 0.9  Binary            -              -",
        "               SM                -           50.0",
        "               Gain              -              -",
    ]


def test_problems_come_from_the_hub_without_a_file(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(*name, split):
        calls.append((*name, split))
        return datasets.Dataset.from_list([HUMANEVAL])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (problem,) = tasks.read_problems("humaneval+")
    assert problem.task_id == HUMANEVAL["task_id"]
    assert calls == [("evalplus/humanevalplus", None, "test")]
    with pytest.raises(ValueError, match=r'openai/gsm8k:1: no text "question"'):
        tasks.read_problems("gsm8k")
    assert calls[1] == ("openai/gsm8k", "main", "test")


def test_a_hub_that_is_not_reached_is_one_line_that_names_the_way_out(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*name, split):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="openai/gsm8k: cannot be fetched.*with --data") as caught:
        tasks.read_problems("gsm8k")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "row", "change"),
    [
        ("humaneval", HUMANEVAL, {"test": " "}),
        ("mbpp", MBPP, {"test_list": []}),
        ("mbpp+", MBPP_PLUS, {"test_list": [""]}),
        ("math500", {"problem": "x"}, {"answer": " "}),
    ],
)
def test_a_problem_that_anything_would_solve_is_refused(tmp_path, task, row, change):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps(row | change))
    with pytest.raises(ValueError, match="problems.jsonl:1: "):
        tasks.read_problems(task, file)
