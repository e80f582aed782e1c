"""A PostgreSQL server of its own on loopback, in a temporary directory, with a password; stopped and removed afterwards.

    python tests/services/postgres.py COMMAND...

runs a command with its URL in MOACOMPRESS_STORAGE. The server is Debian's, or whichever `initdb` is on the path.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MISSING = "PostgreSQL is not here; `make test-services` installs Debian's where it may"
USER = "postgres"
"""Debian's account of the server, which refuses to run as root; and the name of its own first user."""


def programs() -> Path | None:
    """Returns the folder of the newest server's programs; None where there is none."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = debian[-1] if debian else shutil.which("initdb")
    return None if found is None else Path(found).resolve().parent


@contextmanager
def running() -> Iterator[str]:
    """Starts a server and yields its URL, with user and password; it is stopped when the block ends."""
    folder = programs()
    if folder is None:
        raise FileNotFoundError(MISSING)
    password, port = secrets.token_urlsafe(16), free_port()
    with tempfile.TemporaryDirectory(prefix="postgres-") as place:
        data, file = Path(place) / "data", Path(place) / "password"
        file.touch(mode=0o600)
        file.write_text(password)
        if os.getuid() == 0:
            account = pwd.getpwnam(USER)
            for path in (Path(place), file):
                os.chown(path, account.pw_uid, account.pw_gid)
        run(folder / "initdb", "-D", data, "-U", USER, "--auth=scram-sha-256", f"--pwfile={file}", "--no-sync")
        settings = (
            f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={place} -c max_connections=200"
        )
        run(folder / "pg_ctl", "-D", data, "-l", Path(place) / "log", "-w", "-o", settings, "start")
        try:
            yield f"postgresql://{USER}:{password}@127.0.0.1:{port}/postgres"
        finally:
            run(folder / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


def run(program: Path, *arguments: object) -> None:
    """Runs one of the server's programs, as its account where this process is root's."""
    command = [str(program), *map(str, arguments)]
    if os.getuid() == 0:
        command = ["runuser", "-u", USER, "--", *command]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd="/", check=False)
    if done.returncode:
        raise RuntimeError(f"{program.name} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def free_port() -> int:
    """Returns a port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    with running() as url:
        sys.exit(subprocess.run(sys.argv[1:], env={**os.environ, "MOACOMPRESS_STORAGE": url}, check=False).returncode)
