"""Finds the files that an interpreter needs for its standard library."""

import functools
import json
import subprocess

_SECONDS = 60.0

_LOOK = r"""
import ctypes, glob, json, os, sys

files = [os.path.realpath(sys.executable)]

class Info(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("name", ctypes.c_char_p)]

def note(info, size, data):
    name = os.fsdecode(info.contents.name or b"")
    if os.path.isabs(name) and os.path.isfile(name):
        files.append(os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name)))
    return 0

for folder in sys.path:
    for module in glob.glob(os.path.join(glob.escape(folder), "*.so")):
        try:
            ctypes.CDLL(module)
        except OSError:
            pass  # A library that it needs is missing, so that it cannot be imported either.
look = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Info), ctypes.c_size_t, ctypes.c_void_p)
ctypes.CDLL(None).dl_iterate_phdr(look(note), None)
print(json.dumps({"folders": [p for p in sys.path if os.path.isdir(p)], "files": files}))
"""


@functools.cache
def files_of(interpreter: str) -> dict[str, list[str]]:
    """Returns the folders of the standard library, and the shared libraries that it loads.

    Args:
      interpreter: Path of the interpreter.

    Raises:
      OSError: The interpreter cannot run, or does not report its files.
    """
    try:
        found = subprocess.run(
            [interpreter, "-I", "-S", "-B", "-c", _LOOK],
            capture_output=True,
            timeout=_SECONDS,
            check=True,
        )
        said = json.loads(found.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise OSError(f"{interpreter} does not report its standard library: {error}") from None
    folders = sorted(said["folders"])
    inside = tuple(folder + "/" for folder in folders)
    return {
        "folders": folders,
        "files": [file for file in dict.fromkeys(said["files"]) if not file.startswith(inside)],
    }
