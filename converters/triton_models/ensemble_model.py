"""An ensemble of reward models inside Triton's python back end; `model.py` of the ensemble's version folders.

It stands alone: numpy and nothing of the package that wrote it. What it must know is in `manifest.json`
beside it. Three layers, top to bottom:

    combine             the members' scores of some samples -> one reward each
    MemberModels        samples -> every member's scores, or why there is none
    TritonPythonModel   what Triton calls

By hand, `python model.py < requests.json` combines scores without a server; see `main` for the format.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:  # run by hand: only Triton provides it
    pb_utils: Any = None

Inputs = dict[str, np.ndarray]
"""Input tensors by name, all with the same number of rows."""

# A call to another model loses its error code on the way, so the words of 2.51 and later tell the failures
# apart: absent or unloaded, and a model process that died. Asking again row by row would help neither.
_UNAVAILABLE = ("is not ready", "unknown model", "not found", "is not healthy")
# How the members' own code begins the message of a failure that is not the caller's fault.
_MEMBERS_FAULT = ("scoring failed:", "failed to process the request")


@dataclass(frozen=True)
class MemberFailure:
    """Why a member gave no score.

    member: name of the model.
    message: the error, as the server reports it.
    """

    member: str
    message: str

    @property
    def is_unavailable(self) -> bool:
        """Whether the member can score no sample now."""
        return any(words in self.message.lower() for words in _UNAVAILABLE)

    @property
    def is_members_fault(self) -> bool:
        """Whether the failure is the member's, not the caller's."""
        return self.is_unavailable or self.message.lower().startswith(_MEMBERS_FAULT)


Column = list[float | MemberFailure]
"""Scores, of one member for some samples or of all members for one, or why there is none."""


def combine(
    member_rewards: np.ndarray, objective: str, uwo_weight: float, variance_kind: str = "population"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Combine each row of scores [n, members] into one reward; NaN where a member gave none, never all NaN.

    variance_kind: `population` divides by the number of scores there are, `sample` by one less; the variance
        of a single one is 0.

    Returns:
        rewards float64 [n]; variance float64 [n] of the scores there are; their number int [n].
    """
    used = np.isfinite(member_rewards).sum(axis=1)
    mean = np.nanmean(member_rewards, axis=1)
    squares = np.nansum((member_rewards - mean[:, None]) ** 2, axis=1)
    variance = squares / np.maximum(1, used - (variance_kind == "sample"))
    if objective == "mean":
        return mean, variance, used
    if objective == "wco":
        return np.nanmin(member_rewards, axis=1), variance, used
    assert objective == "uwo", objective
    return mean - uwo_weight * variance, variance, used


class MemberModels:
    """Scores rows by the members, through the server that this model runs in."""

    def __init__(self, members: Sequence[dict[str, Any]]) -> None:
        self._members = members

    async def scores(self, inputs: Inputs) -> list[Column]:
        """Return per row every member's score, or why there is none; all members score at the same time."""
        columns = await asyncio.gather(*(self._column(member, inputs) for member in self._members))
        return [list(row) for row in zip(*columns, strict=True)]

    async def _column(self, member: dict[str, Any], inputs: Inputs) -> Column:
        """Return one member's scores. A bad row fails the whole request, so halves of it are sent again."""
        outcome, rows = await self._ask(member, inputs), _rows(inputs)
        if not isinstance(outcome, MemberFailure):
            return outcome
        if outcome.is_unavailable or rows == 1:
            return [outcome] * rows
        halves = (slice(0, rows // 2), slice(rows // 2, rows))
        column: Column = []
        for half in halves:
            part = {name: np.ascontiguousarray(values[half]) for name, values in inputs.items()}
            column += await self._column(member, part)
        return column

    async def _ask(self, member: dict[str, Any], inputs: Inputs) -> Column | MemberFailure:
        request = pb_utils.InferenceRequest(
            model_name=member["name"],
            requested_output_names=["rewards"],
            inputs=[pb_utils.Tensor(name, values) for name, values in inputs.items()],
        )
        try:
            response = await request.async_exec()
        except pb_utils.TritonModelException as error:
            return MemberFailure(member["name"], str(error))
        if response.has_error():
            return MemberFailure(member["name"], response.error().message())
        return read_scores(member, response.output_tensors()[0].as_numpy(), _rows(inputs))


def read_scores(member: dict[str, Any], scores: np.ndarray, rows: int) -> Column | MemberFailure:
    """Return the member's column of its rewards, checked, since Triton does not check what models return."""
    name, expected = member["name"], (rows, member["columns"])
    if scores.shape != expected:
        return MemberFailure(name, f"scoring failed: rewards of shape {scores.shape}, expected {expected}")
    column = scores[:, member["column"]].astype(np.float64).tolist()
    return [
        score if np.isfinite(score) else MemberFailure(name, f"scoring failed: the score is {score}")
        for score in column
    ]


class TritonPythonModel:
    """Triton's interface: one object per instance, its methods called in turn."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings. Members may load later than this model: the first request looks for them."""
        refuse_numpy_2(np.__version__)
        self.manifest = json.loads((Path(__file__).parent / "manifest.json").read_text(encoding="utf-8"))
        self.members = MemberModels(self.manifest["members"])
        self.inputs = ("text",) if self.manifest["form"] == "text" else ("input_ids", "attention_mask")
        names = ", ".join(member["name"] for member in self.manifest["members"])
        pb_utils.Logger.log_info(
            f"{args['model_name']} version {args['model_version']}: {self.manifest['objective']} of {names}; "
            f"on a member's failure: {self.manifest['on_member_failure']}"
        )

    async def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request, each with its scores or its own error; a member gets all rows at once."""
        request_inputs = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        scores = await self.members.scores(_joined(request_inputs))
        log_failures(scores, self.manifest)
        rows = iter(scores)
        return [
            response([next(rows) for _ in range(_rows(inputs))], self.manifest) for inputs in request_inputs
        ]


def response(scores: list[Column], manifest: dict[str, Any]) -> Any:
    """Build the reply to a request from its rows' scores, or the error of the first row that gets none."""
    for number, row in enumerate(scores):
        failures = [score for score in row if isinstance(score, MemberFailure)]
        if failures and (manifest["on_member_failure"] == "fail" or len(failures) == len(row)):
            return _error(number, failures)
    member_rewards = np.array(
        [[np.nan if isinstance(score, MemberFailure) else score for score in row] for row in scores]
    )
    rewards, variance, used = combined(member_rewards, manifest)
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("rewards", rewards.astype(np.float32)[:, None]),
            pb_utils.Tensor("member_rewards", member_rewards.astype(np.float32)),
            pb_utils.Tensor("variance", variance.astype(np.float32)[:, None]),
            pb_utils.Tensor("members_used", used.astype(np.int32)[:, None]),
        ]
    )


def combined(
    member_rewards: np.ndarray, manifest: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what `combine` does with the manifest's rule; manifests of before the choice of a variance have
    that of the population."""
    kind = manifest.get("variance", "population")
    return combine(member_rewards, manifest["objective"], manifest["uwo_weight"], kind)


def log_failures(scores: list[Column], manifest: dict[str, Any]) -> None:
    """Say for each member how many of the rows it gave no score, and why."""
    for column, member in enumerate(manifest["members"]):
        of_member = [row[column] for row in scores]
        failures = [score for score in of_member if isinstance(score, MemberFailure)]
        if failures:
            pb_utils.Logger.log_warn(
                f"member {member['name']} gave no score to {len(failures)} of {len(scores)} samples "
                f"({manifest['on_member_failure']}): {failures[0].message}"
            )


def _error(row: int, failures: list[MemberFailure]) -> Any:
    """Build the error of a whole request for its row `row`, with the code that the member's error lost."""
    first = next((failure for failure in failures if failure.is_members_fault), failures[0])
    if first.is_unavailable:
        code = pb_utils.TritonError.UNAVAILABLE
    else:
        code = pb_utils.TritonError.INTERNAL if first.is_members_fault else pb_utils.TritonError.INVALID_ARG
    message = first.message.removeprefix("row 0").lstrip(": ")  # the member got this row alone
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(f"row {row}: member {first.member} gave no score: {message}", code)
    )


def _joined(requests: Sequence[Inputs]) -> Inputs:
    """Join all rows in one set of tensors; shorter rows of ids are filled up on the right, masked out."""
    joined = {}
    for name in requests[0]:
        tensors = [request[name] for request in requests]
        longest = max(tensor.shape[1] for tensor in tensors)
        wide = [np.pad(tensor, ((0, 0), (0, longest - tensor.shape[1]))) for tensor in tensors]
        joined[name] = np.concatenate(wide)
    return joined


def _rows(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


def refuse_numpy_2(version: str) -> None:
    """Raise RuntimeError for numpy 2, with which Triton's python stub silently turns tensors into zeros."""
    if int(version.split(".")[0]) >= 2:
        raise RuntimeError(
            f"numpy {version} in the model's Python: Triton's python stub corrupts tensors with numpy 2; "
            "install numpy<2 there"
        )


def main() -> None:
    """Combine scores read from stdin as one JSON object; write the answers to stdout.

    in:  {"requests": [{"member_rewards": [[...], ...]}, ...]} with null where a member gave no score
    out: [{"scores": [[...], ...]}, ...]
    """
    manifest = json.loads((Path(__file__).parent / "manifest.json").read_text(encoding="utf-8"))
    answers = []
    for request in json.load(sys.stdin)["requests"]:
        rewards, _, _ = combined(np.array(request["member_rewards"], dtype=np.float64), manifest)
        answers.append({"scores": rewards.astype(np.float32)[:, None].tolist()})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
