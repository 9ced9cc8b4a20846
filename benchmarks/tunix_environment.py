"""Makes the environment that the worker of Tunix runs in."""

import importlib.metadata as metadata
import subprocess
import sys
import venv
from pathlib import Path

TUNIX = "0.1.7"


def tunix_python(folder: Path) -> Path:
    """Returns the Python of an environment with Tunix and this environment's JAX.

    Args:
      folder: Folder of the environment. It is made if it has no Tunix of the right version.

    Raises:
      RuntimeError: pip cannot install it.
    """
    python = folder / "bin" / "python"
    if not _has_tunix(python):
        venv.create(folder, with_pip=True, clear=True)
        wanted = [f"google-tunix=={TUNIX}"]
        wanted += [f"{name}=={metadata.version(name)}" for name in ("jax", "jaxlib")]
        print(f"installing {', '.join(wanted)} in {folder} …", file=sys.stderr, flush=True)
        done = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"pip could not install {', '.join(wanted)}; leave these rows out with --only"
            )
    return python


def _has_tunix(python: Path) -> bool:
    """Returns whether an environment has the version of Tunix that is compared."""
    if not python.is_file():
        return False
    ask = "import importlib.metadata as m; print(m.version('google-tunix'))"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    return found.stdout.strip() == TUNIX
