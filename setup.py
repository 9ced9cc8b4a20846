"""Packages of the wheel: what the repository keeps beside `peft_jax/` is installed inside it."""

from setuptools import find_packages, setup

INSIDE = {"peft_jax.configs": "configs", "peft_jax.eval": "eval"}
"""By its name in the wheel, the folder of a package in the repository."""

packages = find_packages(include=["peft_jax*", "kernels_pallas*"])
for name, folder in INSIDE.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=INSIDE)
