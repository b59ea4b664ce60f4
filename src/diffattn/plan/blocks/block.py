"""A model as a list of its kinds of layer, and what that list says: parameters, FLOPs, bytes of cache.

Where every layer is attention with a gated feed-forward network, ``ModelShape`` and ``cost.py`` count it. Experts,
latent keys and values, state spaces and networks of two matrices are counted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffattn.plan.cost import Parameters
from diffattn.plan.shape import BuiltShape


@dataclass(frozen=True, kw_only=True)
class Block:
    """One kind of layer, with numbers of one layer.

    A *matrix* is a parameter with which every token is multiplied once, so it costs one multiply-add for each token;
    biases, gains and λ are small ones. ``chosen`` of the ``experts`` read a token.

    >>> Block(what="attention", layers=2, matrices=8, expert=3, experts=4, chosen=1).held
    40
    """

    what: str
    """The name of it for a person, such as ``"attention with experts"``."""
    layers: int
    """The number of layers of this kind."""
    matrices: int
    """Parameters of attention, or of what stands in its place, that are matrices."""
    small: int = 0
    """Parameters of it that are no matrix."""
    feed_forward: int = 0
    """Parameters of the part of the feed-forward network that reads every token, that are matrices."""
    feed_forward_small: int = 0
    """Parameters of that part that are no matrix."""
    expert: int = 0
    """Parameters of one expert that are matrices."""
    expert_small: int = 0
    """Parameters of one expert that are no matrix."""
    experts: int = 0
    """The experts of a layer."""
    chosen: int = 0
    """The experts that read one token."""
    norms: int = 0
    """Parameters of the norms of the residual stream, of queries and of keys."""
    pairs: int = 0
    """Multiply-adds for one query and one key that it sees, by the definition."""
    executed_pairs: int | None = None
    """Multiply-adds for them as they are computed; None: as by the definition."""
    decoding_pairs: int | None = None
    """Multiply-adds for them of a decoded token that reads latent keys as they are in the cache; None: as computed."""
    scan: int = 0
    """Multiply-adds of one token beside those of matrices and pairs: the update of a state, and reading it."""
    kept: int = 0
    """Numbers of a token in the cache; 0 also where the keys and values of another layer are read."""
    window: int | None = None
    """The tokens that a token sees, itself among them; None: all before it."""
    state: int = 0
    """Numbers of a sequence that are kept whatever its length is."""
    wide: int = 0
    """Numbers of a token at the widest place of the layer, beside the residual stream."""

    @property
    def held(self) -> int:
        """Parameters of all layers of this kind."""
        return self.layers * (self.mixer + self.networks + self.norms)

    @property
    def mixer(self) -> int:
        """Parameters of attention, or of what stands in its place."""
        return self.matrices + self.small

    @property
    def networks(self) -> int:
        """Parameters of the feed-forward network, with all experts."""
        return self.feed_forward + self.feed_forward_small + self.experts * (self.expert + self.expert_small)

    def keys(self, context: int) -> int:
        """Returns the keys that the last of ``context`` tokens sees."""
        return context if self.window is None else min(context, self.window)

    def tokens_kept(self, context: int) -> int:
        """Returns the tokens kept behind ``context`` tokens: of a window, those that the next one sees."""
        return context if self.window is None else min(context, self.window - 1)

    def pairs_seen(self, context: int) -> int:
        """Returns the query-key pairs of one causal sequence."""
        near = self.keys(context)
        return near * (near + 1) // 2 + (context - near) * near


@dataclass(frozen=True, kw_only=True)
class BlockShape(BuiltShape):
    """The shape of a model whose layers differ, with the list of their kinds.

    The sizes of ``ModelShape`` are those that its configuration names; what is counted is the list.

    ``final_norm``: parameters of the last norm. ``unread``: parameters that are held and that no pass of generation
    reads. ``unplanned``: what of the model no number here holds, in words.
    """

    blocks: tuple[Block, ...] = ()
    final_norm: int = 0
    unread: int = 0
    unplanned: tuple[str, ...] = ()

    def parameters(self) -> Parameters:
        """Returns the numbers of parameters by part; *attention* is everything that mixes tokens.

        Those of the list's layers, the embedding, the output head, and ``extras``.
        """
        embedding = self.vocab_size * self.hidden_size
        return Parameters(
            embedding=embedding + self.beside("embedding"),
            lm_head=(0 if self.tie_word_embeddings else embedding) + self.beside("lm_head"),
            attention=sum(each.layers * each.mixer for each in self.blocks) + self.beside("attention"),
            feed_forward=sum(each.layers * each.networks for each in self.blocks) + self.beside("feed_forward"),
            norms=sum(each.layers * each.norms for each in self.blocks) + self.final_norm + self.beside("norms"),
        )

    def active(self, tokens: int = 1) -> int:
        """Returns all parameters but those of the experts that so many tokens leave out, if each chooses others."""
        left_out = sum(
            each.layers * (each.experts - min(each.experts, tokens * each.chosen)) * (each.expert + each.expert_small)
            for each in self.blocks
        )
        return self.parameters().total - left_out

    def read_by(self, tokens: int) -> int:
        """Returns the parameters that a pass of so many tokens reads: an embedding that is not tied is looked up."""
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.active(tokens) - embedding - self.unread

    @property
    def linear_flops(self) -> int:
        """FLOPs of one token in products with parameters and in scans, forward."""
        of_layers = sum(
            each.layers * (each.matrices + each.feed_forward + each.chosen * each.expert + each.scan)
            for each in self.blocks
        )
        return 2 * (of_layers + self.vocab_size * self.hidden_size)

    def attention_flops(self, context: int) -> tuple[int, int]:
        """Returns the FLOPs of all pairs of one causal sequence: by the definition, and as they are computed."""
        seen = [(each, 2 * each.layers * each.pairs_seen(context)) for each in self.blocks]
        return sum(each.pairs * pairs for each, pairs in seen), sum(_executed(each) * pairs for each, pairs in seen)

    def decoding_attention_flops(self, context: int) -> tuple[int, int]:
        """Returns the FLOPs of one query over ``context`` keys: by the definition, and as they are computed."""
        seen = [(each, 2 * each.layers * each.keys(context)) for each in self.blocks]
        executed = (_executed(each) if each.decoding_pairs is None else each.decoding_pairs for each, _ in seen)
        return (
            sum(each.pairs * keys for each, keys in seen),
            sum(each * keys for each, (_, keys) in zip(executed, seen, strict=True)),
        )

    def cached(self, context: int) -> int:
        """Returns the numbers that a sequence keeps behind ``context`` tokens: keys, values, latents, states."""
        return sum(each.layers * (each.kept * each.tokens_kept(context) + each.state) for each in self.blocks)

    def cached_in_prefill(self, context: int) -> int:
        """Returns the same while a prompt is read, where a window has not let anything go yet."""
        return sum(each.layers * (each.kept * context + each.state) for each in self.blocks)

    def kinds(self) -> Iterator[str]:
        """Yields the kinds of layer with their numbers, in words."""
        for each in self.blocks:
            seen = "" if each.window is None else f" within {each.window:,} tokens"
            yield f"{each.layers} × {each.what}{seen}"


def _executed(block: Block) -> int:
    return block.pairs if block.executed_pairs is None else block.executed_pairs
