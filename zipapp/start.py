"""Starts nightcrier: `__main__.py` of the archive.

It parses on every Python since 2.7, so that an old one gets one line instead of a SyntaxError.
"""

# ruff: noqa: RUF005, SIM115, UP031, UP036, S603, S606 - the language is that of Python 2.7
import os
import sys

MISSING_DEPENDENCY = 5  # the program's own exit code for it


def main():
    try:
        start()
    except KeyboardInterrupt:
        sys.exit(130)


def start():
    open_closed_streams()
    if sys.version_info < (3, 11):
        start_another_python()
    if sys.version_info < (3, 11) or sys.implementation.name != "cpython" or os.name != "posix":
        refuse("this is %s" % host())
    # The importer comes through Python's own, as bytecode from here, or else as source.
    sys.path.insert(0, os.path.join(sys.path[0], "_pyc", sys.implementation.cache_tag))
    try:
        import zlib  # noqa: F401 - Python's own importer needs it

        import zipapp_importer

        zipapp_importer.install(os.path.realpath(sys.path[1]))
        import nightcrier
    except ModuleNotFoundError as error:
        refuse("cannot start: %s" % error)
    except ImportError as error:  # the archive is damaged
        stop("cannot start: %s" % error)
    nightcrier.console_main()


def open_closed_streams():
    """Else the archive would get the descriptor of one, and who prints would find a None there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)  # to stay open at the end, as Python's own
            setattr(sys, name, open(nothing, mode, closefd=False))


def refuse(reason):
    needs = "needs CPython 3.11 or newer, with its whole standard library, on Linux or macOS"
    stop("%s: it %s; this file has: %s" % (reason, needs, read("summary")))


def stop(reason):
    sys.stderr.write("nightcrier: %s\n" % reason)
    sys.exit(MISSING_DEPENDENCY)


def host():
    import platform

    python = "%s %d.%d" % ((platform.python_implementation(),) + tuple(sys.version_info[:2]))
    return "%s on %s" % (python, platform.system())


def start_another_python():
    """Look further when the header took `python3` and that is an old one: RHEL 9 has 3.9 there.

    Who names an interpreter on the command line gets that one, or the reason why not.
    """
    if "nightcrier" not in getattr(sys, "_xoptions", ()):
        return
    import subprocess

    targets = read("index").splitlines()
    for python in sorted({"python3." + target[3:5] for target in targets}, reverse=True):
        command = [python, "-I", "-S"]
        try:  # A pyenv shim is a command with possibly nothing behind it: ask before the jump.
            if subprocess.call(command + ["-c", ""], stderr=subprocess.DEVNULL) == 0:
                os.execvp(python, command + sys.argv)
        except OSError:
            pass


def read(name):
    """What the archive has an apsw for."""
    import zipimport

    archive = os.path.dirname(__file__)
    return zipimport.zipimporter(archive).get_data("_native/" + name).decode()


if __name__ == "__main__":
    main()
