"""Which exceptions are refusals, told in one sentence; whatever is not here is a defect and keeps its traceback."""

import errno
import os

import typer

from sonoedge.errors import SonoEdgeError

EXTRAS = {  # module that may be missing → the extra that brings it
    "accelerate": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "cpu",
    "onnxscript": "export",
    "optimum": "export",
    "psutil": "export",
    "safetensors": "export",
    "torch": "export",
    "transformers": "export",
}
_PATH_PROBLEMS = {
    errno.EACCES: "check its permissions",
    errno.EISDIR: "name a file",
    errno.ELOOP: "name a path without a loop of links",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "name a folder",
    errno.EPERM: "check its permissions",
    errno.EROFS: "name a path on a disk that can be written",
}


def sentence(error: Exception) -> str | None:
    """Return what to tell the user, on one line, or None when the exception is a defect."""
    message = _message(error)
    return None if message is None else " ".join(message.split())


def _message(error: Exception) -> str | None:
    match error:
        case SonoEdgeError():
            return str(error)
        case typer.TyperException():
            return _usage(error)
        case ModuleNotFoundError(name=str(name)) if (module := name.partition(".")[0]) in EXTRAS:
            extra = EXTRAS[module]
            return f"{module} is not installed: pip install 'sonoedge[{extra}]'"
        case BrokenPipeError():
            return "whoever read the output has gone: nothing to do, unless it should have read all"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"{_where(error)}the disk is full: free space and run it again"
        case OSError(errno=int(code), filename=str() | os.PathLike()) if code in _PATH_PROBLEMS:
            return f"{_where(error)}{error.strerror}: {_PATH_PROBLEMS[code]}"
        case _:
            return None


def _usage(error: typer.TyperException) -> str:
    """Word a mistake on the command line: what is wrong, and where the help is."""
    context = getattr(error, "ctx", None)
    command = "sonoedge" if context is None else context.command_path
    return f"{error.format_message().strip().rstrip('.')} (see `{command} --help`)"


def _where(error: OSError) -> str:
    return "" if error.filename is None else f"{os.fspath(error.filename)}: "
