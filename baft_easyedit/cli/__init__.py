"""The command line: `baft-easyedit COMMAND`; `baft-easyedit --help` lists the commands.

Each module of this package defines some commands: `add_commands` adds them to the parser, and their
`run` functions run them. Heavy packages are imported only then, so that `--help` is fast.
"""

import os
import sys
from collections.abc import Sequence

from baft_easyedit.cli import bench, edit, export, kept, serve, theorem, tools
from baft_easyedit.cli.options import Parser
from baft_easyedit.files.messages import cut

INTERRUPTED = 130
"""Exit status after Ctrl-C, as usual in a shell."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status, 2 for bad input."""
    from baft_easyedit import __version__

    parser = Parser(
        prog="baft-easyedit", description="BaFT, knowledge editing by basis-level fine-tuning."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (edit, kept, export, serve, bench, theorem, tools):
        module.add_commands(commands)
    try:
        arguments = parser.parse_args(argv)
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:
        return _end(f"stopped{': ' if stop.args else ''}{stop}", INTERRUPTED)
    except BrokenPipeError:  # as `| head` ends what it reads from
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            return _end(f"{error.filename}: {error.strerror}", 2)
        return _end(str(error) or type(error).__name__, 2)


def _end(message: str, status: int) -> int:
    """Print why a command ended, in one line; return the status."""
    print(f"baft-easyedit: {cut(' '.join(message.split()))}", file=sys.stderr)
    return status
