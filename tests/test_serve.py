"""The server, asked by OpenAI's client: its answers are those of `generate_answers`."""

import asyncio
import copy
import json
import socket
import sys
import threading
import time
from contextlib import contextmanager
from queue import SimpleQueue

import pytest
import torch
from transformers import AutoTokenizer

from baft_easyedit.files.resources import bundled_model_path
from baft_easyedit.generation import generate_answers
from baft_easyedit.model.named import NamedEdits
from baft_easyedit.model.prompt_format import PromptFormat
from tests.conftest import make_model, make_tokenizer, random_edit

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

# ruff: noqa: E402
from baft_easyedit.serving.answering import Answer, Answerer, FullError, Queue, Wish, _Text
from baft_easyedit.serving.app import make_app

PROMPT = "The capital of France is"
JSON = {"Content-Type": "application/json"}
CHAT = [{"role": "user", "content": PROMPT}]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('the user must be last') }}"
    "{% endif %}[assistant]{{ mood }}"
)
FORMATS = {
    "a": PromptFormat(),
    "b": PromptFormat(use_chat_template=True, chat_template_kwargs={"mood": "!"}),
}


@contextmanager
def served(app):
    """The address of an app that is served at a free port."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [free]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{free.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def edits(model):
    return NamedEdits(model, {"a": random_edit(seed=3), "b": random_edit(seed=4)})


@pytest.fixture(scope="module")
def url(model, tokenizer, edits):
    app = make_app(Answerer(model, tokenizer, edits), FORMATS, Queue(16), max_body=5000)
    with served(app) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("name", ["base", "a", "b", "a+b"])
def test_answers_are_those_of_generate_answers(client, model, tokenizer, edits, name):
    with edits.active(*(() if name == "base" else name.split("+"))):
        (plain,) = generate_answers(model, tokenizer, [PROMPT], 10)
        form = FORMATS["b"] if "b" in name.split("+") else PromptFormat(use_chat_template=True)
        (chatted,) = generate_answers(model, tokenizer, [PROMPT], 10, prompt_format=form)
    given = {"model": name, "max_tokens": 10, "temperature": 0}
    completed = client.completions.create(prompt=PROMPT, **given)
    assert completed.choices[0].text.strip() == plain
    assert completed.usage.total_tokens == len(tokenizer(PROMPT)["input_ids"]) + 10
    assert completed.choices[0].finish_reason == "length"
    pieces = [
        chunk.choices[0] for chunk in client.completions.create(prompt=PROMPT, stream=True, **given)
    ]
    assert "".join(piece.text for piece in pieces) == completed.choices[0].text
    assert pieces[-1].finish_reason == "length"
    answer = client.chat.completions.create(messages=CHAT, **given).choices[0].message.content
    assert answer.strip() == chatted
    stream = client.chat.completions.create(messages=CHAT, stream=True, **given)
    assert "".join(chunk.choices[0].delta.content for chunk in stream) == answer


def test_models_are_listed(client, url):
    assert [model.id for model in client.models.list()] == ["base", "a", "b"]
    assert client.models.retrieve("a+b").id == "a+b"
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_nothing_of_a_stop_text_is_said(client):
    given = {"model": "a", "prompt": PROMPT, "max_tokens": 10}
    whole = client.completions.create(**given).choices[0].text
    for start in range(5):
        stop = whole[start : start + 5]
        cut = whole[: whole.index(stop)]
        stopped = client.completions.create(**given, stop=[stop]).choices[0]
        assert (stopped.text, stopped.finish_reason) == (cut, "stop")
        chunks = client.completions.create(**given, stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == cut


def test_text_that_was_said_is_not_cleaned_up_later(tokenizer):
    ids = tokenizer("so , a ' bird")["input_ids"]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.clean_up_tokenization_spaces = True
    text = _Text(tokenizer, Wish((), (), len(ids)), lambda _: True)
    for end in range(1, len(ids) + 1):
        text.after_token(torch.tensor([ids[:end]]), None)
    text.finish()
    assert text.said == "so , a ' bird"


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_text_that_goes_on_begins_with_its_space(goes_on):
    """Tokenizers of SentencePiece's kind leave it out at the beginning of what they decode."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    prompt, ids = (tokenizer(text).input_ids for text in ("The capital is", "The capital is Paris"))
    text = _Text(tokenizer, Wish((), prompt, 9, goes_on=goes_on), lambda _: True)
    for end in range(len(prompt) + 1, len(ids) + 1):
        text.after_token(torch.tensor([ids[:end]]), None)
    text.finish()
    assert text.said == (" Paris" if goes_on else "Paris")


def test_what_clients_leave_empty_or_send_in_parts_is_understood(client, tokenizer):
    given = {"model": "a", "prompt": PROMPT, "max_tokens": 5}
    expected = client.completions.create(**given).choices[0].text
    nothing = dict.fromkeys(("temperature", "top_p", "n", "stop", "seed"))
    for more in (nothing, {"prompt": [PROMPT]}, {"temperature": 1e-40}):
        assert client.completions.create(**(given | more)).choices[0].text == expected
    parts = [{"type": "text", "text": PROMPT[:3]}, {"type": "text", "text": PROMPT[3:]}]
    said = [
        client.chat.completions.create(model="a", messages=[{"role": "user", "content": content}])
        for content in (PROMPT, parts)
    ]
    assert said[0].choices[0].message.content == said[1].choices[0].message.content
    prompts = [
        client.chat.completions.create(model="a", messages=[{"role": role, "content": "B"}, *CHAT])
        for role in ("system", "developer")
    ]
    assert prompts[0].usage == prompts[1].usage
    with pytest.raises(openai.BadRequestError, match=r"role must be 'system', 'user' or .*'tool'"):
        client.chat.completions.create(model="a", messages=[{"role": "tool", "content": "B"}])


def test_half_a_character_is_refused(url):
    body = '{"model": "a", "prompt": "a\\ud800b"}'
    answer = httpx.post(f"{url}/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert "prompt must not have half of a surrogate pair; got" in answer.json()["error"]["message"]


def test_sampling_is_repeated_by_its_seed(client):
    def sampled(seed, **more):
        given = {"model": "a", "prompt": PROMPT, "max_tokens": 20, "temperature": 2.0}
        return client.completions.create(seed=seed, **given, **more).choices[0].text

    state = torch.get_rng_state()
    assert sampled(1) == sampled(1) != sampled(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled(1, top_p=1e-6) == sampled(2, top_p=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "c"}, "model must be 'base', or one or several of .*'a', 'b'.*got 'c'"),
        ({"temperature": 3}, "temperature must be at most 2; got 3"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        ({"max_tokens": 10_000}, "fit into the model's context of 256 tokens"),
        ({"stop": 3}, "stop must be a text or a list; got 3"),
        ({"stop": [""]}, "stop must be at most 4 texts"),
        ({"prompt": PROMPT * 300}, "the body must have at most 5000 bytes"),
        ({"prompt": PROMPT * 20}, "fit into the model's context of 256 tokens"),
    ],
)
def test_bad_requests_are_told_in_the_form_of_openai(client, changed, message):
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        client.completions.create(**({"model": "a", "prompt": PROMPT} | changed))
    assert caught.value.status_code in (400, 404, 413)
    assert caught.value.body["type"] == "invalid_request_error"


def test_messages_must_fit_the_template(client, tokenizer, monkeypatch):
    said = [*CHAT, {"role": "assistant", "content": "Rome"}]
    with pytest.raises(openai.BadRequestError, match="template: the user must be last"):
        client.chat.completions.create(model="a", messages=said)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="has no chat template: use /v1/completions"):
        client.chat.completions.create(model="a", messages=CHAT)


def test_a_queue_runs_one_job_at_a_time_and_refuses_when_full(client, monkeypatch):
    queue, go = Queue(2), threading.Event()
    first, second = queue.submit(go.wait), queue.submit(lambda: 2)
    with pytest.raises(FullError, match="at most 2 requests may run or wait"):
        queue.submit(lambda: 3)
    submit = Queue.submit
    monkeypatch.setattr(Queue, "submit", lambda _, job: submit(queue, job))  # the server's, too
    with pytest.raises(openai.RateLimitError, match="at most 2 requests may run or wait"):
        client.completions.create(model="a", prompt=PROMPT)
    assert not second.done()
    go.set()
    assert (first.result(10), second.result(10)) == (True, 2)


def test_an_answer_ends_when_nobody_wants_it(model, tokenizer, edits):
    ids = tokenizer(PROMPT)["input_ids"]
    answer = Answerer(model, tokenizer, edits).answer(Wish((), ids, 10), lambda _: False)
    assert answer.num_tokens == 1


@pytest.fixture
def endless(model, tokenizer, edits):
    """An app whose answers go on until nobody wants them, and how many tokens each then had."""
    answerer, lengths = Answerer(model, tokenizer, edits), SimpleQueue()

    def answer(wish, say):
        length = next((n for n in range(1000) if time.sleep(0.01) or not say("x")), None)
        lengths.put(length)
        return Answer("", 0, is_cut=True)

    answerer.answer = answer
    return make_app(answerer, dict.fromkeys(edits.names, PromptFormat()), Queue(16)), lengths


def test_a_client_that_leaves_ends_its_answer(endless):
    app, lengths = endless
    with served(app) as address:
        asked = {"model": "a", "prompt": PROMPT}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json=asked, timeout=0.2)
        assert lengths.get(timeout=20) is not None
        asked["stream"] = True
        with httpx.stream("POST", f"{address}/v1/completions", json=asked) as reply:
            next(reply.iter_lines())
        assert lengths.get(timeout=20) is not None


def test_a_client_that_leaves_before_the_first_event_ends_its_answer(endless):
    app, lengths = endless
    body = json.dumps({"model": "a", "prompt": PROMPT, "stream": True}).encode()
    messages = iter([{"type": "http.request", "body": body}])
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(_):
        pass

    asyncio.run(app(scope, receive, send))
    assert lengths.get(timeout=20) is not None


def test_the_command_says_what_it_needs(tmp_path, monkeypatch, refused):
    refused(["serve", tmp_path], "must be a directory with an edit")
    for wrong in ("base", "a+b"):
        refused(["serve", f"{wrong}={tmp_path}"], "must not be empty or 'base'")
    refused(["serve", *[f"a={tmp_path}"] * 2], "each edit must have a name of its own, as in NAM")
    monkeypatch.setattr("baft_easyedit.cli.serve.read_latest", lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 99999):
            refused(["serve", tmp_path, "--port", port], "must be an address of this machine th")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(["serve", tmp_path, "--port", "0"], "serve needs the extra 'serve'")


def test_a_failure_is_told_without_its_words(model, tokenizer, edits, monkeypatch):
    answerer = Answerer(model, tokenizer, edits)
    monkeypatch.setattr(answerer, "answer", lambda *_: 1 / 0)
    app = make_app(answerer, dict.fromkeys(edits.names, PromptFormat()), Queue(16))
    with served(app) as address:
        asked = {"model": "base", "prompt": PROMPT}
        answer = httpx.post(f"{address}/v1/completions", json=asked)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the answer failed: see the server's log"


@pytest.mark.parametrize("size", [0, 33])
def test_a_queue_that_would_take_all_threads_is_refused(size):
    with pytest.raises(ValueError, match=rf"queue must be in \[1, 32\]; got {size}"):
        Queue(size)
