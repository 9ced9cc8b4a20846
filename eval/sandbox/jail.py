"""Isolates and runs one program; a script, started in a new interpreter.

    python -I -S -B jail.py < input

The input is one line of JSON with the settings, followed by the program.

There are three processes. The first enters new namespaces and waits. The second is the init process
of these namespaces. It builds a file system with only the standard library, read-only, and an empty
/tmp. It drops all privileges and starts the third process, which runs the program. When the init
process ends, the kernel ends everything that the program has started.

The script uses only the standard library. The result is one JSON line on the descriptor that the
settings name. It contains the settings' token if the program completed.

A plain program reports its own completion. The token is in none of its arguments, variables or
environment variables, so that it cannot send the token by accident or by exiting early.

A program with a test has neither the token nor the descriptor. The test runs in the init process,
which reads the test and the token, after the program's process has started, from a file that is
closed to the program. They communicate through pipes, in plain data: the init process sends the
arguments of each call, and compares the returned values. The program cannot trace, read or kill
the init process, so that it controls only its answers.
"""

import builtins
import contextlib
import ctypes
import errno
import itertools
import json
import os
import random
import resource
import signal
import stat
import sys
import time

_NEW_NS, _NEW_UTS, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000

_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4

_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAPABILITY_VERSION = 0x20080522

_LIBRARY_FOLDERS = ("/lib", "/lib32", "/lib64", "/libx32")
"""Symbolic links into /usr on many systems, which the loader needs."""

_HIDDEN = ("site-packages", "dist-packages")
_TIME_ZONES = "/usr/share/zoneinfo"
_DEVICES = ("null", "urandom", "random")
"""Without "zero", because a shared mapping of it is memory that no limit counts."""

_FAILED, _NOT_ISOLATED = 1, 3
_MAX_ANSWER = 16 << 20
"""Maximum bytes of a program's answer to its test."""

_EXIT_SECONDS = 1.0
"""Time limit for a program to end after it has closed its pipes."""


class JailError(Exception):
    """Raised when the program cannot be isolated; it was not run."""


def main() -> None:
    """Reads the settings and the program, and runs it."""
    settings = json.loads(sys.stdin.buffer.readline())
    program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    _prefer_for_oom_kill()
    if not settings["isolated"]:
        os.chdir(settings["folder"])
        _limit(settings, processes=None)
        _supervise(program, settings)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        as_root = _leave_namespaces(libc)
    except (JailError, OSError, AttributeError) as error:
        _report(settings, {"not_isolated": str(error)})
        os._exit(_NOT_ISOLATED)
    _die_with_parent(libc)
    if os.getppid() != settings["parent"]:
        os._exit(_NOT_ISOLATED)  # The parent ended before it could be tracked.
    init = os.fork()
    if init == 0:
        _be_init(libc, program, settings, as_root=as_root)
    _, status = os.waitpid(init, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _leave_namespaces(libc: ctypes.CDLL) -> bool:
    """Enters new namespaces, and returns whether as root, which can switch to another user."""
    flags = _NEW_NS | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        if libc.unshare(flags):
            raise JailError(
                "root needs CAP_SYS_ADMIN to isolate programs; run as another user, or give the"
                " container that capability"
            )
        return True
    if libc.unshare(flags | _NEW_USER):
        raise JailError(
            f"the system rejects new namespaces ({os.strerror(ctypes.get_errno())}); allow users to"
            " create them (kernel.unprivileged_userns_clone, user.max_user_namespaces, AppArmor, or"
            " the container's seccomp profile)"
        )
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {user} 1")
    _write("/proc/self/gid_map", f"0 {group} 1")
    return False


def _be_init(libc: ctypes.CDLL, program: str, settings: dict, *, as_root: bool) -> None:
    """Runs the init process: builds the jail, runs the program, and ends everything."""
    try:
        os.setsid()
        user = _unused_user()
        _build_root(libc, settings)
        if as_root:
            _switch_user(user)
        _limit(settings, processes=settings["processes"] + 1)
        _drop_privileges(libc)
        _die_with_parent(libc)
        if os.getpid() != 1:
            raise JailError("the system created no process namespace")
    except (JailError, OSError, ValueError, AttributeError) as error:
        _report(settings, {"not_isolated": str(error)})
        os._exit(_NOT_ISOLATED)
    _supervise(program, settings)


def _build_root(libc: ctypes.CDLL, settings: dict) -> None:
    """Replaces the root by a file system that holds only the interpreter."""
    root = settings["folder"]
    _mount(libc, None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount(libc, "tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=4m,mode=755")
    for folder in _LIBRARY_FOLDERS:
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), root + folder)
    for folder in (*settings["folders"], _TIME_ZONES):
        if os.path.isdir(folder) and not os.path.exists(root + folder):
            os.makedirs(root + folder)
            _mount(libc, folder, root + folder, None, _MS_BIND)
            _hide_packages(libc, folder, root)
    for file in settings["files"]:
        if not os.path.exists(root + file):
            os.makedirs(os.path.dirname(root + file), exist_ok=True)
            os.close(os.open(root + file, os.O_CREAT | os.O_WRONLY))
            _mount(libc, file, root + file, None, _MS_BIND)
    os.mkdir(root + "/tmp")
    os.mkdir(root + "/dev")
    devices = [name for name in _DEVICES if stat.S_ISCHR(os.stat("/dev/" + name).st_mode)]
    for device in devices:
        os.close(os.open(f"{root}/dev/{device}", os.O_CREAT | os.O_WRONLY))
    _make_read_only(libc, root)
    for device in devices:
        _mount(libc, "/dev/" + device, f"{root}/dev/{device}", None, _MS_BIND)
    options = f"size={settings['file_bytes']},nr_inodes=4096,mode=1777"
    _mount(libc, "tmpfs", root + "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir(root)
    here = os.fsencode(".")
    if libc.syscall(_PIVOT_ROOT[os.uname().machine], here, here):
        raise JailError(f"pivot_root: {os.strerror(ctypes.get_errno())}")
    if libc.umount2(here, _MNT_DETACH):
        raise JailError(f"umount: {os.strerror(ctypes.get_errno())}")
    os.chdir("/tmp")


def _hide_packages(libc: ctypes.CDLL, folder: str, root: str) -> None:
    """Mounts empty folders over package folders inside the standard library."""
    for name in _HIDDEN:
        if os.path.isdir(os.path.join(folder, name)):
            inner = os.path.join(root + folder, name)
            _mount(libc, "tmpfs", inner, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=4k,mode=755")


def _unused_user() -> int:
    """Returns a random user id from the end of the namespace's range, which is likely unused."""
    with open("/proc/self/uid_map") as lines:
        first, _, count = map(int, lines.readline().split())
    return first + count - 2 - random.SystemRandom().randrange(max(1, min(count // 4, 1 << 20)))


def _switch_user(user: int) -> None:
    """Switches to an unused user, so that its number of processes can be limited."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _limit(settings: dict, *, processes: int | None) -> None:
    """Sets the resource limits permanently."""
    limits = {
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_CPU: int(settings["seconds"]) + 2,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    # These limit kernel memory that is charged to no process. Some systems lack them.
    for name, most in (("RLIMIT_SIGPENDING", 256), ("RLIMIT_MSGQUEUE", 0)):
        if hasattr(resource, name):
            limits[getattr(resource, name)] = most
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def _drop_privileges(libc: ctypes.CDLL) -> None:
    """Drops all capabilities permanently, and many system calls."""
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) and ctypes.get_errno() != errno.EINVAL:
            if ctypes.get_errno() == errno.EPERM:
                break  # Only root has capabilities to drop.
            raise JailError("capabilities cannot be dropped")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise JailError(f"capset: {os.strerror(ctypes.get_errno())}")
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise JailError(f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    _filter_system_calls(libc)


def _supervise(program: str, settings: dict) -> None:
    """Runs the program and its test, and exits with their result."""
    _report(settings, {"started": True})
    if settings["test"] is None:
        child = _start(_run_program, program, settings)
        while True:
            ended, status = os.wait()
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
                if code < 0:
                    _report(settings, {"signal": -code})
                os._exit(_FAILED if code else 0)
    calls, answers = os.pipe(), os.pipe()
    theirs, ours = (calls[0], answers[1]), (calls[1], answers[0])
    closed = (settings["result"], settings["test"], *ours)
    child = _start(_serve, program, settings["function"], *theirs, closed=closed)
    for descriptor in theirs:
        os.close(descriptor)
    _run_test(settings, _ChildReaper(child), *ours)


def _start(run, *args, closed: tuple[int, ...] = ()) -> int:
    """Runs a function in a child process, which closes some descriptors first."""
    pid = os.fork()
    if pid == 0:
        for descriptor in closed:
            os.close(descriptor)
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        run(*args)
        os._exit(_FAILED)
    return pid


class _ChildReaper:
    """Records how a process ends, and reaps all other orphans.

    Args:
      pid: Process whose exit code is recorded.
    """

    def __init__(self, pid: int):
        self._pid = pid
        self._code: int | None = None
        # The program must not disturb this process with signals.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, self._reap)
        self._reap()

    def code(self) -> int:
        """Waits briefly for the exit code; returns 0 if the process does not end."""
        deadline = time.monotonic() + _EXIT_SECONDS
        while self._code is None and time.monotonic() < deadline:
            time.sleep(0.01)
            self._reap()
        return self._code or 0

    def _reap(self, *_) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                ended, status = os.waitpid(-1, os.WNOHANG)
                if not ended:
                    return
                if ended == self._pid:
                    self._code = os.waitstatus_to_exitcode(status)


def _run_program(program: str, settings: dict) -> None:
    """Runs the program in this process, and exits."""
    result, token = settings["result"], _hide_token(settings.pop("token"))
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        _exit_with({"error": f"{type(error).__name__}: {error}"[:500]}, result, _FAILED)
    _exit_with({"token": os.read(token, 64).decode()}, result, 0)


def _serve(program: str, function: str, calls: int, answers: int) -> None:
    """Runs the program, and its function for each call until the calls end."""
    requests = os.fdopen(calls, "rb")
    number = None
    try:
        namespace: dict = {"__name__": "__main__"}
        exec(compile(program, "program.py", "exec"), namespace)
        if function not in namespace:
            raise NameError(f"name {function!r} is not defined")
        answer: dict = {}
    except BaseException as error:
        answer = {"raised": _describe_error(error)}
    while True:
        _send(answers, {**answer, "number": number})
        line = requests.readline()
        if not line:
            os._exit(0)
        call = json.loads(line)
        number = call["number"]
        try:
            arguments = _VALUES["decode"](call["arguments"])
            named = _VALUES["decode"](call["named"])
            value = namespace[function](*arguments, **named)
            answer = {"value": _VALUES["encode"](value)}
            # Misses changes that the function makes to an argument after it has returned.
            after = _VALUES["encode"](arguments)
            if after != call["arguments"]:
                answer["arguments"] = after
        except BaseException as error:
            answer = {"raised": _describe_error(error)}
        _flush()


def _run_test(settings: dict, program: _ChildReaper, calls: int, answers: int) -> None:
    """Runs the test in this process, and exits.

    This is the init process of its namespace, which no other process there can kill or stop.
    """
    with os.fdopen(settings["test"], "rb") as file:
        given = json.load(file)
    result, function = settings["result"], settings["function"]

    def leave(why: str = "") -> None:
        code = 0 if why else program.code()
        what = {"signal": -code} if code < 0 else {"error": why or "it exited before its end"}
        _exit_with(what, result, _FAILED)

    proxy = _FunctionProxy(calls, answers, leave)
    try:
        proxy.wait()
        namespace: dict = {"__name__": "__main__"}
        exec(compile(given["given"], "given.py", "exec"), namespace)
        namespace[function] = proxy.as_function(function)
        exec(compile(given["test"], "test.py", "exec"), namespace)
    except BaseException as error:
        _exit_with({"error": ": ".join(_describe_error(error))}, result, _FAILED)
    _exit_with({"token": given["token"]}, result, 0)


class _FunctionProxy:
    """Proxy of the program's function in the process of its test.

    Args:
      calls: Descriptor that calls are written to.
      answers: Descriptor that answers are read from.
      leave: Exits with a reason; without one, the program has ended.
    """

    def __init__(self, calls: int, answers: int, leave):
        self._calls = calls
        self._answers = os.fdopen(answers, "rb")
        self._numbers = itertools.count(1)
        self._leave = leave

    def as_function(self, name: str):
        """Returns a function with the given name that calls the program's."""

        def call(*args, **kwargs):
            return self._call(args, kwargs)

        call.__name__ = call.__qualname__ = name
        return call

    def wait(self) -> None:
        """Waits until the program has run, and raises its error."""
        self._receive(None)

    def _call(self, args: tuple, kwargs: dict):
        number = next(self._numbers)
        encode = _VALUES["encode"]
        request = {"number": number, "arguments": encode(list(args)), "named": encode(kwargs)}
        try:
            _send(self._calls, request)
        except OSError:
            self._leave()
        value, arguments = self._receive(number)
        for before, after in zip(args, arguments, strict=False):
            _VALUES["change"](before, after)
        return value

    def _receive(self, number: int | None) -> tuple:
        """Returns the value of a call, and its arguments after the call.

        An invalid answer ends this process, because a test that expects an error must not pass by
        it.
        """
        line = self._answers.readline(_MAX_ANSWER)
        if not line:
            self._leave()
        try:
            answer = json.loads(line)
            if answer["number"] != number:
                raise ValueError("this is the answer to another call")
            raised = [str(part) for part in answer.get("raised", ())]
            value = _VALUES["decode"](answer.get("value"))
            arguments = _VALUES["decode"](answer.get("arguments", ["list"]))
            if type(arguments) is not list:
                raise ValueError("the arguments are not a list")
        except BaseException:
            self._leave("its answer is malformed, or over 16 MiB")
        if raised:
            raise _as_error(*raised)
        return value, arguments


def _describe_error(error: BaseException) -> list[str]:
    """Returns an error's type and message, which is empty if it cannot be formatted."""
    try:
        message = str(error)[:500]
    except BaseException:
        message = ""
    return [type(error).__name__, message]


def _as_error(name: str, message: str = "", *_) -> Exception:
    """Returns an error of a built-in type, or else of a new type with that name.

    StopIteration becomes a new type too, because it would end an iteration of the test, such as
    `all(map(...))`.

    Example:
      >>> _as_error("KeyError", "a"), _as_error("SystemExit", "0")
      (KeyError('a'), SystemExit('0'))
      >>> isinstance(_as_error("SystemExit", "0"), Exception)
      True
    """
    kind = getattr(builtins, name, None)
    ends_iteration = name in ("StopIteration", "StopAsyncIteration")
    if isinstance(kind, type) and issubclass(kind, Exception) and not ends_iteration:
        with contextlib.suppress(TypeError):  # Some types need other arguments.
            return kind(message)
    return type(name[:100] or "Exception", (Exception,), {})(message)


def _send(descriptor: int, what: dict) -> None:
    left = memoryview((json.dumps(what) + "\n").encode())
    while left:
        left = left[os.write(descriptor, left) :]


def _hide_token(token: str) -> int:
    """Hides the token in a pipe, where no variable holds it, and returns the descriptor."""
    readable, writable = os.pipe()
    os.write(writable, token.encode())
    os.close(writable)
    return readable


def _exit_with(what: dict, result: int, code: int) -> None:
    """Reports and exits, whatever the program has done to its modules."""
    try:
        os.write(result, (json.dumps(what) + "\n").encode())
    except BaseException:
        code = code or _FAILED
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in ("stdout", "stderr"):
        # The program may have closed or replaced them.
        with contextlib.suppress(BaseException):
            getattr(sys, stream).flush()


def _report(settings: dict, what: dict) -> None:
    os.write(settings["result"], (json.dumps(what) + "\n").encode())


def _prefer_for_oom_kill() -> None:
    """Makes the kernel kill this process first if memory runs out in spite of all limits."""
    with contextlib.suppress(OSError):
        _write("/proc/self/oom_score_adj", "1000")


def _die_with_parent(libc: ctypes.CDLL) -> None:
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise JailError("the kernel rejects PR_SET_PDEATHSIG, which ends the jail with its parent")


def _mount(libc, source, target, kind, flags, options=None) -> None:
    encoded = (None if text is None else os.fsencode(text) for text in (source, target, kind))
    data = None if options is None else options.encode()
    if libc.mount(*encoded, ctypes.c_ulong(flags), data):
        raise JailError(f"mount {target}: {os.strerror(ctypes.get_errno())}")


def _make_read_only(libc: ctypes.CDLL, path: str) -> None:
    """Makes a mount and all mounts below it read-only."""
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    place, given, size = os.fsencode(path), ctypes.byref(attributes), ctypes.sizeof(attributes)
    if libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, place, _AT_RECURSIVE, given, size):
        raise JailError(f"{path} cannot be made read-only: {os.strerror(ctypes.get_errno())}")


def _write(file: str, text: str) -> None:
    with open(file, "w") as stream:
        stream.write(text)


def _filter_system_calls(libc: ctypes.CDLL) -> None:
    """Installs the filter of `system_calls.py`, which was read before the root was replaced."""
    _FILTER["filter_system_calls"](libc)


_FILTER: dict = {}
_VALUES: dict = {}
if __name__ == "__main__":
    for _name, _names in (("system_calls.py", _FILTER), ("values.py", _VALUES)):
        _beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), _name)
        with open(_beside, encoding="utf-8") as _source:
            exec(compile(_source.read(), _beside, "exec"), _names)
    main()
