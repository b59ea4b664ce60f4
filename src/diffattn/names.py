"""Finds a name as people write it: in any case, without its spaces and marks, or by a part that only one name has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffattn.errors import ConfigError, did_you_mean

# The short names of number formats, which are accepted wherever the long ones are.
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def one_of(
    text: object,
    names: Iterable[str],
    *,
    given: str | None = None,
    also: Mapping[str, str] | None = None,
    way_out: str = "",
) -> str:
    """Returns the name that a text means.

    A text means a name that it equals without regard to case, spaces and marks. Where there is none, it means the one
    name in which it stands from the start of a word on; such a part has a letter and two characters, or three. Of
    several such names it means the shortest that ends with it.

    Args:
        text: the text that a person wrote.
        names: the known names, in the order in which an error lists them.
        given: the first part of an error: what was written, and where. Default: the text in quotes.
        also: further spellings, and the name that each stands for. Default: none.
        way_out: more words for the last part of an error. Default: empty.

    Raises:
        ConfigError: no name, or a part that several names have, which are listed.

    >>> one_of("DIFF-V1", ["softmax", "diff_v1"]), one_of("rtx 3060", ["RTX 4090", "RTX 3060 12GB"])
    ('diff_v1', 'RTX 3060 12GB')
    >>> one_of("v2", ["diff_v2", "diff_gda_v2"])
    'diff_v2'
    """
    names = list(names)
    spelled = {plain(name): name for name in names} | {plain(name): meant for name, meant in (also or {}).items()}
    wanted = plain(str(text))
    if wanted in spelled:
        return spelled[wanted]
    said = repr(text) if given is None else given
    found = [name for name in names if _is_part(wanted, name)]
    if len(found) == 1:
        return found[0]
    ending = sorted((name for name in found if plain(name).endswith(wanted)), key=len)
    if ending and (len(ending) == 1 or len(ending[0]) < len(ending[1])):
        return ending[0]
    if found:
        raise ConfigError(said, "one name", f"{' and '.join(found)} fit, so write one of them in full{way_out}")
    meant = did_you_mean(wanted, spelled, otherwise="choose one of these")
    raise ConfigError(said, f"one of {', '.join(names)}", f"{meant}{way_out}")


def several(given: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    """Returns one text or several as a tuple.

    >>> several("sotu"), several(["a.txt", "b.txt"])
    (('sotu',), ('a.txt', 'b.txt'))
    """
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))


def plain(text: str) -> str:
    """Returns the letters and digits of a text, without case.

    >>> plain("RTX 3060 12GB")
    'rtx306012gb'
    """
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _is_part(wanted: str, name: str) -> bool:
    if len(wanted) < (2 if any(letter.isalpha() for letter in wanted) else 3):
        return False
    words = re.findall(r"[^\W_]+", name.casefold())
    return any("".join(words[start:]).startswith(wanted) for start in range(len(words)))
