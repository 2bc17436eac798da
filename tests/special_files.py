"""What can be where a regular file should be."""

import os
import socket

KINDS = ("FIFO", "socket", "directory", "loop", "dangling", "device")


def make_special(kind, file):
    """Puts something in the place of a file that is none."""
    file.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(file))
    elif kind == "directory":
        file.mkdir()
        (file / "something").write_text("of value")
    else:
        file.symlink_to({"loop": file, "dangling": "nowhere", "device": "/dev/zero"}[kind])
