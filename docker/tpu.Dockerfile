# peft_jax for the hosts of Cloud TPUs, one of them or all hosts of a pod.
#
#     docker build -f docker/tpu.Dockerfile -t peft_jax:tpu .
#     docker run --rm --privileged --net=host -v "$PWD":/work peft_jax:tpu train --config=…
#
# --privileged lets the container reach the TPU's devices, and --net=host the other hosts of a pod.
# The tests check what this file copies and installs; they build no image, and run on no TPU.

FROM python:3.12-slim

WORKDIR /opt/peft_jax
COPY setup.py setup.cfg pyproject.toml README.md LICENSE ./
COPY peft_jax peft_jax
COPY kernels_pallas kernels_pallas
COPY eval eval
COPY configs configs
RUN pip install --no-cache-dir ".[tpu,eval]"

WORKDIR /work
ENTRYPOINT ["peft-jax"]
CMD ["--help"]
