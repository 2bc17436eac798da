"""Stand-in prompts: irrelevant prompts for a request that brings none (ours).

An edit learned without irrelevant prompts changes the answers to similar prompts, too: after an
edit of France's capital, Germany gets the same one. A stand-in is the prompt itself with an
invented name in the place of its subject, so that the gates learn to tell subjects apart. As the
names are invented, no stand-in asks for a true fact, nor for one that was edited before.
"""

import random

from baft_easyedit.training.requests import EditRequest, same_form

_NAMES = (
    *("Velmora", "Tarkesh", "Orlundia", "Brisken", "Port Halden", "Sarnath Vale"),  # places
    *("Lake Ondra", "Mount Serrin", "Tolva River", "Castle Grennock", "Bellweather Tower"),
    *("Milton Grebe", "Anna Torvalsen", "Teodora Vance", "Lin Qiaoya", "Dmitri Volsky"),  # people
    *("Samuel Oduya", "Rafael Quintero Sosa", "Yuki Tanemura", "Greta Brandlmeier"),
    *("The Glass Orchard", "A Winter in Helm", "Nightfall over Tessin", "Kestrel Nine"),  # works
    *("Norvex", "Calderon Motors", "Blue Heron Press", "Hartwell College", "Kingsbridge Rovers"),
    *("velmite", "korvash stew", "the marsh lynx", "harrowflute", "dunball"),  # things
)


def stand_ins(request: EditRequest, count: int) -> list[str]:
    """Return prompts with other names in the place of a request's subject.

    Args:
        request: The request; without a subject, or with irrelevant prompts, it gets none.
        count: How many, at most.

    Returns:
        The stand-ins; the same prompt always gets the same ones.
    """
    if request.subject is None or request.loc_prompts:
        return []
    prompt, subject = same_form(request.prompt), same_form(request.subject)
    names = random.Random(prompt).sample(_NAMES, min(count, len(_NAMES)))
    return [prompt.replace(subject, name) for name in names]
