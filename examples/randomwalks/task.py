"""The randomwalks task of Decision Transformer (Chen et al. 2021, arXiv:2106.01345), section 5.1, in the form
that trlX made popular.

A random directed graph of 21 nodes, each a letter; node `a` is the goal. A walk is a string of at most 10
letters; it is over at its first `a`. Its optimality is

    (10 - length) / (10 - shortest)

where `shortest` is the length of the shortest walk from the same start, and a walk that takes an edge that
does not exist, or does not reach `a`, counts as length 10. So 1 is a shortest walk and 0 a useless one. A
start from which `a` cannot be reached in fewer than 10 letters makes this 0/0 or negative: such nodes are no
prompts.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from examples.letters import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_NODES = 21
MAX_LENGTH = 10
GOAL = "a"
LETTERS = string.ascii_lowercase[:NUM_NODES]


class RandomWalks:
    """One graph and its walks.

    graph_seed: of the graph and its 1,000 walks; has nothing to do with the seed of a training run.
    """

    def __init__(self, graph_seed: int = 1000, num_walks: int = 1000, edge_probability: float = 0.1) -> None:
        self._rng = np.random.RandomState(graph_seed)
        self.edges = self._draw_edges(edge_probability)
        self.walks = [self._draw_walk() for _ in range(num_walks)]

    @cached_property
    def shortest(self) -> dict[str, int]:
        """Letters in the shortest walk from each node that can reach the goal."""
        graph = nx.from_numpy_array(self.edges, create_using=nx.DiGraph).reverse()
        distances = nx.single_source_shortest_path_length(graph, LETTERS.index(GOAL))
        return {LETTERS[node]: steps + 1 for node, steps in distances.items()}

    @cached_property
    def start_nodes(self) -> list[str]:
        """All prompts: nodes other than the goal from which it can be reached in fewer than 10 letters."""
        return [node for node in LETTERS if node != GOAL and self.shortest.get(node, MAX_LENGTH) < MAX_LENGTH]

    def optimality(self, walk: str) -> float:
        """Exact optimality in [0, 1] of one walk from a start node; see this module's docstring."""
        shortest = self.shortest.get(walk[:1], MAX_LENGTH)
        if shortest >= MAX_LENGTH:
            return 0.0
        return (MAX_LENGTH - self.length(walk)) / (MAX_LENGTH - shortest)

    def length(self, walk: str) -> int:
        """Letters up to the first goal; 10 for a walk that breaks off or takes a missing edge."""
        reached = walk.find(GOAL)
        if reached == -1 or reached >= MAX_LENGTH:
            return MAX_LENGTH
        nodes = [LETTERS.find(letter) for letter in walk[: reached + 1]]
        exists = all(-1 not in step and self.edges[step] for step in pairwise(nodes))
        return reached + 1 if exists else MAX_LENGTH

    def reward(self, samples: Sequence[str], **_: Any) -> list[float]:
        """Exact optimality as a reward function."""
        return [self.optimality(sample) for sample in samples]

    def metric(self, samples: Sequence[str], **_: Any) -> dict[str, list[float]]:
        """Gold metric for a trainer's evaluation."""
        return {"optimality": self.reward(samples)}

    def scored_walks(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Walks of many kinds with their optimality, for a reward model.

        A third follow the graph to the goal. A third were like these until two of them were joined at random
        or letters were changed, and a sixth jump to the goal over letters at random: most of these take an
        edge that does not exist, which makes a walk worthless, and without them a policy would find that
        shortcut. The last sixth break off before the goal, or go on behind it.
        """
        rng = np.random.RandomState(seed)
        twice = (self._draw_to_goal, self._draw_spoilt)
        kinds = (*twice, *twice, self._draw_jump, self._draw_any)
        walks = [kinds[index % len(kinds)](rng) for index in range(count)]
        return [{"text": walk, "score": self.optimality(walk)} for walk in walks]

    def _draw_edges(self, probability: float) -> np.ndarray:
        """Every node has a way out; the goal leads only to itself."""
        while True:
            edges = self._rng.rand(NUM_NODES, NUM_NODES) > 1 - probability
            np.fill_diagonal(edges, False)
            if edges.sum(axis=1).all():
                break
        goal = LETTERS.index(GOAL)
        edges[goal, :] = False
        edges[goal, goal] = True
        return edges

    def _draw_walk(self) -> str:
        """A walk from any node but the goal, until the goal or 10 letters."""
        node = LETTERS.index(GOAL)
        while LETTERS[node] == GOAL:
            node = self._rng.randint(NUM_NODES)
        walk = [node]
        while len(walk) < MAX_LENGTH and LETTERS[node] != GOAL:
            node = int(self._rng.choice(np.nonzero(self.edges[node])[0]))
            walk.append(node)
        return "".join(LETTERS[node] for node in walk)

    def _draw_to_goal(self, rng: np.random.RandomState) -> str:
        """A walk along the graph that reaches the goal."""
        while True:
            walk = self._follow(rng, str(rng.choice(self.start_nodes)), MAX_LENGTH)
            if walk.endswith(GOAL):
                return walk

    def _draw_spoilt(self, rng: np.random.RandomState) -> str:
        """The head of one walk to the goal with the tail of another, or one with letters changed behind the
        first."""
        walk = self._draw_to_goal(rng)
        if rng.rand() < 0.5:
            tail = self._draw_to_goal(rng)
            head = walk[: rng.randint(1, max(2, len(walk) - 1))]
            return (head + tail[rng.randint(len(tail)) :])[:MAX_LENGTH]
        places = rng.permutation(np.arange(1, len(walk)))[: rng.randint(1, 3)]
        letters = [
            LETTERS[rng.randint(NUM_NODES)] if place in places else old for place, old in enumerate(walk)
        ]
        return "".join(letters)

    def _draw_jump(self, rng: np.random.RandomState) -> str:
        """A start, at most three letters at random, the goal."""
        between = "".join(LETTERS[node] for node in rng.randint(NUM_NODES, size=rng.randint(4)))
        return str(rng.choice(self.start_nodes)) + between + GOAL

    def _draw_any(self, rng: np.random.RandomState) -> str:
        """A walk along the graph that breaks off before the goal, or goes on behind it."""
        if rng.rand() < 0.5:
            return self._follow(rng, self._draw_to_goal(rng), MAX_LENGTH, beyond_goal=True)
        walk = self._follow(rng, str(rng.choice(self.start_nodes)), rng.randint(2, MAX_LENGTH + 1))
        return walk.rstrip(GOAL) or walk

    def _follow(
        self, rng: np.random.RandomState, walk: str, longest: int, *, beyond_goal: bool = False
    ) -> str:
        """Go on along the graph until the goal or `longest` letters; behind the goal, by letters at
        random."""
        while len(walk) < longest and (beyond_goal or not walk.endswith(GOAL)):
            ways = np.arange(NUM_NODES) if beyond_goal else np.nonzero(self.edges[LETTERS.index(walk[-1])])[0]
            walk += LETTERS[rng.choice(ways)]
        return walk


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and `<pad>`, `<eos>`."""
    return tokenizer_of(LETTERS, max_length=32)
