"""States of a kept edit, made again from its journal.

An older state is restored from the nearest one that is known: in memory, in a checkpoint, or by
what the journal says. The edits after it are learned again, and must give the journal's hashes.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from baft_easyedit.hparams import BaFTHyperParams
from baft_easyedit.model.inspect import text_config
from baft_easyedit.storage.config import environment, environment_change, hparams_of, new_edit
from baft_easyedit.storage.directory import KeptDirectory
from baft_easyedit.storage.journal import Entry, Journal
from baft_easyedit.storage.state import state_hash
from baft_easyedit.training.learner import EditState, Learner
from baft_easyedit.training.loop import EditReport
from baft_easyedit.training.requests import EditRequest, as_requests


def restore_entry(
    learner: Learner, directory: KeptDirectory, to: int, known: Mapping[int, EditState]
) -> None:
    """Restore the state after an entry; `known` has states by positions of the journal.

    Raises:
        ValueError: If no state before it is left, or the edits since do not come out bit for bit.
    """
    journal = directory.journal
    known = {**known, journal.position: learner.state()}

    def state_at(position: int) -> EditState | None:
        if position in known:
            return known[position]
        if position == 0:
            with suppress(ValueError):  # settings that are not read any more
                return _new_state(learner, journal)
        is_wanted = position == journal.position_of(to)
        return _first_edits(learner, journal, position) if is_wanted else None

    position, state = directory.nearest(to, state_at)
    learner.restore(state)
    for i in sorted(i for i in journal.ancestors(to) if i > position):
        _repeat(learner, directory, journal.entries[i])


def learn_entry(
    learner: Learner, journal: Journal, entry: Entry, requests: Sequence[EditRequest]
) -> EditReport:
    """Learn requests of an entry from the present state, with the entry's hyper-parameters."""
    return learner.learn(requests, hparams_at(learner, journal, entry))


def hparams_at(learner: Learner, journal: Journal, entry: Entry) -> BaFTHyperParams:
    """Return the hyper-parameters that an entry was made with."""
    settings = journal.settings_of(entry.id)["hparams"]
    return hparams_of(settings, learner.model, f"entry {entry.id}")


def _new_state(learner: Learner, journal: Journal) -> EditState:
    """Return what the state after entry 0 was, unless a snapshot began the journal."""
    hparams = hparams_at(learner, journal, journal.entries[0])
    new = new_edit(hparams, text_config(learner.model).hidden_size)
    return EditState(new.snapshot(), attached=False)


def _first_edits(learner: Learner, journal: Journal, to: int) -> EditState:
    """Return what the state after an entry was, unless edits since then changed its edits."""
    entries = [journal.entries[i] for i in journal.ancestors(to)]
    count = len({request["prompt"] for entry in entries for request in entry.requests})
    return learner.state()._replace(learned=learner.edit.first_edits(count))


def _repeat(learner: Learner, directory: KeptDirectory, entry: Entry) -> None:
    """Learn one entry again; raise ValueError unless the state has the journal's hash."""
    if entry.kind == "edit":
        learn_entry(learner, directory.journal, entry, as_requests(entry.requests))
        if state_hash(learner.state()) == entry.state_hash:
            return
    then = directory.journal.settings_of(entry.id)["environment"]
    why = environment_change(then, environment(learner.model))
    raise ValueError(
        f"entry {entry.id} of {directory.path} ({entry.kind}) could not be learned again bit "
        f"for bit ({why if entry.kind == 'edit' else 'only an edit can'}); the states after "
        f"entries {directory.exact_ids()} are kept as checkpoints: roll back to one"
    )
