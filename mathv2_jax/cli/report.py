"""mathv2-report: a run as pages to read: curves, and every proof with what was said about it.

mathv2-report --workdir=DIR [--out=DIR/report]

DIR is the workdir of mathv2-train or mathv2-search, finished or running. Open OUT/index.html in a
browser: nothing is served and nothing is loaded from elsewhere. The same command brings the pages
up to date.

Exit codes: 0 finished, 2 bad usage or input, 1 failure.
"""

import sys
from collections.abc import Sequence

from absl import flags

from mathv2_jax.cli import shell
from mathv2_jax.report import site

_ASKED = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=_ASKED)
_OUT = flags.DEFINE_string("out", None, "Default: report in it.", flag_values=_ASKED)


def main(argv: Sequence[str]) -> int:
    """Usage and input errors are one line and exit code 2; what is a bug keeps its traceback."""
    try:
        _ASKED.unparse_flags()  # one process may call it often
        if not shell.read_flags(_ASKED, argv, __doc__, [_WORKDIR.name]):
            return shell.FINISHED
        workdir = shell.absolute(_WORKDIR.value or "")
        out = shell.absolute(_OUT.value) if _OUT.value else workdir / "report"
        made = site.write(workdir, out)
        print(
            f"problems {made.problems:,}  proofs {made.proofs:,}  analyses and meta-analyses "
            f"{made.remarks:,}  stages with curves {made.stages:,}: {made.page}"
        )
        return shell.FINISHED
    except (ValueError, FileNotFoundError, flags.Error) as error:
        if not shell.is_of_input(error):
            raise
        print(f"mathv2-report: {error}", file=sys.stderr)
        return shell.BAD_INPUT
    except OSError as error:  # a full disk, a folder that may not be read: no bug of ours
        print(f"mathv2-report: {error}", file=sys.stderr)
        return shell.FAILED


def run() -> None:
    """The console script."""
    shell.run(main)


if __name__ == "__main__":
    run()
