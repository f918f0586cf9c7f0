"""Processes that tests start: with an environment of their own, a real ``mlflow server``, and a real S3 server."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment_of(**environment: str) -> dict[str, str]:
    """The variables of a child process: none of the tester's own choices, but those given here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "KEDRO_", "DVC_", "HYPERSD_"))}
    return {**kept, "PYTHONPATH": str(ROOT / "src"), **environment}


class Server:
    """A real ``mlflow server`` on a sqlite file, which can be stopped and started again."""

    def __init__(self, database: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self.database = f"http://127.0.0.1:{self.port}", database
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self.database}",
            "--artifacts-destination",
            str(self.database.with_name("artifacts")),
        ]
        self._process = subprocess.Popen(
            command,
            env=environment_of(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("mlflow server did not start")

    def stop(self) -> None:
        """Kill it with its workers."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def bucket(name: str, secret: str = "secret") -> Iterator[tuple[Any, dict[str, str]]]:
    """An S3 server of this process with one bucket: boto3's client of it, and the environment that reaches it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address, region = f"http://{host}:{port}", "us-east-1"
        keys = {"aws_access_key_id": "someone", "aws_secret_access_key": secret}
        client = boto3.client("s3", endpoint_url=address, region_name=region, **keys)
        client.create_bucket(Bucket=name)
        environment = {name.upper(): value for name, value in keys.items()}
        yield client, {**environment, "AWS_DEFAULT_REGION": region, "AWS_ENDPOINT_URL": address}
    finally:
        server.stop()
