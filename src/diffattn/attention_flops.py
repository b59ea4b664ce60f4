"""The FLOPs of attention, by backend and pass, of one map, of V1's and V2's two, and of noise heads that are shared.

They are those of a pair of softmax heads, per query and key, in units of d (see ``Form``). ``diffattn.variants`` names
them in the records.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import NamedTuple

Units = tuple[int | Fraction, int | Fraction]
# The widest values for which the Triton kernel makes the gradients of keys and values in one walk over the queries.
ONE_WALK = 128


class Form(NamedTuple):
    """The FLOPs of one way to compute attention, per query-key pair and pair of softmax heads, in units of d.

    Each part is a pair of numbers: products as wide as queries and keys, and products as wide as values. A product of
    width w costs 2w.

    Attributes:
        forward: what the forward pass does.
        backward: what the backward pass does, with the scores that it computes again.
        backward_wide: the same where values are wider than ``ONE_WALK``.
    """

    forward: Units
    backward: Units
    backward_wide: Units

    def executed(self, value_width: int, *, training: bool) -> int | Fraction:
        """Returns all of it for values of that width: of the forward pass, or of both passes."""
        backward = self.backward if value_width <= ONE_WALK else self.backward_wide
        return sum(self.forward) + (sum(backward) if training else 0)

    def beside(self, noise: Form, signals: int) -> Form:
        """Returns what a signal head does, which is this, and its share of a noise head of so many signal heads."""
        return Form(
            *(
                (own[0] + Fraction(other[0], signals), own[1] + Fraction(other[1], signals))
                for own, other in zip(self, noise, strict=True)
            )
        )


def _recomputed(forward: Units) -> Form:
    """Returns the form of a flash kernel, which computes the scores again.

    Its backward pass has three products as wide as queries (scores, d_q, d_k) where the forward pass has one, and two
    as wide as values (dP, d_v).
    """
    backward = (3 * forward[0], 2 * forward[1])
    return Form(forward, backward, backward)


def _kept(forward: Units) -> Form:
    """Returns the form that keeps its maps: for each product of the forward pass two gradients."""
    backward = (2 * forward[0], 2 * forward[1])
    return Form(forward, backward, backward)


# One map costs the same in every backend, since nothing is subtracted.
ONE_MAP: Mapping[str, Form] = MappingProxyType(
    dict.fromkeys(
        ("definition", "fused_cpu", "fused_triton", "standard", "unequal", "two_calls", "four_calls"),
        _recomputed((4, 4)),
    )
    | {"materialised": _kept((4, 4))}
)
# By the definition two maps of width d, and one product of their difference with V of width 2d; the standard call pads
# q to [q1, 0] and [0, q2], so that every width is 2d. On a GPU each map is multiplied with V by itself. The Triton
# kernel has scores, dP and the gradient of q in one kernel, scores, dP and the gradients of k and v in another, dP for
# both maps at once; of wide values that one makes scores for k and for v.
V1_PAIRS: MappingProxyType[str, Form] = MappingProxyType(
    {
        "definition": _recomputed((4, 4)),
        "fused_cpu": _recomputed((4, 4)),
        "fused_triton": Form((4, 8), backward=(16, 12), backward_wide=(20, 12)),
        "standard": _recomputed((8, 8)),
        "materialised": _kept((4, 4)),
    }
)
# These need keys and values of unequal counts, so noise heads that are shared do not have them.
V1_MORE: MappingProxyType[str, Form] = MappingProxyType(
    {"unequal": _recomputed((4, 8)), "two_calls": _recomputed((4, 8)), "four_calls": _recomputed((8, 8))}
)
# By the definition four maps of width d, and two products of a difference with V of width d. It is one call by nature,
# whose widths are equal, so it has no form of several calls. The Triton kernel is as for V1.
V2_PAIRS: MappingProxyType[str, Form] = MappingProxyType(
    {
        "definition": _recomputed((8, 4)),
        "fused_cpu": _recomputed((8, 4)),
        "fused_triton": Form((8, 8), backward=(32, 12), backward_wide=(40, 12)),
        "standard": _recomputed((8, 8)),
        "materialised": _kept((8, 4)),
    }
)
# What signal heads do, and what as many noise heads would do. Where a difference is multiplied with V, and dP serves
# both maps, the signal heads do that; in the standard call and the Triton kernel, whose noise heads have a dP of their
# own where they are shared, each does what the other does.
Shared = Mapping[str, tuple[Form, Form]]


def _shared(signal: Units, noise: Units, triton: Form, standard: Units) -> Shared:
    subtracted = (_recomputed(signal), _recomputed(noise))
    return MappingProxyType(
        {
            "definition": subtracted,
            "fused_cpu": subtracted,
            "fused_triton": (triton, triton),
            "standard": (_recomputed(standard), _recomputed(standard)),
            "materialised": (_kept(signal), _kept(noise)),
        }
    )


V1_SHARED = _shared((2, 4), (2, 0), Form((2, 4), backward=(8, 12), backward_wide=(10, 12)), (4, 4))
V2_SHARED = _shared((4, 4), (4, 0), Form((4, 4), backward=(16, 12), backward_wide=(20, 12)), (4, 4))
