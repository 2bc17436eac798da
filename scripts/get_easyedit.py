"""Clone EasyEdit at the commit that this package is tested with: for `make demo`.

    python scripts/get_easyedit.py DIRECTORY [--seconds 20]

Only its code and settings are downloaded, without history. The status is 0 if it is there.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from baft_easyedit.easyedit.host import COMMIT, URL


def clone(directory: Path, seconds: float, url: str = URL, commit: str = COMMIT) -> str | None:
    """Clone one commit; return why that could not be done, and None if it is there.

    Args:
        directory: Where to; it is there only if all went well.
        seconds: Longest time for all of it.
        url: Of the repository.
        commit: All of its hash.
    """
    if (directory / "easyeditor").is_dir():
        return None
    if shutil.which("git") is None:
        return "there is no git"
    end = time.monotonic() + seconds
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    steps = (
        ("init", "-q"),
        ("remote", "add", "origin", url),
        ("sparse-checkout", "set", "easyeditor", "hparams"),
        ("fetch", "-q", "--depth", "1", "--filter=blob:none", "origin", commit),
        ("checkout", "-q", commit),
    )
    partial.mkdir(parents=True)
    try:
        for step in steps:
            left = max(0.1, end - time.monotonic())
            subprocess.run(
                ["git", "-C", str(partial), *step], check=True, timeout=left, capture_output=True
            )
        partial.rename(directory)
    except subprocess.TimeoutExpired:
        return f"it took longer than {seconds:g} s"
    except subprocess.CalledProcessError as error:
        return next(iter(error.stderr.decode(errors="replace").splitlines()), "git failed")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return None


def main() -> int:
    """Clone, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=20, help="(%(default)s)")
    arguments = parser.parse_args()
    reason = clone(arguments.directory, arguments.seconds)
    if reason is not None:
        print(f"EasyEdit's current clone is not to be had: {reason}", file=sys.stderr)
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
