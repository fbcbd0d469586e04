"""Imports from the archive, with the bytecode that was made when the archive was built.

Python's own zip importer knows one .pyc beside each module, which serves one Python version, and
on 3.11 it compiles a module twice, the first time only to learn its file name.
"""

# ruff: noqa: S302 — the bytecode is as trusted as the source that is beside it
import _imp
import marshal
import os
import sys
import zipimport
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.util import MAGIC_NUMBER
from types import CodeType, TracebackType

PYC_HEADER = 16


class ArchiveImporter(zipimport.zipimporter):
    def get_filename(self, fullname: str) -> str:
        return os.path.join(self.archive, self._source(fullname))

    def get_code(self, fullname: str) -> CodeType:
        source = self._source(fullname)
        try:
            pyc = self.get_data(f"_pyc/{sys.implementation.cache_tag}/{source}c")
        except OSError:
            return super().get_code(fullname)
        if pyc[: len(MAGIC_NUMBER)] != MAGIC_NUMBER:  # a pre-release of the same Python version
            return super().get_code(fullname)
        code: CodeType = marshal.loads(memoryview(pyc)[PYC_HEADER:])
        # As importlib does for a .pyc that has moved: tracebacks and inspect find the source by it.
        _imp._fix_co_filename(code, self.get_filename(fullname))  # type: ignore[attr-defined]
        return code

    def get_source(self, fullname: str) -> str | None:
        """For tracebacks, to which only an OSError says that there is none.

        When the archive was replaced under us, there may be anything in its place.
        """
        try:
            return super().get_source(fullname)
        except Exception as error:
            raise OSError(f"no source of {fullname}: {error}") from error

    def _source(self, fullname: str) -> str:
        """The module's path inside the archive: yaml.nodes is yaml/nodes.py."""
        path = self.prefix + fullname.rpartition(".")[2]
        return f"{path}/__init__.py" if self.is_package(fullname) else f"{path}.py"


def install(archive: str) -> None:
    """Make imports come from the archive and the standard library, and from nowhere else."""
    stdlib = os.path.dirname(os.__file__)
    sys.path[:] = [archive] + [
        path for path in sys.path if path == stdlib or os.path.basename(path) == "lib-dynload"
    ]
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]
    others = [hook for hook in sys.path_hooks if hook is not zipimport.zipimporter]
    sys.path_hooks[:] = [ArchiveImporter, *others]
    sys.path_importer_cache.pop(archive, None)
    sys.excepthook = show_exception
    if not sys.flags.no_site:
        forget_packages_that_are_bundled(archive)


def forget_packages_that_are_bundled(archive: str) -> None:
    """A .pth file or a sitecustomize may have imported another copy of them before we came."""
    importer = ArchiveImporter(archive)
    for name in list(sys.modules):
        package = name.partition(".")[0]
        if package not in ("__main__", __name__) and importer.find_spec(package):
            del sys.modules[name]


def show_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Python's own way of showing it cannot read source lines from an archive before 3.13."""
    import traceback

    traceback.print_exception(kind, error, trace)
