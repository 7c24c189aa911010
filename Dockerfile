# The image that k8s/mutoscope.yaml runs on the head and on every worker.
FROM rayproject/ray:2.60.0-py311-cu128
WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
COPY autoscaling autoscaling
COPY bench bench
COPY client client
COPY credits credits
COPY deployments deployments
COPY jobs jobs
COPY media media
COPY migrations migrations
COPY models models
COPY training training
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[gpu]'
COPY serve_config.yaml ./
ENV PYTHONPATH=/app
