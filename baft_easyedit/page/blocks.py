"""The page itself. Uses Gradio; what anyone typed is shown as text, never as HTML or Markdown."""

import html
from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr

from baft_easyedit.files.messages import cut
from baft_easyedit.page.desk import HEADERS, Desk

_MOST_WAITING = 16
"""Most clicks that may wait; further ones are refused."""
_FONTS = ("system-ui", "sans-serif")
_CSS = "textarea, input, td { unicode-bidi: plaintext; text-align: start }"
"""Each line runs as its own letters do, to the left or to the right."""
_MOST_TOKENS = 256


def launch(desk: Desk, host: str, port: int | None) -> gr.Blocks:
    """Serve the page in a thread; `local_url` of what is returned says where.

    Args:
        desk: What the page shows.
        host: Address to listen at.
        port: Its port; None for the first free one from 7860 on.

    Raises:
        OSError: If the port is taken.
    """
    page = make_page(desk)
    page.queue(max_size=_MOST_WAITING, default_concurrency_limit=1)
    theme = gr.themes.Default(font=_FONTS, font_mono=_FONTS)
    page.launch(
        share=False, server_name=host, server_port=port, theme=theme, css=_CSS, quiet=True,
        ssr_mode=False, prevent_thread_lock=True, enable_monitoring=False, footer_links=[],
        max_file_size=1,
    )  # fmt: skip
    return page


def make_page(desk: Desk) -> gr.Blocks:
    """Make the page of a desk, which is not served yet."""

    def again(prompt: str, *how: Any) -> tuple[str, str, Any]:
        return desk.ask(prompt, *how) if prompt.strip() else ("", "", None)

    with gr.Blocks(title="baft-easyedit", analytics_enabled=False, fill_width=True) as page:
        with gr.Row():
            with gr.Column(scale=3):
                asked, ask, shown = _asking(desk)
            with gr.Column(scale=2):
                wanted, learn = _wanting()
                status = gr.Textbox(label="What came of it", lines=2, interactive=False)
        table, entry, prompt, undo, rollback, forget = _looking_back()
        changes = (
            (learn, desk.learn, [asked[0], *wanted]),
            (undo, desk.undo, []),
            (rollback, desk.rollback, [entry]),
            (forget, _with_progress(desk), [prompt]),
        )
        for button, act, inputs in changes:
            done = button.click(_told(act), inputs, status)
            done.then(_told(desk.rows), None, table)
            done.success(_told(again), asked, shown)
        gr.on([ask.click, asked[0].submit], _told(desk.ask), asked, shown)
        page.load(_told(desk.rows), None, table)
    return page


def _asking(desk: Desk) -> tuple[list[Any], Any, list[Any]]:
    """Make what asks: a prompt and how it is asked, the button, and where the answers are."""
    prompt = gr.Textbox(label="Prompt", placeholder="The capital of France is", autofocus=True)
    with gr.Row(equal_height=True):
        most = gr.Slider(1, _MOST_TOKENS, 32, step=1, label="Most new tokens")
        chat = gr.Checkbox(
            desk.form.use_chat_template, label="In the chat template", visible=desk.has_chat
        )
        ask = gr.Button("Ask", variant="primary")
    with gr.Row():
        answers = [
            gr.Textbox(label=f"{name} model", lines=3, interactive=False)
            for name in ("Base", "Edited")
        ]
    gates = gr.Plot(show_label=False)
    return [prompt, chat, most], ask, [*answers, gates]


def _wanting() -> tuple[list[Any], Any]:
    """Make what says what to learn for the prompt, and the button."""
    target = gr.Textbox(label="New answer to the prompt")
    subject = gr.Textbox(label="Subject", info="Optional: a part of the prompt")
    info = "Optional, one on a line: what must stay as it is"
    irrelevant = gr.Textbox(label="Irrelevant prompts", info=info, lines=2)
    return [target, subject, irrelevant], gr.Button("Learn", variant="primary")


def _looking_back() -> tuple[Any, ...]:
    """Make the list of entries, and what goes back: a click on a row chooses it."""
    with gr.Row(equal_height=True):
        undo = gr.Button("Undo the latest")
        entry = gr.Number(0, label="Entry", precision=0, minimum=0)
        rollback = gr.Button("Go to the entry")
        prompt = gr.Textbox(label="Prompt of an edit")
        forget = gr.Button("Forget it")
    label = "What was done; a click on a row chooses its entry and prompt"
    table = gr.Dataframe(headers=list(HEADERS), label=label, interactive=False, wrap=True)

    def chosen(event: gr.SelectData) -> tuple[int, str]:
        return event.row_value[0], event.row_value[2]

    table.select(chosen, None, [entry, prompt])
    return table, entry, prompt, undo, rollback, forget


def _with_progress(desk: Desk) -> Callable[..., str]:
    """Return what forgets, and tells meanwhile how many edits it learns again."""

    def forget(prompt: str, progress: Any = gr.Progress()) -> str:  # noqa: B008
        progress(None, desc=f"learning {desk.num_later(prompt)} later requests again")
        return desk.forget(prompt)

    return forget


def _told(act: Callable[..., Any]) -> Callable[..., Any]:
    """Let errors reach who looks at the page, as text; Gradio would show their HTML."""

    @wraps(act)
    def call(*values: Any) -> Any:
        try:
            return act(*values)
        except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
            raise gr.Error(html.escape(cut(error)), print_exception=False) from None

    return call
