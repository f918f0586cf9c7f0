"""Processes that tests start: with an environment of their own, and real servers of MLflow, Postgres and S3."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment_of(**environment: str) -> dict[str, str]:
    """The variables of a child process: none of the tester's own choices, but those given here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "KEDRO_", "DVC_", "HYPERSD_"))}
    return {**kept, "PYTHONPATH": str(ROOT / "src"), **environment}


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@contextmanager
def postgres(folder: Path, password: str) -> Iterator[str]:
    """The address of a database ``mlflow`` on a real Postgres of Debian's packages, which refuses to run as root."""
    binaries, port = POSTGRES[-1], free_port()
    folder.mkdir()
    as_user: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        for parent in folder.parents[:-2]:  # pytest's folders are root's alone
            parent.chmod(parent.stat().st_mode | 0o111)
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    secret = folder / "password"
    secret.write_text(password)
    secret.chmod(0o644)
    data = folder / "data"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
    authentication = ["--auth=scram-sha-256", "--username=mlflow", f"--pwfile={secret}"]
    subprocess.run([*as_user, binaries / "initdb", "-D", data, *authentication], **quiet)  # type: ignore[call-overload]
    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    subprocess.run([*as_user, binaries / "pg_ctl", "-D", data, "-w", "-o", options, "-l", folder / "log", "start"], **quiet)  # type: ignore[call-overload]
    try:
        login = {"env": {**os.environ, "PGPASSWORD": password}}
        subprocess.run([binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"], **quiet, **login)  # type: ignore[call-overload]
        yield f"postgresql://mlflow:{password}@127.0.0.1:{port}/mlflow"
    finally:
        subprocess.run([*as_user, binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **quiet)  # type: ignore[call-overload]


class Server:
    """A real ``mlflow server``, which can be stopped and started again.

    Args:
        database: a sqlite file, or the address of a database server.
        artifacts: where the server keeps them. A folder beside the file where it is left out.
        environment: what the server needs to reach them.
    """

    def __init__(self, database: Path | str, artifacts: str | None = None, environment: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self.uri, self.database = f"http://127.0.0.1:{self.port}", database
        self._store = f"sqlite:///{database}" if isinstance(database, Path) else database
        self._artifacts = artifacts or str(Path(database).with_name("artifacts"))
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += [
            "--backend-store-uri",
            self._store,
            "--artifacts-destination",
            self._artifacts,
        ]
        self._process = subprocess.Popen(
            command,
            env=environment_of(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", **self._environment),
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
        yield client, {**environment, "AWS_DEFAULT_REGION": region, "AWS_ENDPOINT_URL": address, "MLFLOW_S3_ENDPOINT_URL": address}
    finally:
        server.stop()
