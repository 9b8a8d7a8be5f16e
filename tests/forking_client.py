"""What stands in for `python` with `tests.forks`: has a program run in a fork, and ends as it ended.

    python -I -S forking_client.py SOCKET ARGUMENTS...      the arguments of `python`

Signals go on to the program; a client that is killed takes it along. What a fork cannot do as a new process
would, a new process does: options of Python that it does not know, and variables that libraries read when
they are imported. Only the standard library, and little of it: this must start at once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping

READ_AT_IMPORT = (
    "ACCELERATE_DISABLE_RICH",
    "ATEN_",
    "CUDA_",
    "GLIBC_",
    "GOMP_",
    "HF_",
    "KMP_",
    "LANG",
    "LC_",
    "LD_",
    "MALLOC_",
    "MKL_",
    "MPLBACKEND",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "PYTHON",
    "TOKENIZERS_",
    "TORCH",
    "TRANSFORMERS_",
    "TZ",
    "USE_",
)
"""How the names of variables begin that Python or a library reads once."""
READ_LATER = (
    "PYTHONBREAKPOINT",  # which ray.init sets in the process that calls it
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "PYTHON_EXEC",
    "TORCHELASTIC_",
    "TORCHINDUCTOR_",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_NCCL_",
)
"""Names among those that a fork finds as a new process does."""
PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(path: str, arguments: list[str]) -> int:
    """Exit code, where the program was not ended by a signal."""
    with open(f"{path}.json", encoding="utf-8") as file:
        known = json.load(file)
    program = parsed(arguments)
    if program is None or read_at_import(os.environ) != read_at_import(known):
        os.execv(sys.executable, [sys.executable, *arguments])
    mask = os.umask(0)
    os.umask(mask)
    job = {"program": program, "environment": dict(os.environ), "folder": os.getcwd(), "umask": mask}
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    socket.send_fds(server, [b"."], [0, 1, 2])
    replies = server.makefile("rb")
    text = json.dumps(job).encode()
    # The program may have said something, and whoever read it sent a signal, before it can be passed on here.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    server.sendall(len(text).to_bytes(8, "big") + text)
    first = replies.readline()
    if not first:
        return os.EX_SOFTWARE
    child = int(first)
    for stream in (0, 1, 2):  # whoever reads the program's output waits for all who could write
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    note = f"{path}.{os.getpid()}"  # for `tests.forks.started_by`
    with open(note, "w", encoding="ascii") as file:
        file.write(str(child))
    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: os.kill(child, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    code = int(replies.readline() or os.EX_SOFTWARE)
    os.unlink(note)
    if code < 0:  # ended by that signal, and so does this
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def parsed(arguments: list[str]) -> dict[str, object] | None:
    """The program that arguments of `python` name; None where a fork cannot tell it."""
    program: dict[str, object] = {"unbuffered": False, "isolated": False}
    for place, argument in enumerate(arguments):
        if argument == "-u":
            program["unbuffered"] = True
        elif argument == "-I":
            program["isolated"] = True
        elif argument in ("-m", "-c"):
            kind = "module" if argument == "-m" else "code"
            return {**program, "kind": kind, "what": arguments[place + 1], "words": arguments[place + 2 :]}
        elif argument.startswith("-"):
            return None
        else:
            return {**program, "kind": "file", "what": argument, "words": arguments[place + 1 :]}
    return None


def read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that must be the same."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and not name.startswith(READ_LATER)
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
