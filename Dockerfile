# The package with the pipeline, for `snakemake --software-deployment-method apptainer` and Kubernetes (docs/scaling.md):
#   docker build -t nrcg:0.1.0 .
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/nrcg
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir -r requirements.lock
COPY nrcg ./nrcg
RUN pip install --no-cache-dir --no-deps .
WORKDIR /nrcg
CMD ["nrcg", "--help"]
