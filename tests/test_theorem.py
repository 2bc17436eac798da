"""Theorem 2.3 in our reading: on operators and linear models with known answers, and on models."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from baft_easyedit.cli import main
from baft_easyedit.method.intervention import BaFTIntervention
from baft_easyedit.theorem import balls, show
from baft_easyedit.theorem.measure import Case, LastState, Moved, State, measure, settings
from tests.conftest import logits, make_model, make_tokenizer, with_prefix

D, RANK = 32, 4
CASE = Case("The capital of Peru is", "Oslo", ("Peru's capital:",), ("Water is", "Ice is"))


def linear_edit(seed=0, scale=1.0, gate="one"):
    """An edit whose A - R has the singular values 4, 3, 2, 1 times `scale`."""
    generator = torch.Generator().manual_seed(seed)
    edit = BaFTIntervention(D, RANK, gate, generator)
    rows = torch.linalg.qr(torch.randn(D, RANK, generator=generator))[0].mT
    with torch.no_grad():
        edit.difference.copy_(scale * torch.arange(4.0, 0, -1)[:, None] * rows)
        edit.source_bias.copy_(torch.randn(RANK, generator=generator))
    return edit.requires_grad_(False)


def states(count, seed=1):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def test_sigma_max_is_that_of_the_operator():
    edit = linear_edit()
    assert balls.sigma_max(edit) == pytest.approx(4, rel=1e-5)
    H = edit.basis.mT @ edit.difference
    assert torch.linalg.svdvals(H)[:5].tolist() == pytest.approx([4, 3, 2, 1, 0], abs=1e-5)
    moved = balls.step(edit, states(2))
    torch.testing.assert_close(moved[0] - moved[1], H @ (states(2)[0] - states(2)[1]))


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_a_linear_edit_lie_in_the_cone(seed):
    edit, h = linear_edit(seed), states(50, seed)
    steps, distances = balls.step(edit, h).norm(dim=-1), (h - h[0]).norm(dim=-1)
    room = balls.sigma_max(edit) * distances + 1e-3
    assert ((steps - steps[0]).abs() <= room).all()
    for own, distance in zip(steps.tolist(), distances.tolist(), strict=True):
        assert own + 1e-3 >= balls.least_step(steps[0].item(), balls.sigma_max(edit), distance)


def test_bound_is_reached_in_the_first_singular_direction():
    edit = linear_edit()
    with torch.no_grad():
        edit.source_bias.zero_()
    first = torch.linalg.svd(edit.difference).Vh[0]
    near, far = (balls.step(edit, length * first).norm().item() for length in (2.0, 5.0))
    assert near == pytest.approx(balls.least_step(far, balls.sigma_max(edit), 3.0), rel=1e-5)


def linear_model(seed=0, vocab=7):
    head = torch.randn(vocab, D, generator=torch.Generator().manual_seed(seed))
    return head, lambda h: h @ head.mT


@pytest.mark.parametrize("seed", range(5))
def test_radii_of_a_linear_model_are_known(seed):
    head, answers = linear_model(seed)
    h = states(1, seed + 10)[0]
    answer = answers(h).argmax()
    others = torch.arange(len(head)) != answer
    apart = (head[answer] - head)[others]  # the answer changes where apart @ h turns negative
    nearest = (apart @ h / apart.norm(dim=-1)).min().item()
    directions = balls.random_directions(h, 6, seed)
    lengths = apart @ h / (-directions @ apart.mT)  # where each line meets each plane
    expected = torch.where(lengths > 0, lengths, torch.inf).min(-1).values.clamp(max=50)
    found = balls.radii(answers, h, directions, 50.0)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)
    toward = balls.adversarial_directions(answers, h, 6, 3)
    assert balls.radii(answers, h, toward, 50.0).min().item() == pytest.approx(nearest, rel=0.02)
    assert (found >= nearest * 0.999).all()  # measured radii are upper bounds


def test_a_pair_that_must_leave_leaves():
    _, answers = linear_model()
    h = states(1)[0]
    near = h + 0.01 * balls.random_directions(h, 1, 0)[0]
    edit = linear_edit(scale=3.0)
    steps = balls.step(edit, torch.stack([h, near])).norm(dim=-1).tolist()
    radius = balls.radii(
        answers, near, balls.adversarial_directions(answers, near, 6, 3), 50.0
    ).min()
    least = balls.least_step(steps[0], balls.sigma_max(edit), (near - h).norm().item())
    assert radius.item() <= least <= steps[1]


def test_least_sigma_is_what_lets_a_state_stay():
    assert balls.least_sigma(5.0, 1.0, 2.0) == 2.0
    assert balls.least_sigma(1.0, 5.0, 2.0) == balls.least_sigma(5.0, 1.0, 0.0) == 0.0
    assert balls.least_step(5.0, balls.least_sigma(5.0, 1.0, 2.0), 2.0) == 1.0


def test_a_closed_gate_moves_nothing():
    edit = linear_edit(gate="rms-sigmoid")
    assert balls.step(edit, states(3)).norm() > 1
    edit.gate.forward = lambda hidden: torch.zeros(*hidden.shape[:-1], RANK)
    assert torch.equal(balls.step(edit, states(3)), torch.zeros(3, D))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "prefix"])
@pytest.mark.parametrize("ids", [[5, 9, 40, 7, 80, 6, 90, 30, 21, 8], [5]])
def test_last_state_is_the_model_from_there_on(family, ids):
    model = with_prefix(make_model()) if family == "prefix" else make_model(family)
    found = LastState(model, ids, 2)
    whole = logits(model, torch.tensor([ids]))[:, -1]
    with torch.no_grad():
        again = found.logits(found.hidden.expand(3, -1))
    torch.testing.assert_close(again, whole.expand(3, -1), rtol=1e-3, atol=1e-3)
    assert not any(module._forward_hooks for module in model.modules())


def test_measured_edits_are_those_of_the_edited_model():
    from baft_easyedit import BaFTEditor

    model, tokenizer = make_model(), make_tokenizer()
    hparams = [replace(h, num_steps=20) for h in settings("tiny", 2, "cpu")]
    sigmas, found = measure(model, tokenizer, CASE, hparams)
    assert [state.kind for state in found] == ["edited", "rephrasing", "irrelevant", "irrelevant"]
    for state in found:
        assert state.radius <= state.random_radius
        assert state.leaves("ReFT") or not state.must_leave()
        assert abs(state.edits["ReFT"].step - found[0].edits["ReFT"].step) <= (
            sigmas["ReFT"] * state.distance + 1e-3
        )
        assert (state.edits["ReFT"].weight, state.edits["BaFT"].least) == (1.0, None)
    for method in hparams:  # the same edit, attached
        editor = BaFTEditor(model, tokenizer, method)
        editor.edit({"prompt": CASE.prompt, "target_new": CASE.target})
        for state in found:
            ids = tokenizer(state.prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad(), editor.model_edit.prompt_lengths([ids.shape[1]]):
                token = model(input_ids=ids).logits[0, -1].argmax()
            assert tokenizer.decode([token]) == state.edits[method.algorithm].answer
        editor.undo()
        editor.model_edit.detach()


@pytest.mark.parametrize("model", ["bundled", "smollm2", "tiny"])
def test_the_theorem_is_of_the_papers_form(model):
    """With bases of its own for each edit, there is no H = R^T (A - R) of all states."""
    for hparams in settings(model, 2, "cpu"):
        assert hparams.min_similarity is None
        assert hparams.rank == 12


@pytest.mark.parametrize("model", ["bundled", "smollm2"])
def test_chosen_facts_have_prompts_of_each_kind(model):
    case = Case.of_facts(model)
    texts = [text for _, text in case.prompts()]
    assert len({*texts}) == len(texts) == 1 + len(case.rephrasings) + 12
    assert len(case.rephrasings) >= 2
    assert not [t for t in case.irrelevant if any(told.startswith(t) for told in case.loc_prompts)]


def test_counts_and_table_tell_what_was_found():
    edits = {"ReFT": Moved(3.0, 2.0, 1.0, " b"), "BaFT": Moved(0.1, None, 0.0, "a|")}
    state = State("irrelevant", "Ice is", "a|", 9.0, 1.0, 1.5, 40.0, edits)
    (line,) = show.counts([state])
    assert line.startswith("1 irrelevant: 1 must leave their ball by ReFT; ReFT: 1 steps")
    assert line.endswith("BaFT: 0 steps as long as the radius, 0 other answers")
    assert r"| a\| | 1.0 | 1.50 | 40.0 | **2.0** | 3.0 | b |" in show.table([state])


def test_command_writes_numbers_table_and_figure(saved, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = ["theorem", "--model", saved, "--layer", "1", "--device", "cpu", "--prompt", "Ice is"]
    command += ["--target", "hot", "--loc", "Snow is", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "1 irrelevant: " in capsys.readouterr().out
    content = json.loads((tmp_path / "out/theorem.json").read_text())
    assert [state["prompt"] for state in content["states"]] == ["Ice is", "Snow is"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "theorem.json", "theorem.md", "theorem.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "Ice is"], "--prompt and --target must both be given"),
        (["--loc", "Snow is"], "--prompt and --target must both be given"),
        (["--model", "nowhere"], "for a model other than bundled and smollm2"),
        (["--prompt", "Ice is", "--target", ""], "target_new must not be empty"),
        (["--layer", "99", "--device", "cpu"], "--layer must be below 6, the model's depth"),
        (["--prompt", "Ice is", "--target", "a", "--loc", ""], "--loc-prompt must not be blank"),
        (["--prompt", "a", "--target", "b", "--loc", "a " * 999], "must fit the model's context"),
        (["--layer", "-1"], "argument --layer: must be a whole number of at least 0"),
    ],
)
def test_bad_input_is_told(options, message, capsys):
    try:
        status = main(["theorem", *options])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_what_draws_is_asked_for_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command = ["theorem", "--model", "nowhere", "--prompt", "a", "--target", "b"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "--out needs matplotlib" in capsys.readouterr().err
