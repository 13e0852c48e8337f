# One image per role, each with its own dependencies only:
#
#     docker build --target edge          -t trunkline-edge .
#     docker build --target workers       -t trunkline-workers .        # your app goes to /app, or is mounted there
#     docker build --target subscriptions -t trunkline-subscriptions .  # its functions run here: name it as the command
#
# Needs no BuildKit. Versions are those of constraints.txt, also of what builds the wheel.

FROM python:3.13-slim AS build
ENV PIP_CONSTRAINT=/source/constraints.txt PIP_BUILD_CONSTRAINT=/source/constraints.txt \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY shared shared
COPY edge edge
COPY workers workers
COPY subscriptions subscriptions
COPY cli cli
RUN pip wheel --no-deps --wheel-dir /wheels .
# What all roles need, without pip itself: nothing is installed where the service runs.
RUN python -m venv --without-pip /opt/trunkline \
    && pip --python /opt/trunkline/bin/python install /wheels/*.whl

FROM build AS build-edge
RUN pip --python /opt/trunkline/bin/python install "$(echo /wheels/*.whl)[edge]"

FROM build AS build-workers
RUN pip --python /opt/trunkline/bin/python install "$(echo /wheels/*.whl)[workers]"

FROM build AS build-subscriptions
RUN pip --python /opt/trunkline/bin/python install "$(echo /wheels/*.whl)[subscriptions]"

FROM python:3.13-slim AS runtime
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /app --shell /usr/sbin/nologin trunkline
ENV PATH=/opt/trunkline/bin:$PATH \
    TRUNKLINE_EDGE_HOST=0.0.0.0 \
    TRUNKLINE_EDGE_PORT=8080 \
    TRUNKLINE_HEALTH_HOST=0.0.0.0 \
    TRUNKLINE_HEALTH_PORT=9100
WORKDIR /app
# `RUN trunkline <role> --help` below keeps the bytecode of what the role imports of the standard library, which the base
# image has as sources only: without it each start, and each health check, would compile it again.

FROM runtime AS edge
COPY --from=build-edge /opt/trunkline /opt/trunkline
RUN trunkline edge --help >/dev/null && trunkline health --help >/dev/null
USER 10001:10001
EXPOSE 8080
# Each check is a Python process of about 0.4 s of processor time, so not more often than this, and patient: on a machine
# that is too busy, health checks that fail would make it busier.
HEALTHCHECK --interval=10s --timeout=10s --start-period=90s --retries=5 CMD ["trunkline", "health", "edge"]
ENTRYPOINT ["trunkline", "edge"]

FROM runtime AS workers
COPY --from=build-workers /opt/trunkline /opt/trunkline
RUN trunkline workers --help >/dev/null && trunkline health --help >/dev/null
USER 10001:10001
EXPOSE 9100
HEALTHCHECK --interval=10s --timeout=10s --start-period=90s --retries=5 CMD ["trunkline", "health", "workers"]
ENTRYPOINT ["trunkline", "workers"]
CMD ["/app/app.py"]

FROM runtime AS subscriptions
COPY --from=build-subscriptions /opt/trunkline /opt/trunkline
RUN trunkline subscriptions --help >/dev/null && trunkline health --help >/dev/null
USER 10001:10001
EXPOSE 9100
HEALTHCHECK --interval=10s --timeout=10s --start-period=90s --retries=5 CMD ["trunkline", "health", "subscriptions"]
ENTRYPOINT ["trunkline", "subscriptions"]
