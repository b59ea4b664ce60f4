"""Turns text of any size into token files, cached by content, and opens them as blocks for a run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from diffattn.cache import SHORT_LIVED, Cache, cache_explained, cache_root
from diffattn.data.blocks import TokenBlocks, TrainingOrder
from diffattn.data.documents import Piece, weighted_digest
from diffattn.data.roundtrip import RoundTrip, accept, round_trip
from diffattn.data.survey import SIDES, Sides, Survey, TextSource, in_sample, sides_of, text_sources
from diffattn.data.text import Corpus, Text
from diffattn.data.token_files import (
    FORMAT,
    JOURNAL,
    Shard,
    Tokens,
    damaged,
    documents_in,
    shard_name,
    write_again,
    write_shards,
)  # fmt: skip
from diffattn.data.tokenizer import (
    byte_lengths,
    document_marks,
    fingerprint,
    parted,
    train_tokenizer,
    vocabulary_rows,
    with_chat_template,
)  # fmt: skip
from diffattn.errors import CheckpointError, ConfigError
from diffattn.files import file_facts, write_json
from diffattn.progress import OnStage, Stage, unseen
from diffattn.sealed import read_sealed, sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The bytes of files from which on it is kept what one reading of them found.
KEPT_BYTES = 1 << 26
# The characters of text that a tokenizer is trained on, about, where there are more.
SAMPLE = 1 << 26
# Between two reports, in bytes or characters.
_REPORTED = 1 << 20
_MANIFEST = "manifest.json"
OnNote = Callable[[str], None]


class TextFacts(TypedDict):
    """The facts about a run's text that its ``config.json`` and reports hold."""

    name: str
    digest: str
    documents: dict[str, int]
    """Documents of each part, ``train`` and ``validation`` (the held-out one); so are the next three."""
    bytes: dict[str, int]
    tokens: dict[str, int]
    blocks: dict[str, int]
    vocab_size: int
    context: int
    note: str
    """A sentence about an unusual split, or an empty text."""
    weights: NotRequired[list[float]]
    """The weights of the sources, in the order of the name."""
    tokenizer: NotRequired[str]
    """The fingerprint of a tokenizer that was given and not trained."""
    text_lost: NotRequired[float]
    """The share of the text's bytes that the tokenizer loses."""
    needles: NotRequired[dict[str, float]]
    """The settings of a mixture with needles."""


@dataclass(frozen=True)
class PreparedData:
    """The data that a run reads."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenBlocks
    validation: TokenBlocks
    """The blocks of the held-out part."""
    facts: TextFacts
    """The facts that a report says about the text, ready for JSON."""
    validation_bytes_per_token: float
    """Bytes of the text per predicted token of the held-out blocks, so that bits per byte is the mean loss / ln 2
    divided by this. All tokens of a block but its first are predicted, separators too. It counts the bytes of the text,
    also those that the tokenizer loses."""
    mixture: Callable[[TrainingOrder, int], Dataset[dict[str, torch.Tensor]]] | None = None
    """Makes the samples of a mixture (``data/mixture.py``) from those of the text and the samples per step."""

    def order(self, *, seed: int, num_samples: int, batch_size: int) -> Dataset[dict[str, torch.Tensor]]:
        """Returns the samples of a run, ``batch_size`` in each step, from ``TrainingOrder`` or from the mixture."""
        text = TrainingOrder(self.train, seed=seed, num_samples=num_samples)
        return text if self.mixture is None else self.mixture(text, batch_size)

    def sample_text(self, n_chars: int = 400) -> str:
        """Returns at most ``n_chars`` characters of the first held-out document: whole sentences, else whole words."""
        # A character has at most four bytes, and a token at least one.
        ids = self.validation.tokens[: 4 * n_chars + 4].tolist()
        before, behind = document_marks(self.tokenizer)
        ids = ids[len(before) : ids.index(behind) if behind in ids else None]
        text = self.tokenizer.decode(ids).strip()
        if len(text) <= n_chars:
            return text
        head = text[:n_chars]
        end = max(head.rfind(mark) + 1 for mark in (". ", "! ", "? ", ".\n", "!\n", "?\n", "。", "！", "？"))
        return head[:end] if end else head[: head.rfind(" ")] if " " in head else head


def prepare_data(
    text: str | Path | Sequence[str | Path] | Corpus | Text = "sotu",
    *,
    context: int,
    vocab_size: int | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    validation_fraction: float = 0.02,
    text_column: str = "text",
    lossy_tokenizer: bool = False,
    chat_template: str | None = None,
    cache_dir: str | Path | None = None,
    on_stage: OnStage = unseen,
    on_note: OnNote = lambda line: None,
) -> PreparedData:
    """Reads text, holds documents out, trains a tokenizer on the rest and packs both parts into blocks.

    What was prepared before is found in the cache.

    Args:
        text: one source or several that ``read_corpus`` takes, or a ``Corpus``.
        vocab_size: the number of tokens, at least 257, of a tokenizer that is trained; or
        tokenizer: an existing tokenizer, such as that of a pretrained model. Pass exactly one of the two.
        context: tokens per block, at least 2.
        validation_fraction: share of the bytes to hold out, above 0 and at most 0.5.
        text_column: the field or column that holds the text.
        lossy_tokenizer: accept a tokenizer that loses more than 1% of the text's bytes (``data/roundtrip.py``).
        chat_template: the chat template of the tokenizer in the result, by which conversations are written. Default:
            the given tokenizer's own.
        cache_dir: the folder of the cache. Default: ``$DIFFATTN_CACHE``, else ``$XDG_CACHE_HOME/diffattn``, else
            ``~/.cache/diffattn``.
        on_stage: called with each stage of the work and how much of it is done.
        on_note: called with a line that a person should see, such as how much the tokenizer loses.

    Returns:
        The data; the same text and sizes always give the same tokens.

    Raises:
        DataError: text that cannot be read or is too short.
        ConfigError: a size, a tokenizer or a cache folder that cannot be used.

    >>> data = prepare_data("sotu", vocab_size=4096, context=256)  # doctest: +SKIP
    >>> len(data.train), len(data.validation), data.tokenizer.vocab_size  # doctest: +SKIP
    """
    if (vocab_size is None) == (tokenizer is None):
        raise ConfigError(
            "vocab_size and tokenizer are both given, or neither", "exactly one of them", "pass vocab_size=4096, say"
        )
    cache = Cache(cache_root(cache_dir), on_stage, on_note)
    given = tokenizer is not None
    with cache_explained(cache.root), ExitStack() as stack:
        on_stage(Stage("reading the text"))
        name, sources = text_sources(text, text_column, on_note)
        known = [_known(source, cache, stack, validation_fraction) for source in sources]
        if tokenizer is None:
            assert vocab_size is not None
            tokenizer = _trained(known, vocab_size, validation_fraction, cache)
        if chat_template is not None:
            tokenizer = with_chat_template(tokenizer, chat_template)
        made = [_made(each, tokenizer, given, lossy_tokenizer, validation_fraction, cache) for each in known]
    data = _open(name, known, [each.tokens for each in made], context, tokenizer)
    if given:
        data.facts["tokenizer"] = fingerprint(tokenizer)
    if any(each.lost.lost for each in made):
        data.facts["text_lost"] = sum(each.lost.lost for each in made) / sum(each.lost.tried for each in made)
    return data


@dataclass(frozen=True)
class _Known:
    """A source whose documents are known."""

    source: TextSource
    survey: Survey
    sides: Sides

    def pieces(self) -> Iterator[Piece]:
        """Reads the text, split into its sides."""
        return self.sides.pieces(self.survey.verified(self.source.name, self.source.read()))


def _known(source: TextSource, cache: Cache, stack: ExitStack, fraction: float) -> _Known:
    """Reads a source once; what this found out about large files is kept as long as they do not change."""
    facts = source.facts()
    size = sum(path.stat().st_size for path in source.files or ())
    reported = 0

    def on_read(done: int) -> None:
        nonlocal reported
        if done - reported >= _REPORTED:
            reported = done
            # Packed files hold more text than they have bytes.
            cache.on_stage(Stage("reading the text", done, size if done <= size else None))

    if facts is None or size < KEPT_BYTES:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        survey = Survey.make(folder, source.read(), on_read)
    else:
        with cache.entry(FORMAT, facts, source.asked, end=SHORT_LIVED) as folder:
            found = Survey.read(folder)
            if found is None:
                with cache.unfinished(folder) as new:
                    Survey.make(new, source.read(), on_read)
                found = Survey.read(folder)
            assert found is not None
            os.utime(folder)
            survey = found
    return _Known(source, survey, sides_of(source.name, survey, source.read, fraction))


def _trained(known: Sequence[_Known], vocab_size: int, fraction: float, cache: Cache) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on the training parts of all sources, or finds it in the cache."""
    from transformers import PreTrainedTokenizerFast

    digests = [each.survey.digest for each in known]
    with cache.entry(FORMAT, "tokenizer", digests, float(fraction), vocab_size) as folder:
        if not _is_whole(folder):
            with cache.unfinished(folder) as new:
                train_tokenizer(_training_text(known, cache), vocab_size).save_pretrained(new)
                files = {path.name: file_facts(path) for path in sorted(new.iterdir())}
                write_json(new / _MANIFEST, sealed({"files": files}))
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _is_whole(folder: Path) -> bool:
    try:
        files = read_sealed(folder / _MANIFEST, way_out="make it anew")["files"]
        return all(file_facts(folder / name) == facts for name, facts in files.items())
    except (CheckpointError, OSError, KeyError, AttributeError):
        return False


def _training_text(known: Sequence[_Known], cache: Cache) -> Iterator[str]:
    """Yields what a tokenizer is trained on; after it the tokenizer chooses its tokens, and reports no progress."""
    total = sum(each.sides.characters["train"] for each in known)
    share = min(1.0, SAMPLE / total)
    if share < 1:
        cache.on_note(
            f"the tokenizer is trained on about {SAMPLE / 1e6:.0f} million characters, {share:.1%} of the text, chosen "
            "by their hash"
        )
    done = reported = 0
    for each in known:
        for number, document in documents_in(each.pieces()):
            if each.sides.side(number) != "train":
                continue
            key = each.survey.documents["sha256"][number].tobytes()
            for part, text in enumerate(parted(piece.text for piece in document)):
                if in_sample(key, part, share):
                    yield text
                done += len(text)
                if done - reported >= _REPORTED or done == total:
                    reported = done
                    cache.on_stage(Stage("training the tokenizer", done, total))
    cache.on_stage(Stage("choosing the tokens of the tokenizer"))


@dataclass(frozen=True)
class _Made:
    """The tokens of a source."""

    tokens: dict[str, Tokens]
    lost: RoundTrip


def _made(
    known: _Known, tokenizer: PreTrainedTokenizerFast, given: bool, lossy: bool, fraction: float, cache: Cache
) -> _Made:
    """Turns a source into token files, or finds them in the cache and makes those anew that are damaged."""
    with cache.entry(FORMAT, known.survey.digest, float(fraction), fingerprint(tokenizer)) as folder:
        shards, lost = _kept(folder)
        if lost is None:
            characters = sum(known.sides.characters.values())
            lost = round_trip(tokenizer, known.pieces(), characters) if given else RoundTrip(0, 0)
        accept(tokenizer, lost, lossy=lossy, on_note=cache.on_note)
        if shards is not None and not all(
            _repaired(folder, shard, known, tokenizer, cache)
            for shard in damaged(folder, [*shards["train"], *shards["validation"]], cache.on_stage)
        ):
            cache.on_note(f"{folder}: another tokenizer made these tokens; all of them are made anew")
            shards = None
        if shards is None:
            with cache.unfinished(folder, empty=False) as new:
                shards = write_shards(new, known.pieces, known.sides, tokenizer, cache.on_stage)
                write_json(new / _MANIFEST, sealed({"shards": shards, "round_trip": [*lost]}))
                (new / JOURNAL).unlink(missing_ok=True)
    return _Made(
        {
            side: Tokens([folder / shard_name(shard) for shard in some], [shard["tokens"] for shard in some])
            for side, some in shards.items()
        },
        lost,
    )


def _kept(folder: Path) -> tuple[dict[str, list[Shard]] | None, RoundTrip | None]:
    try:
        content: dict[str, Any] = read_sealed(folder / _MANIFEST, way_out="make it anew")
        return content["shards"], RoundTrip(*content["round_trip"])
    except (CheckpointError, KeyError, TypeError):
        return None, None


def _repaired(folder: Path, shard: Shard, known: _Known, tokenizer: PreTrainedTokenizerFast, cache: Cache) -> bool:
    cache.on_note(f"{folder / shard_name(shard)} is damaged: its content is not what was written; it is made anew")
    return write_again(folder, shard, known.pieces, known.sides, tokenizer, cache.on_stage)


def _open(
    name: str,
    known: Sequence[_Known],
    tokens: Sequence[dict[str, Tokens]],
    context: int,
    tokenizer: PreTrainedTokenizerFast,
) -> PreparedData:
    weights = [each.source.weight for each in known if each.source.weight is not None]
    blocks = {
        side: TokenBlocks(
            [each[side] for each in tokens], context=context,
            parts=[f"{each.source.name}, {part} part" for each in known],
            weights=weights if weights and side == "train" else None,
        )
        for side, part in zip(SIDES, ("training", "held-out"), strict=True)
    }  # fmt: skip
    digests = [each.survey.digest for each in known]
    notes = [f"{each.source.name}: {each.sides.note}" if weights else each.sides.note for each in known]
    facts: TextFacts = {
        "name": name,
        "digest": weighted_digest(digests, weights) if weights else digests[0],
        "documents": {side: sum(each.sides.documents[side] for each in known) for side in SIDES},
        "bytes": {side: sum(each.sides.bytes[side] for each in known) for side in SIDES},
        "tokens": {side: len(blocks[side].tokens) for side in SIDES},
        "blocks": {side: len(blocks[side]) for side in SIDES},
        "vocab_size": vocabulary_rows(tokenizer),
        "context": context,
        "note": "; ".join(note for note, each in zip(notes, known, strict=True) if each.sides.note),
    }
    if weights:
        facts["weights"] = weights
    bytes_per_token = _bytes_per_token(tokenizer, blocks["validation"], facts["bytes"]["validation"])
    return PreparedData(tokenizer, blocks["train"], blocks["validation"], facts, bytes_per_token)


def _bytes_per_token(tokenizer: PreTrainedTokenizerFast, blocks: TokenBlocks, text_bytes: int) -> float:
    """The bytes of the text per predicted token: each token gets its share of the text's bytes by its own length."""
    marks = document_marks(tokenizer)
    # If the tokenizer's tokens are not made of bytes, their lengths are not known, and each gets the same share.
    same = np.ones(vocabulary_rows(tokenizer), np.int64)
    same[[*marks[0], marks[1]]] = 0
    choices = [same]
    with suppress(ConfigError):
        choices = [byte_lengths(tokenizer), same]
    for parts in choices:
        counted = predicted = 0
        for tokens in blocks.sources:
            # Whole blocks of a few million tokens at once.
            step = blocks.context * max(1, (1 << 22) // blocks.context)
            for start in range(0, len(tokens), step):
                lengths = parts[tokens[start : start + step]]
                counted += int(lengths.sum())
                whole = len(lengths) // blocks.context * blocks.context
                predicted += int(lengths[:whole].reshape(-1, blocks.context)[:, 1:].sum())
        if counted:
            return predicted / (len(blocks) * (blocks.context - 1)) * (text_bytes / counted)
    raise ConfigError(
        f"{blocks.parts[0]}: the tokenizer makes no token of it",
        "a tokenizer for this text",
        "choose another tokenizer",
    )
