"""Imports from the archive, with code that was compiled before: at the build or at the first start.

Python's own zip importer knows one .pyc beside each module, which serves one Python version, and
on 3.11 it compiles a module twice, the first time only to learn its file name. It also opens the
file anew for each module: a program that runs would find another archive there after an upgrade.
"""

# ruff: noqa: S302 — the bytecode is as trusted as the source that is beside it
import _imp
import contextlib
import errno
import functools
import importlib
import marshal
import os
import struct
import sys
import zlib
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from importlib.util import MAGIC_NUMBER
from types import CodeType, ModuleType, TracebackType

TYPE_CHECKING = False  # the module typing costs a start 5 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

    from zipapp_cache import Cache  # type: ignore[import-not-found]

CACHE = "zipapp_cache"
TAG = sys.implementation.cache_tag

# Of the zip format: the record at its end (22 bytes, for there is no comment), and of each entry
# compression, CRC-32, size here, size unpacked, lengths of name, extra field, comment, and place.
END_OF_DIRECTORY = struct.Struct("<4s8xII2x")
ENTRY = struct.Struct("<10xH4xIIIHHH8xI")
LOCAL_HEADER = 30


class Archive:
    """The file behind one descriptor: a finder in sys.meta_path, and the loader of its modules."""

    prefix = ""  # of all names in it, for importlib's reader of resources

    def __init__(self, path: str) -> None:
        self.archive = path
        self._file = os.open(path, os.O_RDONLY)
        self._entries = dict(self._directory())
        self._baked: dict[str, bytes] = {}
        with contextlib.suppress(FileNotFoundError):
            if not sys.flags.optimize:  # the build keeps asserts and docstrings
                self._baked = marshal.loads(self.get_data(f"_pyc/{TAG}/modules"))
        if self._baked.get("magic") != MAGIC_NUMBER:  # a pre-release of the same Python version
            self._baked = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        source = self._source(name)
        if not source:
            return None
        file = os.path.join(self.archive, source)
        spec = ModuleSpec(name, self, origin=file)  # type: ignore[arg-type]
        spec.has_location = True
        if self.is_package(name):
            spec.submodule_search_locations = [os.path.dirname(file)]
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Python makes the module."""

    def exec_module(self, module: ModuleType) -> None:
        exec(self.get_code(module.__name__), module.__dict__)  # noqa: S102

    def get_code(self, name: str) -> CodeType:
        source = self._source(name)
        file = os.path.join(self.archive, source)
        if packed := self._baked.get(source):
            code: CodeType = marshal.loads(zlib.decompress(packed))
        elif name == CACHE:  # it would have to be there to be read
            code = self._compile(file)
        else:
            code = self._cached_code(name, file)
        # As importlib does for a .pyc that has moved: tracebacks and inspect find the source by it.
        _imp._fix_co_filename(code, file)  # type: ignore[attr-defined]
        return code

    def get_source(self, name: str) -> str:
        """Tracebacks and inspect ask for it."""
        return self.get_data(self._source(name)).decode()

    def get_data(self, path: str) -> bytes:
        name = path.removeprefix(self.archive + os.sep)
        if name not in self._entries:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        compression, crc32, size, place = self._entries[name]
        header = os.pread(self._file, LOCAL_HEADER, place)
        lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:], "little")
        content = os.pread(self._file, size, place + LOCAL_HEADER + sum(lengths))
        if compression:
            with contextlib.suppress(zlib.error):
                content = zlib.decompress(content, -zlib.MAX_WBITS)
        if zlib.crc32(content) != crc32:
            raise self._damaged()
        return content

    def get_resource_reader(self, name: str) -> object:
        from importlib.readers import ZipReader

        return ZipReader(self, name)  # type: ignore[arg-type]

    def is_package(self, name: str) -> bool:
        """That reader asks for it since Python 3.13."""
        return self._source(name).endswith("/__init__.py")

    def _source(self, name: str) -> str:
        """The module's path inside the archive: yaml.nodes is yaml/nodes.py."""
        path = name.replace(".", "/")
        for source in (f"{path}.py", f"{path}/__init__.py"):
            if source in self._entries:
                return source
        return ""

    def _directory(self) -> "Iterator[tuple[str, tuple[int, int, int, int]]]":
        end_at = os.fstat(self._file).st_size - END_OF_DIRECTORY.size
        end = os.pread(self._file, END_OF_DIRECTORY.size, max(end_at, 0))
        if end[:4] != b"PK\5\6":
            raise self._damaged()
        _, size, start = END_OF_DIRECTORY.unpack(end)
        before = end_at - size - start  # what somebody has put before the archive, a header maybe
        directory = os.pread(self._file, size, before + start)
        at = 0
        while at < size:
            entry = ENTRY.unpack_from(directory, at)
            compression, crc32, packed, _, name, extra, comment, place = entry
            at += ENTRY.size
            yield directory[at : at + name].decode(), (compression, crc32, packed, before + place)
            at += name + extra + comment

    def _damaged(self) -> ImportError:
        return ImportError(
            f"{self.archive} is damaged, or was written over while it ran: get it anew"
        )

    def _compile(self, file: str) -> CodeType:
        return compile(self.get_data(file), file, "exec", dont_inherit=True)

    def _cached_code(self, name: str, file: str) -> CodeType:
        """What an earlier start compiled, for a Python that the build did not have."""
        if not self._cache:
            return self._compile(file)
        cached = f"{name}.{TAG}-{MAGIC_NUMBER.hex()}-O{sys.flags.optimize}-{self._sources}.code"
        if content := self._cache.read_checked(cached):
            return marshal.loads(content)  # type: ignore[no-any-return]
        code = self._compile(file)
        # -I, which the header gives, has Python itself overlook the variable.
        if not (sys.dont_write_bytecode or os.environ.get("PYTHONDONTWRITEBYTECODE")):
            with contextlib.suppress(OSError):
                self._cache.write_checked(cached, marshal.dumps(code))
        return code

    @functools.cached_property
    def _sources(self) -> str:
        """Changes with any of them."""
        return self.get_data("_pyc/sources").decode()

    @functools.cached_property
    def _cache(self) -> "Cache | None":
        try:
            return importlib.import_module(CACHE).open_cache()
        except OSError:
            return None


def install(path: str) -> None:
    """Make imports come from the archive and the standard library, and from nowhere else."""
    archive = Archive(path)
    stdlib = os.path.dirname(os.__file__)
    sys.path[:] = [
        path for path in sys.path if path == stdlib or os.path.basename(path) == "lib-dynload"
    ]
    sys.path.append(archive.archive)  # for the processes that multiprocessing spawns
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, archive, PathFinder]
    sys.excepthook = show_exception
    if not sys.flags.no_site:
        forget_packages_that_are_bundled(archive)
    for name in ("__main__", __name__):  # they came through Python's own importer
        adopt(sys.modules[name], archive)


def forget_packages_that_are_bundled(archive: Archive) -> None:
    """A .pth file or a sitecustomize may have imported another copy of them before we came."""
    for name in list(sys.modules):
        package = name.partition(".")[0]
        if package not in ("__main__", __name__) and archive.find_spec(package):
            del sys.modules[name]


def adopt(module: ModuleType, archive: Archive) -> None:
    """Have tracebacks ask us for its source lines: Python's importer fails after an upgrade."""
    module.__loader__ = archive  # type: ignore[assignment]
    if module.__spec__:
        module.__spec__.loader = archive  # type: ignore[assignment]


def show_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Python's own way of showing it cannot read source lines from an archive before 3.13."""
    import traceback

    traceback.print_exception(kind, error, trace)
