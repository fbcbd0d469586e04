"""The user's private cache: the native module, and code for a Python that the build did not have.

Whoever can write here decides what this user runs. So the directory, and each file that is taken
from it, must belong to the user, and nobody else may be able to write to it. NIGHTCRIER_CACHE names
the directory; else it is `nightcrier` in XDG_CACHE_HOME, or in ~/.cache.
"""

import contextlib
import functools
import os
import stat
import time
import zlib

DAY = 86400
KEPT_UNUSED = 30 * DAY
LEFTOVER = 3600
CHECKSUM = 4

# What we may delete, of this version or another: our files, and what a killed start leaves of them.
OURS = r"apsw-[\w-]+-[0-9a-f]{64}\.so|[\w.-]+-O\d-[0-9a-f]{64}\.code"
TEMPORARY = rf"\.({OURS})\.[0-9a-f]{{16}}"


class Cache:
    def __init__(self, path: str) -> None:
        self.path = path
        self._directory = open_private_directory(path)

    def open(self, name: str) -> int | None:
        """A descriptor of the file, if it is there and nobody else could have written it."""
        try:
            file = self._open(name, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would keep us waiting
        except OSError:
            return None
        status = os.fstat(file)
        if not (stat.S_ISREG(status.st_mode) and is_ours_alone(status)):
            os.close(file)
            return None
        if abs(time.time() - status.st_mtime) > DAY:
            with contextlib.suppress(OSError):
                os.utime(file)  # it is in use: the time is what _prune() goes by
        return file

    def write(self, name: str, content: bytes, *, durable: bool = False) -> None:
        """Under a name of its own, then in place at once: readers never see a part."""
        temporary = f".{name}.{os.urandom(8).hex()}"
        try:
            with open(temporary, "xb", opener=self._open) as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.rename(temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._directory)
            raise
        with contextlib.suppress(OSError):
            self._prune()

    def read_checked(self, name: str) -> bytes | None:
        """What write_checked() wrote, unless a crash or an accident has changed it."""
        descriptor = self.open(name)
        if descriptor is None:
            return None
        with open(descriptor, "rb", buffering=0) as file:
            content = file.read()
        body = content[CHECKSUM:]
        return body if content[:CHECKSUM] == checksum(body) else None

    def write_checked(self, name: str, body: bytes) -> None:
        self.write(name, checksum(body) + body)

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, mode=0o500, dir_fd=self._directory)

    @functools.cache  # noqa: B019 — once in a process, which has one cache
    def _prune(self) -> None:
        """Remove what no start has used for a while."""
        import re

        kept = {OURS: KEPT_UNUSED, TEMPORARY: LEFTOVER}
        for name in os.listdir(self._directory):
            for pattern, seconds in kept.items():
                with contextlib.suppress(OSError):  # another start was quicker
                    if re.fullmatch(pattern, name) and self._age(name) > seconds:
                        os.unlink(name, dir_fd=self._directory)

    def _age(self, name: str) -> float:
        status = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        return time.time() - status.st_mtime


@functools.cache
def open_cache() -> Cache:
    return Cache(cache_path())


def checksum(content: bytes) -> bytes:
    """It finds accidents, at little cost. Against people, it is the owner that protects a file."""
    return zlib.crc32(content).to_bytes(CHECKSUM, "little")


def cache_path() -> str:
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.environ.get("NIGHTCRIER_CACHE") or os.path.join(caches, "nightcrier")
    if not os.path.isabs(path):  # there may be no home at all
        raise OSError(f"{path} is not an absolute path")
    return os.path.normpath(path)  # after a final slash, O_NOFOLLOW would follow


def open_private_directory(path: str) -> int:
    """Open the directory, created if need be, unless anybody else can put files into it."""
    make_directory(path)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if not is_ours_alone(os.fstat(directory)):
        os.close(directory)
        raise PermissionError(f"{path} is not ours alone")
    return directory


def is_ours_alone(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def make_directory(path: str) -> None:
    """Make the directory and the one around it, as ~/.cache/nightcrier, but never a home.

    Nor anything in a directory of another user: root with that user's HOME (sudo) would leave
    there what the user can never use.
    """
    for directory in (os.path.dirname(path), path):
        if not os.path.isdir(directory):
            parent = os.path.dirname(directory)
            if os.stat(parent).st_uid not in (0, os.geteuid()):
                raise PermissionError(f"{parent} belongs to another user")
            with contextlib.suppress(FileExistsError):  # another first start was quicker
                os.mkdir(directory, 0o700)


def leads_nowhere_else(path: str) -> bool:
    """Whether nobody but us and root can put another file in the place of this one."""
    path = os.path.realpath(path)
    while path != "/":
        path = os.path.dirname(path)
        status = os.stat(path)
        others_write = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or others_write:
            return False
    return True
