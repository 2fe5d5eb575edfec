"""What the commands share towards the shell: exit codes, and whose fault an error is."""

import os
import select
import signal
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging
from etils import epath

from mathv2_jax import storage

FINISHED, FAILED, BAD_INPUT, PREEMPTED = 0, 1, 2, 75


def is_of_input(error: BaseException) -> bool:
    """Whether the error was raised by our own checks of settings and files, or by absl's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    ours = raised_in.partition(".")[0] in ("mathv2_jax", "__main__", "config_file")
    return ours or isinstance(error, (flags.Error, FileNotFoundError))


def absolute(path: str) -> epath.Path:
    """A folder named on the command line, local (relative to where it was given) or gs://."""
    return epath.Path(os.path.abspath(os.path.expanduser(path)) if storage.is_local(path) else path)


def run(main: Callable[[Sequence[str]], int]) -> None:
    """A console script: warnings and worse are shown, and `main` gives the exit code."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    try:
        code = main(sys.argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _nobody_reads(pipe: int) -> bool:
    """Whether the reader of what is printed has gone, as `head` goes."""
    ends = select.poll()
    ends.register(pipe, 0)
    return any(event & select.POLLERR for _, event in ends.poll(0))


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether one of the arguments is one of absl's flags for help."""
    asked = {argument.lstrip("-").partition("=")[0] for argument in argv if argument[:1] == "-"}
    return bool(asked & {"help", "h", "helpfull", "helpshort", "helpxml"})


def require_unused(asked: flags.FlagValues, names: Sequence[str], why: str) -> None:
    """ValueError names flags that were given, though what they are about is not asked for."""
    given = [name for name in names if asked[name].value != asked[name].default]
    if given:
        raise ValueError(f"--{', --'.join(given)} {why}, which is not asked for")


def read_flags(
    asked: flags.FlagValues, argv: Sequence[str], doc: str | None, required: Sequence[str]
) -> bool:
    """Parses a program's own flags; False where --help was asked for, which is then printed.

    ValueError where an argument is no flag, or one of the `required` flags is missing or empty.
    """
    if asks_for_help(argv):
        print(f"{doc}{asked.get_help()}")
        return False
    rest = asked(argv)[1:]
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}: every setting is a --flag")
    missing = [n for n in required if not "".join(asked[n].value or "").strip()]
    if missing:
        raise ValueError(f"{', '.join(f'--{n}=...' for n in missing)} must be given")
    return True
