"""Show the states of `measure`: counts in words, a table in Markdown, and a figure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from baft_easyedit.files.messages import printable
from baft_easyedit.theorem.measure import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"edited": "black", "rephrasing": "tab:green", "irrelevant": "tab:red"}
_HEAD = (
    "kind", "prompt", "answer", "distance", "radius", "at random", "ReFT must", "ReFT step",
    "ReFT answer", "BaFT step", "BaFT weight", "BaFT answer",
)  # fmt: skip


def counts(states: Sequence[State]) -> Iterator[str]:
    """Yield, for each kind of state, how many must leave their balls, do so, and answer anew."""
    for kind in _COLOURS:
        of_kind = [state for state in states if state.kind == kind]
        if not of_kind:
            continue
        must = sum(state.must_leave() for state in of_kind)
        said = [f"{must} must leave their ball by ReFT"]
        for method in of_kind[0].edits:
            leave = sum(state.leaves(method) for state in of_kind)
            change = sum(state.changes(method) for state in of_kind)
            said.append(f"{method}: {leave} steps as long as the radius, {change} other answers")
        yield f"{len(of_kind)} {kind}: {'; '.join(said)}"


def table(states: Sequence[State]) -> str:
    """Write the states as a table in Markdown."""
    rows: list[Sequence[str]] = [_HEAD, ["---"] * len(_HEAD)]
    for state in states:
        reft, baft = state.edits["ReFT"], state.edits["BaFT"]
        must = f"{reft.least or 0.0:.1f}"
        rows.append([
            state.kind, _cell(state.prompt), _cell(state.answer), f"{state.distance:.1f}",
            f"{state.radius:.2f}", f"{state.random_radius:.1f}",
            f"**{must}**" if state.must_leave() else must, f"{reft.step:.1f}", _cell(reft.answer),
            f"{baft.step:.1f}", f"{baft.weight:.2f}", _cell(baft.answer),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def figure(states: Sequence[State], sigmas: Mapping[str, float]) -> "Figure":
    """Draw steps and radii against the distance from the edited state, a panel for each method.

    The edited state comes first; `sigmas` are sigma_max(H) by method.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    drawn = Figure(figsize=(10, 4), layout="constrained")
    farthest = 1.05 * max(state.distance for state in states) or 1.0
    for ax, method in zip(drawn.subplots(1, 2, sharey=True), sigmas, strict=True):
        own, ends = states[0].edits[method].step, []
        if method == "ReFT":  # only a linear edit's steps must lie in the cone
            ends = [own - sigmas[method] * farthest, own + sigmas[method] * farthest]
            ax.fill([0, farthest, farthest], [own, *ends], color="0.9", zorder=0)
        for state in states:
            colour, moved = _COLOURS[state.kind], state.edits[method]
            is_new = state.changes(method)
            ax.plot([state.distance] * 2, [state.radius, moved.step], color=colour, lw=0.7)
            ax.plot(state.distance, state.radius, "_", color=colour, ms=10, mew=2)
            face = colour if is_new else "white"
            ax.plot(state.distance, moved.step, "o", color=colour, mfc=face, ms=6)
        top = 1.15 * max(m.step for state in states for m in state.edits.values()) or 1.0
        ax.set_title(f"ReFT, $\\sigma_{{max}}(H)$ = {sigmas[method]:.2f}" if ends else method)
        ax.set(xlabel="distance d from the edited state", xlim=(-2, farthest), ylim=(-2, top))
        ax.spines[["top", "right"]].set_visible(False)
    drawn.axes[0].set_ylabel("length of the step |u(h)|, radius of the ball")
    handles = [Line2D([], [], color=c, marker="o", ls="", label=k) for k, c in _COLOURS.items()]
    forms = (
        ("o", "none", "the answer stays"),
        ("o", "0.5", "another answer"),
        ("_", "none", "radius"),
    )
    handles += [Line2D([], [], color="0.5", marker=m, mfc=f, ls="", label=t) for m, f, t in forms]
    handles.append(Line2D([], [], color="0.9", lw=8, label="|u(h_e)| ± σ d"))
    drawn.legend(handles=handles, loc="outside right center", fontsize=8)
    return drawn


def _cell(text: str) -> str:
    """Return a text for one cell of a table."""
    return printable(text.strip()).replace("|", "\\|")
