"""Readers of each kind of file: its layout as a model, and the cases that its records become.

Every reader takes the path of a file or directory, and options by keyword. All raise ValueError if
a record breaks a rule, TypeError if a file holds no list, FileNotFoundError if one is missing.
"""

from itertools import chain, cycle
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
)

from baft_easyedit import facts
from baft_easyedit.bench.data.case import (
    Answers,
    Case,
    Layout,
    MaybeText,
    Probe,
    Probes,
    Text,
    Texts,
    none_is_empty,
    one,
)
from baft_easyedit.bench.data.files import Source, find_file, read_file, read_records
from baft_easyedit.facts.records import Split
from baft_easyedit.files.validation import validated


class _ZsreIrrelevant(Layout):
    """The part of a ZsRE record that is read as an irrelevant prompt."""

    loc: MaybeText = None
    loc_ans: MaybeText = None

    @property
    def text(self) -> str | None:
        """Prompt and answer; None if either is missing."""
        return f"{self.loc} {self.loc_ans}" if self.loc and self.loc_ans else None


class _NewQuestion(Probe):
    """A question whose answer follows from the edit."""

    prompt: MaybeText = Field(alias="New Question")
    ground_truth: Answers = Field(alias="New Answer")


class _Zsre(_ZsreIrrelevant):
    """ZsRE as MEND and WISE lay it out."""

    subject: MaybeText = None
    src: Text
    alt: Annotated[str, StringConstraints(strict=True, strip_whitespace=True)]
    answers: Answers = ()
    rephrase: MaybeText = None
    portability: _NewQuestion | None = None

    def case(self, index: int, loc_prompt: str | None) -> Case:
        return Case(
            case_id=index,
            prompt=self.src,
            target_new=self.alt,
            ground_truth=self.answers,
            subject=self.subject,
            rephrase_prompt=self.rephrase,
            loc_prompt=(loc_prompt,) if loc_prompt else (),
            locality={"neighborhood": one(self.loc, self.loc_ans)},
            portability={"one_hop": (self.portability,) if self.portability else ()},
        )


def read_zsre(path: Path | None, *, loc_prompts: bool = True) -> Source:
    """Read ZsRE as EasyEdit's run_wise_editing.py does.

    `loc_prompt` of record i is `loc` and `loc_ans` of the train file's record i, which starts again
    at its end where EasyEdit would shuffle. Records with an empty `alt` are skipped, as EasyEdit's
    ZsreDataset does.

    Args:
        path: The directory of zsre_mend_edit.json and zsre_mend_train.json, or a file to edit with
            the train file beside it.
        loc_prompts: Whether to read the train file at all.
    """
    edit_file = find_file(path, "zsre_mend_edit.json")
    records, file = read_records(edit_file, lambda _: _Zsre)
    files, notes = [file], []
    texts: list[str | None] = []
    if loc_prompts:
        train_file = find_file(edit_file.with_name("zsre_mend_train.json"))
        irrelevant, train_hash = read_records(train_file, lambda _: _ZsreIrrelevant)
        texts = [record.text for record in irrelevant]
        files.append(train_hash)
        if len(texts) < len(records):
            notes.append(f"{len(texts)} loc prompts are used in turn for {len(records)} records")
    skipped = [i for i, record in enumerate(records) if not record.alt]
    if skipped:
        notes.append(f"records skipped, for their alt is empty: {skipped}")
    pairs = zip(records, cycle(texts or [None]), strict=False)
    cases = [record.case(i, text) for i, (record, text) in enumerate(pairs) if record.alt]
    return Source(cases, files, notes)


def _named_as_in_requests(probes: Probes) -> Probes:
    if "Reasoning" in probes:
        probes["reasoning"] = probes.pop("Reasoning")
    return probes


class KnowEdit(Case):
    """A record of KnowEdit: ZsRE, WikiData_recent, WikiData_counterfact or WikiBio.

    WikiBio has names of its own. Kinds of probes are called as in the requests of EasyEdit's
    run_knowedit_llama2.py. That script asks no rephrased prompt, also where the file has one; here
    it is read.
    """

    subject: MaybeText = Field(None, validation_alias=AliasChoices("subject", "concept"))
    prompt: Text = Field(validation_alias=AliasChoices("prompt", "text"))
    target_new: Text = Field(validation_alias=AliasChoices("target_new", "labels"))
    rephrase_prompt: MaybeText = Field(
        None, validation_alias=AliasChoices("rephrase_prompt", "rephrase")
    )
    portability: Annotated[Probes, AfterValidator(_named_as_in_requests)] = Field({})


def _with_one_slot(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("must have one {} for the subject")
    return template


class Rewrite(Layout):
    """A fact to rewrite: ROME's `requested_rewrite`."""

    prompt: Annotated[Text, AfterValidator(_with_one_slot)]
    subject: Text
    target_new: Text = Field(validation_alias=AliasPath("target_new", "str"))
    target_true: Text = Field(validation_alias=AliasPath("target_true", "str"))
    relation_id: MaybeText = None
    target_id: MaybeText = Field(None, validation_alias=AliasPath("target_new", "id"))

    def case(self, **others: Any) -> Case:
        """Return the edit, with the fields of a case that are not the fact's."""
        return Case(
            prompt=self.prompt.replace("{}", self.subject),
            target_new=self.target_new,
            ground_truth=(self.target_true,),
            subject=self.subject,
            **others,
        )


class _RomeCounterFact(Layout):
    """CounterFact as ROME publishes it."""

    case_id: int | str
    requested_rewrite: Rewrite
    paraphrase_prompts: Texts = ()
    neighborhood_prompts: Texts = ()
    generation_prompts: Texts = ()

    def case(self) -> Case:
        fact = self.requested_rewrite
        near = (one(prompt, fact.target_true) for prompt in self.neighborhood_prompts)
        return fact.case(
            case_id=self.case_id,
            rephrase_prompt=next(iter(self.paraphrase_prompts), None),
            counterfact={
                "paraphrase": self.paraphrase_prompts,
                "neighborhood": self.neighborhood_prompts,
                "generation": self.generation_prompts,
                "reference": (fact.relation_id, fact.target_id)
                if fact.relation_id and fact.target_id
                else (),
            },
            locality={"neighborhood": tuple(chain.from_iterable(near))},
        )


class _FlatCounterFact(Layout):
    """CounterFact as EasyEdit's CounterFactDataset reads it."""

    case_id: int | str | None = None
    prompt: Text
    target_new: Text
    ground_truth: Answers = ()
    subject: MaybeText = None
    rephrase_prompt: MaybeText = None
    locality_prompt: MaybeText = None
    locality_ground_truth: MaybeText = None

    def case(self) -> Case:
        of_case = self.model_dump(exclude={"locality_prompt", "locality_ground_truth"})
        near = one(self.locality_prompt, self.locality_ground_truth)
        return Case(**of_case, locality={"neighborhood": near})


def _layout_of(record: Any) -> type[_RomeCounterFact | _FlatCounterFact]:
    is_romes = isinstance(record, dict) and "requested_rewrite" in record
    return _RomeCounterFact if is_romes else _FlatCounterFact


def read_counterfact(path: Path | None) -> Source:
    """Read CounterFact, as ROME publishes it or as EasyEdit flattens it.

    ROME's neighbours share the true answer, which is what the probes `neighborhood` give; the first
    paraphrase is the rephrased prompt. All paraphrases, neighbours and generation prompts are for
    other papers' scores; a record may lack any. Attributes are not read.
    """
    file_names = "multi_counterfact.json", "counterfact.json"
    records, file = read_records(find_file(path, *file_names), _layout_of)
    return Source([record.case() for record in records], [file], [])


def _split_probe(probe: Any) -> Any:
    """Cut EasyEdit's probe, one prompt or parallel lists, into single probes."""
    if probe is None:
        return []
    if not isinstance(probe, dict):
        raise ValueError("must be a dict with the keys prompt and ground_truth")
    prompts: Any = probe.get("prompt")
    answers: Any = probe.get("ground_truth")
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [answers]
    aliases: Any = probe.get("aliases", answers)
    for name, values in (("ground_truth", answers), ("aliases", aliases)):
        if not isinstance(values, list) or len(values) != len(prompts):
            raise ValueError(
                f"{name} must be a list with an entry for each of {len(prompts)} prompts"
            )
    return [
        {"prompt": prompt, "ground_truth": [answer, others]}
        for prompt, answer, others in zip(prompts, answers, aliases, strict=True)
    ]


_Sections = Annotated[
    dict[str, Annotated[tuple[Probe, ...], BeforeValidator(_split_probe)]],
    BeforeValidator(none_is_empty),
]


class Request(Case):
    """A request dict of EasyEdit, such as in the `requests.json` of a run; other keys are kept.

    A probe has one prompt or a list of them; its `ground_truth` is a text for each prompt, or a
    list of accepted ones. `ground_truth`, `locality` and `portability` may be missing.
    """

    model_config = ConfigDict(extra="allow")

    locality: _Sections = Field({})
    portability: _Sections = Field({})
    probes: _Sections = Field({})


def read_facts(path: Path | None, *, split: Split = "eval") -> Source:
    """Return one split of the package's own facts, see `baft_easyedit.facts.edit_requests`."""
    if path is not None:
        raise ValueError(f"path must be None for facts, which the package brings; got {path}")
    folder = Path(facts.__file__).parent / "data"
    tables = sorted([*folder.glob("*.tsv"), *folder.glob("*.json")])
    cases: list[Case] = [validated(Request, r, "facts") for r in facts.edit_requests(split)]
    return Source(cases, [read_file(table)[1] for table in tables], [])
