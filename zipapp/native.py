"""Loads the bundled apsw: `apsw/__init__.py` of the archive.

The dynamic linker cannot read a zip file. So the first `import apsw` hands it the native module
in the first of these ways that works, and puts that module in the place of this one:

1. a file in the user's private cache: the next start is quick;
2. memory (Linux): for a home that is missing, read-only, noexec, full, or not ours alone;
3. a temporary file, gone once it is loaded.

The linker gets the descriptor that was verified: no other file can come in between. Who sets
NIGHTCRIER_CACHE and has it not used is told so, for each start then takes the time of a first one.
"""

import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import sys
import zlib
from types import ModuleType

TYPE_CHECKING = False  # the module typing costs a start 5 ms
if TYPE_CHECKING:
    from zipapp_cache import Cache  # type: ignore[import-not-found]


class Unusable(ImportError):
    """No way of loading it will help."""


class Bundled:
    """A native module of the archive: a line of `_native/index`, and the content behind it.

    Those of one system and machine are a single xz stream, for the same SQLite is in each of them.
    """

    def __init__(self, line: str) -> None:
        self.target, self.libc, offset, size, crc32, self.sha256 = line.split()
        self.offset, self.size, self.crc32 = int(offset), int(size), int(crc32, 16)
        self.file_name = f"apsw-{self.target}-{self.sha256}.so"

    @functools.cached_property
    def content(self) -> bytes:
        import hashlib

        try:
            import lzma
        except ImportError as error:
            raise Unusable(f"this Python was built without lzma ({error})") from error
        stream = read(stream_of(self.target))
        content = b""
        with contextlib.suppress(lzma.LZMAError):
            modules = lzma.LZMADecompressor().decompress(stream, self.offset + self.size)
            content = modules[self.offset :]
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise Unusable("it is damaged, get this file again")
        return content

    def is_in(self, file: int) -> bool:
        """Whether the file is whole. Small pieces, because fresh memory is not free."""
        size = crc32 = 0
        while piece := os.read(file, 1 << 16):
            size += len(piece)
            crc32 = zlib.crc32(piece, crc32)
        return (size, crc32) == (self.size, self.crc32)


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
    # The suffix of extension modules says "gnu" in some musl builds, so ask the libc itself.
    return "linux-gnu" if glibc() else "linux-musl"


def glibc() -> str:
    """Its version; musl has none to tell."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ")
    except ValueError:
        return ""


def read(name: str) -> bytes:
    archive = os.path.dirname(os.path.dirname(__file__))
    content: bytes = __loader__.get_data(os.path.join(archive, name))  # type: ignore[name-defined]
    return content


def load() -> ModuleType:
    module = find()
    failures = []
    for way in (from_cache, from_memory, from_temporary_file):
        try:
            return way(module)
        except Unusable as error:
            failures = [str(error)]
            break
        except (ImportError, OSError) as error:
            failures.append(str(error))
            if way is from_cache and os.environ.get("NIGHTCRIER_CACHE"):
                print(f"nightcrier: NIGHTCRIER_CACHE is not used: {error}", file=sys.stderr)
    reasons = "; ".join(dict.fromkeys(failures))
    raise ImportError(f"the bundled apsw does not load: {reasons}", name="apsw")


def find() -> Bundled:
    wanted = target()
    index = map(Bundled, read("_native/index").decode().splitlines())
    found = [module for module in index if module.target == wanted]
    if not found:
        has = read("_native/summary").decode()
        raise ImportError(f"no bundled apsw for {wanted}; this file has: {has}", name="apsw")
    [module] = found
    if glibc() and version(glibc()) < version(module.libc):
        text = f"the bundled apsw needs glibc {module.libc}, and this host has {glibc()}"
        raise ImportError(text, name="apsw")
    return module


def version(text: str) -> list[int]:
    return [int(number) for number in text.split(".") if number.isdecimal()]


def from_cache(module: Bundled) -> ModuleType:
    import zipapp_cache

    cache = zipapp_cache.open_cache()
    file = open_cached(module, cache)
    if file is None:
        cache.write(module.file_name, module.content, durable=True)
        file = open_cached(module, cache)
    if file is None:
        raise OSError(f"{module.file_name} in {cache.path} does not stay as it was written")
    return load_file(file, os.path.join(cache.path, module.file_name))


def open_cached(module: Bundled, cache: "Cache") -> int | None:
    file: int | None = cache.open(module.file_name)
    if file is not None and not module.is_in(file):
        os.close(file)
        return None
    return file


def from_memory(module: Bundled) -> ModuleType:
    if not hasattr(os, "memfd_create"):
        raise OSError("no memfd on this system")
    import fcntl

    file = os.memfd_create("apsw", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(file, "wb", closefd=False) as writer:
        writer.write(module.content)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return load_file(file)


def from_temporary_file(module: Bundled) -> ModuleType:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="nightcrier-") as directory:
        path = os.path.join(directory, module.file_name)
        with open(path, "wb") as writer:
            writer.write(module.content)
        return load_file(os.open(path, os.O_RDONLY), path)


def load_file(file: int, path: str = "") -> ModuleType:
    """Load what the descriptor has, by its path only where nobody can put another file there.

    The descriptor stays open: glibc takes a second library at the same /proc/self/fd/N for the
    first one.
    """
    import zipapp_cache

    through = f"/proc/self/fd/{file}"
    if os.path.exists(through):
        path = through
    elif not path or not zipapp_cache.leads_nowhere_else(path):
        raise OSError(f"no {through} here, and others can change what {path or 'a path'} leads to")
    loader = importlib.machinery.ExtensionFileLoader("apsw", path)
    spec = importlib.util.spec_from_file_location("apsw", path, loader=loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


if __name__ == "apsw":  # the packer imports this file too, for target()
    sys.modules["apsw"] = load()
