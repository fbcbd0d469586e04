"""Starts nightcrier: `__main__.py` of the archive.

It parses on every Python since 2.7, so that an old one gets one line instead of a SyntaxError.
"""

# ruff: noqa: RUF005, UP031, UP036, S603, S606 — the language is that of Python 2.7
import os
import sys
import zipimport

MISSING_DEPENDENCY = 5  # the program's own exit code for it


def main():
    if sys.version_info < (3, 11):
        start_another_python()
        sys.stderr.write(
            "nightcrier: needs Python 3.11 or newer, and this is %d.%d; this file has: %s\n"
            % (sys.version_info[0], sys.version_info[1], ", ".join(bundled()))
        )
        sys.exit(MISSING_DEPENDENCY)
    import zipapp_importer

    zipapp_importer.install(os.path.realpath(sys.path[0]))
    import nightcrier

    nightcrier.console_main()


def start_another_python():
    """Look further when the header took `python3` and that is an old one: RHEL 9 has 3.9 there.

    Who names an interpreter on the command line gets that one, or the reason why not.
    """
    if "nightcrier" not in getattr(sys, "_xoptions", ()):
        return
    import subprocess

    for python in sorted({"python3." + target[3:5] for target in bundled()}, reverse=True):
        command = [python, "-I", "-S"]
        try:  # A pyenv shim is a command with possibly nothing behind it: ask before the jump.
            if subprocess.call(command + ["-c", ""], stderr=subprocess.DEVNULL) == 0:
                os.execvp(python, command + sys.argv)
        except OSError:
            pass


def bundled():
    """What the archive has an apsw for, as in cp311-linux-gnu-x86_64."""
    index = zipimport.zipimporter(sys.path[0]).get_data("_native/index")
    return [line.split()[0] for line in index.decode().splitlines()]


if __name__ == "__main__":
    main()
