"""Small records of every kind of benchmark file, and a way to write them."""

import copy
import json


def knowedit(subject, target="Rome"):
    return {
        "subject": subject,
        "prompt": f"The capital of {subject} is",
        "target_new": target,
        "rephrase": f"{subject} has the capital",
        "portability": {
            "Reasoning": [
                {"prompt": f"People in {subject}'s capital speak", "ground_truth": [["Italian"]]},
                {"prompt": f"The mayor of {subject}'s capital is", "ground_truth": "Gualtieri"},
            ],
            "Logical_Generalization": [
                {"prompt": f"Is {target} a capital?", "ground_truth": [["yes"], ["it is", "yes"]]}
            ],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": f"The currency of {subject} is", "ground_truth": ["euro", "EUR"]}
            ]
        },
    }


def wikibio(name):
    return {
        "text": f"This is a passage about {name}. {name} was a physician. ",
        "labels": f"In 1850 {name} moved to London, where a clinic was founded.",
        "concept": name,
        "locality": {
            "Relation_Specificity": [{"prompt": f"{name} works in", "ground_truth": ["medicine"]}]
        },
    }


def zsre(subject, alt=" 2006"):
    return {
        "subject": subject,
        "src": f"When was {subject} founded?",
        "pred": "2011",
        "rephrase": f"What year saw the start of {subject}?",
        "alt": alt,
        "answers": ["1998", "in 1998"],
        "loc": f"nq question: who sang about {subject}",
        "loc_ans": "Roxette",
        "portability": {"New Question": f"What is {subject}?", "New Answer": "A club"},
    }


def rewrite(subject, new, true):
    return {
        "prompt": "{} is a citizen of",
        "relation_id": "P27",
        "subject": subject,
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": true, "id": "Q2"},
    }


def rome(subject, case_id):
    return {
        "case_id": case_id,
        "requested_rewrite": rewrite(subject, "Australia", "India"),
        "paraphrase_prompts": [f"Long ago. {subject} has a passport of", "Another one"],
        "neighborhood_prompts": ["Asha is a citizen of", "Ravi is a citizen of"],
        "generation_prompts": [f"{subject}'s passport says"],
        "attribute_prompts": ["Bruce is a citizen of"],
    }


def counterfact(subject):
    return {
        "case_id": 7,
        "prompt": f"{subject}, who plays the",
        "target_new": "piano",
        "subject": subject,
        "ground_truth": "guitar",
        "rephrase_prompt": f"{subject} is incredible at",
        "locality_prompt": "John Lennon performs on the",
        "locality_ground_truth": "guitar",
    }


def mquake(first, second, case_id):
    return {
        "case_id": case_id,
        "requested_rewrite": [
            {**rewrite(first, second, "India"), "question": f"Whose citizen is {first}?"},
            {**rewrite(second, "Mars", "Earth"), "question": f"Where is {second}?"},
        ],
        "questions": [f"On what planet is {first} a citizen?", f"What planet is {first}'s?"],
        "new_answer": "Mars",
        "new_answer_alias": ["the red planet"],
    }


def convsent(topic):
    return {"ent": topic, "pos": [" I like it. ", "Great."], "neg": [" I do not like it. ", "Bad."]}


def request(subject):
    return {
        "prompt": f"The capital of {subject} is",
        "target_new": "Rome",
        "ground_truth": "Paris",
        "subject": subject,
        "rephrase_prompt": f"{subject} has the capital",
        "loc_prompt": ["Water boils at 100", "Snow is white"],
        "locality": {"nq": {"prompt": "The sky is", "ground_truth": "blue"}, "none": None},
        "portability": {
            "hop": {"prompt": ["One is", "Two is"], "ground_truth": ["1", ["2", "two"]]}
        },
        "target_neg": "Oslo",
    }


def wikibigedit(subject, **others):
    return {
        "tag": "Update",
        "subject": subject,
        "update": f"Who leads {subject}?",
        "ans": "Ann Lee",
        "rephrase": f"Whom does {subject} follow?",
        "personas": f"Arr, who be leadin' {subject}?",
        "mhop": f"Where was the leader of {subject} born?",
        "mhop_ans": "Lima",
        "loc": "Who wrote it?",
        "loc_ans": "Bob",
        **others,
    }


def unke(subject, **others):
    return {
        "id": subject,
        "question": f"Who is {subject}?",
        "para_question": f"What do you know of {subject}?",
        "answer": f"{subject} is a painter. The works hang in Oslo.",
        "sub_question": [f"What is {subject}?", "Where do the works hang?"],
        "sub_answer": ["A painter", "Oslo"],
        **others,
    }


def akew(subject, kind):
    """A record of one of AKEW's three files."""
    fact = {
        "prompt": "{} lives in",
        "subject": subject,
        "question": f"Where is {subject}'s home?",
        "fact_new_uns": f"{subject} moved to Rome.",
        "unsfact_triplets_GPT": [
            {"prompt": f"{{}} has room {i} in", "subject": subject, "target": "Rome"}
            for i in range(7)
        ],
    }
    near = {"loc": "Who sang?", "loc_ans": "Roxette"}
    if kind == "wikiupdate":
        return {"requested_rewrite": {**fact, "answer_new": "Rome", "answer_true": "Bern"}, **near}
    fact |= {"target_new": {"str": "Rome"}, "target_true": {"str": "Bern"}}
    if kind == "mquake":
        asked = {"questions": [f"Of what is {subject}'s home the capital?"]}
        return {"requested_rewrite": [fact], "answer": "A", "new_answer": "Italy", **asked, **near}
    return {
        "requested_rewrite": {**fact, "prompt_full": f"In which town does {subject} live?"},
        "paraphrase_prompts": [f"{subject}'s town is", "Another"],
        "neighborhood_prompts": ["Bob lives in", "Eve lives in"],
    }


HALLUEDIT = (
    "subject,relation,object,question,paraphrased_question,yes_question,no_question,"
    "multiple_choice_with_letters,multiple_choice_labels,reversed_relation_question,"
    "question_2hop,answer_2hop,question_3hop,answer_3hop,locality_question"
)
"""The columns of HalluEditBench that are read."""


def halluedit(subject, relation):
    return (
        f'{subject},{relation},"Rome, Italy",What is it?,Say it again?,Is it Rome?,Is it Oslo?,'
        f'"A. Rome, B. Oslo",A,What has its {relation} in Rome?,Two hops?,Two,,,Who sang?'
    )


RECORDS = {
    "zsre": [zsre("Acme"), zsre("Bolt")],
    "knowedit-zsre": [knowedit("France"), knowedit("Spain")],
    "wikidata-recent": [knowedit("France"), knowedit("Spain")],
    "wikidata-counterfact": [knowedit("France"), knowedit("Spain")],
    "wikibio": [wikibio("jo smith"), wikibio("al brown")],
    "convsent": [convsent("jazz"), convsent("rain")],
    "counterfact": [rome("Asha", 3), counterfact("Toko")],
    "mquake": [mquake("Ann", "Norway", 11), mquake("Bob", "Sweden", 12)],
    "wikibigedit": [wikibigedit("Acme"), wikibigedit("Bolt", mhop=None, mhop_ans=None)],
    "unke": [unke("Ann"), unke("Bob")],
    "akew": [akew("Ann", "wikiupdate"), akew("Bob", "counterfact"), akew("Eve", "mquake")],
    "requests": [request("France"), request("Spain")],
}
"""Good records of each kind that is read from a JSON file."""


def records_of(kind):
    return copy.deepcopy(RECORDS[kind])


def write_records(folder, records, name="records.json"):
    """Write a file to edit, and an irrelevant one beside it for ZsRE; return the first one."""
    irrelevant = [{"loc": "nq question: who wrote it", "loc_ans": " Ann "}]
    (folder / "zsre_mend_train.json").write_text(json.dumps(irrelevant), encoding="utf-8")
    path = folder / name
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
