"""Places where a run may live: a bucket, a server, a drive; each the real thing, on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from launch.supervisor import free_port
from tests.support.debian import program

_BUCKET_SERVER = """
import sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
sys.stdin.read()
"""


@dataclass(frozen=True)
class Address:
    """A URL, and the variables by which its library finds server and credentials."""

    url: str
    variables: Mapping[str, str] = field(default_factory=dict)


def wait_for_port(port: int) -> None:
    for _ in range(3000):
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.02)
    raise TimeoutError(f"nobody listens at port {port}")


@contextmanager
def bucket(name: str = "relay-tests") -> Iterator[Address]:
    """An empty bucket of an S3 server."""
    import s3fs

    port = free_port()
    words = [sys.executable, "-c", _BUCKET_SERVER, str(port)]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        credentials = {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "word", "AWS_DEFAULT_REGION": "us-east-1"}
        variables = {**credentials, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        kept = dict(os.environ)
        os.environ |= variables
        try:
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
            yield Address(f"s3://{name}", variables)
        finally:
            os.environ.clear()
            os.environ |= kept
    finally:
        server.kill()
        server.wait()


class SftpServer:
    """A real sshd with a key, a host key and a home folder of its own. Below `folder` lies what it serves."""

    def __init__(self, folder: Path):
        sshd, keygen = program(["sshd"], "openssh-server"), program(["ssh-keygen"], "openssh-client")
        self.folder, self.port, self._process = folder / "served", free_port(), None
        home = folder / "home/.ssh"
        for each in (self.folder, home):
            each.mkdir(parents=True)
        for key in (folder / "host_key", home / "id_ed25519"):
            subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        public = (folder / "host_key.pub").read_text().split()[:2]
        (home / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {' '.join(public)}\n")
        (folder / "authorized").write_text((home / "id_ed25519.pub").read_text())
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {folder}/host_key",
            f"AuthorizedKeysFile {folder}/authorized",
            "StrictModes no",
            "UsePAM no",
            "PermitRootLogin yes",
            "MaxStartups 100",
            f"PidFile {folder}/pid",
            "Subsystem sftp internal-sftp",
        ]
        (folder / "config").write_text("\n".join(lines) + "\n")
        self._words = [sshd, "-D", "-e", "-f", str(folder / "config")]
        self._log = folder / "log"
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        self.address = Address(f"sftp://{user}@127.0.0.1:{self.port}{self.folder}", {"HOME": str(folder / "home")})

    def start(self) -> None:
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)  # where it puts itself as root
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._words, stderr=log, start_new_session=True)
        wait_for_port(self.port)

    def stop(self) -> None:
        """As when its machine goes down: no connection survives."""
        if self._process is not None:
            children = subprocess.run(["pgrep", "-P", str(self._process.pid)], capture_output=True, text=True)
            grown = subprocess.run(
                ["pgrep", "-P", ",".join(children.stdout.split()) or "0"], capture_output=True, text=True
            )
            for pid in (self._process.pid, *map(int, children.stdout.split()), *map(int, grown.stdout.split())):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def sftp_server(folder: Path) -> Iterator[SftpServer]:
    """Runs for as long as the block; this process's home folder is the one with its key."""
    server, kept = SftpServer(folder), os.environ["HOME"]
    server.start()
    os.environ |= server.address.variables
    try:
        yield server
    finally:
        os.environ["HOME"] = kept
        server.stop()
