"""Files at an address: in a bucket (s3://), on a server (sftp://), on a mounted drive (file://), or elsewhere.

Promises: a failure of whatever serves the address is an AddressError of one line. A file that was `put` on a server or
a drive appears whole or not at all, as it does in a bucket. Where `guards` is true, a name is created once, however
many machines try at the same moment. Credentials are found by each library in its own way; a URL with one is refused.
A store may be used by one thread at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec

from training.base.console import UserError
from training.base.files import copy_plain, read_plain, remove

T = TypeVar("T")

# What fsspec needs beside itself; not in requirements.txt, since few runs have an address.
CLIENTS = {
    "s3": "s3fs==2026.9.0",
    "gs": "gcsfs==2026.9.0",
    "sftp": "paramiko==5.1.0",
}

# How long a server that is silent is waited for, in seconds: to connect, and to answer.
_CONNECT_S, _ANSWER_S = 10, 60


class AddressError(Exception):
    """The address cannot be reached, or refuses: the message says why. It may pass."""


def open_store(url: str) -> Store:
    """The store of a URL; nothing is asked of it yet. Raises UserError where a library is missing."""
    scheme = urlsplit(url).scheme
    kinds: dict[str, type[Store]] = {"file": _Drive, "s3": _Bucket, "sftp": _Server}
    return kinds.get(scheme, Store)(url)


@contextmanager
def _naming_failures(*, may_lack: bool = False) -> Iterator[None]:
    """Whatever a library raises becomes an AddressError; may_lack: but that a file is not there."""
    try:
        yield
    except (AddressError, UserError):
        raise
    except Exception as error:  # each library has classes of its own
        said = " ".join(str(error).split())[:200] or type(error).__name__
        kind = FileNotFoundError if may_lack and isinstance(error, FileNotFoundError) else AddressError
        raise kind(said) from error


class Store:
    """What fsspec serves. Names are paths below the URL, with `/` between their parts."""

    guards = False
    _reconnects = False
    _options: ClassVar[dict[str, Any]] = {}

    def __init__(self, url: str):
        self.url, scheme = url.rstrip("/"), urlsplit(url).scheme
        self._opened: Any = None
        try:
            self._class: Any = fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            if scheme not in fsspec.available_protocols():
                raise UserError(
                    f"--run_at {scheme}://... is no kind of address that fsspec knows: s3://, sftp:// and file:// are"
                ) from None
            client = CLIENTS.get(scheme)
            how = f"pip install {client}" if client else " ".join(str(error).split())
            raise UserError(f"--run_at {scheme}://... needs a library that is not here: {how}") from None

    def _connect(self) -> Any:
        options = self._class._get_kwargs_from_urls(self.url)
        return self._class(**options, **self._options, skip_instance_cache=True, use_listings_cache=False)

    def _try(self, work: Callable[[Any], T], *, may_lack: bool = False) -> T:
        """Does it by fsspec's file system of the address."""
        with _naming_failures(may_lack=may_lack):
            try:
                if self._opened is None:
                    self._opened = self._connect()
                return work(self._opened)
            except FileNotFoundError:
                raise
            except Exception:
                if self._reconnects:  # it may be the connection that is broken: the next try has a new one
                    self._opened = None
                raise

    def _path(self, name: str) -> str:
        path: str = self._class._strip_protocol(f"{self.url}/{name}")
        return path

    def put(self, source: Path, name: str) -> None:
        """Sends a file, in the place of one that has its name."""
        self._try(lambda fs: fs.put_file(str(source), self._path(name)))

    def get(self, name: str, target: Path) -> None:
        """Fetches a file. Raises FileNotFoundError."""
        try:
            self._try(lambda fs: fs.get_file(self._path(name), str(target)), may_lack=True)
        except BaseException:
            target.unlink(missing_ok=True)  # some libraries make it first
            raise

    def read(self, name: str) -> bytes:
        """What a small file holds. Raises FileNotFoundError."""
        content: bytes = self._try(lambda fs: fs.cat_file(self._path(name)), may_lack=True)
        return content

    def create(self, name: str, content: bytes) -> bool:
        """Makes a small file; false where its name is taken. Without `guards` it is overwritten."""
        self._try(lambda fs: fs.pipe_file(self._path(name), content))
        return True

    def names(self, folder: str) -> dict[str, int | None]:
        """What lies in a folder, with the size of files in bytes; nothing where there is no such folder."""
        path = self._path(folder)

        def look(fs: Any) -> list[dict[str, Any]]:
            fs.invalidate_cache()
            found: list[dict[str, Any]] = fs.ls(path, detail=True)
            return [each for each in found if each["name"].rstrip("/") != path]

        with suppress(FileNotFoundError):
            return {
                PurePosixPath(each["name"]).name: each["size"] if each["type"] == "file" else None
                for each in self._try(look, may_lack=True)
            }
        return {}

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it, if there is one."""
        with suppress(FileNotFoundError):
            self._try(lambda fs: fs.rm(self._path(name), recursive=True), may_lack=True)


class _Bucket(Store):
    """S3, and what speaks as it does: a write with If-None-Match is refused where the name is taken."""

    guards = True
    _options: ClassVar[dict[str, Any]] = {
        "config_kwargs": {"connect_timeout": _CONNECT_S, "read_timeout": _ANSWER_S, "retries": {"max_attempts": 1}}
    }

    def create(self, name: str, content: bytes) -> bool:
        def work(fs: Any) -> bool:
            try:
                fs.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
            return True

        return self._try(work)


class _Server(Store):
    """SFTP: a file is opened exclusively. Only a server whose key is among the known hosts is talked to."""

    guards = _reconnects = True

    def _connect(self) -> Any:
        import paramiko

        class KnownServer(self._class):  # type: ignore[misc,name-defined]
            """fsspec's own takes any server's word for who it is."""

            def _connect(self) -> None:
                self.client = paramiko.SSHClient()
                self.client.load_system_host_keys()
                limits = {"timeout": _CONNECT_S, "banner_timeout": _CONNECT_S, "auth_timeout": _CONNECT_S}
                self.client.connect(self.host, **self.ssh_kwargs, **limits)
                self.ftp = self.client.open_sftp()
                self.ftp.get_channel().settimeout(_ANSWER_S)

        return KnownServer(**self._class._get_kwargs_from_urls(self.url), skip_instance_cache=True)

    def put(self, source: Path, name: str) -> None:
        def work(fs: Any) -> None:
            path = self._path(name)
            fs.put_file(str(source), f"{path}.partial")
            fs.mv(f"{path}.partial", path)

        self._try(work)

    def create(self, name: str, content: bytes) -> bool:
        def work(fs: Any) -> bool:
            path = self._path(name)
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                file = fs.ftp.open(path, "wx")
            except OSError:
                if fs.exists(path):  # the protocol has no word for it
                    return False
                raise
            with file:
                file.write(content)
            return True

        return self._try(work)


class _Drive(Store):
    """A folder of this machine's, such as a drive that is mounted there."""

    guards = True

    def __init__(self, url: str):
        self.url, self._root = url.rstrip("/"), Path(unquote(urlsplit(url).path))

    def _below(self, name: str) -> Path:
        # Where the drive is not mounted the run would live on a disk that may be gone tomorrow.
        if not self._root.parent.is_dir():
            raise AddressError(f"there is no folder {self._root.parent}: mount or make it first")
        return self._root / name

    def put(self, source: Path, name: str) -> None:
        with _naming_failures():
            target = self._below(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_plain(source, target)

    def get(self, name: str, target: Path) -> None:
        with _naming_failures(may_lack=True):
            copy_plain(self._below(name), target)

    def read(self, name: str) -> bytes:
        with _naming_failures(may_lack=True):
            return read_plain(self._below(name))

    def create(self, name: str, content: bytes) -> bool:
        with _naming_failures():
            target = self._below(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = target.open("xb")
            except FileExistsError:
                return False
            with file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return True

    def names(self, folder: str) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        with _naming_failures(), suppress(FileNotFoundError):
            for each in self._below(folder).iterdir():
                with suppress(FileNotFoundError):  # removed meanwhile
                    found[each.name] = each.stat().st_size if each.is_file() else None
        return found

    def remove(self, name: str) -> None:
        with _naming_failures(), suppress(FileNotFoundError):
            remove(self._below(name))
        with suppress(OSError):  # where there is more
            self._root.rmdir()
