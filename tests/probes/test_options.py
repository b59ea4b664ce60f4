"""The options of the studies: counts with which a study would have nothing to do, or never end."""

import dataclasses

import pytest

from diffattn.errors import ConfigError
from diffattn.probes.registry import OURS, load_study
from diffattn.scaling.fit import fit_scaling

# Other limits hold these: the model's positions, what follows from them, or none.
FREE = {"length", "lengths", "context", "seed", "labels", "bits", "tasks", "depths"}


@pytest.mark.parametrize("number", [2**62, 10**400])
@pytest.mark.parametrize("study", OURS)
def test_a_count_with_which_a_study_would_not_end_is_refused(study: str, number: int) -> None:
    """They were a hang, or a MemoryError from the library below."""
    for field in dataclasses.fields(load_study(study).options):
        if "int" not in str(field.type) or field.name in FREE:
            continue
        value = (number,) if "tuple" in str(field.type) else number
        with pytest.raises(
            ConfigError, match=f"^{field.name} is {str(number)[:9]}.*; wanted at most [0-9,]+: change --"
        ):
            load_study(study).options(**{field.name: value})


@pytest.mark.parametrize("number", [99, 10**7, 2**62])
def test_draws_behind_an_interval_have_a_least_and_a_most(number: int) -> None:
    with pytest.raises(ConfigError, match=f"bootstrap is {number}; wanted 100 to 1,000,000 draws"):
        fit_scaling("figure3a", bootstrap=number)


@pytest.mark.parametrize(("study", "field"), [("low_bit", "samples"), ("outliers", "batch_size"), ("noise", "samples")])
def test_a_count_with_which_a_study_has_nothing_to_do_is_refused(study: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} is 0; wanted at least 1: change --{field.replace('_', '-')}$"):
        load_study(study).options(**{field: 0})
