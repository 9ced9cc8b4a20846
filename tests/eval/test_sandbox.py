"""Tests that programs can neither escape the sandbox nor exceed its limits."""

import contextlib
import errno
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from eval.sandbox import IsolationError, Sandbox, SandboxLimits, api
from eval.sandbox.system_calls import filter_program

LIMITS = SandboxLimits(seconds=20.0, memory_mib=256, processes=6, file_mib=4, output_kib=32)


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox(LIMITS)
    try:
        made.check()
    except IsolationError as error:
        pytest.skip(f"programs cannot be isolated on this machine: {error}")
    return made


def run(sandbox, program):
    return sandbox.run(textwrap.dedent(program))


def still_works(sandbox):
    """Asserts that the next program runs as usual."""
    assert run(sandbox, "assert sorted([2, 1]) == [1, 2]").verdict == "passed"


def test_a_program_passes_only_if_it_completes(sandbox):
    passed = run(sandbox, "print('hello')")
    assert (passed.verdict, passed.output) == ("passed", "hello\n")
    assert run(sandbox, "assert False, 'wrong'").detail == "AssertionError: wrong"
    assert run(sandbox, "import os; os._exit(0)").detail == "it exited before its end"
    assert run(sandbox, "import sys; sys.exit(0)").detail == "SystemExit: 0"
    assert run(sandbox, "def broken(:").detail.startswith("SyntaxError")
    assert run(sandbox, "import ctypes; ctypes.string_at(0)").detail == "SIGSEGV"
    assert run(sandbox, "x = '\\ud800'; print(len(x))").verdict == "passed"


def test_only_the_standard_library_can_be_imported(sandbox):
    assert run(sandbox, "import json, math, re, hashlib, typing, collections").passed
    assert run(sandbox, "import ctypes, ssl, sqlite3, lzma, zlib, decimal, select").passed
    assert "ModuleNotFoundError" in run(sandbox, "import numpy").detail


def test_no_files_of_other_packages_exist(sandbox):
    """Covers packages of every interpreter, in any folder."""
    program = f"""
        import os, sys
        standard = tuple(path + "/" for path in sys.path if os.path.isdir(path))
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk("/")
            for name in names
            if name.endswith((".py", ".pyc", ".pth", ".zip", ".whl", ".egg"))
        ]
        others = [file for file in found if not file.startswith(standard)]
        packages = [file for file in found if "-packages/" in file]
        assert not others and not packages, (others + packages)[:5]
        sys.path += {[path for path in sys.path if "-packages" in path]!r}
        try:
            import pytest
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError(pytest.__file__)
        """
    outcome = run(sandbox, program)
    assert outcome.passed, outcome


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(3600)"])
def test_an_endless_program_times_out(sandbox, program):
    impatient = Sandbox(SandboxLimits(seconds=1.0))
    outcome = run(impatient, program)
    assert outcome.verdict == "timeout"
    assert 1.0 <= outcome.seconds < 100.0
    still_works(sandbox)


def test_an_endless_program_that_ignores_signals_times_out():
    impatient = Sandbox(SandboxLimits(seconds=1.0))
    program = """
        import signal
        for number in range(1, 65):
            try:
                signal.signal(number, lambda *_: None)
            except (OSError, ValueError):
                pass
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass
        """
    assert run(impatient, program).verdict == "timeout"


def test_a_fork_bomb_is_stopped_by_the_limit(sandbox):
    # Bounded, so that a failing limit leaves at most 60 sleeping processes.
    program = """
        import os, time
        made = 0
        try:
            for _ in range(60):
                if os.fork() == 0:
                    time.sleep(600)
                    os._exit(0)
                made += 1
        except OSError as error:
            raise RuntimeError(f"{made} and then errno {error.errno}")
        """
    outcome = run(sandbox, program)
    assert outcome.verdict == "failed"
    made, code = outcome.detail.removeprefix("RuntimeError: ").split(" and then errno ")
    assert int(made) < LIMITS.processes
    assert int(code) == errno.EAGAIN
    still_works(sandbox)


def test_threads_count_as_processes(sandbox):
    program = """
        import threading, time
        for _ in range(60):
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        """
    assert "can't start new thread" in run(sandbox, program).detail


def test_processes_end_with_the_program(sandbox, tmp_path):
    marker = f"sleeper-{os.getpid()}-{time.monotonic_ns()}"
    program = f"""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                import ctypes
                ctypes.CDLL(None).prctl(15, b"{marker[:15]}", 0, 0, 0)
                time.sleep(600)
            os._exit(0)
        time.sleep(0.2)
        """
    assert run(sandbox, program).passed
    names = [
        path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm") if path.is_file()
    ]
    assert marker[:15] not in names


def test_memory_is_limited(sandbox):
    outcome = run(sandbox, "held = [bytearray(10**7) for _ in range(200)]")
    assert outcome.verdict == "memory" or outcome.detail.startswith("MemoryError")
    still_works(sandbox)


def test_the_memory_of_all_processes_together_is_limited(sandbox):
    program = """
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                held = bytearray(120 << 20)
                time.sleep(600)
        time.sleep(600)
        """
    assert run(sandbox, program).verdict == "memory"
    still_works(sandbox)


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.memfd_create('hidden')",
        "import ctypes; assert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0",
        "import mmap; mmap.mmap(-1, 1 << 20)",
        "import mmap; mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON | 0x40000)",
        "import mmap; mmap.mmap(open('/dev/zero', 'r+b').fileno(), 1 << 20)",
        "import socket; socket.socketpair()",
        "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "import fcntl, os; fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
        "import fcntl; fcntl.lockf(open('file', 'w'), fcntl.LOCK_EX, 1, 0)",
        "import os; r, w = os.pipe(); assert libc.vmsplice(w, None, 0, 0) == 0",
        "import os; r, w = os.pipe(); assert libc.tee(r, w, 1, 2) == 0",
        "assert libc.inotify_init() >= 0",
        "assert libc.inotify_init1(0) >= 0",
        "assert libc.fanotify_init(0, 0) >= 0",
        "assert libc.syscall(206 if os.uname().machine == 'x86_64' else 0, 1, None) == 0",
        "assert libc.msgget(0, 0o1600) >= 0",
        "assert libc.semget(0, 1, 0o1600) >= 0",
    ],
)
def test_uncounted_memory_cannot_be_allocated(sandbox, program):
    before = "import ctypes, os; libc = ctypes.CDLL(None)\n"
    assert run(sandbox, before + program).verdict == "failed"


def test_pipes_hold_little_memory(sandbox):
    """All pipes of all processes hold a small fraction of the memory limit."""
    program = """
        import os
        kept, held = [], 0
        try:
            while True:
                pair = os.pipe()
                kept.append(pair)
                os.set_blocking(pair[1], False)
                try:
                    while True:
                        held += os.write(pair[1], bytes(1 << 16))
                except BlockingIOError:
                    pass
        except OSError:
            print(held)
        """
    outcome = run(sandbox, program)
    assert outcome.passed, outcome
    assert 0 < int(outcome.output) * LIMITS.processes < LIMITS.memory_mib << 20 >> 2


def test_pending_signals_are_limited(sandbox):
    program = """
        import ctypes, os, resource, signal
        assert resource.getrlimit(resource.RLIMIT_SIGPENDING)[1] <= 1024
        assert resource.getrlimit(resource.RLIMIT_MSGQUEUE)[1] == 0
        """
    assert run(sandbox, program).passed


def test_counted_memory_can_be_mapped(sandbox):
    program = """
        import mmap
        mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)[0] = 1
        with open("file", "w+b") as file:
            file.truncate(1 << 20)
            mmap.mmap(file.fileno(), 0)[0] = 1
        """
    assert run(sandbox, program).passed


def test_no_file_outside_can_be_written(sandbox, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    outside.chmod(0o666)
    tmp_path.chmod(0o777)
    mine = Path(tempfile.mkdtemp(dir="/tmp"))
    mine.rmdir()
    program = f"""
        import os
        places = [{str(outside)!r}, "/escaped", "/usr/escaped", "/usr/lib/escaped",
                  "/etc/passwd", "/dev/escaped", os.__file__, "../escaped",
                  "/proc/self/oom_score_adj",
                  {str(Path.home() / "escaped")!r}]
        written = []
        for place in places:
            try:
                with open(place, "a") as file:
                    file.write("!")
                written.append(place)
            except OSError:
                pass
        assert not written, written
        with open({str(mine)!r}, "w") as file:
            file.write("its own folder is there")
        """
    outcome = run(sandbox, program)
    assert outcome.passed, outcome
    assert outside.read_text() == "untouched"
    assert not mine.exists()


def test_no_file_outside_can_be_read(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    program = f"""
        import os
        assert not os.path.exists({str(secret)!r})
        assert not os.path.exists("/proc/self")
        assert not os.path.exists("/etc")
        assert os.listdir("/tmp") == []
        assert set(os.environ) == {{"PATH", "HOME", "LANG"}}
        """
    os.environ["SANDBOX_SECRET"] = "secret"
    try:
        assert run(sandbox, program).passed
    finally:
        del os.environ["SANDBOX_SECRET"]


def test_each_program_has_its_own_folder(sandbox):
    assert run(sandbox, "open('left', 'w').write('x')").passed
    assert run(sandbox, "import os; assert os.listdir('.') == []").passed


def test_file_sizes_are_limited_each_and_together(sandbox):
    big = run(sandbox, "open('big', 'wb').write(bytes(5 << 20))")
    assert "File too large" in big.detail or "No space left" in big.detail
    many = """
        for number in range(8):
            open(str(number), "wb").write(bytes(1 << 20))
        """
    assert "No space left" in run(sandbox, many).detail
    still_works(sandbox)


def test_no_socket_can_be_opened(sandbox):
    received = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.5)

        def accept():
            with contextlib.suppress(TimeoutError):
                received.append(server.accept())

        listener = threading.Thread(target=accept)
        listener.start()
        program = f"""
            import socket
            refused = 0
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                    try:
                        socket.socket(family, kind)
                    except OSError:
                        refused += 1
            assert refused == 12, refused
            import urllib.request
            try:
                urllib.request.urlopen("http://127.0.0.1:{server.getsockname()[1]}", timeout=5)
            except OSError:
                pass
            else:
                raise AssertionError("connected")
            """
        outcome = run(sandbox, program)
        listener.join()
    assert outcome.passed, outcome
    assert received == []


def test_neither_the_parent_nor_any_other_process_can_be_killed(sandbox):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        program = f"""
            import os, signal
            assert os.getppid() == 1
            os.kill(1, signal.SIGKILL)  # the init process of its namespace ignores it
            for target in ({os.getpid()}, {bystander.pid}):
                try:
                    os.kill(target, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                raise AssertionError("it sees other processes")
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                pass
            """
        assert run(sandbox, program).passed
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    still_works(sandbox)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_limited(sandbox, stream):
    outcome = run(sandbox, f"import sys\nwhile True: sys.{stream}.write('x' * 10000)")
    assert outcome.verdict == "output"
    assert len(outcome.output) == LIMITS.output_kib << 10
    still_works(sandbox)


def test_reports_are_limited_and_not_trusted(sandbox):
    found = """
        import os
        for fd in range(3, 64):
            try:
                {do}
            except OSError:
                continue
        """
    assert run(sandbox, found.format(do="os.write(fd, b'x' * 100000)")).verdict == "output"
    lie = 'os.write(fd, b\'{"not_isolated": "lie"}\\n\')'
    outcome = run(sandbox, found.format(do=lie) + "os._exit(3)\n")
    assert (outcome.verdict, outcome.detail) == ("failed", "it exited before its end")
    lie = lie.replace("not_isolated", "token")
    outcome = run(sandbox, found.format(do=lie) + "os._exit(0)\n")
    assert (outcome.verdict, outcome.detail) == ("failed", "it exited before its end")
    for lie in ("b'[' * 20000", 'b\'{"signal": {"a": 1}}\'', "b'{\"signal\": [1]}'"):
        outcome = run(sandbox, found.format(do=f"os.write(fd, {lie})") + "os._exit(0)\n")
        assert (outcome.verdict, outcome.detail) == ("failed", "it exited before its end")
    outcome = run(sandbox, found.format(do="os.write(fd, b'{\"error\": 1}')") + "os._exit(0)\n")
    assert (outcome.verdict, outcome.detail) == ("failed", "no valid result")
    still_works(sandbox)


def test_lone_surrogates_are_escaped(sandbox):
    outcome = run(sandbox, "raise ValueError('\\ud83d')")
    assert (outcome.verdict, outcome.detail) == ("failed", r"ValueError: \ud83d")
    assert run(sandbox, "import os; os.kill(os.getpid(), 40)").detail == "signal 40"


def test_the_token_is_in_no_argument_and_no_variable(sandbox):
    program = """
        import sys
        held, frame = [sys.argv], sys._getframe()
        while frame := frame.f_back:
            held.append(frame.f_locals)
        assert "token" not in str(held[0]) and "settings" in held[1]
        assert not any("token" in str(what.get("settings")) for what in held[1:])
        texts = [str(x) for what in held[1:] for x in what.values()]
        assert not [x for x in texts if len(x) == 32 and set(x) <= set("0123456789abcdef")]
        """
    assert run(sandbox, program).passed


@pytest.mark.parametrize(
    "change", ["sys.stdout.close()", "sys.stdout = None", "sys.stderr.close()"]
)
def test_a_program_may_close_its_streams(sandbox, change):
    assert run(sandbox, f"import sys\n{change}").passed


def test_no_privileges_can_be_gained(sandbox):
    program = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x10000000) == -1
        assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == -1
        assert libc.ptrace(16, 1, 0, 0) == -1
        assert libc.chroot(b"/tmp") == -1
        class Header(ctypes.Structure):
            _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
        data = (ctypes.c_uint32 * 6)()
        assert libc.capget(ctypes.byref(Header(0x20080522, 0)), data) == 0
        assert not any(data), list(data)
        for change in (os.setuid, os.setgid):
            try:
                change(12345)
            except OSError:
                continue
            raise AssertionError("it can become someone else")
        assert os.system("test 1") in (0, 32512)
        """
    outcome = run(sandbox, program)
    assert outcome.passed, outcome


def test_the_program_ends_when_its_runner_is_killed(sandbox, tmp_path):
    script = tmp_path / "runs.py"
    script.write_text(
        "from eval.sandbox import Sandbox, SandboxLimits\n"
        "print('begun', flush=True)\n"
        "Sandbox(SandboxLimits(seconds=600.0)).run('while True: pass')\n"
    )
    root = Path(__file__).parents[2]
    runner = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert runner.stdout.readline() == b"begun\n"
    jails = []
    for _ in range(3000):
        jails = jail_processes(runner.pid)
        if len(jails) >= 3:
            break
        time.sleep(0.1)
    assert len(jails) >= 3, "the jail, its init process and the program"
    runner.kill()
    runner.wait()
    runner.stdout.close()
    for _ in range(1000):
        if not any(alive(pid) for pid in jails):
            break
        time.sleep(0.1)
    assert not [pid for pid in jails if alive(pid)]


def jail_processes(pid):
    """Returns all descendants of a process."""
    found = []
    try:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found += [child, *jail_processes(child)]
    except OSError:
        pass
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can switch to another user")
def test_isolation_works_for_an_unprivileged_user(monkeypatch):
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip("no Python that every user can run")
    popen = subprocess.Popen

    def as_nobody(*args, **kwargs):
        return popen(*args, user=65534, group=65534, extra_groups=[], **kwargs)

    monkeypatch.setattr(api, "_interpreter", lambda: python)
    monkeypatch.setattr(api.subprocess, "Popen", as_nobody)
    sandbox = Sandbox(LIMITS)
    try:
        sandbox.check()
    except IsolationError as error:
        pytest.skip(f"users cannot isolate programs on this machine: {error}")
    for test in (
        test_a_fork_bomb_is_stopped_by_the_limit,
        test_no_privileges_can_be_gained,
        test_file_sizes_are_limited_each_and_together,
    ):
        test(sandbox)
    assert run(sandbox, "import os; assert os.getppid() == 1; os.kill(1, 9)").passed


def test_no_program_runs_without_isolation(monkeypatch, tmp_path):
    mark = tmp_path / "ran"
    program = f"open({str(mark)!r}, 'w')"
    monkeypatch.setattr(api, "_interpreter", lambda: "/bin/false")
    with pytest.raises(IsolationError, match="cannot be isolated"):
        Sandbox(LIMITS).run(program)
    monkeypatch.setattr(api.sys, "platform", "darwin")
    with pytest.raises(IsolationError, match="only on Linux, not on darwin"):
        Sandbox(LIMITS).run(program)
    assert not mark.exists()


def test_unisolated_programs_have_limits():
    impatient = Sandbox(SandboxLimits(seconds=1.0), isolated=False)
    sandbox = Sandbox(SandboxLimits(seconds=60.0, file_mib=1), isolated=False)
    sandbox.check()
    assert run(sandbox, "print(1)").passed
    assert run(impatient, "while True: pass").verdict == "timeout"
    assert "File too large" in run(sandbox, "open('big', 'wb').write(bytes(2 << 20))").detail


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_well_formed(machine):
    code = filter_program(machine)
    assert len(code) % 8 == 0
    count = len(code) // 8
    for at in range(count):
        kind, if_true, if_false = code[at * 8], code[at * 8 + 2], code[at * 8 + 3]
        if kind & 0x07 == 0x05:
            assert at + 1 + max(if_true, if_false) < count, "no jump may leave the filter"
    assert code[-8] == 0x06, "the last instruction must return"


def test_an_unsupported_architecture_is_rejected():
    with pytest.raises(OSError, match="riscv64"):
        filter_program("riscv64")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seconds": 0}, "seconds must be a number above 0"),
        ({"memory_mib": 10}, "memory_mib is 10 .* 64"),
        ({"processes": 0}, "processes .* 0"),
        ({"seconds": float("inf")}, "seconds must be a number above 0"),
        ({"seconds": 1e6}, "at most 86400"),
        ({"file_mib": 1 << 30}, "file_mib is 1073741824 .* at most"),
    ],
)
def test_invalid_limits_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        SandboxLimits(**settings)
