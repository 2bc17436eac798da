"""An error at any line of an edit leaves everything as it was, and the next edit works."""

import random
import sys
from dataclasses import replace

import pytest
import torch

from baft_easyedit import BaFTEditor
from tests.conftest import logits, make_model

PAST = {"prompt": "Ice is", "target_new": "hot", "loc_prompt": "Fire burns"}
NEW = {"prompt": "The capital of Cuba is", "target_new": "Rome", "loc_prompt": "Water boils"}
NEXT = {"prompt": "Snow is", "target_new": "black"}
CLEAN_UP = ("surroundings.py", "locks.py")
"""Files that are made of cleaning up."""


def edit(editor):
    editor.edit(NEW)


def undo(editor):
    editor.undo()


def side_by_side(editor):
    editor.learn_apart([NEW, NEXT])


SETTINGS = {
    "cached": ({}, 0, edit),
    "full": ({"engine": "full"}, 0, edit),
    "later": ({}, 1, edit),
    "side by side": ({}, 0, side_by_side),
    "side by side, later": ({}, 1, side_by_side),
    "undo": ({}, 1, undo),
    "undo of one": ({}, 2, undo),
}


class Interrupts:
    """Raises at the n-th line of the package that runs in a context.

    Args:
        number: n, from 0; None to note the lines only.
        error: What is raised.
    """

    def __init__(self, number=None, error=KeyboardInterrupt):
        self.number = number
        self.error = error
        self.places = []

    def __enter__(self):
        sys.settrace(self._called)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _called(self, frame, event, arg):
        return self._line if "/baft_easyedit/" in frame.f_code.co_filename else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.places.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.places) - 1 == self.number:
                sys.settrace(None)
                raise self.error
        return self._line


def numbers_of(places):
    """The first and the last time that each line runs."""
    first = {place: number for number, place in reversed(list(enumerate(places)))}
    last = {place: number for number, place in enumerate(places)}
    return sorted({*first.values(), *last.values()})


def hooks_of(model):
    return [
        [(key, hook) for key, hook in vars(module)[name].items()]
        for module in model.modules()
        for name in vars(module)
        if name.startswith(("_forward_hooks", "_forward_pre_hooks"))
    ]


def all_of(model):
    """Everything around a model that an edit may change for a while."""
    return {
        "logits": logits(model),
        "hooks": hooks_of(model),
        "forwards": [vars(module).get("forward") for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": torch.get_rng_state(),
        "python's random": random.getstate(),
    }


def differences(before, after):
    return [
        name
        for name, value in before.items()
        if not (
            torch.equal(value, after[name])
            if isinstance(value, torch.Tensor)
            else value == after[name]
        )
    ]


def prepared(setting, tokenizer, hparams):
    """A model with modes that differ, an editor that made some edits, and what is to be done."""
    changes, num_edits, act = SETTINGS[setting]
    settings = {"num_steps": 2, "early_stop_loss": 0.0, **changes}
    model = make_model()
    model.model.layers[2].train()
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.register_forward_pre_hook(lambda module, args: None)
    model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    editor = BaFTEditor(model, tokenizer, replace(hparams, **settings))
    for request in [PAST, NEXT][:num_edits]:
        editor.edit(request)
    return model, editor, act


KINDS = [KeyboardInterrupt, MemoryError, torch.cuda.OutOfMemoryError]


def failures(setting, tokenizer, hparams, every):
    """Interrupt at every n-th place; return (place, what is different) and how many were tried."""
    _, editor, act = prepared(setting, tokenizer, hparams)
    act(editor)  # what comes once in a process
    model, editor, act = prepared(setting, tokenizer, hparams)
    with Interrupts() as noted:
        act(editor)
    editor.edit(NEXT)
    expected = logits(model)
    model, editor, act = prepared(setting, tokenizer, hparams)
    found, numbers = [], numbers_of(noted.places)[::every]
    for tried, number in enumerate(numbers):
        before, attached = all_of(model), editor.is_attached
        try:
            with Interrupts(number, KINDS[tried % 3]) as interrupts:
                act(editor)
        except tuple(KINDS):
            pass
        else:  # after a failure all is recorded anew, which are other lines than these
            model, editor, act = prepared(setting, tokenizer, hparams)
            continue
        different = differences(before, all_of(model))
        different += ["attached"] * (editor.is_attached != attached)
        different += ["lock"] * (not is_free(editor))
        if not different and not tried % 9:
            different += ["next edit"] * (not next_is_right(editor, act, expected))
            model, editor, act = prepared(setting, tokenizer, hparams)
        elif different:
            found.append((interrupts.places[-1], different))
            model, editor, act = prepared(setting, tokenizer, hparams)
    return found, len(numbers)


def is_free(editor):
    """Whether another thread could change the model at once."""
    return editor._learner.lock._owner is None


def next_is_right(editor, act, expected):
    """Whether it can be done now, and an edit after it, and gives what it would have given."""
    act(editor)
    editor.edit(NEXT)
    return torch.allclose(logits(editor.model), expected, atol=1e-3)


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_interrupt_leaves_everything_as_it_was(setting, tokenizer, hparams):
    found, tried = failures(setting, tokenizer, hparams, every=SAMPLED.get(setting, 251))
    assert tried > 2
    assert not [failure for failure in found if not is_clean_up(failure)]


SAMPLED = {"undo": 11, "undo of one": 11}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_an_interrupt_anywhere_leaves_everything_as_it_was(setting, tokenizer, hparams, request):
    every = 1 if setting in SAMPLED else int(request.config.getoption("--interrupt-every"))
    found, tried = failures(setting, tokenizer, hparams, every)
    assert tried > 50
    assert not [failure for failure in found if not is_clean_up(failure)]
    assert len(found) <= 8  # of the lines that put something back, and let others in


def is_clean_up(failure):
    """Whether an interrupt came while something was put back: it cannot be perfect there."""
    (file, line), _ = failure
    return file.endswith(CLEAN_UP) or line in clean_up_lines(file)


def clean_up_lines(file):
    """Lines in the `finally` and `except` blocks of a file."""
    import ast

    with open(file, encoding="utf-8") as opened:
        tree = ast.parse(opened.read())
    blocks = [
        block
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        for block in (node.finalbody, *(handler.body for handler in node.handlers))
    ]
    return {
        line
        for block in blocks
        for statement in block
        for line in range(statement.lineno, statement.end_lineno + 1)
    }
