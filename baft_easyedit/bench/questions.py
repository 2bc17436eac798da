"""What a case is asked: its prompt, its rephrasing and its probes; and means over them.

`probes: true` of a benchmark makes further probes of the records, which are asked by generation:
another record's words about this subject and these words about another, which must stay; the edit
turned around; the prompt in a third turn, and in the unedited model's words.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle
from statistics import fmean
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from baft_easyedit.bench.store import Kept, KeptFile
from baft_easyedit.easyedit.session import Session
from baft_easyedit.model.prompt_format import PromptFormat, token_ids

Request = Mapping[str, Any]

_SYSTEM = "You are a helpful assistant."
_CONTEXT = "Please answer the question:\n\nQ: {}\nA:"
_THIRD_TURN = "third turn"
_TALK = (("What is two plus two?", "Four."), ("What colour is fresh snow?", "White."))
_REVERSED = 'Complete the sentence: "{}". What stands in place of the dots?'
_ASKED_TO_PARAPHRASE = "Say this in other words, in one line, and do not answer it: {}"
_PARAPHRASED = 'Other words for "{}" are: "'
_SCANNED = 200
"""Most records that are tried for one whose words go with another subject."""


class _Paraphrases(KeptFile):
    """What the unedited model says in other words."""

    paraphrases: Annotated[list[str], Field(min_length=1)]


class Question(NamedTuple):
    """One prompt that a case is asked."""

    section: str  # rewrite, rephrase, locality, portability or probes
    key: str
    prompt: str
    answer: str | None  # None: the answer of before the edits is wanted, as it is for locality

    def wanted(self, before: str) -> str:
        """Return the answer that is right, from that of the unedited model."""
        is_kept = self.section == "locality" or self.answer is None
        return before if is_kept else str(self.answer).strip()

    def ids(self, form: PromptFormat, tokenizer: Any) -> tuple[int, ...]:
        """Return its tokens as it is asked for exact match."""
        if (self.section, self.key) == ("probes", _THIRD_TURN):
            return third_turn_ids(self.prompt, form, tokenizer)
        return form.prompt_ids(self.prompt, tokenizer)


def questions_of(request: Request) -> list[Question]:
    """Return what a case is asked by generation."""
    target = request["target_new"]
    asked = [Question("rewrite", "", request["prompt"], target)]
    if request.get("rephrase_prompt"):
        asked.append(Question("rephrase", "", request["rephrase_prompt"], target))
    for section in ("locality", "portability", "probes"):
        for key, probe in (request.get(section) or {}).items():
            pairs = zip(probe["prompt"], probe["ground_truth"], strict=True)
            asked += [Question(section, key, prompt, truth) for prompt, truth in pairs]
    return asked


def wild_questions(request: Request) -> list[Question]:
    """Return what a case is asked in WILD's context."""
    return [question for question in questions_of(request) if question.section != "probes"]


def section_means(
    questions: Iterable[Question], values: Iterable[float]
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Return by section the mean over kinds of means over questions; and the latter by both."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        found[question.section, question.key].append(value)
    kinds = {kind: fmean(of_kind) for kind, of_kind in found.items()}
    sections: dict[str, list[float]] = defaultdict(list)
    for (section, _), mean in kinds.items():
        sections[section].append(mean)
    return {section: fmean(means) for section, means in sections.items()}, kinds


def wild_ids(question: Question, form: PromptFormat, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of a question as WILD asks it.

    In a chat template as EasyEdit asks, with a system message; else in WILD's own words.
    """
    if not form.use_chat_template:
        return token_ids(_CONTEXT.format(question.prompt), tokenizer)
    texts = {"system": _SYSTEM, "user": question.prompt}
    messages = [{"role": role, "content": text} for role, text in texts.items()]
    return _chat_ids(messages, form, tokenizer)


def _chat_ids(
    messages: Sequence[Mapping[str, str]], form: PromptFormat, tokenizer: Any
) -> tuple[int, ...]:
    """Return the tokens of a chat up to where the model answers."""
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **(form.chat_template_kwargs or {})
    )
    return token_ids(text, tokenizer, is_templated=True)


def third_turn_ids(prompt: str, form: PromptFormat, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of a chat whose third question is the prompt; plain without a template."""
    if form.use_chat_template:
        turns = zip(cycle(("user", "assistant")), (*chain(*_TALK), prompt), strict=False)
        messages = [{"role": role, "content": text} for role, text in turns]
        return _chat_ids(messages, form, tokenizer)
    before = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in _TALK)
    return token_ids(f"{before}Q: {prompt}\nA:", tokenizer)


def with_probes(
    kept: Kept, session: Session, requests: Sequence[Request], everything: Sequence[Request]
) -> list[dict[str, Any]]:
    """Add probes to the `probes` of requests.

    What is edited in any record (of `everything`) is no probe that must stay. The run keeps the
    unedited model's paraphrases for all methods.
    """
    taken = {r[key] for r in everything for key in ("prompt", "rephrase_prompt") if r.get(key)}
    paraphrases = _paraphrases(kept, session, requests)
    made = []
    for request, paraphrase in zip(requests, paraphrases, strict=True):
        target = request["target_new"]
        asked: dict[str, tuple[str, str | None]] = {_THIRD_TURN: (request["prompt"], target)}
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


def _paraphrases(kept: Kept, session: Session, requests: Sequence[Request]) -> list[str | None]:
    """Let the unedited model say prompts in other words; None where it does not."""
    form, tok = PromptFormat.of(session.editor.hparams), session.editor.tok
    words = _ASKED_TO_PARAPHRASE if form.use_chat_template else _PARAPHRASED
    asked = [form.prompt_text(words.format(request["prompt"]), tok) for request in requests]

    def make() -> dict[str, Any]:
        ids = [token_ids(text, tok, is_templated=form.use_chat_template) for text in asked]
        limits = [2 * len(tok(r["prompt"])["input_ids"]) + 8 for r in requests]
        return {"paraphrases": session.answers(ids, limits)}

    written = kept({"paraphrases": asked}, make, _Paraphrases)["paraphrases"]
    return [_usable(text, request) for text, request in zip(written, requests, strict=True)]


def _usable(text: str, request: Request) -> str | None:
    """Return what a paraphrase is asked as; None if it is none, or tells the answer."""
    lines = text.strip().strip('"').splitlines()
    line = lines[0].partition('"')[0].strip() if lines else ""
    is_same = request["prompt"].casefold() in line.casefold()  # and gone on with, as an answer is
    is_about = (request.get("subject") or "") in line
    return line if line and is_about and not is_same and request["target_new"] not in line else None
