"""Is anything trained on twice, lost, or left hanging when the parts of a remote run die? Seeded runs say.

    python -m benchmarks.chaos_remote --runs 50

Each run is a small GRPO: `python -m conch.service` in a process, two clients in processes of their own, one
with the client's own loop and one that rewards group by group, and a proxy between (`tests/fakes`), which is
the network. A run draws from these, each at a moment of its own, in whatever order and overlap:

    client      SIGKILL for one of the two; another may come, under its name or a new one
    service     SIGKILL, once or twice: for the server alone, which starts again by itself, or for its
                parent too, and it is started anew
    network     nothing comes through for 5 to 20 s: swallowed, or refused
    bad client  a third one, from beginning to end, which rewards late, twice, with too few or no numbers,
                for tokens that were not given out, and for another's group

A run passes if it comes to its end, in time; if its ledger has each update's groups once, with the rewards
that the clients gave, and each update has learned from just these (`remote_ledger_faults`); if all that fits
nothing was refused in words; if the model comes over the network whole; if the service leaves with code
0 and no process is left. All together pass if the mean reward of what they have learned is that of
undisturbed runs within three standard errors.

With `--keep FOLDER` a second call goes on where the first one ended; `--minutes` ends a call early.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.chaos_parts import Process, Watch, distance, remote_ledger_faults
from benchmarks.chaos_remote_clients import LONGEST_S, PROMPTS, vowels
from benchmarks.measuring import END_S, ROOT
from conch.errors import ConchError
from conch.service.client import TrainingClient
from conch.service.protocol import KEY_VARIABLE
from tests.fakes.faulty_proxy import Fault, FaultyProxy
from tests.services import KEY, Service, tiny_model, tiny_settings

FAULTS = ("client", "service", "network", "bad client")
_GROUPS, _GROUP_SIZE, _TOKENS = 4, 8, 5
_LEASE_S = 3.0
_CUT_S = (5.0, 20.0)
_LONGEST_AWAY_S = 2.0
_POLL_S = 0.05
_EVALUATED = 64
"""Completions of each prompt that a run's reward is the mean of."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    disturbed: kinds of what was done to it.
    reward: of the model that was downloaded.
    deeds: posts and requests of the bad client that were refused.
    """

    name: str
    disturbed: tuple[str, ...]
    seconds: float
    reward: float | None
    faults: tuple[str, ...]
    deeds: int


@dataclass
class Scene:
    """One run while it goes on.

    progress: updates that have been made.
    """

    folder: Path
    service: Service
    wire: FaultyProxy
    watch: Watch
    run: Path
    draw: random.Random
    clients: list[subprocess.Popen[bytes]] = field(default_factory=list)
    notes: list[Path] = field(default_factory=list)
    is_over: bool = False

    def progress(self) -> int:
        """Updates so far; read from the disk, where nothing is disturbed."""
        try:
            return (self.run / "train" / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def add_client(self, kind: str, name: str) -> subprocess.Popen[bytes]:
        """Start a client."""
        number = len(self.notes)
        self.notes.append(self.folder / f"notes_{number}.jsonl")
        words = [kind, f"http://{self.wire.url}", name, str(number), str(self.notes[-1])]
        with (self.folder / f"client_{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.chaos_remote_clients", *words],
                cwd=ROOT,
                env={**os.environ, KEY_VARIABLE: KEY},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.watch.add(process.pid)
        self.clients.append(process)
        return process


# ----------------------------------------------------------------------------------------- what is done to it


def kill_client(scene: Scene) -> None:
    """One client gets SIGKILL; in half of the cases another comes, under its name or a new one."""
    place = scene.draw.randrange(2)
    kind, name = (("trains", "first"), ("by_hand", "second"))[place]
    scene.clients[place].kill()
    scene.clients[place].wait(END_S)
    if scene.draw.random() < 0.5:
        time.sleep(scene.draw.uniform(0, _LONGEST_AWAY_S))
        scene.clients[place] = scene.add_client(kind, scene.draw.choice([name, f"{name}-again"]))
        scene.clients.pop()


def kill_service(scene: Scene) -> None:
    """The server gets SIGKILL, or its parent with it, and it is started again."""
    for _ in range(scene.draw.choice([1, 2])):
        service = scene.service
        scene.watch.look()
        servers = [each for each in scene.watch.living() if kind_of(each) == "service"]
        if scene.draw.random() < 0.5:
            for each in servers:
                with suppress(ProcessLookupError):
                    if each.pid != service.process.pid:
                        os.kill(each.pid, signal.SIGKILL)
        else:
            service.process.send_signal(signal.SIGSTOP)  # so that it starts no other meanwhile
            for each in servers:
                with suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGKILL)
            service.process.wait(END_S)
            time.sleep(scene.draw.uniform(0, _LONGEST_AWAY_S))
            service.start()
            scene.watch.add(service.process.pid)
        time.sleep(scene.draw.uniform(0, 10.0))
        if scene.is_over:
            return


def cut_network(scene: Scene) -> None:
    """Nothing comes through for a while; then all connections break."""
    seconds, refused = scene.draw.uniform(*_CUT_S), scene.draw.random() < 0.5
    if refused:
        scene.wire.refuse()
    else:
        scene.wire.fault = Fault(swallow=True)
    time.sleep(seconds)
    if refused:
        scene.wire.listen()
    else:
        scene.wire.fault = Fault()
        scene.wire.reset()


_DEEDS: dict[str, Callable[[Scene], None]] = {
    "client": kill_client,
    "service": kill_service,
    "network": cut_network,
}


def drawn_faults(seed: int) -> tuple[str, ...]:
    """What is done to a run: one kind for certain, by turns, each other one with a chance of one in three."""
    draw = random.Random(f"kinds {seed}")
    certain = FAULTS[seed % len(FAULTS)]
    return tuple(kind for kind in FAULTS if kind == certain or draw.random() < 1 / 3)


def disturb(scene: Scene, kind: str, moment: float) -> None:
    """Do it behind so many updates, and a part of a second; unless the run is over before."""
    while scene.progress() < int(moment):
        if scene.is_over:
            return
        time.sleep(_POLL_S)
    time.sleep(moment % 1.0)
    if not scene.is_over:
        _DEEDS[kind](scene)


# ------------------------------------------------------------------------------------------------- one run


def kind_of(process: Process) -> str:
    """What a process of a run is for."""
    return "service" if "conch.service" in process.command else "client"


def one_run(folder: Path, model: Path, *, seed: int, steps: int, kinds: Sequence[str]) -> Outcome:
    """A run to its end. kinds: what is done to it."""
    folder.mkdir(parents=True)
    started, watch = time.monotonic(), Watch()
    faults: list[str] = []
    reward, notes = None, list[dict[str, Any]]()
    with ExitStack() as opened:
        opened.callback(_end_all, watch)
        service = Service(folder / "service", restart="true")
        watch.add(service.process.pid)
        wire = opened.enter_context(FaultyProxy(f"127.0.0.1:{service.port}"))
        client = opened.enter_context(TrainingClient(f"http://{wire.url}", KEY, retry_s=60.0))
        run_id = client.start(_settings(model, steps, seed)).run_id
        run = folder / "service" / "runs" / run_id
        scene = Scene(folder, service, wire, watch, run, random.Random(seed))
        try:
            faults += _played(scene, kinds, steps)
            target = folder / "model.zip"
            if not faults and client.get_model(target) != steps:
                faults.append("another version of the model was downloaded than the last")
            reward = _reward_of(target) if not faults else None
            if (code := service.terminate()) != 0:
                faults.append(f"the service left with code {code} behind SIGTERM")
        except (ConchError, AssertionError, OSError, subprocess.TimeoutExpired) as error:
            faults.append(f"{type(error).__name__}: {error}")
        faults += watch.left(kind_of)
        notes = [json.loads(line) for file in scene.notes if file.exists() for line in file.open("rb")]
    told = [each for each in notes if each.get("outcome") == "whole"]
    faults += remote_ledger_faults(run, steps, _GROUPS, told)
    refused = sum("deed" in each for each in notes)
    return Outcome(folder.name, tuple(kinds), time.monotonic() - started, reward, tuple(faults), refused)


def _settings(model: Path, steps: int, seed: int) -> Any:
    return tiny_settings(
        model,
        num_completions_per_prompt=_GROUP_SIZE,
        training_batch_size=_GROUPS,
        max_completion_length=_TOKENS,
        learning_rate=0.0003,
        max_steps=steps,
        save_every=5,
        lease_s=_LEASE_S,
        seed=seed,
    )


def _played(scene: Scene, kinds: Sequence[str], steps: int) -> list[str]:
    """Have clients train to the end of a run, and do to it what was drawn; what went wrong, in words."""
    scene.add_client("trains", "first")
    scene.add_client("by_hand", "second")
    bad = scene.add_client("misbehaves", "bad") if "bad client" in kinds else None
    deeds = [kind for kind in kinds if kind in _DEEDS]
    moments = {kind: scene.draw.uniform(0, steps - 1) for kind in deeds}
    with ThreadPoolExecutor(max(1, len(deeds))) as pool:
        done = [pool.submit(disturb, scene, kind, moments[kind]) for kind in deeds]
        try:
            faults = _waited_for(scene, [] if bad is None else [bad])
        finally:
            scene.is_over = True
    if not faults:  # who came at the very end
        faults += _waited_for(scene, [])
    faults += [f"{type(error).__name__}: {error}" for each in done if (error := each.exception()) is not None]
    return faults


def _waited_for(scene: Scene, further: Sequence[subprocess.Popen[bytes]]) -> list[str]:
    """Wait for the ends of the clients that were not killed."""
    until = time.monotonic() + LONGEST_S
    while time.monotonic() < until:
        clients = [*scene.clients[:2], *further]
        codes = [each.poll() for each in clients]
        if all(code is not None for code in codes):
            return [
                f"a client ended with code {code}: {_last_words(scene, each)}"
                for each, code in zip(clients, codes, strict=True)
                if code not in (0, -signal.SIGKILL)
            ]
        time.sleep(_POLL_S)
    return [f"it does not end within {LONGEST_S:g} s, {scene.progress()} updates are made"]


def _last_words(scene: Scene, client: subprocess.Popen[bytes]) -> str:
    number = str(client.args[-1]).rpartition("_")[2].partition(".")[0]  # pyright: ignore[reportIndexIssue]
    lines = (scene.folder / f"client_{number}.log").read_text(errors="replace").splitlines()
    return lines[-1] if lines else "nothing was said"


def _end_all(watch: Watch) -> None:
    watch.stop()
    for process in watch.living():
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _reward_of(archive: Path) -> float:
    """Mean reward of completions that a downloaded model samples, the same prompts and seed for all."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as files:
            files.extractall(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = tokenizer(PROMPTS * _EVALUATED, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(0)
    with torch.no_grad():
        ids = model.generate(
            **rows, do_sample=True, max_new_tokens=_TOKENS, pad_token_id=tokenizer.pad_token_id
        )
    outputs = tokenizer.batch_decode(ids[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
    return statistics.mean(vowels(outputs))


# ------------------------------------------------------------------------------------------------ all runs


def chaos(folder: Path, arguments: argparse.Namespace) -> tuple[list[Outcome], bool]:
    """Undisturbed runs, then disturbed ones; run n is seeded with n. Those that `folder` has already are not
    made again. Returns all outcomes, and whether none is missing."""
    model = folder / "model"
    if not model.exists():
        tiny_model(model)
    file = folder / "outcomes.jsonl"
    outcomes = _read(file)
    until = time.monotonic() + 60 * arguments.minutes
    plan = [(f"calm_{number}", 1000 + number, ()) for number in range(arguments.calm)]
    plan += [
        (f"run_{number}", number, drawn_faults(number))
        for number in range(arguments.seed, arguments.seed + arguments.runs)
    ]
    for name, seed, kinds in plan:
        if name in outcomes:
            continue
        if time.monotonic() > until:
            return [*outcomes.values()], False
        attempt = Path(tempfile.mkdtemp(prefix="attempt_", dir=folder))
        outcome = one_run(attempt / name, model, seed=seed, steps=arguments.steps, kinds=kinds)
        outcomes[name] = outcome
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(outcome)) + "\n")
        _tell(outcome)
    return [outcomes[name] for name, *_ in plan], True


def _read(file: Path) -> dict[str, Outcome]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    values = [json.loads(line) for line in lines]
    return {
        each["name"]: Outcome(
            **{**each, "disturbed": tuple(each["disturbed"]), "faults": tuple(each["faults"])}
        )
        for each in values
    }


def _tell(outcome: Outcome) -> None:
    reward = "none" if outcome.reward is None else f"{outcome.reward:.3f}"
    print(
        f"{outcome.name}: {', '.join(outcome.disturbed) or 'nothing'}; {outcome.seconds:.0f} s, reward "
        f"{reward}, {outcome.deeds} deeds refused: {'; '.join(outcome.faults) or 'passed'}",
        file=sys.stderr,
        flush=True,
    )


def _rewards(outcomes: Sequence[Outcome]) -> list[float | None]:
    return [each.reward for each in outcomes]


def table(outcomes: Sequence[Outcome]) -> str:
    """As Markdown: a line for each kind of fault, of all runs that had it, whatever else they had."""
    lines = ["| disturbed by | runs | passed | s a run | reward |", "|" + "---|" * 5]
    calm = [each for each in outcomes if not each.disturbed]
    disturbed = [each for each in outcomes if each.disturbed]
    sides = [("nothing", calm)]
    sides += [(kind, [each for each in disturbed if kind in each.disturbed]) for kind in FAULTS]
    sides.append(("two or more of these", [each for each in disturbed if len(each.disturbed) > 1]))
    for name, side in [*sides, ("all disturbed", disturbed)]:
        if not side:
            continue
        rewards = [each.reward for each in side if each.reward is not None]
        passed = sum(not each.faults for each in side)
        seconds = f"{min(each.seconds for each in side):.0f}-{max(each.seconds for each in side):.0f}"
        reward = "none" if not rewards else f"{statistics.mean(rewards):.3f}"
        if len(rewards) > 1:
            reward += f" (sd {statistics.stdev(rewards):.3f})"
        lines.append(f"| {name} | {len(side)} | {passed} | {seconds} | {reward} |")
    apart = distance(_rewards(calm), _rewards(disturbed))
    refused = sum(each.deeds for each in outcomes)
    lines += [
        "",
        f"Difference of the mean rewards: {apart:.1f} standard errors; {refused} requests were refused",
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos_remote", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--runs", type=int, default=50, help="disturbed runs; default: %(default)s")
    add("--calm", type=int, default=8, help="undisturbed ones; default: %(default)s")
    add("--seed", type=int, default=0, help="of the first run; default: %(default)s")
    add("--steps", type=int, default=40, help="of a run; default: %(default)s")
    add("--minutes", type=float, default=600.0, help="no run is begun behind that; default: %(default)s")
    add("--keep", type=Path, help="folder for the runs, which later calls go on with; default: none")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if all runs passed, with the table on stdout; 1 if not; 2 if `--minutes` left some out."""
    arguments = _parser().parse_args(argv)
    if arguments.calm < 2:
        print("error: `--calm` takes at least 2", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="conch-chaos-") as scratch:
        folder = (arguments.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        outcomes, is_whole = chaos(folder, arguments)
    print(table(outcomes))
    if not is_whole:
        return 2
    calm, disturbed = ([e for e in outcomes if bool(e.disturbed) is kind] for kind in (False, True))
    faulty = any(each.faults for each in outcomes)
    return int(faulty or abs(distance(_rewards(calm), _rewards(disturbed))) > 3)


if __name__ == "__main__":
    sys.exit(main())
