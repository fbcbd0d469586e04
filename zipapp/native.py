"""Loads the bundled apsw: `apsw/__init__.py` of the archive.

The dynamic linker cannot read a zip file. So the first `import apsw` hands it the native module
in the first of these ways that works, and puts that module in the place of this one:

1. a file in the user's private cache: the next start is quick;
2. memory (Linux): for a home that is missing, read-only, noexec, full, or not ours alone;
3. a temporary file, gone once it is loaded.
"""

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import zipimport
import zlib
from collections.abc import Callable
from types import ModuleType


class Bundled:
    """A native module of the archive: a line of `_native/index`, and the content behind it.

    Those of one system and machine are a single xz stream, for the same SQLite is in each of them.
    """

    def __init__(self, line: str) -> None:
        self.target, offset, size, crc32, self.sha256 = line.split()
        self.offset, self.size, self.crc32 = int(offset), int(size), int(crc32, 16)
        self.file_name = f"apsw-{self.target}-{self.sha256}.so"

    def extract(self) -> bytes:
        import hashlib
        import lzma

        stream = read(stream_of(self.target))
        content = b""
        with contextlib.suppress(lzma.LZMAError):
            modules = lzma.LZMADecompressor().decompress(stream, self.offset + self.size)
            content = modules[self.offset :]
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ImportError("it is damaged, get this file again")
        return content


def stream_of(target: str) -> str:
    """Where it is in the archive: cp311-linux-musl-x86_64 is in _native/linux-x86_64.xz."""
    _, system, *_, machine = target.split("-")
    return f"_native/{system}-{machine}.xz"


def target() -> str:
    """What a native module has to fit, as in cp311-linux-gnu-x86_64."""
    python = {"cpython": "cp"}.get(sys.implementation.name, sys.implementation.name)
    version = "{}{}".format(*sys.version_info)
    threading = "t" if "t" in sys.abiflags else ""  # a free-threaded build has another ABI
    return f"{python}{version}{threading}-{operating_system()}-{os.uname().machine}"


def operating_system() -> str:
    if sys.platform != "linux":
        return {"darwin": "macos"}.get(sys.platform, sys.platform)
    try:  # The suffix of extension modules says "gnu" in some musl builds, so ask the libc itself.
        return "linux-gnu" if os.confstr("CS_GNU_LIBC_VERSION") else "linux-musl"
    except ValueError:
        return "linux-musl"


def read(name: str) -> bytes:
    archive = os.path.dirname(os.path.dirname(__file__))
    return zipimport.zipimporter(archive).get_data(name)


def load() -> ModuleType:
    bundled = [Bundled(line) for line in read("_native/index").decode().splitlines()]
    wanted = target()
    found = [module for module in bundled if module.target == wanted]
    if not found:
        has = ", ".join(module.target for module in bundled)
        advice = "run it with that Python, or build it with this one"
        text = f"no bundled apsw for {wanted}; this file has: {has}: {advice}"
        raise ImportError(text, name="apsw")
    failures = []
    for way in (from_cache, from_memory, from_temporary_file):
        try:
            return way(found[0])
        except (ImportError, OSError) as error:
            failures.append(error)
    raise ImportError(f"the bundled apsw does not load: {failures[-1]}", name="apsw")


def from_cache(module: Bundled) -> ModuleType:
    path = cache_path()
    directory = open_private_directory(path)
    try:
        if not is_cached(module, directory):
            write(module.extract(), module.file_name, directory)
    finally:
        os.close(directory)
    return load_file(os.path.join(path, module.file_name))


def from_memory(module: Bundled) -> ModuleType:
    if not hasattr(os, "memfd_create"):
        raise OSError("no memfd on this system")
    # Never closed: glibc takes a second library at the same /proc/self/fd/N for the first one.
    descriptor = os.memfd_create("apsw")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(module.extract())
    return load_file(f"/proc/self/fd/{descriptor}")


def from_temporary_file(module: Bundled) -> ModuleType:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="nightcrier-") as directory:
        path = os.path.join(directory, module.file_name)
        with open(path, "wb") as file:
            file.write(module.extract())
        return load_file(path)


def load_file(path: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("apsw", path)
    spec = importlib.util.spec_from_file_location("apsw", path, loader=loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


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
    status = os.fstat(directory)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(directory)
        raise PermissionError(f"{path} is not ours alone")
    return directory


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


def is_cached(module: Bundled, directory: int) -> bool:
    """Whether the file is there and whole.

    CRC-32 finds accidents, and costs every start 1 ms where SHA-256 costs 2 to 5. Against people,
    it is the directory that protects the file. Small pieces, because fresh memory is not free.
    """
    size = crc32 = 0
    try:
        with open(module.file_name, "rb", buffering=0, opener=in_directory(directory)) as file:
            while piece := file.read(1 << 16):
                size += len(piece)
                crc32 = zlib.crc32(piece, crc32)
    except FileNotFoundError:
        return False
    return (size, crc32) == (module.size, module.crc32)


def write(content: bytes, name: str, directory: int) -> None:
    """Under a name that no other start uses, then in place at once: readers never see a part."""
    temporary = f".{name}.{os.urandom(8).hex()}"
    try:
        with open(temporary, "xb", opener=in_directory(directory)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise


def in_directory(directory: int) -> Callable[[str, int], int]:
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, mode=0o500, dir_fd=directory)

    return opener


if __name__ == "apsw":  # the packer imports this file too, for target()
    sys.modules["apsw"] = load()
