"""Keeps modules of version 0.1 importable under their old names, with a warning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Iterable, Mapping

RENAMED = {
    "kernels_pallas.block_rotation.product": "kernels_pallas.block_rotation.rotated_kernel",
    "kernels_pallas.block_rotation.vjp": "kernels_pallas.block_rotation.api",
    "kernels_pallas.butterfly.vjp": "kernels_pallas.butterfly.api",
    "kernels_pallas.cases": "kernels_pallas.shared_cases",
    "kernels_pallas.checks": "kernels_pallas.operand_checks",
    "kernels_pallas.chips": "kernels_pallas.target_device",
    "kernels_pallas.traffic": "kernels_pallas.memory_traffic",
    "kernels_pallas.unitary.vjp": "kernels_pallas.unitary.api",
}
"""Old name → new name. They go with version 0.3."""


class _RenamedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its old name, with a warning that gives the new one."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def find_spec(
        self,
        fullname: str,
        path: Iterable[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        new = self.names[spec.name]
        warnings.warn(
            f"{spec.name} is now {new}; the old name will be removed in peft_jax 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        old = types.ModuleType(spec.name, f"The old name of `{new}`.")
        module = importlib.import_module(new)
        # PEP 562: whatever the new module has, the old one has too.
        old.__dict__["__getattr__"] = lambda name: getattr(module, name)
        old.__dict__["__dir__"] = lambda: dir(module)
        return old

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing: the new module has been executed."""


_FINDER = _RenamedModules()


def install(names: Mapping[str, str] = RENAMED) -> None:
    """Lets modules be imported under their old names.

    Args:
      names: New names by old name.
    """
    _FINDER.names.update(names)
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
