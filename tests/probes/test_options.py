"""The options of the studies: counts with which none would end."""

import dataclasses

import pytest

from diffattn.errors import ConfigError
from diffattn.probes.options import OPTIONS
from diffattn.scaling.fit import fit_scaling

# Held to the model's positions, to what follows from them, or of any size.
FREE = {"length", "lengths", "context", "seed", "labels", "bits", "tasks", "depths"}


@pytest.mark.parametrize("number", [2**62, 10**400])
@pytest.mark.parametrize("study", OPTIONS)
def test_a_count_with_which_a_study_would_not_end_is_refused(study: str, number: int) -> None:
    """They were a hang, or a MemoryError from the library below."""
    for field in dataclasses.fields(OPTIONS[study]):
        if "int" not in str(field.type) or field.name in FREE:
            continue
        value = (number,) if "tuple" in str(field.type) else number
        with pytest.raises(ConfigError, match=f"^{field.name} is {str(number)[:9]}.*; wanted at most [0-9,]+$"):
            OPTIONS[study](**{field.name: value})


@pytest.mark.parametrize("number", [99, 10**7, 2**62])
def test_draws_behind_an_interval_have_a_least_and_a_most(number: int) -> None:
    with pytest.raises(ConfigError, match=f"bootstrap is {number}; 100 to 1,000,000 draws are wanted"):
        fit_scaling("figure3a", bootstrap=number)
