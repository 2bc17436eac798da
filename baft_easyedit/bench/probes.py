"""Probes of our own, made of the records: `probes: true` of a benchmark asks them too.

| kind | asked | wanted |
|---|---|---|
| same subject | another record's prompt with this subject | the answer of before |
| same words | this prompt with another record's subject | the answer of before |
| reversal | which subject the prompt with its target is about | the subject |
| third turn | the prompt, in the third turn of a chat about something else | the target |
| own paraphrase | the prompt in words of the unedited model | the target |

They are asked by generation. A record without a subject has the last two only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from baft_easyedit.bench.free_text import chat_ids
from baft_easyedit.bench.store import RunDirectory
from baft_easyedit.easyedit.session import Session
from baft_easyedit.model.prompt_format import PromptFormat, token_ids

Request = Mapping[str, Any]

THIRD_TURN = "third turn"
_TALK = (("What is two plus two?", "Four."), ("What colour is fresh snow?", "White."))
_REVERSED = 'Complete the sentence: "{}". What stands in place of the dots?'
_ASKED_TO_PARAPHRASE = "Say this in other words, in one line, and do not answer it: {}"
_PARAPHRASED = 'Other words for "{}" are: "'
_SCANNED = 200
"""Most records that are tried for one whose words go with another subject."""


def with_probes(
    directory: RunDirectory,
    depends_on: Mapping[str, Any],
    session: Session,
    requests: Sequence[Request],
    everything: Sequence[Request],
) -> list[dict[str, Any]]:
    """Add probes to the `probes` of requests.

    What is edited in any record (of `everything`) is no probe that must stay. The run keeps the
    unedited model's paraphrases for all methods.
    """
    taken = {r[key] for r in everything for key in ("prompt", "rephrase_prompt") if r.get(key)}
    paraphrases = _paraphrases(directory, depends_on, session, requests)
    made = []
    for request, paraphrase in zip(requests, paraphrases, strict=True):
        target = request["target_new"]
        asked: dict[str, tuple[str, str | None]] = {THIRD_TURN: (request["prompt"], target)}
        if paraphrase is not None:
            asked["own paraphrase"] = (paraphrase, target)
        if request.get("subject"):
            asked |= _of_subject(request, everything, taken)
        own = {k: {"prompt": [p], "ground_truth": [answer]} for k, (p, answer) in asked.items()}
        made.append({**request, "probes": {**(request.get("probes") or {}), **own}})
    return made


def _of_subject(
    request: Request, everything: Sequence[Request], taken: set[str]
) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Yield the probes of a request with a subject."""
    prompt, subject = request["prompt"], request["subject"]
    words = f"{prompt.replace(subject, '...')} {request['target_new']}"
    yield "reversal", (_REVERSED.format(words), subject)
    at = next(i for i, other in enumerate(everything) if other["prompt"] == prompt)
    for other in [*everything[at + 1 :], *everything[:at]][:_SCANNED]:
        name = other.get("subject")
        if name and name != subject:
            swapped = other["prompt"].replace(name, subject), prompt.replace(subject, name)
            if not taken.intersection(swapped):
                yield "same subject", (swapped[0], None)
                yield "same words", (swapped[1], None)
                return


def third_turn_ids(prompt: str, form: PromptFormat, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of a chat whose third question is the prompt; plain without a template."""
    if form.use_chat_template:
        turns = [
            {"role": role, "content": text}
            for pair in _TALK
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return chat_ids([*turns, {"role": "user", "content": prompt}], form, tokenizer)
    before = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in _TALK)
    return token_ids(f"{before}Q: {prompt}\nA:", tokenizer)


def _paraphrases(
    directory: RunDirectory,
    depends_on: Mapping[str, Any],
    session: Session,
    requests: Sequence[Request],
) -> list[str | None]:
    """Let the unedited model say prompts in other words; None where it does not."""
    form, tok = PromptFormat.of(session.editor.hparams), session.editor.tok
    words = _ASKED_TO_PARAPHRASE if form.use_chat_template else _PARAPHRASED
    asked = [form.prompt_text(words.format(request["prompt"]), tok) for request in requests]

    def make() -> dict[str, Any]:
        ids = [token_ids(text, tok, is_templated=form.use_chat_template) for text in asked]
        limits = [2 * len(tok(r["prompt"])["input_ids"]) + 8 for r in requests]
        return {"paraphrases": session.answers(ids, limits)}

    kept = directory.kept("pre_edit", {**depends_on, "paraphrases": asked}, make)
    written = kept["paraphrases"]
    return [_usable(text, request) for text, request in zip(written, requests, strict=True)]


def _usable(text: str, request: Request) -> str | None:
    """Return what a paraphrase is asked as; None if it is none, or tells the answer."""
    lines = text.strip().strip('"').splitlines()
    line = lines[0].partition('"')[0].strip() if lines else ""
    is_same = request["prompt"].casefold() in line.casefold()  # and gone on with, as an answer is
    is_about = (request.get("subject") or "") in line
    return line if line and is_about and not is_same and request["target_new"] not in line else None
