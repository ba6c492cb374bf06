# `corral` from this checkout, with the clients of all brokers and of PostgreSQL.
#
#   docker build -t llama-corral .
#   docker run --rm -p 127.0.0.1:8000:8000 -v corral:/data llama-corral \
#       serve llama_corral.examples.digest:digest --host 0.0.0.0
#
# An image with workflows of your own begins with FROM llama-corral and installs or copies them; /data is the current folder,
# which is first on the import path.
FROM python:3.11-slim

COPY pyproject.toml README.md /build/
COPY src /build/src
RUN pip install --no-cache-dir '/build[postgres,redis,nats,rabbitmq]' && rm -r /build

RUN useradd --create-home --home-dir /data corral
USER corral
WORKDIR /data
VOLUME /data
EXPOSE 8000
ENTRYPOINT ["corral"]
