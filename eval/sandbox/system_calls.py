"""Filters the system calls of sandboxed code, with the kernel's seccomp.

The jail's namespaces isolate the code. The filter closes the remaining gaps: memory that no limit
counts, and parts of the kernel that such code does not need. This module uses only the standard
library, because the jail runs it without other packages.
"""

import ctypes
import errno
import platform
import struct

_X86_64, _AARCH64 = 0xC000003E, 0xC00000B7
_ARCHITECTURES = {"x86_64": _X86_64, "aarch64": _AARCH64}
_X32_BIT = 0x40000000

# Name: (number on x86_64, number on aarch64); None if the architecture lacks the call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    # Memory that belongs to no process, so that no process limit counts it.
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # Kernel memory that a program can grow: pages that a pipe keeps alive, event queues, rules.
    "splice": (275, 76),
    "tee": (276, 77),
    "vmsplice": (278, 75),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "io_setup": (206, 0),
    "landlock_create_ruleset": (444, 444),
    # Parts of the kernel with a history of vulnerabilities.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "acct": (163, 89),
    "quotactl": (179, 60),
}

_CLONE, _CLONE3, _MMAP = (56, 220), 435, (9, 222)
_FCNTL, _PRLIMIT = (72, 25), (302, 261)
_NEW_NAMESPACES = 0x7E020080
"""Flags of clone that create namespaces: CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, … NEWNET."""

_SHARED, _ANONYMOUS, _HUGE_PAGES = 0x01, 0x20, 0x40000
"""Flags of mmap. Anonymous shared memory stays allocated after its pages have left every process,
and huge pages are not counted for any. A process's memory usage therefore misses both."""

_LOCKS_AND_SIZES = (6, 7, 37, 38, 1031)
"""Commands of fcntl that allocate kernel memory: file-range locks, and a pipe's size."""

# Instructions of the filter: load a word, jump on equality, on a set bit, on at least; return.
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_FIRST_ARGUMENT_AT, _SECOND_ARGUMENT_AT, _FOURTH_ARGUMENT_AT = 16, 24, 40

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


class _Program(ctypes.Structure):
    """Mirrors `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_system_calls(libc: ctypes.CDLL) -> None:
    """Installs the filter permanently for this process and its descendants.

    Args:
      libc: C library. `PR_SET_NO_NEW_PRIVS` must be set.

    Raises:
      OSError: The kernel rejects the filter, or the architecture is unsupported.
    """
    code = filter_program(platform.machine())
    program = _Program(len(code) // 8, code)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        number = ctypes.get_errno()
        raise OSError(
            number,
            f"the kernel rejects the system call filter: {errno.errorcode.get(number, number)}",
        )


def filter_program(machine: str) -> bytes:
    """Returns the filter's instructions, of 8 bytes each.

    Args:
      machine: Architecture, as named by `platform.machine`.

    Raises:
      OSError: The architecture is unsupported.
    """
    if machine not in _ARCHITECTURES:
        raise OSError(
            errno.ENOSYS,
            f"system calls cannot be filtered on {machine}, only on {', '.join(_ARCHITECTURES)}",
        )
    column = list(_ARCHITECTURES).index(machine)
    code = [
        _instruction(_LOAD, _ARCHITECTURE_AT),
        _instruction(_IF_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_AT),
        _instruction(_IF_AT_LEAST, _X32_BIT, 0, 1),
        _instruction(_RETURN, _KILL),
        # A filter cannot see the flags of clone3; without it, the C library falls back to clone.
        _instruction(_IF_EQUAL, _CLONE3, 0, 1),
        _instruction(_RETURN, _FAIL | errno.ENOSYS),
    ]
    for numbers in _DENIED.values():
        if (number := numbers[column]) is not None:
            code.append(_instruction(_IF_EQUAL, number, 0, 1))
            code.append(_instruction(_RETURN, _FAIL | errno.EPERM))
    code += [
        _instruction(_IF_EQUAL, _MMAP[column], 0, 6),
        _instruction(_LOAD, _FOURTH_ARGUMENT_AT),
        _instruction(_IF_ANY_BIT, _HUGE_PAGES, 2, 0),
        _instruction(_IF_ANY_BIT, _ANONYMOUS, 0, 2),
        _instruction(_IF_ANY_BIT, _SHARED, 0, 1),
        _instruction(_RETURN, _FAIL | errno.EPERM),
        _instruction(_RETURN, _ALLOW),
        _instruction(_IF_EQUAL, _FCNTL[column], 0, 2 + 2 * len(_LOCKS_AND_SIZES)),
        _instruction(_LOAD, _SECOND_ARGUMENT_AT),
    ]
    for command in _LOCKS_AND_SIZES:
        code.append(_instruction(_IF_EQUAL, command, 0, 1))
        code.append(_instruction(_RETURN, _FAIL | errno.EPERM))
    code += [
        _instruction(_RETURN, _ALLOW),
        # A process may change its own limits, but not those of the test's process.
        _instruction(_IF_EQUAL, _PRLIMIT[column], 0, 4),
        _instruction(_LOAD, _FIRST_ARGUMENT_AT),
        _instruction(_IF_EQUAL, 0, 1, 0),
        _instruction(_RETURN, _FAIL | errno.EPERM),
        _instruction(_RETURN, _ALLOW),
        _instruction(_IF_EQUAL, _CLONE[column], 0, 3),
        _instruction(_LOAD, _FIRST_ARGUMENT_AT),
        _instruction(_IF_ANY_BIT, _NEW_NAMESPACES, 0, 1),
        _instruction(_RETURN, _FAIL | errno.EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(code)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Packs a `struct sock_filter`: the operation, and the numbers of instructions to skip."""
    return struct.pack("HBBI", code, if_true, if_false, value)
