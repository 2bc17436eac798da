"""Probes made of the records themselves."""

from functools import partial
from types import SimpleNamespace

import pytest

from baft_easyedit.bench.questions import third_turn_ids, with_probes
from baft_easyedit.bench.store import RunDirectory
from baft_easyedit.model.prompt_format import PromptFormat


def record(prompt, target, subject=None, **others):
    named = {"subject": subject} if subject else {}
    return {"prompt": prompt, "target_new": target, **named, **others}


EVERYTHING = [
    record("The capital of France is", "Oslo", "France"),
    record("The capital of Spain is", "Bern", "Spain"),
    record("The currency of Peru is", "the yen", "Peru"),
]


@pytest.fixture
def made(tmp_path, tokenizer):
    """Return probes of requests, and how often the model was asked."""
    asked = []
    kept = partial(RunDirectory(tmp_path).kept, "pre_edit")

    def make(requests, written, everything=EVERYTHING, form=None):
        def answers(prompts, limits):
            asked.append((len(prompts), limits))
            return written

        editor = SimpleNamespace(tok=tokenizer, hparams=form or SimpleNamespace())
        session = SimpleNamespace(editor=editor, answers=answers)
        return with_probes(kept, session, requests, everything)

    return make, asked


def test_a_rephrasing_is_no_probe_that_must_stay(made):
    make, _ = made
    everything = [
        {**EVERYTHING[0], "rephrase_prompt": "The currency of France is"},
        *EVERYTHING[1:],
    ]
    (found,) = make(everything[:1], [""], everything)
    asked = found["probes"].get("same subject", {"prompt": []})["prompt"]
    assert "The currency of France is" not in asked


def test_probes_share_words_with_the_edit_or_turn_it_around(made):
    make, _ = made
    (found,) = make(EVERYTHING[:1], ['France has the capital", he said'])
    asked = {
        kind: (probe["prompt"][0], probe["ground_truth"][0])
        for kind, probe in found["probes"].items()
    }
    assert asked == {
        "third turn": ("The capital of France is", "Oslo"),
        "own paraphrase": ("France has the capital", "Oslo"),
        "reversal": (
            'Complete the sentence: "The capital of ... is Oslo". What stands in place of the '
            "dots?",
            "France",
        ),
        # Not Spain's: that prompt is edited too.
        "same subject": ("The currency of France is", None),
        "same words": ("The capital of Peru is", None),
    }


def test_probes_that_a_record_has_are_kept_and_those_it_cannot_have_are_not_made(made):
    make, _ = made
    own = {"yes": {"prompt": ["Is it?"], "ground_truth": ["Yes"]}}
    alone = record("All is", "well", probes=own)
    (found,) = make([alone], ["All is"], [alone])
    assert list(found["probes"]) == ["yes", "third turn"]
    lonely = record("The capital of France is", "Oslo", "France")
    (found,) = make([lonely], [""], [lonely])
    assert list(found["probes"]) == ["third turn", "reversal"]


@pytest.mark.parametrize(
    "text", ["", "\n", "the capital of France IS Paris", "It is in Spain", "France: Oslo"]
)
def test_a_paraphrase_must_be_one(made, text):
    make, _ = made
    assert "own paraphrase" not in make(EVERYTHING[:1], [text])[0]["probes"]


def test_paraphrases_are_written_once(made):
    make, asked = made
    first, second = (make(EVERYTHING[:2], ["France's capital", "Spain's"]) for _ in range(2))
    assert first == second
    assert len(asked) == 1


def test_the_third_turn_is_in_the_chat_template_if_the_edit_is(tokenizer):
    plain = tokenizer.decode(third_turn_ids("Who?", PromptFormat(), tokenizer))
    assert plain.count("Q: ") == 3
    assert plain.endswith("White.\n\nQ: Who?\nA:")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chat = tokenizer.decode(third_turn_ids("Who?", PromptFormat(use_chat_template=True), tokenizer))
    assert chat.count("<assistant>") == 2
    assert chat.endswith("<assistant>White.<user>Who?")
