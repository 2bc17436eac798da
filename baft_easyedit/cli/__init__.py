"""The command line: `baft-easyedit COMMAND`; `baft-easyedit --help` lists the commands.

Each module of this package has some commands: it adds them to the parser, and runs them. What they
need beyond the options is imported when they run.
"""

import argparse
import sys
from collections.abc import Sequence

from baft_easyedit.cli import bench, demo, edit, gguf, speed
from baft_easyedit.cli.options import Parser
from baft_easyedit.files.messages import cut

INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell has it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status, 2 for bad input."""
    try:
        arguments = _parser().parse_args(argv)
        status = arguments.run(arguments)
    except KeyboardInterrupt as stop:
        return _end(f"stopped{': ' if stop.args else ''}{stop}", INTERRUPTED)
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        return _end(_message(error), 2)
    return status or 0


def _end(message: str, status: int) -> int:
    """Print why a command ended, in one line; return the status."""
    print(f"baft-easyedit: {cut(' '.join(message.split()))}", file=sys.stderr)
    return status


def _message(error: Exception) -> str:
    """Return what an error says; of the system's own, the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    from baft_easyedit import __version__

    parser = Parser(
        prog="baft-easyedit", description="BaFT, knowledge editing by basis-level fine-tuning."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (edit, demo, bench, speed, gguf):
        module.add_commands(commands)
    doctor = commands.add_parser("doctor", help="say which EasyEdit was found and what works")
    doctor.set_defaults(run=_doctor)
    return parser


def _doctor(_arguments: argparse.Namespace) -> int:
    """Print what `doctor` finds; the status is 1 if EasyEdit cannot be used."""
    from baft_easyedit.easyedit.doctor import doctor

    report = doctor()
    print(report)
    return 0 if report.is_usable else 1
