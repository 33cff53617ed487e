# falqon-fx with what it needs to train and to export.
#   docker build --tag falqon-fx .                                                for a CPU
#   docker build --tag falqon-fx --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://pypi.org/simple .                           for NVIDIA's GPUs
#   docker run --rm [--gpus all] falqon-fx falqon-fx --help
# The base needs Python 3.11 or newer in apt: Ubuntu 24.04, Debian 12.
ARG BASE=ubuntu:24.04
FROM ${BASE}

# g++ and Python's headers: Inductor and Triton compile at run time. Which versions there are is the
# base's to say.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/falqon/bin:$PATH
# torch first, so that a change of the sources doesn't install it anew.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/falqon \
    && pip install --no-cache-dir --index-url ${TORCH_INDEX} 'torch>=2.11'

COPY . /src
RUN pip install --no-cache-dir '/src[export]' \
    && useradd --create-home --uid 1500 trainer
USER 1500
WORKDIR /home/trainer
CMD ["python3"]
