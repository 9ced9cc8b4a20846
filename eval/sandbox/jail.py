"""Runs one program where it can reach nothing; a script, and the first thing in its process.

    python -I -S -B jail.py < input

The input is a line of JSON, the settings, and after it the program.

Three processes share the work. The first leaves the machine's namespaces and waits. The second is
the first process of the new ones (their "init"): it builds a file system of the interpreter alone,
read-only, and an empty /tmp; gives up every privilege; and waits for the third, which runs the
program. When the init ends, the kernel ends everything that the program has started.

Only the standard library is used: nothing else is there. The result is one line of JSON on the
descriptor that the settings name, and a program counts as passed only if it came to its end: the
line then carries the settings' token. No argument, variable or environment hands that token to the
program, so none gives it by accident or by leaving early. One that is written to cheat can: it runs
in the process that reports its end, and can look for what that process holds.
"""

import contextlib
import ctypes
import errno
import json
import os
import random
import resource
import signal
import stat
import sys

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

_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin")
_DEVICES = ("null", "urandom", "random")
"""Not "zero": mapped shared, it is memory that no limit counts."""

_FAILED, _NOT_ISOLATED = 1, 3


class JailError(Exception):
    """The program cannot be kept apart here; it has not been run."""


def main() -> None:
    """Reads the settings and the program, and runs it."""
    settings = json.loads(sys.stdin.buffer.readline())
    program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    _be_first_to_go()
    if not settings["isolated"]:
        os.chdir(settings["folder"])
        _limit(settings, processes=None)
        _run_program(program, settings)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        as_root = _leave_namespaces(libc)
    except (JailError, OSError, AttributeError) as error:
        _report(settings, {"not_isolated": str(error)})
        os._exit(_NOT_ISOLATED)
    _die_with_parent(libc)
    if os.getppid() != settings["parent"]:
        os._exit(_NOT_ISOLATED)  # The parent was gone before it could be watched.
    init = os.fork()
    if init == 0:
        _be_init(libc, program, settings, as_root=as_root)
    _, status = os.waitpid(init, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _leave_namespaces(libc: ctypes.CDLL) -> bool:
    """Enters new namespaces; whether as root, so that another user can be taken on."""
    flags = _NEW_NS | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        if libc.unshare(flags):
            raise JailError(
                "root lacks CAP_SYS_ADMIN here, without which it cannot be confined: run as another"
                " user, or give the container that capability"
            )
        return True
    if libc.unshare(flags | _NEW_USER):
        raise JailError(
            f"new namespaces are refused ({os.strerror(ctypes.get_errno())}): the system does not"
            " let users make them (kernel.unprivileged_userns_clone, user.max_user_namespaces,"
            " AppArmor, or the container's seccomp profile)"
        )
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {user} 1")
    _write("/proc/self/gid_map", f"0 {group} 1")
    return False


def _be_init(libc: ctypes.CDLL, program: str, settings: dict, *, as_root: bool) -> None:
    """The first process of the new namespaces: builds the jail, runs the program, and ends all."""
    try:
        os.setsid()
        user = _unused_user()
        _build_root(libc, settings)
        if as_root:
            _become(user)
        _limit(settings, processes=settings["processes"] + 1)
        _drop_privileges(libc)
        _die_with_parent(libc)
        if os.getpid() != 1:
            raise JailError("there is no new process namespace")
        child = os.fork()
    except (JailError, OSError, ValueError, AttributeError) as error:
        _report(settings, {"not_isolated": str(error)})
        os._exit(_NOT_ISOLATED)
    if child == 0:
        _run_program(program, settings)
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                _report(settings, {"signal": -code})
            os._exit(_FAILED if code else 0)


def _build_root(libc: ctypes.CDLL, settings: dict) -> None:
    """Makes a file system of the interpreter alone the root."""
    root = settings["folder"]
    _mount(libc, None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount(libc, "tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for folder in (*_SYSTEM_FOLDERS, *settings["folders"]):
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), root + folder)
        elif os.path.isdir(folder) and not os.path.exists(root + folder):
            os.makedirs(root + folder)
            _mount(libc, folder, root + folder, None, _MS_BIND | _MS_REC)
            _make_read_only(libc, root + folder)
    os.mkdir(root + "/dev")
    for device in _DEVICES:
        if stat.S_ISCHR(os.stat("/dev/" + device).st_mode):
            os.close(os.open(f"{root}/dev/{device}", os.O_CREAT | os.O_WRONLY))
            _mount(libc, "/dev/" + device, f"{root}/dev/{device}", None, _MS_BIND)
    os.mkdir(root + "/tmp")
    size = settings["file_bytes"]
    options = f"size={size},nr_inodes=4096,mode=1777"
    _mount(libc, "tmpfs", root + "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.chdir(root)
    here = os.fsencode(".")
    if libc.syscall(_PIVOT_ROOT[os.uname().machine], here, here):
        raise JailError(f"pivot_root: {os.strerror(ctypes.get_errno())}")
    if libc.umount2(here, _MNT_DETACH):
        raise JailError(f"umount: {os.strerror(ctypes.get_errno())}")
    _make_read_only(libc, "/", recursive=False)
    os.chdir("/tmp")


def _unused_user() -> int:
    """A user that nobody else is, among those that there are here."""
    with open("/proc/self/uid_map") as lines:
        first, _, count = map(int, lines.readline().split())
    return first + count - 2 - random.SystemRandom().randrange(max(1, min(count // 4, 1 << 20)))


def _become(user: int) -> None:
    """Takes on a user of its own, so that the number of its processes can be limited."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _limit(settings: dict, *, processes: int | None) -> None:
    """Sets the limits of resources, for good."""
    limits = {
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_CPU: int(settings["seconds"]) + 2,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def _drop_privileges(libc: ctypes.CDLL) -> None:
    """Gives up all capabilities, the means to regain them, and many system calls."""
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) and ctypes.get_errno() != errno.EINVAL:
            if ctypes.get_errno() == errno.EPERM:
                break  # Another user than root has nothing to drop.
            raise JailError("capabilities cannot be dropped")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise JailError(f"capset: {os.strerror(ctypes.get_errno())}")
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise JailError(f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    _refuse_system_calls(libc)


def _run_program(program: str, settings: dict) -> None:
    """Runs the program in this process, and ends it."""
    result, token = settings["result"], _put_away(settings.pop("token"))
    _report(settings, {"started": True})
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        _leave({"error": f"{type(error).__name__}: {error}"[:500]}, result, _FAILED)
    _leave({"token": os.read(token, 64).decode()}, result, 0)


def _put_away(token: str) -> int:
    """Puts the token where no variable holds it: in a pipe, to be read from the descriptor."""
    readable, writable = os.pipe()
    os.write(writable, token.encode())
    os.close(writable)
    return readable


def _leave(what: dict, result: int, code: int) -> None:
    """Ends this process with a last word, whatever the program has done to its modules."""
    try:
        os.write(result, (json.dumps(what) + "\n").encode())
    except BaseException:
        code = code or _FAILED
    for stream in ("stdout", "stderr"):
        # The program may have closed them, or put something else in their places.
        with contextlib.suppress(BaseException):
            getattr(sys, stream).flush()
    os._exit(code)


def _report(settings: dict, what: dict) -> None:
    os.write(settings["result"], (json.dumps(what) + "\n").encode())


def _be_first_to_go() -> None:
    """Where memory runs out in spite of all limits, this is what the kernel ends."""
    with contextlib.suppress(OSError):
        _write("/proc/self/oom_score_adj", "1000")


def _die_with_parent(libc: ctypes.CDLL) -> None:
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise JailError("the process cannot be tied to its parent")


def _mount(libc, source, target, kind, flags, options=None) -> None:
    encoded = (None if text is None else os.fsencode(text) for text in (source, target, kind))
    data = None if options is None else options.encode()
    if libc.mount(*encoded, ctypes.c_ulong(flags), data):
        raise JailError(f"mount {target}: {os.strerror(ctypes.get_errno())}")


def _make_read_only(libc: ctypes.CDLL, path: str, *, recursive: bool = True) -> None:
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    size = ctypes.sizeof(attributes)
    if libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, ctypes.byref(attributes), size
    ):
        raise JailError(f"{path} cannot be made read-only: {os.strerror(ctypes.get_errno())}")


def _write(file: str, text: str) -> None:
    with open(file, "w") as stream:
        stream.write(text)


def _refuse_system_calls(libc: ctypes.CDLL) -> None:
    """Sets the filter of the file beside this one, which was read before the root was changed."""
    _FILTER["refuse_system_calls"](libc)


_FILTER: dict = {}
if __name__ == "__main__":
    _beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "system_calls.py")
    with open(_beside, encoding="utf-8") as _source:
        exec(compile(_source.read(), _beside, "exec"), _FILTER)
    main()
