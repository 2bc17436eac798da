import pytest

from baft_easyedit import BaFTHyperParams
from baft_easyedit.files.messages import MAX_MESSAGE, cut, short
from baft_easyedit.training.rehearsal import RehearsalMemory
from baft_easyedit.training.requests import EditRequest, as_requests

LONG = "long" * 20_000


@pytest.mark.parametrize(
    "value",
    [LONG, LONG.encode(), [LONG] * 1000, {LONG: [[[LONG]]] * 9}, 10**5000, -(10**5000), "\ud800"],
    ids=lambda value: type(value).__name__,
)
def test_value_is_shown_in_short(value):
    text = short(value)
    assert 0 < len(text) <= 200
    text.encode()


def test_short_values_are_shown_as_they_are():
    for value in ("a", 3, None, [1, 2], {"a": 0.5}, (), b"x"):
        assert short(value) == repr(value)


def test_long_text_loses_its_middle():
    assert cut("a" * 50 + "b" * 50, 25) == "a" * 10 + " ... " + "b" * 10
    assert cut("abc") == "abc"
    assert len(cut(LONG)) <= MAX_MESSAGE


@pytest.mark.parametrize(
    "use",
    [
        lambda: EditRequest(LONG, "b", subject=f"{LONG}s"),
        lambda: as_requests({LONG: 1}),
        lambda: as_requests({"prompt": [LONG] * 100, "target_new": "b"}),
        lambda: as_requests({"prompt": "a", "target_new": " " * 80_000}),
        lambda: BaFTHyperParams.from_dict({LONG: 1}),
        lambda: BaFTHyperParams("m", [1], gate=LONG),
        lambda: BaFTHyperParams("m", [1], rank=LONG),
        lambda: BaFTHyperParams("m", [1], seed=-(10**5000)),
        lambda: BaFTHyperParams.from_hparams(LONG),
        lambda: RehearsalMemory().restore({"past": [], "num_seen": -(10**4200)}),
    ],
)
def test_messages_are_short(use):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        use()
    assert len(str(error.value)) <= MAX_MESSAGE
