# peft_jax for NVIDIA GPUs. CUDA 13 comes with JAX's wheels; the machine has to have a driver for it
# (580 or newer) and the NVIDIA Container Toolkit.
#
#     docker build -f docker/gpu.Dockerfile -t peft_jax:gpu .
#     docker run --rm --gpus=all -v "$PWD":/work peft_jax:gpu train --config=…
#
# The tests check what this file copies and installs; they build no image, and run on no GPU.

FROM python:3.12-slim

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/peft_jax
COPY setup.py setup.cfg pyproject.toml README.md LICENSE ./
COPY peft_jax peft_jax
COPY kernels_pallas kernels_pallas
COPY eval eval
COPY configs configs
RUN pip install --no-cache-dir ".[gpu,eval]"

WORKDIR /work
ENTRYPOINT ["peft-jax"]
CMD ["--help"]
