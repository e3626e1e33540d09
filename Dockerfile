# The command line in a CPU image, and by default the app on a run folder mounted at /data:
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU builds> --tag compressor .
#   docker run -v ./runs:/data compressor distill --teacher demo --target 50% --out demo
#   docker run -v ./runs/demo:/data -e COMPRESSOR_AUTH=me:secret -p 127.0.0.1:7860:7860 compressor
#
# Without that index pip takes torch's build for CUDA, several gigabytes of it.
FROM debian:12.11-slim

RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 compressor

WORKDIR /opt/compressor
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY compressor ./compressor
COPY export ./export
COPY serve ./serve
ARG PIP_EXTRA_INDEX_URL
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --quiet --no-cache-dir --constraint constraints.txt . \
 && rm -rf /opt/compressor

ENV PATH=/opt/venv/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /data
USER compressor
EXPOSE 7860
# A container is reached from outside, so the app wants COMPRESSOR_AUTH=user:password.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD python3 -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/', timeout=4)"
ENTRYPOINT ["compressor"]
CMD ["serve", "/data", "--host", "0.0.0.0"]
