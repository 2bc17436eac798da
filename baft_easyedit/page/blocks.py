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
_WANTED = (
    ("New answer to the prompt", 1),
    ("Subject, a part of the prompt (optional)", 1),
    ("Prompts to leave alone, one a line (optional)", 3),
)
"""What makes a request beside the prompt, and its lines."""


def launch(desk: Desk, host: str, port: int | None) -> gr.Blocks:
    """Serve the page in a thread; `local_url` of what is returned says where.

    The port None stands for the first free one from 7860 on.

    Raises:
        OSError: If the port is taken.
    """
    page = make_page(desk)
    page.queue(max_size=_MOST_WAITING, default_concurrency_limit=1, api_open=False)
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

    def forget(prompt: str, progress: Any = gr.Progress()) -> str:  # noqa: B008
        told = {"desc": "later edits learned again", "unit": "edits"}
        return desk.forget(prompt, lambda done, total: progress((done, total), **told))

    with gr.Blocks(title="baft-easyedit", analytics_enabled=False, fill_width=True) as page:
        with gr.Row():
            with gr.Column(scale=3):
                asked, ask, shown = _asking(desk)
            with gr.Column(scale=2):
                wanted = [gr.Textbox(label=label, lines=n) for label, n in _WANTED]
                learn = gr.Button("Learn", variant="primary")
                status = gr.Textbox(label="What came of it", lines=2, interactive=False)
        table, chosen, buttons = _looking_back()
        inputs: tuple[list[Any], ...] = ([asked[0], *wanted], [chosen[0]], [chosen[1]], [])
        acts: tuple[Callable[..., str], ...] = (desk.learn, forget, desk.rollback, desk.undo)
        for button, act, given in zip((learn, *buttons), acts, inputs, strict=True):
            done = button.click(_with_errors(act), given, status)
            done.then(_with_errors(desk.rows), None, table)
            done.success(_with_errors(again), asked, shown)
        gr.on([ask.click, asked[0].submit], _with_errors(desk.ask), asked, shown)
        page.load(_with_errors(desk.rows), None, table)
    return page


def _asking(desk: Desk) -> tuple[list[Any], Any, list[Any]]:
    """Make what asks: a prompt and how it is asked, the button, and where the answers are."""
    has_chat = bool(getattr(desk.editor.tokenizer, "chat_template", None))
    in_chat = desk.editor.hparams.use_chat_template
    prompt = gr.Textbox(label="Prompt", placeholder="The capital of France is", autofocus=True)
    with gr.Row():
        most = gr.Slider(1, _MOST_TOKENS, 32, step=1, label="Most new tokens")
        chat = gr.Checkbox(in_chat, label="In the chat template", visible=has_chat)
    ask = gr.Button("Ask", variant="primary")
    with gr.Row():
        base = gr.Textbox(label="Base model", lines=3, interactive=False)
        edited = gr.Textbox(label="Edited model", lines=3, interactive=False)
    return [prompt, chat, most], ask, [base, edited, gr.Plot(show_label=False)]


def _looking_back() -> tuple[Any, list[Any], list[Any]]:
    """Make the list of entries, what is chosen by a click on it, and the buttons that go back."""
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt of an edit")
            forget = gr.Button("Forget it, and keep the later ones")
        with gr.Column():
            entry = gr.Number(0, label="Entry", precision=0, minimum=0)
            rollback = gr.Button("Go to the state after it")
    undo = gr.Button("Undo the latest")
    label = "What was done; a click on a row chooses its entry and prompt"
    table = gr.Dataframe(headers=list(HEADERS), label=label, interactive=False, wrap=True)

    def choose(event: gr.SelectData) -> tuple[str, int]:
        return event.row_value[2], event.row_value[0]

    table.select(choose, None, [prompt, entry])
    return table, [prompt, entry], [forget, rollback, undo]


def _with_errors(act: Callable[..., Any]) -> Callable[..., Any]:
    """Let errors reach who looks at the page, as text; Gradio would show their HTML."""

    @wraps(act)
    def call(*values: Any) -> Any:
        try:
            return act(*values)
        except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
            raise gr.Error(html.escape(cut(error), quote=False), print_exception=False) from None

    return call
