# docker build -f docker/cuda.Dockerfile -t convneur-mm:cuda .
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install --yes --no-install-recommends \
        build-essential git libgl1 libglib2.0-0 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# No GPU is visible while an image is built.
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0"
ENV FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST PYTHON=/usr/bin/python3
WORKDIR /convneur-mm
COPY . .
RUN tools/setup_env.sh && rm -rf ~/.cache
ENV PATH=/convneur-mm/.venv/bin:$PATH VIRTUAL_ENV=/convneur-mm/.venv PYTHON=/convneur-mm/.venv/bin/python
CMD ["tools/doctor.py"]
