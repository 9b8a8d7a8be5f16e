"""The randomwalks task: its graph, what a walk is worth, and its walks for training."""

from __future__ import annotations

import statistics
from itertools import pairwise

import numpy as np
import pytest

from examples.randomwalks.task import LETTERS, MAX_LENGTH, NUM_NODES, RandomWalks, letter_tokenizer


@pytest.fixture(scope="module")
def task() -> RandomWalks:
    return RandomWalks()


def by_hand(*edges: str) -> RandomWalks:
    """A task with these edges alone ("ba" leads from b to a), and that of the goal to itself."""
    task = RandomWalks(num_walks=0)
    task.edges = np.zeros((NUM_NODES, NUM_NODES), dtype=bool)
    for start, end in ("aa", *edges):
        task.edges[LETTERS.index(start), LETTERS.index(end)] = True
    return task


CHAIN = ("ba", "cb", "dc", "ed", "fe", "gf", "hg", "ih", "ji", "kj")  # k needs eleven letters, j ten, i nine


# ------------------------------------------------------------------------------------------- worth of walks


@pytest.mark.parametrize(
    ("walk", "length", "optimality"),
    [
        ("ba", 2, 1.0),  # the shortest from b
        ("bca", 3, 7 / 8),
        ("bcbca", 5, 5 / 8),
        ("ca", 2, 1.0),
        ("da", 10, 0.0),  # no such edge
        ("dca", 3, 1.0),
        ("dcba", 4, 6 / 7),
        ("dbca", 10, 0.0),  # no such edge on the way
        ("bcb", 10, 0.0),  # breaks off
        ("b", 10, 0.0),
        ("", 10, 0.0),
        ("bab", 2, 1.0),  # over at its first goal
        ("bazzz", 2, 1.0),
        ("bza", 10, 0.0),  # no node
        ("bBa", 10, 0.0),
        ("b a", 10, 0.0),
        ("bcbcbcbca", 9, 1 / 8),
        ("bcbcbcbcba", 10, 0.0),  # ten letters are worth no more than none
        ("bcbcbcbcbcba", 10, 0.0),
        ("ea", 10, 0.0),  # cannot reach the goal at all
    ],
)
def test_optimality_by_hand(walk: str, length: int, optimality: float) -> None:
    # u is the last node: a letter that names none, found at index -1, must not be taken for it
    task = by_hand("ba", "bc", "cb", "ca", "dc", "bu", "ua")

    assert task.length(walk) == length
    assert task.optimality(walk) == pytest.approx(optimality)


def test_metric_gives_one_optimality_per_sample() -> None:
    task = by_hand("ba", "cb")

    assert task.metric(["ba", "cba", "bba"], prompts=["b", "c", "b"]) == {"optimality": [1.0, 1.0, 0.0]}


def test_nodes_that_reach_the_goal_too_late_or_never_are_no_prompts() -> None:
    task = by_hand(*CHAIN, "lm", "ml")

    assert task.shortest == dict(zip("abcdefghijk", range(1, 12), strict=True))
    assert task.start_nodes == list("bcdefghi")
    assert task.optimality("ihgfedcba") == 1.0
    assert task.optimality("jihgfedcba") == 0.0, "not 0/0"
    assert task.optimality("kjihgfedcba") == task.optimality("lm") == 0.0


# ------------------------------------------------------------------------------------------------ the graph


def test_graph_has_a_way_out_of_each_node_and_none_from_the_goal(task: RandomWalks) -> None:
    assert task.edges.shape == (NUM_NODES, NUM_NODES)
    assert task.edges.any(axis=1).all()
    assert np.nonzero(task.edges[0])[0].tolist() == [0]
    assert not task.edges.diagonal()[1:].any()


def test_known_graph_has_known_walks(task: RandomWalks) -> None:
    assert len(task.walks) == 1000
    assert statistics.mean(map(task.optimality, task.walks)) == pytest.approx(0.3515, abs=5e-5)
    assert task.start_nodes == list(LETTERS[1:])


def test_walks_follow_the_graph_until_the_goal_or_ten_letters(task: RandomWalks) -> None:
    for walk in task.walks:
        nodes = [LETTERS.index(letter) for letter in walk]
        assert all(task.edges[step] for step in pairwise(nodes))
        assert walk.find("a") == len(walk) - 1 or (len(walk) == MAX_LENGTH and "a" not in walk)


def test_graph_depends_on_its_own_seed_alone(task: RandomWalks) -> None:
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    again, other = RandomWalks(), RandomWalks(graph_seed=1001)

    assert again.walks == task.walks and (again.edges == task.edges).all()
    assert (other.edges != task.edges).any()
    assert (np.random.get_state()[1] == before).all(), "nor does it move numpy's own generator"


# --------------------------------------------------------------------------------- walks for a reward model


def test_scored_walks_carry_their_exact_optimality(task: RandomWalks) -> None:
    rows = task.scored_walks(300, seed=0)

    assert len(rows) == 300
    assert all(row["score"] == task.optimality(row["text"]) for row in rows)
    assert all(row["text"][0] in task.start_nodes and len(row["text"]) <= MAX_LENGTH for row in rows)


def test_scored_walks_show_good_ones_and_every_kind_of_useless_one(task: RandomWalks) -> None:
    rows = task.scored_walks(1000, seed=0)
    useless = [row["text"] for row in rows if row["score"] == 0]
    short_cuts = [walk for walk in useless if 0 < walk.find("a") < MAX_LENGTH - 1]

    assert sum(row["score"] == 1 for row in rows) > 50
    assert len(short_cuts) > 100, "walks that reach the goal over edges that do not exist"
    assert sum("a" not in walk for walk in useless) > 50, "walks that break off"


def test_scored_walks_depend_on_their_seed_alone(task: RandomWalks) -> None:
    assert task.scored_walks(50, seed=1) == task.scored_walks(50, seed=1)
    assert task.scored_walks(50, seed=1) != task.scored_walks(50, seed=2)


# -------------------------------------------------------------------------------------------- the tokenizer


def test_tokenizer_has_one_token_a_letter_and_comes_back(task: RandomWalks) -> None:
    tokenizer = letter_tokenizer()

    assert len(tokenizer) == NUM_NODES + 3
    for walk in [LETTERS, *task.walks[:50]]:
        ids = tokenizer(walk)["input_ids"]
        assert len(ids) == len(walk)
        assert tokenizer.decode(ids) == walk


def test_tokenizer_keeps_pad_and_eos_apart_and_out_of_the_text() -> None:
    tokenizer = letter_tokenizer()
    ids = tokenizer("ba" + tokenizer.eos_token)["input_ids"]

    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert ids[-1] == tokenizer.eos_token_id and len(ids) == 3
    assert tokenizer.decode([*ids, tokenizer.pad_token_id], skip_special_tokens=True) == "ba"
