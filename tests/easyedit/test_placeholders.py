"""Stand-ins let imports succeed, and everything else fail clearly."""

import importlib
import importlib.util
import sys

import pytest

from baft_easyedit.easyedit.placeholders import missing_vision_packages, vision_placeholders


@pytest.fixture
def stand_in():
    with vision_placeholders(["novision"]):
        yield importlib.import_module("novision.parts.colour")


def test_classes_can_be_inherited_from_but_not_made(stand_in):
    class Colour(stand_in.Jitter):
        pass

    for use in (Colour, stand_in.Jitter, stand_in.Mode.BICUBIC):
        with pytest.raises(ImportError, match=r"needs the package 'novision'.*never needs it"):
            use(1)


def test_private_attributes_do_not_exist(stand_in):
    with pytest.raises(AttributeError, match="__wrapped__"):
        _ = stand_in.__wrapped__
    with pytest.raises(AttributeError, match="__wrapped__"):
        _ = stand_in.Jitter.__wrapped__


def test_placeholders_go_with_the_context():
    with vision_placeholders(["novision"]):
        importlib.import_module("novision.parts")
    assert not [name for name in sys.modules if name.split(".")[0] == "novision"]
    assert importlib.util.find_spec("novision") is None


def test_installed_packages_are_not_stood_in_for():
    assert all(importlib.util.find_spec(name) is None for name in missing_vision_packages())


def test_moved_names_are_lent_to_transformers():
    from transformers import modeling_utils

    names = ("apply_chunking_to_forward", "prune_linear_layer")
    before = [hasattr(modeling_utils, name) for name in names]
    with vision_placeholders([]):
        assert all(callable(getattr(modeling_utils, name)) for name in names)
    assert [hasattr(modeling_utils, name) for name in names] == before
