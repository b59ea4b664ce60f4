"""Maps of long texts: squares hold several weights, and the labels that are left name their first tokens."""

import numpy as np

from diffattn.report.charts import specification
from diffattn.report.map_chart import cells, map_chart, panels
from diffattn.results.maps import AttentionMaps


def test_a_square_of_a_long_text_holds_its_largest_weight() -> None:
    tokens = [f"t{place}" for place in range(242)]
    weights = np.random.default_rng(0).normal(size=(242, 242))
    drawn = panels(AttentionMaps(map_pos=weights.tolist()), tokens)["map_pos"]
    rows = {(row["query"], row["key"]): row for row in cells(drawn, tokens)}
    assert set(rows) == {(query, key) for query in range(0, 242, 2) for key in range(0, query + 1, 2)}
    block = weights[100:102, 40:42]
    assert rows[100, 40]["weight"] == round(float(block.flat[np.abs(block).argmax()]), 6)
    assert (rows[100, 40]["query token"], rows[100, 40]["key token"]) == ("t100", "t40")
    # On the diagonal, what the first query of a square cannot see is not among its weights.
    seen = [weights[100, 100], weights[101, 100], weights[101, 101]]
    assert rows[100, 100]["weight"] == round(max(seen, key=abs), 6)


def test_labels_of_a_long_text_are_first_tokens_of_squares() -> None:
    tokens = [f"t{place}" for place in range(300)]
    drawn = panels(AttentionMaps(map_pos=np.ones((300, 300)).tolist()), tokens)["map_pos"]
    chart = specification(map_chart(drawn, tokens, "map_pos", (0.5, 1.0), side=300))
    axis = chart["encoding"]["x"]["axis"]
    places = {row["key"] for row in cells(drawn, tokens)}
    assert set(axis["values"]) <= places
    assert 20 <= len(axis["values"]) <= 64
    assert "3 × 3 tokens a square" in chart["encoding"]["x"]["title"]
