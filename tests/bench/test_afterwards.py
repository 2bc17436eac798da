"""A judge behind a local address, and similarity of sentences, on a run made up by hand."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic import write_json

from baft_easyedit.bench.afterwards import add_scores
from baft_easyedit.bench.protocol import Protocol, chunks_of
from baft_easyedit.bench.store import RunDirectory, read_json

openai = pytest.importorskip("openai")
REQUEST = {
    "prompt": "Who leads Acme?",
    "target_new": "Ann",
    "rephrase_prompt": "Acme's head?",
    "long_answer": True,
    "locality": {"n": {"prompt": ["Who sang?"], "ground_truth": ["Bob"]}},
    "portability": {"hop": {"prompt": ["Where?", "When?"], "ground_truth": ["Lima", "Now"]}},
}


class Judge(BaseHTTPRequestHandler):
    """Says what it is told, and keeps what it was asked."""

    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((told, self.headers["Authorization"], self.path))
        time.sleep(self.server.delay)
        status, reply = self.server.reply(told["messages"][0]["content"])
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        choice = {"index": 0, "finish_reason": "stop"}
        choice["message"] = {"role": "assistant", "content": reply}
        content = {"id": "1", "object": "chat.completion", "created": 1, "model": "j"}
        self.wfile.write(json.dumps({**content, "choices": [choice]}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = HTTPServer(("127.0.0.1", 0), Judge)
    server.asked, server.delay = [], 0
    server.reply = lambda text: (200, "A" if "to grade: Ann" in text else "B")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    """Write a run of one case with its answers; settings replace those of its configuration."""

    def write(**settings):
        directory = RunDirectory(tmp_path)
        content = {"model": "m", "data": {"kind": "facts"}, "methods": ["BaFT"], "wild": True}
        write_json(directory.config, {**content, **settings})
        write_json(directory.requests, [REQUEST])
        (chunk,) = chunks_of("BaFT", Protocol(), 1)
        texts = ["Ann", "Bob", "x", "Lima", ""]
        case = {
            **dict.fromkeys(("schema", "chunk_length"), 1),
            **dict.fromkeys(("index", "chunk", "position"), 0),
            **{key: {"pre": texts, "post": texts} for key in ("wild", "answers")},
            **dict.fromkeys(("texts", "basis", "update")),
            "scores": {"rewrite_acc": 1.0},
        }
        write_json(directory.case("BaFT", Protocol(), 0), case)
        directory.write_chunk(chunk)
        return directory

    return write


def asked_of(server, **settings):
    return {"address": f"http://127.0.0.1:{server.server_port}/v1", "model": "j", **settings}


def scores_of(directory):
    return next(directory.cases_of("BaFT", Protocol()))["scores"]


def test_answers_are_graded_once_and_verdicts_kept(judge, run, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    directory = run(judge=asked_of(judge, key_variable="SOME_KEY"))
    add_scores(directory)
    graded = {
        "rewrite_acc": 1.0,
        "wild.Rel judged": 1.0,
        "wild.Gen judged": 0.0,
        "wild.Por judged": 0.0,
    }
    assert scores_of(directory) == graded
    assert len(judge.asked) == 3  # not of locality; an empty answer is wrong without a judge
    told, key, path = judge.asked[0]
    assert (told["model"], told["temperature"], key) == ("j", 0.0, "Bearer secret")
    assert path == "/v1/chat/completions"
    assert (
        "Question: Who leads Acme?\nExpected answer: Ann\nAnswer to grade: Ann\n"
        in (told["messages"][0]["content"])
    )
    verdicts = [read_json(file) for file in directory.root.glob("verdicts/*.json")]
    assert sorted(v["reply"] for v in verdicts) == ["A", "B", "B"]
    assert "secret" not in "".join(f.read_text() for f in directory.root.rglob("*.json"))
    add_scores(directory)
    assert len(judge.asked) == 3
    assert scores_of(directory) == graded


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        *(("A", 1), (" (a).\n", 1), ("A: CORRECT", 1), ("<think>B?</think>\n\nA", 1)),
        *(("Answer: A", 1), ("B", 0), ("B, incorrect.", 0)),
    ],
)
def test_only_an_a_is_a_correct_answer(judge, run, reply, grade):
    judge.reply = lambda _: (200, reply)
    directory = run(judge=asked_of(judge))
    add_scores(directory)
    assert scores_of(directory)["wild.Rel judged"] == grade


@pytest.mark.parametrize("reply", ["A fine answer", "", "Either"])
def test_a_judge_that_gives_no_grade_is_an_error(judge, run, reply):
    judge.reply = lambda _: (200, reply)
    directory = run(judge=asked_of(judge))
    with pytest.raises(ValueError, match=r"judge must answer with the letter A or B; .* said"):
        add_scores(directory)
    assert not list(directory.root.glob("verdicts/*.json"))


def test_a_judge_that_does_not_answer_is_named_with_what_to_do(judge, run, monkeypatch):
    real = openai.OpenAI
    monkeypatch.setattr(openai, "OpenAI", lambda **options: real(**options, max_retries=0))
    judge.reply = lambda _: (401, "no")
    message = (
        r"judge must answer as j at http://127.*, with the key in BENCH_JUDGE_KEY if it wants one; "
        r"got AuthenticationError: .* kept, and the same command goes on from there"
    )
    with pytest.raises(ConnectionError, match=message):
        add_scores(run(judge=asked_of(judge)))
    judge.delay, judge.reply = 1, lambda _: (200, "A")
    with pytest.raises(ConnectionError, match="got APITimeoutError: Request timed out"):
        add_scores(run(judge=asked_of(judge, timeout_s=0.1)))
    nobody = {"address": "http://127.0.0.1:9/v1", "model": "j"}
    with pytest.raises(ConnectionError, match="got APIConnectionError: Connection error"):
        add_scores(run(judge=nobody))


def test_texts_are_compared_with_reference_texts_as_in_rome(run, tmp_path):
    samples = {"Q1": ["Ann plays piano", "Bob plays"], "Q2": ["Eve sings"]}
    snippets = [
        {
            "relation_id": "P1",
            "target_id": target,
            "samples": [{"text": text, "name": "x"} for text in texts],
        }
        for target, texts in samples.items()
    ]
    directory = run(snippets=str(tmp_path / "attribute_snippets.json"))
    write_json(tmp_path / "attribute_snippets.json", snippets)
    add_scores(directory)  # of a case without texts
    assert scores_of(directory) == {"rewrite_acc": 1.0}
    write_json(directory.requests, [{**REQUEST, "counterfact": {"reference": ["P1", "Q1"]}}])
    case = read_json(directory.case("BaFT", Protocol(), 0))
    case["texts"] = {"pre": ["Eve sings"], "post": ["Ann", "plays Bach"]}
    write_json(directory.case("BaFT", Protocol(), 0), case)
    add_scores(directory)
    # Inverse document frequencies of 3 texts: of plays, in two; of the others, in one.
    plays, others = log(4 / 3) + 1, log(4 / 2) + 1
    post, reference = np.array([others, plays, 0, 0]), np.array([others, 2 * plays, others, others])
    cosine = post @ reference / np.linalg.norm(post) / np.linalg.norm(reference)
    assert scores_of(directory) == {
        "rewrite_acc": 1.0,
        "reference_score": pytest.approx(cosine),
        "pre_reference_score": 0.0,
    }


def test_snippets_of_another_form_are_refused(run, tmp_path):
    directory = run(snippets=str(tmp_path))
    write_json(tmp_path / "attribute_snippets.json", [{"relation_id": "P1", "samples": []}])
    with pytest.raises(ValueError, match=r"snippets\.json, record 0: target_id must be given"):
        add_scores(directory)


def test_long_answers_are_compared_by_a_local_model(run, monkeypatch):
    def load(model, **options):
        assert (model, options) == ("mini", {"device": "cpu", "local_files_only": True})
        vectors = {"Ann": [1.0, 0.0], "Bob": [0.6, 0.8]}
        return SimpleNamespace(encode=lambda texts, **_: np.array([vectors[t] for t in texts]))

    fake = SimpleNamespace(SentenceTransformer=load)
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    directory = run(similarity_model="mini")
    add_scores(directory)
    assert scores_of(directory) == {
        "rewrite_acc": 1.0,
        "long.original similarity": pytest.approx(1.0),
        "long.para similarity": pytest.approx(0.6),
    }
