"""C of ours as a library: built once per machine by the machine's own compiler, kept in the cache folder, loaded.

Nothing of Python or another library is compiled in. A machine where a library cannot be built or loaded gets
`Unavailable` with the reason, never an exception.
"""

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from plans.commands.user_cache import cache_folder, is_private_file

_COMPILERS = ("cc", "gcc", "clang")
_OPTIONS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_MACHINE_OPTIONS = ("-march=native", "-mcpu=native", "")  # the spelling depends on compiler and processor
_COMPILE_SECONDS = 120.0

Opened = TypeVar("Opened")
Open = Callable[[Path], Opened]
"""Loads the library at a path; OSError where that is not possible on this machine."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """C that becomes one library."""

    name: str
    """Of its files in the cache folder, before the hash."""
    words: str
    """What it is, after `the`."""
    file: Path
    headers: tuple[Path, ...] = ()
    """What it includes of ours."""
    options: tuple[str, ...] = ()
    """Of the compiler, beside those that all libraries have."""

    @property
    def all_options(self) -> tuple[str, ...]:
        """What the compiler is told but for the machine and the files."""
        return (*_OPTIONS, *self.options)


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why C of ours cannot run here; shown once, after which what it would do faster is done without it."""

    reason: str


def load(source: Source, opened: Open[Opened], *, on_build: Say | None = None) -> Opened | Unavailable:
    """Return this machine's library, compiling it first where the cache folder has none that fits.

    Args:
        source: what it is made of.
        opened: loads it.
        on_build: told, in one line, that a compilation starts.
    """
    compiler = find_compiler()
    if isinstance(compiler, Unavailable):
        return compiler
    try:
        name = f"{source.name}-{_fingerprint(source, compiler)}.so"
    except (OSError, subprocess.TimeoutExpired) as error:
        return Unavailable(f"{compiler[0]} does not run: {error}")
    try:
        folder = cache_folder()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return _load_private(name, source, opened, compiler=compiler, reason=str(error), on_build=on_build)
    try:
        return load_from(folder / name, source, opened, compiler=compiler, on_build=on_build)
    except OSError as error:  # such as a full disk
        return _load_private(name, source, opened, compiler=compiler, reason=str(error), on_build=on_build)


def load_from(
    path: Path, source: Source, opened: Open[Opened], *, compiler: Sequence[str], on_build: Say | None = None
) -> Opened | Unavailable:
    """Load the library at `path`, building it there if it is missing, not this user's own, or cannot be loaded."""
    if is_private_file(path):
        with contextlib.suppress(OSError):
            return opened(path)
    if on_build is not None:
        on_build(f"compiling the {source.words} with {compiler[0]} (once per machine)")
    failure = build(path, source, compiler=compiler)
    if failure is not None:
        return failure
    try:
        return opened(path)
    except OSError as error:
        return Unavailable(f"the compiled {source.words} cannot be loaded: {error}")


def build(path: Path, source: Source, *, compiler: Sequence[str]) -> Unavailable | None:
    """Compile into `path`: complete or absent at any moment, whoever else builds it at the same time."""
    failures = []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        partial = Path(folder) / path.name
        for machine_option in _MACHINE_OPTIONS:
            options = (*source.all_options, *machine_option.split())
            command = [*compiler, *options, str(source.file), "-o", str(partial), "-lm"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
                partial.chmod(0o700)
                partial.replace(path)
                return None
            except subprocess.CalledProcessError as error:
                failures.append(next(iter(error.stderr.splitlines()), f"exit status {error.returncode}"))
            except (OSError, subprocess.TimeoutExpired) as error:
                failures.append(str(error))
    return Unavailable(f"{compiler[0]} cannot compile the {source.words}: {failures[0]}")


def find_compiler() -> tuple[str, ...] | Unavailable:
    """Return the command of the C compiler: $CC if set, else the first of cc, gcc and clang on the PATH."""
    wanted = os.environ.get("CC", "").split()
    for name, *options in [wanted] if wanted else [[name] for name in _COMPILERS]:
        if path := shutil.which(name):
            return (path, *options)
    return Unavailable(f"there is no C compiler here (looked for {wanted[0] if wanted else ', '.join(_COMPILERS)})")


def _load_private(
    name: str, source: Source, opened: Open[Opened], *, compiler: Sequence[str], reason: str, on_build: Say | None
) -> Opened | Unavailable:
    """Without a usable cache folder, build for this process only; a loaded library needs its file no more."""
    try:
        with tempfile.TemporaryDirectory(prefix="llamaplan-") as folder:
            return load_from(Path(folder) / name, source, opened, compiler=compiler, on_build=on_build)
    except OSError as error:
        return Unavailable(f"no folder can hold the compiled {source.words}: {reason}; {error}")


def _fingerprint(source: Source, compiler: Sequence[str]) -> str:
    """Hash everything the compiled code depends on."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False, timeout=_COMPILE_SECONDS)
    texts = (file.read_bytes() for file in (source.file, *source.headers))
    parts = (*texts, shlex.join((*compiler, *source.all_options)).encode(), version.stdout, _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])
