"""True facts about the world, questions on them, and a small Llama that knows the answers.

Nothing is read at import: each function reads the tables in `data/` when it is called. The recipe
of the bundled model is in `scripts/train_facts_model.py`.
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
