"""The FastAPI app: OpenAI's chat and completions API for a model and its named edits.

A request's `model` names the edits to use: `base`, or names with `+` between them. Nothing in a
request is executed: its texts become tokens, and its other fields are numbers and names.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from dataclasses import replace
from queue import SimpleQueue
from typing import Annotated, Any, Literal

from anyio import from_thread
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from baft_easyedit.files.messages import short
from baft_easyedit.files.validation import in_words
from baft_easyedit.model.inspect import max_context
from baft_easyedit.model.prompt_format import PromptFormat, token_ids
from baft_easyedit.serving.answering import Answer, Answerer, FullError, Queue, Wish

_MAX_TOKENS = 256
"""Most tokens of an answer if the request does not say."""
_COLDEST = 1e-4
"""A lower temperature is as 0: greedy."""
_LOOK_EVERY_S = 0.5
"""How often to look whether the client of an answer that is not streamed is still there."""


def _encodable(text: str) -> str:
    """Raise ValueError if a text has half of a surrogate pair, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not have half of a surrogate pair")
    return text


def _joined(content: Any) -> Any:
    """Join the parts of a content that is a list of texts, as OpenAI's clients may send it."""
    is_text = isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    )
    return "".join(part["text"] for part in content) if is_text else content


def _single(prompt: Any) -> Any:
    """Return the only text of a list."""
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt


def _role(role: Any) -> Any:
    """Return `system` for `developer`, OpenAI's newer name of it, which no chat template has."""
    return "system" if role == "developer" else role


_Text = Annotated[str, AfterValidator(_encodable)]


class Body(BaseModel, strict=True):
    """The fields that both kinds of request have; unknown fields are ignored."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=1)
    stream: bool | None = None


class Completion(Body):
    """A request to continue a text."""

    prompt: Annotated[_Text, BeforeValidator(_single)]


class Message(BaseModel, strict=True):
    """A message of a chat."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_role)]
    content: Annotated[_Text, BeforeValidator(_joined)]


class Chat(Body):
    """A request for the next message of a chat."""

    messages: list[Message] = Field(min_length=1)


class LimitedBody:
    """ASGI middleware that refuses bodies of more than `most` bytes, counted as they are read."""

    def __init__(self, app: Any, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on; answer with status 413 once too many bytes were read."""
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(413, f"the body must have at most {self._most} bytes")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)


def make_app(
    answerer: Answerer, formats: Mapping[str, PromptFormat], queue: Queue, max_body: int = 2**20
) -> FastAPI:
    """Make the app.

    Args:
        answerer: Answers with the model and its edits.
        formats: The prompt format that each edit was learned with, by the edit's name.
        queue: The requests that run or wait; one that finds no room gets status 429.
        max_body: Most bytes of a request; a larger one gets status 413.
    """
    routes = _Routes(answerer, formats, queue)
    app = FastAPI(title="baft_easyedit", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LimitedBody, most=max_body)
    for kind in (AnyHTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _as_openai)
    app.add_api_route("/health", lambda: {"status": "ok"})
    app.add_api_route("/v1/models", routes.models)
    app.add_api_route("/v1/models/{model}", routes.model)
    app.add_api_route("/v1/completions", routes.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], response_model=None)
    return app


def _as_openai(_request: Request, error: Exception) -> JSONResponse:
    """Return an error in OpenAI's form; an unexpected one is left to the server's log."""
    if isinstance(error, RequestValidationError):
        found = error.errors()
        for problem in found:  # each is in `body`; in broken JSON, behind that many characters
            inner = () if problem["type"] == "json_invalid" else problem["loc"][1:]
            problem["loc"] = inner or ("the body",)
        error = HTTPException(400, in_words(found))
    elif not isinstance(error, AnyHTTPException):
        error = HTTPException(500, "the answer failed: see the server's log")
    kind = "invalid_request_error" if error.status_code < 429 else "server_error"
    told = {"message": str(error.detail), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": told}, error.status_code)


class _Routes:
    """The functions behind the app's addresses."""

    def __init__(
        self, answerer: Answerer, formats: Mapping[str, PromptFormat], queue: Queue
    ) -> None:
        self._answerer, self._formats, self._queue = answerer, formats, queue

    def models(self) -> dict[str, Any]:
        """List the unedited model and the edits."""
        names = ("base", *self._answerer.edits.names)
        return {"object": "list", "data": [self.model(name) for name in names]}

    def model(self, model: str) -> dict[str, Any]:
        """Tell of the unedited model, or of edits."""
        self._edits_of(model)
        return {"id": model, "object": "model", "created": 0, "owned_by": "local"}

    def complete(self, body: Completion, request: Request) -> Any:
        """Continue a text."""
        edits = self._edits_of(body.model)
        prompt_format = self._prompt_format(edits, in_chat=False).without_template()
        ids = prompt_format.prompt_ids(body.prompt, self._answerer.tokenizer)
        wish = replace(self._wish(body, edits, ids), goes_on=True)
        return self._reply(_AnswerBody(body.model, is_chat=False), body, wish, request)

    def chat(self, body: Chat, request: Request) -> Any:
        """Write the next message of a chat."""
        edits, tokenizer = self._edits_of(body.model), self._answerer.tokenizer
        if tokenizer.chat_template is None:
            raise HTTPException(400, "the model has no chat template: use /v1/completions")
        try:
            text = tokenizer.apply_chat_template(
                [message.model_dump() for message in body.messages],
                add_generation_prompt=True,
                tokenize=False,
                **(self._prompt_format(edits, in_chat=True).chat_template_kwargs or {}),
            )
        except TemplateError as error:
            raise HTTPException(400, f"messages do not fit the chat template: {error}") from None
        ids = token_ids(text, tokenizer, is_templated=True)
        wish = self._wish(body, edits, ids)
        return self._reply(_AnswerBody(body.model, is_chat=True), body, wish, request)

    def _edits_of(self, model: str) -> tuple[str, ...]:
        """Read a request's `model`: `base`, or names of edits with a `+` between them."""
        edits = () if model == "base" else tuple(model.split("+"))
        known = self._answerer.edits.names
        if not set(edits) <= set(known):
            raise HTTPException(
                404,
                f"model must be 'base', or one or several of {known} with '+' between them; got "
                f"{short(model)}",
            )
        return edits

    def _prompt_format(self, edits: tuple[str, ...], *, in_chat: bool) -> PromptFormat:
        """Return the format of the first edit that was learned in a chat template, or outside."""
        given = [self._formats[name] for name in edits]
        return min(given, key=lambda one: one.use_chat_template != in_chat, default=PromptFormat())

    def _wish(self, body: Body, edits: tuple[str, ...], ids: tuple[int, ...]) -> Wish:
        """Make a `Wish` of a request, after the checks that pydantic cannot do."""
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        if len(stop) > 4 or not all(stop):
            raise HTTPException(400, "stop must be at most 4 texts, none of them empty")
        room = (max_context(self._answerer.model) or 2**31) - len(ids)
        asked = body.max_completion_tokens or body.max_tokens
        most = asked or max(1, min(_MAX_TOKENS, room))
        if not ids or room < most:
            raise HTTPException(
                400,
                f"the prompt ({len(ids)} tokens) must not be empty, and with max_tokens "
                f"({most}) fit into the model's context of {room + len(ids)} tokens",
            )
        heat = body.temperature or 0.0
        greedy = heat < _COLDEST  # logits over less than that are not finite
        return Wish(edits, ids, most, 0.0 if greedy else heat, body.top_p or 1.0, body.seed, stop)

    def _reply(self, answer_body: "_AnswerBody", body: Body, wish: Wish, request: Request) -> Any:
        """Queue a request, and return its answer as a whole or as a stream of pieces."""
        pieces: SimpleQueue[str | None] = SimpleQueue()
        is_left = threading.Event()

        def say(piece: str) -> bool:
            pieces.put(piece)
            return not is_left.is_set()

        def answer() -> Answer:
            if is_left.is_set():  # while it waited
                return Answer("", 0, is_cut=True)
            return self._answerer.answer(wish, say)

        try:
            future = self._queue.submit(answer)
        except FullError as error:
            raise HTTPException(429, str(error)) from None
        if not body.stream:
            while not wait([future], timeout=_LOOK_EVERY_S).done:
                if from_thread.run(request.is_disconnected):
                    is_left.set()
            return answer_body.whole(future.result(), len(wish.prompt))
        future.add_done_callback(lambda _: pieces.put(None))

        def events() -> Iterator[str]:
            for piece in iter(pieces.get, None):
                if piece:
                    yield _event(answer_body.part(piece))
            yield _event(answer_body.part("", future.result()))
            yield "data: [DONE]\n\n"

        return _Stream(events(), is_left.set)


class _Stream(StreamingResponse):
    """Server-sent events; calls `at_end` when they end, also if the client leaves before any."""

    def __init__(self, events: Iterator[str], at_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self._at_end()


def _event(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


class _AnswerBody:
    """Builds the JSON of one answer, in OpenAI's form for chats or for completions."""

    def __init__(self, model: str, *, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answer: Answer, num_prompt: int) -> dict[str, Any]:
        """Return the JSON of a whole answer to a prompt of `num_prompt` tokens."""
        message = {"role": "assistant", "content": answer.text}
        said = {"message": message} if self._is_chat else {"text": answer.text}
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": answer.num_tokens,
            "total_tokens": num_prompt + answer.num_tokens,
        }
        return {**self._with("", said, answer), "usage": usage}

    def part(self, piece: str, answer: Answer | None = None) -> dict[str, Any]:
        """Return the JSON of a piece of a stream; the last piece comes with the whole answer."""
        delta = {"delta": {"role": "assistant", "content": piece}}
        return self._with(".chunk", delta if self._is_chat else {"text": piece}, answer)

    def _with(self, chunk: str, said: dict[str, Any], answer: Answer | None) -> dict[str, Any]:
        reason = None if answer is None else "length" if answer.is_cut else "stop"
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        kind = f"chat.completion{chunk}" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice]}
