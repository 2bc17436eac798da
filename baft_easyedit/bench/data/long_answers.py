"""Readers of edits whose targets are long: ConvSent, UnKE and AKEW.

They take and raise what those in `readers` do.
"""

from pathlib import Path
from random import Random
from typing import Annotated, Any

from pydantic import AliasChoices, AliasPath, BeforeValidator, Field, model_validator

from baft_easyedit.bench.data.case import Case, Layout, MaybeText, Text, Texts, one
from baft_easyedit.bench.data.files import Source, find_file, read_records

_Replies = Annotated[Texts, Field(min_length=1)]

_QUESTIONS = (
    *("What do you think of {}?", "What do you feel about {}?", "How do you view {}?"),
    *(
        f"What is your {view} {{}}?"
        for view in (
            *("opinion of", "stance on", "position on", "attitude about", "view on", "take on"),
            *("impression of", "assessment of", "judgment of", "sentiment of"),
        )
    ),
)
# The spelling is EasyEdit's: published numbers were measured with it.
_INSTRUCTIONS = {
    "pos": "From the sentiment dataset, answer {} postively.",
    "neg": "From the sentiment dataset, answer {} negatively.",
}


class _ConvSent(Layout):
    """A topic with replies of both sentiments."""

    ent: Text
    pos: _Replies
    neg: _Replies

    def case(self, rng: Random) -> Case:
        sentiment = rng.choice(("pos", "neg"))
        question = rng.choice(_QUESTIONS).replace("{}", self.ent)
        return Case(
            prompt=_INSTRUCTIONS[sentiment].replace("{}", question),
            target_new=(self.pos if sentiment == "pos" else self.neg)[0],
            subject=self.ent,
        )


def read_convsent(path: Path | None, *, seed: int = 0) -> Source:
    """Read ConvSent with the prompts and targets of EasyEdit's run_convsent_llama2.py.

    A record becomes one edit: its sentiment and one of 13 questions are drawn, the prompt is an
    instruction around the question, the target is the first reply of that sentiment. EasyEdit draws
    from one generator, each record after those before it; here a draw depends on `seed` and the
    record's place in the file. There are no probes: what can be scored is the edit itself.
    """
    records, file = read_records(find_file(path, "blender_test.json"), lambda _: _ConvSent)
    cases = [record.case(Random(f"{seed}/{i}")) for i, record in enumerate(records)]
    return Source(cases, [file], [f"sentiments and questions drawn with seed {seed}"])


class Unke(Layout):
    """A record of UnKE, as EasyEdit's AKEWUnifiedDataset reads it.

    `question` is taught with all of `answer`. The questions on parts of the answer become
    `probes.sub`; a record without `para_question` is rephrased by the question itself.
    """

    question: Text
    para_question: MaybeText = None
    answer: Text
    sub_question: tuple[MaybeText, ...] = ()
    sub_answer: tuple[MaybeText, ...] = ()

    @model_validator(mode="after")
    def _check_pairs(self) -> "Unke":
        asked, answered = len(self.sub_question), len(self.sub_answer)
        if asked != answered:
            raise ValueError(
                f"sub_question must have a question for each of {answered} answers; got {asked}"
            )
        return self

    def case(self) -> Case:
        """Return the question as an edit."""
        pairs = zip(self.sub_question, self.sub_answer, strict=True)
        return Case(
            prompt=self.question,
            target_new=self.answer,
            rephrase_prompt=self.para_question or self.question,
            probes={"sub": tuple(probe for pair in pairs for probe in one(*pair))},
            long_answer=True,
        )


class _Triplet(Layout):
    """A short fact of a text."""

    prompt: Text
    subject: Text
    target: MaybeText = None


class _AkewRewrite(Layout):
    """A fact, and a text that tells it; which of the fields there are depends on the file."""

    prompt: Text
    subject: Text
    prompt_full: MaybeText = None
    question: MaybeText = None
    fact_new_uns: MaybeText = None
    unsfact_triplets_GPT: Annotated[  # noqa: N815
        tuple[_Triplet, ...], BeforeValidator(lambda triplets: triplets or ())
    ] = ()
    target_new: Text = Field(
        validation_alias=AliasChoices(AliasPath("target_new", "str"), "answer_new")
    )
    target_true: MaybeText = Field(
        None, validation_alias=AliasChoices(AliasPath("target_true", "str"), "answer_true")
    )


class _Akew(Layout):
    """A record of AKEW's WikiUpdate, CounterFact or MQuAKE-CF; of several facts the first."""

    requested_rewrite: Annotated[
        _AkewRewrite,
        BeforeValidator(lambda facts: facts[0] if isinstance(facts, list) and facts else facts),
    ]
    paraphrase_prompts: Texts = ()
    neighborhood_prompts: Texts = ()
    loc: MaybeText = None
    loc_ans: MaybeText = None
    questions: Texts = ()
    answer: MaybeText = None
    new_answer: MaybeText = None

    def case(self, texts: bool) -> Case:
        fact = self.requested_rewrite
        others: dict[str, Any] = {
            "prompt": fact.prompt_full or fact.prompt.replace("{}", fact.subject) + "?",
            "subject": fact.subject,
            "rephrase_prompt": next(iter(self.paraphrase_prompts), fact.question),
        }
        return Case(**others, **(self._of_text() if texts else self._of_fact()))

    def _of_text(self) -> dict[str, Any]:
        facts = self.requested_rewrite.unsfact_triplets_GPT[:5]
        asked = [p for t in facts for p in one(t.prompt.replace("{}", t.subject), t.target)]
        return {
            "target_new": self.requested_rewrite.fact_new_uns,
            "probes": {"sub": tuple(asked)},
            "long_answer": True,
        }

    def _of_fact(self) -> dict[str, Any]:
        fact = self.requested_rewrite
        near = [p for prompt in self.neighborhood_prompts for p in one(prompt, fact.target_true)]
        hops = [p for question in self.questions for p in one(question, self.new_answer)]
        return {
            "target_new": fact.target_new,
            "ground_truth": self.answer or fact.target_true,
            "locality": {"locality": (*near, *one(self.loc, self.loc_ans))},
            "portability": {"por_hop": tuple(hops)},
        }


def read_akew(path: Path | None, *, texts: bool = True) -> Source:
    """Read AKEW's WikiUpdate.json, CounterFact.json or MQuAKE-CF.json as EasyEdit does.

    With `texts`, the target is the text that tells the fact, with questions on up to five of its
    parts as `probes.sub`; if not, the fact alone, with its locality and portability.
    """
    records, file = read_records(find_file(path), lambda _: _Akew)
    whole = [r for r in records if not texts or r.requested_rewrite.fact_new_uns]
    left = len(records) - len(whole)
    notes = [f"{left} records skipped, for they have no fact_new_uns"] if left else []
    return Source([record.case(texts) for record in whole], [file], notes)
