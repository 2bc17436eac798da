"""Run notebooks without Jupyter: `python examples/run.py examples/edit_and_undo.ipynb`.

Each notebook's code cells are run in order, in one scope, and print what they print. With
`--write`, that becomes the notebook's outputs.
"""

import argparse
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any]) -> list[str]:
    """Run the code cells of a notebook.

    Returns:
        What each of them printed.
    """
    scope: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for cell in code_cells(notebook):
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile("".join(cell["source"]), "cell", "exec"), scope)
        printed.append(out.getvalue())
    return printed


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells that hold code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def keep(notebook: dict[str, Any], printed: list[str]) -> None:
    """Put into a notebook what its code cells printed."""
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed, strict=True), 1):
        lines = text.splitlines(keepends=True)
        output = {"name": "stdout", "output_type": "stream", "text": lines}
        cell.update(execution_count=number, outputs=[output] if lines else [])


def main() -> None:
    """Run the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description="Run notebooks without Jupyter.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="keep what cells print as outputs")
    arguments = parser.parse_args()
    for file in arguments.notebooks:
        notebook = json.loads(file.read_text(encoding="utf-8"))
        printed = run(notebook)
        print("".join(printed), end="")
        if arguments.write:
            keep(notebook, printed)
            text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
            file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
