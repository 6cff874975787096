"""Refusals of a plan, as several tests see them."""

from __future__ import annotations

import pytest

import convpeft
from convpeft import SpecError
from tests.detector import Untouched, detector


def refused(spec, error, text, model=None, **options):
    """Plan and inject raise the error, and nothing has changed."""
    model = detector() if model is None else model
    before = Untouched(model)
    for function in (convpeft.plan, convpeft.inject):
        with pytest.raises(SpecError, match=text) as caught:
            function(model, spec, **options)
        assert type(caught.value) is error
    before.check()
    return str(caught.value)
