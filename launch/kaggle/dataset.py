"""The data set that a kernel run trains from: code, config and prepared data, and nothing else of this machine.

Of the code go the folders in `_FOLDERS` and the training's own: what git tracks there, and new Python files, because a
training of the user's own may not be committed yet. Of the prepared data goes what its meta.json lists. Links, hidden
files and other stray files stay, such as slurm/environment.sh, which may hold keys.

content.json lists the SHA-256 of every file. Its own SHA-256, `content_hash`, thus stands for all of them: by it a
relay knows whether anything is new to upload, and a notebook whether it was given what was uploaded for it. Equal
code, config and data give equal files, byte for byte.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import stat
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from launch.scripts import script_of
from training.base.console import UserError, counted
from training.base.files import (
    PATH_WITHIN,
    open_atomically,
    open_plain,
    read_json,
    read_plain,
    write_atomically,
    writing_to,
)

CODE, DATA, CONTENT = "relay.tar.gz", "data.tar", "content.json"
_ABOUT = "dataset-metadata.json"

# What a kernel run needs of a checkout, beside the training's own module.
_FOLDERS = ("launch", "data_prep", "training", "configs")
_FILES = ("LICENSE", "requirements.txt")

# What the code in them consists of, where there is no git to ask. YAML is not among it: it may hold keys.
_SUFFIXES = (".py", ".html", ".css", ".js", ".md")

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Content:
    """What goes into a data set: files of this machine, by their place there."""

    code: dict[str, Path]  # with the config
    data: dict[str, Path]
    new: list[str] | None  # places of the files in `code` that git does not track; None where there is no git

    def described(self) -> list[str]:
        """A few lines for the user, who should know what leaves the machine."""
        if self.new is None:
            about_git = f"without git: all files there that end in {', '.join(_SUFFIXES)}"
        else:
            about_git = f"not tracked by git: {', '.join(self.new) or 'none'}"
        return [f"code and config: {_by_folder(self.code)}", about_git, f"data: {_by_folder(self.data)}"]


def _by_folder(files: Mapping[str, Path]) -> str:
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for name, path in sorted(files.items()):
        sizes[name.partition("/")[0]].append(path.stat().st_size)
    counts = {top: counted(len(each), "file") for top, each in sizes.items()}
    return ", ".join(f"{top} ({counts[top]}, {sum(each) / 1e6:,.1f} MB)" for top, each in sizes.items())


def content_of(config: Path, data: Path, script: str | None = None) -> Content:
    """What a training by `config` on the prepared data `data` needs. Raises UserError with every mistake.

    script: the module that trains (default: what the config says). It goes too, with the package that it is in.
    """
    mistakes = [] if config.is_file() else [f"there is no config file {config}"]
    prepared: dict[str, Path] = {}
    try:
        prepared = {str(PurePosixPath("prepared", data.name, name)): data / name for name in _prepared_files(data)}
    except UserError as error:
        mistakes.append(str(error))
    if mistakes:
        raise UserError("; ".join(mistakes))
    names, new = _code_files(_ROOT, script or script_of(config))
    place, config = str(config_in_archive(config)), config.resolve()
    if new is not None and config not in {_ROOT / name for name in names}:
        new = [*new, place]
    return Content({name: _ROOT / name for name in names} | {place: config}, prepared, new)


def config_in_archive(config: Path) -> PurePosixPath:
    """The place of a config that lies anywhere; the name of its folder still says what trains by it."""
    return PurePosixPath("configs", config.resolve().parent.name, config.name)


def _prepared_files(data: Path) -> list[str]:
    """meta.json and the files that it lists. Raises UserError where that is no list, or where one is no plain file."""
    if not (data / "meta.json").is_file():
        raise UserError(f"{data} is no prepared data set: there is no meta.json in it; make it with data_prep")
    if not data.name:
        raise UserError(f"--data {data}: name the folder itself, because Kaggle's copy is found by that name")
    listed = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        listed = read_json(data / "meta.json")["files"]
    if not isinstance(listed, dict):
        raise UserError(f"{data / 'meta.json'} does not list the data's files (`files`); prepare it again")
    for name in listed:
        if not re.fullmatch(PATH_WITHIN, name) or not _is_plain(data, name):
            raise UserError(f"{data / 'meta.json'} lists {name!r}, which is no plain file there; prepare it again")
    return ["meta.json", *listed]


def _is_plain(root: Path, name: str) -> bool:
    """Whether `name` is a file below `root`, and neither it nor a folder on the way to it is a link."""
    inside = Path(name)
    if any((root / each).is_symlink() for each in (inside, *inside.parents) if each.name):
        return False
    return (root / inside).is_file()


def _code_files(root: Path, script: str) -> tuple[list[str], list[str] | None]:
    """The files of the code below `root`, and those of them that git does not track; None where git does not know."""
    own = [top for top in (script.partition(".")[0],) if top.isidentifier()]
    found = [name for top in sorted({*_FOLDERS, *own}) for name in _plain_files(root, top)]
    single = [name for name in (*_FILES, *(f"{top}.py" for top in own)) if _is_plain(root, name)]
    tracked, new = _known_to_git(root)
    # If Relay lies within another repository, that one's git may ignore all of it.
    if "launch/kaggle/dataset.py" not in tracked | new:
        return [*single, *(name for name in found if name.endswith(_SUFFIXES))], None
    new = {name for name in new if name.endswith(".py")}
    names = [name for name in (*single, *found) if name in tracked | new]
    return names, [name for name in names if name in new]


def _plain_files(root: Path, top: str) -> Iterator[str]:
    """The files below the folder `top` of `root`, without links and what is hidden, by their path in `root`."""
    if (root / top).is_symlink():
        return
    for folder, folders, names in os.walk(root / top):  # it does not follow links
        folders[:] = [each for each in folders if not each.startswith(".") and each != "__pycache__"]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and stat.S_ISREG(path.lstat().st_mode):
                yield path.relative_to(root).as_posix()


def _known_to_git(root: Path) -> tuple[set[str], set[str]]:
    """The files below `root` that git tracks, and those that it could; neither where there is no git."""
    asked = ["git", "ls-files", "-z"]
    with suppress(OSError, subprocess.CalledProcessError):
        tracked, new = (
            subprocess.run([*asked, *more], cwd=root, capture_output=True, check=True).stdout
            for more in ([], ["--others", "--exclude-standard"])
        )
        return set(os.fsdecode(tracked).split("\0")), set(os.fsdecode(new).split("\0"))
    return set(), set()


def name_mistakes(owner: str, slug: str) -> list[str]:
    """What Kaggle would not accept in a user's name and the name of a kernel or data set."""
    mistakes = []
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", owner):
        mistakes.append(f"--owner: expected a name on Kaggle, got {owner!r}")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) or not 5 <= len(slug) <= 50:
        mistakes.append(f"--slug: expected 5 to 50 lower-case letters, digits and single dashes within, got {slug!r}")
    return mistakes


def write_dataset(folder: Path, content: Content, *, owner: str, slug: str) -> None:
    """Writes `content` into `folder`, for `kaggle datasets create -p` and `... version -p`, which upload all of it.

    Raises UserError where something else is in the folder.
    """
    if mistakes := name_mistakes(owner, slug):
        raise UserError("; ".join(mistakes))
    about = {
        "id": f"{owner}/{slug}",
        "title": f"Relay {slug}"[:50],
        "licenses": [{"name": "other"}],  # the data's own, which its meta.json names
    }
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The data has an archive of its own, since it changes less often and is much larger.
        files = _write_archive(folder / CODE, content.code) | _write_archive(folder / DATA, content.data)
        write_atomically(folder / _ABOUT, json.dumps(about, indent=2) + "\n")
        write_atomically(folder / CONTENT, json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")
    strangers = {path.name for path in folder.iterdir()} - {CODE, DATA, CONTENT, _ABOUT}
    if strangers:
        raise UserError(f"{folder / min(strangers)} would be uploaded too: move it away, or choose another --output")


def content_hash(folder: Path) -> str | None:
    """The SHA-256 of the content.json in a folder that `write_dataset` wrote; None where there is none."""
    with suppress(OSError):
        return hashlib.sha256(read_plain(folder / CONTENT)).hexdigest()
    return None


class _Hashed:
    """A file that is hashed while it is read."""

    def __init__(self, file: BinaryIO):
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._digest.update(block)
        return block

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _write_archive(path: Path, members: Mapping[str, Path]) -> dict[str, str]:
    """A tar file, compressed if its name says so; returns the SHA-256 of its members.

    It holds no times, owners and permissions: equal members give equal bytes.
    """
    with open_atomically(path) as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as compressed:
                return _write_tar(compressed, members)
        return _write_tar(raw, members)


def _write_tar(file: BinaryIO | gzip.GzipFile, members: Mapping[str, Path]) -> dict[str, str]:
    hashes = {}
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for name, path in sorted(members.items()):
            with open_plain(path) as plain:
                about = tarfile.TarInfo(name)
                about.size = os.fstat(plain.fileno()).st_size
                hashed = _Hashed(plain)
                archive.addfile(about, hashed)
                hashes[name] = hashed.sha256
    return hashes
