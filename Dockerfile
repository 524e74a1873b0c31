# One image, every process: the command says which (docker-compose.yml). Nothing in it is a secret.
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/laneway
COPY requirements.lock requirements-dev.lock ./
RUN /opt/laneway/bin/pip install --no-cache-dir --require-hashes --no-deps -r requirements.lock
# The build backend comes hash-locked too, and stays out of the image.
RUN awk '/^setuptools==/ {on = 1} on; on && !/\\$/ {exit}' requirements-dev.lock > build.lock \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --require-hashes --no-deps -r build.lock
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY backend backend
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/laneway/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/laneway laneway
COPY --from=build /opt/laneway /opt/laneway
ENV PATH=/opt/laneway/bin:$PATH PYTHONUNBUFFERED=1 LANEWAY_HOST=0.0.0.0 LANEWAY_DATA_DIR=/var/lib/laneway
USER laneway
WORKDIR /var/lib/laneway
EXPOSE 8000
# SIGTERM drains (LANEWAY_DRAIN_SECONDS); what stops the container must leave it that time and a little more.
STOPSIGNAL SIGTERM
ENTRYPOINT ["laneway"]
CMD ["api"]
