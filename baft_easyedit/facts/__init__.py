"""The bundled data: true facts about the world, questions on them, and edit requests made of them.

A small Llama, the bundled model, was trained on the facts by `scripts/train_facts_model.py`. Each
function reads the tables in `data/` when it is called; nothing is read at import.
"""

from baft_easyedit.facts.questions import Question, questions
from baft_easyedit.facts.records import edit_requests, split_of
from baft_easyedit.facts.tables import Fact, Relation, TwoHopRule, facts, relations, two_hop_rules
from baft_easyedit.files.resources import bundled_model_path

__all__ = [
    "Fact",
    "Question",
    "Relation",
    "TwoHopRule",
    "bundled_model_path",
    "edit_requests",
    "facts",
    "questions",
    "relations",
    "split_of",
    "two_hop_rules",
]
