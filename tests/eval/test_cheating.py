"""Tests that programs cannot pass by cheating, and checks the outcome of each attempt."""

import textwrap

import pytest

from eval.humaneval.problems import Problem
from eval.sandbox import IsolationError, Sandbox, SandboxLimits, TestedProgram

LIMITS = SandboxLimits(seconds=20.0, memory_mib=256, processes=6, file_mib=4, output_kib=32)

PROBLEM = Problem(
    task_id="Own/0",
    prompt=textwrap.dedent(
        '''
        import math
        from typing import List


        def half(number: float) -> float:
            """Returns half of a number."""
            return number / 2


        def halves(numbers: List[float]) -> List[float]:
            """Returns the halves of numbers, in order.

            >>> halves([2.0])
            [1.0]
            """
        '''
    ).lstrip(),
    test=textwrap.dedent(
        """
        import random

        def check(candidate):
            assert candidate([3.0, 5.0]) == [1.5, 2.5], "two"
            assert candidate([]) == [], "none"
            for _ in range(5):
                numbers = [random.randint(-9, 9) for _ in range(4)]
                expected = [half(number) for number in numbers]
                assert candidate(numbers) == expected, "random"
                assert math.isclose(sum(halves(numbers)), sum(numbers) / 2), "sum"
        """
    ),
    entry_point="halves",
)

WRONG = "    return numbers\n"
RIGHT = "    return [number / 2 for number in numbers]\n"


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox(LIMITS)
    try:
        made.check()
    except IsolationError as error:
        pytest.skip(f"programs cannot be isolated on this machine: {error}")
    return made


@pytest.fixture(params=[True, False], ids=["isolated", "unisolated"])
def either(request, sandbox):
    """Returns a sandbox with or without isolation; honest programs pass in both."""
    return sandbox if request.param else Sandbox(LIMITS, isolated=False)


def behind(function, text):
    """Returns a completion with the function body `function`, followed by the code `text`."""
    return textwrap.indent(textwrap.dedent(function), "    ") + "\n" + textwrap.dedent(text)


LEFT = ("failed", "it exited before its end")
TWO = ("failed", "AssertionError: two")

CHEATS = {
    # Exiting early, or never.
    "ends at once": (behind(WRONG, "import os; os._exit(0)"), LEFT),
    "raises SystemExit": (behind(WRONG, "raise SystemExit(0)"), ("failed", "SystemExit: 0")),
    "ends when called": ("    import os; os._exit(0)\n", LEFT),
    "raises SystemExit when called": ("    raise SystemExit(0)\n", ("failed", "SystemExit: 0")),
    "ends at exit": (behind(WRONG, "import atexit, os; atexit.register(os._exit, 0)"), TWO),
    "ends in a thread": (
        behind(
            "import time; time.sleep(5)",
            "import os, threading\nthreading.Timer(0.2, os._exit, (0,)).start()",
        ),
        LEFT,
    ),
    # Searching for the token or the test.
    "writes to every descriptor": (
        behind(
            WRONG,
            """
            import os
            held = [b""]
            for fd in range(3, 64):
                try:
                    os.set_blocking(fd, False)
                    held.append(os.read(fd, 4096))
                except OSError:
                    pass
            for fd in range(3, 64):
                for token in held:
                    try:
                        os.write(fd, b'{"token": "' + token + b'"}\\n')
                    except OSError:
                        pass
            os._exit(0)
            """,
        ),
        ("failed", "its answer is malformed"),
    ),
    "reads every descriptor from its beginning": (
        behind(
            WRONG,
            """
            import os
            for fd in range(3, 64):
                try:
                    if b"token" in os.pread(fd, 1 << 16, 0):
                        os._exit(7)
                except OSError:
                    pass
            """,
        ),
        TWO,
    ),
    "replaces how the jail exits": (
        behind(
            WRONG,
            """
            import sys
            frame = sys._getframe()
            while frame:
                for name in ("_exit_with", "_run_test", "_report", "_as_error"):
                    if name in frame.f_globals:
                        frame.f_globals[name] = lambda *_: None
                frame = frame.f_back
            import __main__
            __main__._exit_with = __main__._FunctionProxy = lambda *_: None
            """,
        ),
        TWO,
    ),
    "changes the settings in the jail's frames": (
        behind(
            WRONG,
            """
            import sys
            frame = sys._getframe()
            while frame := frame.f_back:
                for value in list(frame.f_locals.values()):
                    if isinstance(value, dict) and "result" in value:
                        value.update(test=None, token="", function="print")
            """,
        ),
        TWO,
    ),
    "looks for a token among all objects": (
        behind(
            WRONG,
            """
            import gc, os, re
            words = [x for o in gc.get_objects() if isinstance(o, dict) for x in o.values()]
            tokens = [w for w in words if isinstance(w, str) and re.fullmatch("[0-9a-f]{32}", w)]
            if tokens:
                os._exit(7)
            """,
        ),
        TWO,
    ),
    "looks for the test among all objects": (
        behind(
            WRONG,
            """
            import gc, os
            part = "".join(["is", "close(sum"])
            for held in gc.get_objects():
                if isinstance(held, (dict, list, tuple)):
                    words = held.values() if isinstance(held, dict) else held
                    words = [word for word in words if isinstance(word, str) and word != part]
                    if any(part in word for word in words):
                        os._exit(7)
            """,
        ),
        TWO,
    ),
    "reads the memory of the test's process": (
        behind(
            WRONG,
            """
            import ctypes, os
            libc = ctypes.CDLL(None)
            class Part(ctypes.Structure):
                _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
            buffer = ctypes.create_string_buffer(64)
            mine = Part(ctypes.addressof(buffer), 64)
            theirs = Part(id(os), 64)
            for pid in range(1, 20):
                if pid == os.getpid():
                    continue
                read = libc.process_vm_readv(
                    pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)
                if read > 0 or libc.ptrace(16, pid, 0, 0) == 0:
                    os._exit(7)
            """,
        ),
        TWO,
    ),
    # Changing names that the test uses.
    "defines the test's function": (behind(WRONG, "def check(candidate): pass"), TWO),
    "a trailing decorator": (
        behind(WRONG, "@lambda function: (lambda *_: None)"),
        ("failed", "SyntaxError: invalid syntax"),
    ),
    "an open string": (behind(WRONG, "'''"), ("failed", "SyntaxError: unterminated")),
    "changes the names the test is given": (
        behind(WRONG, "half = float\nmath.isclose = lambda *_: True"),
        TWO,
    ),
    "changes built-in functions": (
        behind(
            WRONG,
            """
            import builtins
            builtins.AssertionError = type("Fine", (BaseException,), {})
            builtins.compile = builtins.exec = builtins.all = lambda *_, **__: None
            builtins.__import__ = lambda *_, **__: math
            """,
        ),
        TWO,
    ),
    "changes how messages are written and read": (
        behind(
            WRONG,
            """
            import json, os
            json.loads = lambda line, **_: {"number": 1, "arguments": ["list"], "named": ["dict"]}
            json.dumps = lambda what, **_: '{"number": null, "token": "", "value": true}'
            """,
        ),
        ("failed", "its answer is malformed"),
    ),
    "changes what the test imports": (
        behind(
            WRONG,
            """
            import random, sys
            random.randint = lambda *_: 0
            sys.modules["random"] = sys.modules["math"] = sys.modules[__name__]
            open("random.py", "w").write("def randint(*_): return 0")
            sys.path.insert(0, "")
            """,
        ),
        TWO,
    ),
    "traces every line": (
        behind(
            WRONG,
            """
            import sys
            def trace(frame, event, argument):
                frame.f_locals.update(expected=argument, number=None)
                return trace
            sys.settrace(trace)
            sys.setprofile(lambda *_: None)
            """,
        ),
        TWO,
    ),
    # Answering with values that are equal to everything.
    "a value that is equal to all": (
        behind(
            "return Same()",
            """
            class Same:
                __eq__ = __ne__ = __bool__ = lambda *_: True
            """,
        ),
        ("failed", "TypeError: Same is not plain data"),
    ),
    "a list that is equal to all": (
        behind(
            "return Same(numbers)",
            """
            class Same(list):
                __eq__ = lambda *_: True
                __reduce__ = lambda *_: (print, ())
            """,
        ),
        TWO,
    ),
    "numbers that are equal to all": (
        behind(
            "return [Same(number) for number in numbers]",
            """
            class Same(float):
                __eq__ = lambda *_: True
                __hash__ = lambda *_: 0
            """,
        ),
        TWO,
    ),
    "a string that is written as a list": (
        behind("return Same('x')", "class Same(str):\n    __str__ = lambda _: [1.5, 2.5]"),
        TWO,
    ),
    "takes all out of its argument": ("    numbers.clear(); return numbers\n", TWO),
    # Other processes.
    "a forked child answers": (
        behind(WRONG, "import os\nif os.fork():\n    os.wait()\n    os._exit(0)"),
        TWO,
    ),
    "a forked child, and the parent ends": (
        behind(WRONG, "import os\nif os.fork():\n    os._exit(0)"),
        TWO,
    ),
    "both of two processes answer": (behind(WRONG, "import os\nos.fork()"), None),
    "answers before it is asked": (
        behind(
            WRONG,
            """
            import os
            answers = [
                b'{"number": %d, "value": ["list", ["float", "%s"]]}\\n' % (n, b"0x1.8p+0")
                for n in range(40)
            ]
            for fd in range(3, 64):
                try:
                    os.write(fd, b'{"number": null}\\n' + b"".join(answers))
                except OSError:
                    pass
            """,
        ),
        ("failed", "its answer is malformed"),
    ),
    "kills all others": (
        behind(WRONG, "import os; os.kill(-1, 9)"),
        ("failed", "ProcessLookupError"),
    ),
    "stops all others": (
        behind(WRONG, "import os; os.kill(-1, 19)"),
        ("failed", "ProcessLookupError"),
    ),
    "sends every signal to the test's process": (
        behind(
            WRONG,
            """
            import os
            for number in range(1, 65):
                os.kill(os.getppid(), number)
            """,
        ),
        TWO,
    ),
    "takes resources from the test's process": (
        behind(
            WRONG,
            """
            import os, resource
            for what in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE):
                try:
                    resource.prlimit(os.getppid(), what, (0, 0))
                except PermissionError:
                    continue
                raise SystemExit("it can")
            """,
        ),
        TWO,
    ),
    "kills itself": (behind(WRONG, "import os; os.kill(os.getpid(), 9)"), ("crashed", "SIGKILL")),
    "never ends": ("    while True: pass\n", ("timeout", "over 2 s")),
    "closes every descriptor": (behind(WRONG, "import os; os.closerange(3, 64)"), LEFT),
    "an answer that is nested too deeply": (
        "    held = numbers\n    for _ in range(10**5): held = [held]\n    return held\n",
        None,
    ),
    "an answer without end": (
        "    import itertools; return itertools.repeat('x' * 100)\n",
        None,
    ),
}


@pytest.mark.parametrize(("completion", "grade"), CHEATS.values(), ids=CHEATS)
def test_no_cheat_passes(sandbox, completion, grade):
    patient = sandbox if grade != ("timeout", "over 2 s") else Sandbox(SandboxLimits(seconds=2.0))
    outcome = patient.run(PROBLEM.program(completion))
    assert not outcome.passed, outcome
    if grade is not None:
        verdict, detail = grade
        assert outcome.verdict == verdict, outcome
        assert outcome.detail.startswith(detail), outcome


@pytest.mark.parametrize(
    "completion",
    [
        RIGHT,
        "    print(numbers); return list(map(half, numbers))\n",
        behind("return Halves(n / 2 for n in numbers)", "class Halves(list): pass"),
        "    for at in range(len(numbers)): numbers[at] /= 2\n    return [*numbers]\n",
        RIGHT + "\n\nif __name__ == '__main__':\n    print(halves([1.0]))\n",
    ],
    ids=["plain", "prints", "a class of its own", "in place", "runs itself"],
)
def test_honest_programs_have_the_same_outcome_as_in_one_process(either, completion):
    outcome = either.run(PROBLEM.program(completion))
    space = {"__name__": "__main__"}
    exec(PROBLEM.prompt + completion + PROBLEM.test, space)
    raised = None
    try:
        space["check"](space["halves"])
    except AssertionError as error:
        raised = error
    assert outcome.passed == (raised is None), outcome
    assert outcome.detail == ("" if raised is None else f"AssertionError: {raised}")


VALUES = """[
    None, True, False, 0, -7, 10**5000, 0.1, -0.0, 1e308, float("inf"), 2 - 3j, "",
    "\\ud800\\n\\x00é", b"\\x00\\xff", bytearray(b"a"), [],
    [[1], (2, [3])], (), (1,), {1, 2}, frozenset({(1, 2)}),
    {}, {"a": [1], (1, 2): {3: 4}}, range(3, 9, 2), Fraction(1, 3), Decimal("0.10"),
    OrderedDict(a=1), Counter("aab"), Point(1, 2), Color.RED,
]"""
DEFINITIONS = """
from collections import Counter, OrderedDict, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
Point = namedtuple("Point", "x y")
Color = IntEnum("Color", "RED")
"""


def test_values_are_transferred_exactly(either):
    """Covers both directions, from the program and to it."""
    source = f"""{DEFINITIONS}
VALUES = {VALUES}
def value(at=None, *, given=None):
    return given if at is None else VALUES[at]
"""
    test = f"""
for at, expected in enumerate({VALUES}):
    for there in (value(at), value(given=expected)):
        assert there == expected, at
        if type(expected) in (bool, int, float, complex, str, bytes, list, tuple, set, dict):
            assert type(there) is type(expected), at
assert str(value(given=-0.0)) == "-0.0"
assert value(given=float("nan")) != value(given=float("nan"))
assert list(value(given=iter([1, 2]))) == [1, 2]
assert value(given={{1: 2}}.keys()) == {{1}}
"""
    program = TestedProgram(source=source, function="value", given=DEFINITIONS, test=test)
    outcome = either.run(program)
    assert outcome.passed, outcome


def test_changes_of_arguments_are_transferred(either):
    source = """
def change(rows, names, found):
    rows[0].append(1); rows.append([2]); names["a"] = 1; found.clear()
"""
    test = """
rows, names, found = [[0]], {}, {1}
assert change(rows, names, found=found) is None
assert (rows, names) == ([[0, 1], [2]], {"a": 1}), (rows, names)
"""
    outcome = either.run(TestedProgram(source=source, function="change", test=test))
    assert outcome.passed, outcome


@pytest.mark.parametrize(
    ("raised", "caught"),
    [
        ("KeyError('a')", "KeyError"),
        ("ValueError('no')", "ValueError"),
        ("UnicodeDecodeError('utf-8', b'', 0, 1, '')", "Exception"),
        ("Own('mine')", "Exception"),
    ],
)
def test_a_test_can_expect_an_error(either, raised, caught):
    source = f"class Own(Exception): pass\ndef fail(): raise {raised}\n"
    test = f"try:\n    fail()\nexcept {caught} as e:\n    pass\nelse:\n    assert False, 'none'\n"
    outcome = either.run(TestedProgram(source=source, function="fail", test=test))
    assert outcome.passed, outcome


@pytest.mark.parametrize("end", ["os._exit(0)", "os.closerange(3, 64)", "os.kill(os.getpid(), 9)"])
def test_exiting_does_not_count_as_an_expected_error(sandbox, end):
    source = f"import os\ndef fail(): {end}\n"
    test = "try:\n    fail()\nexcept BaseException:\n    pass\n"
    outcome = sandbox.run(TestedProgram(source=source, function="fail", test=test))
    assert outcome.verdict in ("failed", "crashed"), outcome


def test_an_error_does_not_end_an_iteration_of_the_test(sandbox):
    test = "assert all(map(lambda x: same(x) == x, range(3))), 'wrong'"
    for raised in ("StopIteration", "GeneratorExit", "StopAsyncIteration"):
        source = f"def same(x): raise {raised}"
        outcome = sandbox.run(TestedProgram(source=source, function="same", test=test))
        assert (outcome.verdict, outcome.detail) == ("failed", f"{raised}: ")


def test_a_prompt_without_docstring_gets_a_body(sandbox):
    problem = Problem(
        "Own/1", "import math\ndef one(x):\n", "def check(c): assert c(0) == 1", "one"
    )
    assert sandbox.run(problem.program("    return math.cos(x)\n")).passed
    assert sandbox.run(problem.program("    return 0\n")).detail == "AssertionError: "


def test_a_missing_function_is_named(sandbox):
    outcome = sandbox.run(TestedProgram(source="", function="absent", test="absent()"))
    assert outcome.detail == "NameError: name 'absent' is not defined"


def test_a_long_test_does_not_block(sandbox):
    test = "#" * (1 << 20) + "\nassert one() == 1"
    program = TestedProgram(source="def one(): return 1", function="one", test=test)
    assert sandbox.run(program).passed
