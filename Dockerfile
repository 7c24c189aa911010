# The image that k8s/mutoscope.yaml runs on the head and on every worker.
FROM rayproject/ray:2.60.0-py311-cu128
USER root
RUN install -d -o ray -g users /app
USER ray
WORKDIR /app
COPY --chown=ray:users pyproject.toml constraints.txt README.md ./
COPY --chown=ray:users autoscaling autoscaling
COPY --chown=ray:users bench bench
COPY --chown=ray:users client client
COPY --chown=ray:users credits credits
COPY --chown=ray:users deployments deployments
COPY --chown=ray:users jobs jobs
COPY --chown=ray:users media media
COPY --chown=ray:users migrations migrations
COPY --chown=ray:users models models
COPY --chown=ray:users parallel parallel
COPY --chown=ray:users training training
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[gpu]'
COPY --chown=ray:users serve_config.yaml ./
ENV PYTHONPATH=/app
