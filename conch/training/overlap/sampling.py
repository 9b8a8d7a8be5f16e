"""Sampling and scoring that go on while the trainer computes: what stands in for the first line of its step.

    group i of a rank is trained in step i // P              P groups a step
    it is admitted once  i // P <= w + max_staleness         w: version of the weights last handed over
    it is sampled from the newest weights that its sampler holds, at least w

so what step s learns from was sampled at version s - max_staleness or later, whatever samplers and rewards
take, and groups are trained in the order in which they were admitted. (Admission with the oldest first,
instead of throwing away what has become too old, which would be the long completions.)
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from conch.config.algorithms.async_grpo import AsyncConfig
from conch.errors import StuckError
from conch.log import get_logger
from conch.rollouts.base import draw_seeds
from conch.rollouts.remote.stream import GroupRequest, GroupStream
from conch.runs.checkpoint import CHECKPOINTS, read_rank_state
from conch.training.overlap.buffer import Admission, BufferedGroup, GroupBuffer
from conch.training.overlap.ledger import append_to_ledger, cut_ledger
from conch.training.overlap.metrics import LengthAudit, split_advice, staleness_metrics
from conch.training.overlap.watchdog import Progress, Watchdog
from conch.types import Metrics, RewardResult, Rollout

if TYPE_CHECKING:
    from conch.training.online import OnlineTrainer

_log = get_logger(__name__)

_SLICE_S = 0.5
"""Longest wait for rewards before the ranks agree whether to wait on."""


class Overlap:
    """One rank's groups between sampling and training.

    trainer: that learns from them; its policy is read while it samples and hands over weights.
    """

    def __init__(self, trainer: OnlineTrainer[Any], settings: AsyncConfig) -> None:
        self._trainer = trainer
        self._settings = settings
        samplers = "rollout.ray.samplers" if trainer.config.rollout.urls is None else "rollout servers"
        self.device_settings: tuple[str, str] = ("train.num_processes", samplers)
        """What a user divides devices by, to train and to sample; the last line of a run names them."""
        self.buffer = GroupBuffer()
        self.progress = Progress()
        self._lengths = LengthAudit(trainer.config.generation.max_new_tokens)
        self._stream: GroupStream | None = None
        self._handed: int | None = None
        self._asked: dict[int, list[int]] = {}
        self._request_lock = threading.Lock()
        self._taken: list[BufferedGroup] = []
        self._rewards: list[RewardResult] = []
        self._stuck: StuckError | None = None
        self._waited_s = 0.0
        self._step_began = time.perf_counter()
        self._totals = torch.zeros(4, dtype=torch.float64)

    # ----------------------------------------------------------------------------------------------- one step

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, a step is made, in which something has to move; between steps nothing has to, however long
        an evaluation, a checkpoint or a user with a trainer in a notebook takes.

        Raises:
            StuckError: nothing has moved for `asynchronous.deadline_s`.
        """
        self._start()
        assert self._stream is not None
        with Watchdog(
            self.progress,
            deadline_s=self._settings.deadline_s,
            run=self._trainer.run.folder,
            rank=self._trainer.collectives.rank,
            on_stuck=self._fail_stuck,
            describe=[self._describe, self._stream.describe],
            stacks=[self._stream.stacks],
        ):
            yield

    def sample(self, count: int) -> list[Rollout]:
        """The completions of the oldest `count` groups, those of a group together; their rewards are under
        way.

        Hands over weights and admits prompts first, where it is time to.

        Raises:
            ConchError: on all ranks: sampling failed, here or on another rank.
        """
        trainer = self._trainer
        self._start()
        if self._handed is None or trainer.policy_version - self._handed >= self._settings.sync_every:
            self._hand_over()
        self._admit(count)
        taken: list[BufferedGroup] = []
        began = time.perf_counter()
        trainer.collectives.run_on_all_ranks(lambda: taken.extend(self.buffer.take(count)))
        self._waited_s += time.perf_counter() - began
        self._taken = taken
        self._adopt(taken)
        rollouts = [rollout for group in taken for rollout in group.in_order]
        for rollout in rollouts:
            self._lengths.note_trained(len(rollout.completion.token_ids))
        return rollouts

    def score(self) -> list[RewardResult]:
        """Wait for the rewards of what `sample` returned last; raises as `RewardScorer.gather` does.

        Raises:
            StuckError: nothing has moved for `asynchronous.deadline_s`: a reward does not return. On other
                ranks a DistributedError.
        """
        began = time.perf_counter()
        self._wait_for_rewards()
        with self.progress.paused("scoring"):  # all that is left to wait for is an outage, which has a budget
            self._rewards = self._trainer.scorer.gather()
        self._waited_s += time.perf_counter() - began
        return self._rewards

    def finish_step(self) -> Metrics:
        """Enter into the ledger what the step before has learned from; returns the figures of the overlap.

        Returns:
            staleness/mean, staleness/max: updates between the weights that sampled a token and the step that
                learned from it.
            async/trainer_idle_fraction: share of the time since the last step in which trainers waited for
                completions or rewards.
            async/sampler_idle_fraction: share of the samplers' time in which they sampled nothing.
            async/buffered_groups, async/groups_under_way: groups whose completions have ended, and which wait
                to be trained; groups that are being sampled.
            async/length_sampled_mean, async/length_trained_mean, async/length_distance: see `LengthAudit`.
        """
        trainer, ranks = self._trainer, self._trainer.collectives
        version = trainer.policy_version - 1  # the step's updates are in it
        self.progress.note("step")
        self._enter(version)
        now = time.perf_counter()
        busy_s, clock_s = self._stream.idle() if self._stream is not None and ranks.is_main else (0.0, 0.0)
        times = torch.tensor([self._waited_s, now - self._step_began, busy_s, clock_s], dtype=torch.float64)
        self._waited_s, self._step_began = 0.0, now
        ended, under_way = self.buffer.counts()
        sums = ranks.all_reduce(torch.cat([times, torch.tensor([ended, under_way])])).cpu()
        self._totals += sums[:4]
        trainer_idle, sampler_idle = idle_shares(sums[:4])
        rollouts = [rollout for group in self._taken for rollout in group.in_order]
        self._taken, self._rewards = [], []
        return {
            **staleness_metrics(rollouts, version, ranks.all_reduce, ranks.all_reduce_max),
            "async/trainer_idle_fraction": trainer_idle,
            "async/sampler_idle_fraction": sampler_idle,
            "async/buffered_groups": float(sums[4]),
            "async/groups_under_way": float(sums[5]),
            **self._lengths.metrics(ranks.all_reduce),
        }

    def present_weights(self) -> None:
        """Have samplers hold the present weights, for an evaluation; what is under way goes on behind it or
        with it."""
        if self._stream is None:
            return
        self._hand_over()
        self._trainer.collectives.run_on_all_ranks(self._stream.wait_for_weights)

    def close(self) -> None:
        """Stop sampling, and tell which division of the devices would have been better; the next step begins
        anew."""
        if self._stream is None:
            return
        self._stream.close()
        ranks, (trainer_idle, sampler_idle) = self._trainer.collectives, idle_shares(self._totals)
        if ranks.is_main and self._totals[1] > 0:
            devices = (ranks.num_ranks, self._stream.num_samplers)
            advice = split_advice(*devices, trainer_idle, sampler_idle, settings=self.device_settings)
            _log.info("%s", advice)
        self._stream, self._handed = None, None
        for group in self.buffer.groups():
            group.requests.clear()

    # -------------------------------------------------------------------------------------------------- parts

    def _start(self) -> None:
        """Begin to sample, at the first step: what a resumed run has to finish comes first."""
        if self._stream is not None:
            return
        trainer = self._trainer
        self._stream = stream = trainer.engine_stream(
            goes_on=self._settings.partial_rollouts,
            on_completion=self._note_completion,
            on_failure=self.buffer.fail,
        )
        # All of the data, not what is admitted: else a long prompt ends the run after hours.
        trainer.collectives.run_on_all_ranks(lambda: stream.check(trainer.prompts))
        stream.idle()  # samplers count from here on, as the trainer does
        self._hand_over()
        groups = self.buffer.groups()
        for group in groups:
            for place, rollout in group.rollouts.items():
                if not self._asks_by_group:
                    self._request_rewards(group, [place], [rollout])
        self._request_whole_groups()
        missing = [group for group in groups if group.missing]
        trainer.collectives.run_on_all_ranks(lambda: self._submit(missing))
        self._step_began = time.perf_counter()

    def _hand_over(self) -> None:
        """Have samplers get the present weights, unless they were given these already."""
        trainer, stream = self._trainer, self._stream
        assert stream is not None
        if self._handed == trainer.policy_version:
            return
        self._handed = version = trainer.policy_version
        with trainer.engine.gathered_weights():
            stream.hand_over(version)

    def _admit(self, count: int) -> None:
        """Admit every prompt whose group can still be trained in time, and none behind the run's last
        step, unless a caller takes further ones."""
        trainer, ranks = self._trainer, self._trainer.collectives
        assert self._handed is not None
        admitted = trainer.stream.position // ranks.num_ranks
        # A step that is made beyond the run's last one needs samples as well.
        end = max(trainer.config.train.total_steps - 1, trainer.policy_version)
        last_step = min(self._handed + self._settings.max_staleness, end)
        rows = trainer.stream.draw(max(0, (last_step + 1) * count - admitted))
        size = trainer.samples_per_prompt
        seeds = draw_seeds(len(rows) * size) if rows else []
        groups = [
            BufferedGroup(
                Admission(admitted + index, row, tuple(seeds[index * size : (index + 1) * size])),
                trainer.prompts[row],
            )
            for index, row in enumerate(rows)
        ]
        self.buffer.admit(groups)
        ranks.run_on_all_ranks(lambda: self._submit(groups))

    def _submit(self, groups: Sequence[BufferedGroup]) -> None:
        """Have the missing completions of groups sampled."""
        if not groups:
            return
        stream, version = self._stream, self._handed
        assert stream is not None and version is not None
        requests: list[GroupRequest] = []
        for group in groups:
            number, missing = group.admission.number, group.missing
            self._asked[number] = missing
            seeds = tuple(group.admission.seeds[place] for place in missing)
            requests.append(GroupRequest(number, group.prompt, seeds, version))
        stream.submit(requests)

    def _note_completion(self, number: int, index: int, rollout: Rollout) -> None:
        """In the stream's thread: buffer a completion, and request its reward, or that of its whole group
        where the source wants what belongs together. What goes wrong here ends the stream, which tells
        `GroupBuffer.fail`.

        index: of the completion among those that were asked for.
        """
        place = self._asked[number][index]
        group = self.buffer.put(number, place, rollout)
        self._lengths.note_sampled(len(rollout.completion.token_ids))
        self.progress.note("completion")
        if self._asks_by_group:
            self._request_whole_groups()
        else:
            self._request_rewards(group, [place], [rollout])

    def _request_rewards(
        self, group: BufferedGroup, places: Sequence[int], rollouts: Sequence[Rollout]
    ) -> None:
        request = self._trainer.scorer.request(rollouts)
        request.future.add_done_callback(lambda _future: self.progress.note("reward"))
        self.buffer.requested(group, places, request)

    def _wait_for_rewards(self) -> None:
        """Wait for the rewards of all ranks. One that comes on any of them has moved on all, for the others
        wait for it."""
        scorer, ranks = self._trainer.scorer, self._trainer.collectives
        before: int | None = None
        while ranks.all_reduce_int(int(not scorer.wait(_SLICE_S))):
            ranks.run_on_all_ranks(self._raise_stuck)
            number = ranks.all_reduce_int(self.progress.counts().get("reward", 0))
            if before not in (None, number):
                self.progress.note("reward on some rank")
            before = number

    def _fail_stuck(self, error: StuckError) -> None:
        """In the watchdog's thread: wake the trainer's, which waits for completions or for rewards."""
        self._stuck = error
        self.buffer.fail(error)

    def _raise_stuck(self) -> None:
        if self._stuck is not None:
            raise self._stuck

    def _describe(self) -> list[str]:
        """What the trainer has of groups, in words, for the watchdog."""
        ended, under_way = self.buffer.counts()
        oldest = next(iter(self.buffer.groups()), None)
        where = ""
        if oldest is not None:
            number, size = oldest.admission.number, len(oldest.admission.seeds)
            where = f"; the oldest, group {number}, lacks {len(oldest.missing)} of {size} completions"
        lines = [f"the trainer has {ended} groups whose completions have ended and {under_way} others{where}"]
        unscored = sum(
            len(places)
            for group in self._taken
            for places, request in group.requests
            if not request.future.done()
        )
        if unscored:
            source = self._trainer.scorer.source_name
            lines.insert(0, f"the step waits for the rewards of {unscored} completions by {source}")
        return lines

    @property
    def _asks_by_group(self) -> bool:
        """Whether the source gets whole groups: it compares what is in one, or what is scored together
        matters."""
        return self._trainer.scorer.batched or self._trainer.scorer.needs_groups

    def _request_whole_groups(self) -> None:
        """Request the rewards of whole groups, in the order of admission for sources where order matters."""
        if not self._asks_by_group:
            return
        with self._request_lock:
            for group in self.buffer.groups():
                if group.missing:
                    if self._trainer.scorer.batched:
                        return
                    continue
                if not group.requests:
                    self._request_rewards(group, range(len(group.rollouts)), group.in_order)

    def _adopt(self, taken: Sequence[BufferedGroup]) -> None:
        size = self._trainer.samples_per_prompt
        self._trainer.scorer.adopt(
            ([row * size + place for place in places], request)
            for row, group in enumerate(taken)
            for places, request in group.requests
        )
        for group in taken:
            self._asked.pop(group.admission.number, None)

    # -------------------------------------------------------------------------------------- ledger and resume

    def _enter(self, version: int) -> None:
        """Write the groups of all ranks into the run's ledger. version: that learned from them."""
        trainer, ranks = self._trainer, self._trainer.collectives
        size = trainer.samples_per_prompt
        lines: list[dict[str, Any]] = []
        for index, group in enumerate(self._taken):
            number, position = group.admission.number, group.admission.number * ranks.num_ranks + ranks.rank
            versions = [sampled_by for rollout in group.in_order for sampled_by, _ in rollout.versions]
            lines.append(
                {
                    "step": version + 1,
                    "rank": ranks.rank,
                    "number": number,
                    "position": position,
                    "row": group.admission.row,
                    "epoch": position // len(trainer.prompts),
                    "versions": [min(versions), max(versions)],
                    "scored": sum(reward.ok for reward in self._rewards[index * size : (index + 1) * size]),
                }
            )
        lines = sorted(ranks.all_gather(lines), key=lambda line: line["position"])
        if ranks.is_main:
            append_to_ledger(trainer.run.folder, lines)

    def take_up_run(self) -> None:
        """Go on where a resumed run stood, or begin a new one's ledger; from now on it is saved with the run.

        Raises:
            CheckpointError: a checkpoint's groups cannot be read.
        """
        run, ranks = self._trainer.run, self._trainer.collectives
        run.own = self
        if ranks.is_main:
            cut_ledger(run.folder, run.step)
        if run.continued:
            folder = run.folder / CHECKPOINTS / f"step_{run.step}"
            state = read_rank_state(folder, ranks.rank)
            self.buffer.load_state_dict(state["groups"], self._trainer.prompts)
            self._lengths.load_state_dict(state["lengths"])
            for group in self.buffer.groups():
                for rollout in group.rollouts.values():
                    self._lengths.note_sampled(len(rollout.completion.token_ids))

    def capture(self) -> Callable[[], dict[str, Any]]:
        """Capture groups that were admitted and not trained, with the completions that have ended; rewards
        are asked for again."""
        groups, lengths = self.buffer.capture(), self._lengths.state_dict()
        return lambda: {"groups": groups(), "lengths": lengths}


def idle_shares(times: torch.Tensor) -> tuple[float, float]:
    """Idle shares of the time, of trainers and of samplers; NaN where nothing was told of them.

    times: seconds that trainers waited, that passed for them, that samplers were busy, that passed for them.
    """
    waited, passed, busy, clock = times.tolist()
    return waited / passed if passed else math.nan, 1 - busy / clock if clock else math.nan
