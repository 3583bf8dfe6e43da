# One image for worker, monitor and submitting. An application builds on it: FROM rq-ceylon, then COPY its files to /app.

FROM python:3.13-slim AS build
RUN python -m venv /opt/ceylon
COPY pyproject.toml README.md LICENSE /src/
COPY rq_ceylon /src/rq_ceylon
RUN /opt/ceylon/bin/pip install --no-cache-dir --disable-pip-version-check "/src[fast]"

FROM python:3.13-slim
COPY --from=build /opt/ceylon /opt/ceylon
ENV PATH=/opt/ceylon/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001:10001
CMD ["ceylon", "--help"]
