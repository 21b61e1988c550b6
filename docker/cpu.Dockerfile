# docker build -f docker/cpu.Dockerfile -t convneur-mm:cpu .
FROM python:3.12-slim-bookworm
# Compiler and headers for mmcv and the memory's kernels; OpenCV's libraries.
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential git libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
# torch's builds for CPUs, 4 GB smaller than those with CUDA.
ARG TORCH_INDEX_URL
WORKDIR /convneur-mm
COPY . .
RUN tools/setup_env.sh && rm -rf ~/.cache
ENV PATH=/convneur-mm/.venv/bin:$PATH VIRTUAL_ENV=/convneur-mm/.venv
CMD ["tools/doctor.py"]
