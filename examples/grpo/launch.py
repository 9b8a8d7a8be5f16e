"""Starts what a plan of devices asks for, samplers, reference servers and training processes, and ends all.

Each server runs below a guard (`conch/serving/server/process_guard.py`), which ends it when this process is
gone, however it went. The kernel ends the training processes, or their launcher, in that case.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from conch.cli.run_config import default_config_dir
from conch.config.algorithms.grpo import GRPORunConfig
from conch.errors import ConfigError, ServerStartError
from conch.log import get_logger
from conch.serving.server import process_guard
from examples.grpo.async_settings import uses_ray
from examples.grpo.devices import DevicePlan
from examples.grpo.settings import ExampleConfig
from examples.grpo.translation import at_once_of_each, sampler, served_share

_log = get_logger("conch.grpo")

TRAINING = Path(__file__).with_name("training.py")
SECRET_VARIABLE = "CONCH_GRPO_SECRET"
"""Environment variable with the secret that a run's servers and training processes share: nobody else on the
machine is let in, and no other run takes these servers for its own."""

READY_WITHIN_S = 900.0
"""Longest start of a server: it loads a model, and vLLM records graphs."""
_POLL_S = 0.2
_GRACE_S = 10.0
_LOG_TAIL_LINES = 15
_LOG_MAX_BYTES, _LOG_KEEP = 50_000_000, 1
_PR_SET_PDEATHSIG = 1
_OK, _UNAUTHORIZED = 200, 401


@dataclass(frozen=True)
class Server:
    """A server to start.

    name: of its log: `inference-0`.
    verb: of `conch`.
    settings: of the server.
    port: that it listens on.
    devices: that it may use.
    """

    name: str
    verb: str
    settings: Mapping[str, object]
    port: int
    devices: tuple[int, ...]

    @property
    def url(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Its command line."""
        words = [f"{key}={json.dumps(value)}" for key, value in self.settings.items() if value is not None]
        return [sys.executable, "-m", "conch", self.verb, *words, f"port={self.port}"]


def servers_of(
    config: ExampleConfig, run: GRPORunConfig, plan: DevicePlan, *, has_vllm: bool
) -> list[Server]:
    """The servers that a plan asks for, on free ports.

    run: what the settings became.
    """
    size = config.inference_model.tensor_parallel_size
    served = () if uses_ray(config) else plan.inference
    groups = [served[first : first + size] for first in range(0, len(served), size)]
    ports = free_ports(len(groups) + len(plan.reference))
    settings = _sampler_settings(config, run, plan, len(groups), has_vllm=has_vllm)
    made = [
        Server(f"inference-{number}", "rollout-server", settings, ports.pop(), group)
        for number, group in enumerate(groups)
    ]
    model = run.model
    own: dict[str, object] = {
        "model": model.path,
        "revision": model.revision,
        "dtype": model.dtype,
        "attention": model.attention,
        "trust_remote_code": model.trust_remote_code or None,
        "secret_env": SECRET_VARIABLE,
    }
    return made + [
        Server(f"reference-{number}", "reference-server", own, ports.pop(), (device,))
        for number, device in enumerate(plan.reference)
    ]


def _sampler_settings(
    config: ExampleConfig, run: GRPORunConfig, plan: DevicePlan, copies: int, *, has_vllm: bool
) -> dict[str, object]:
    """Settings of the rollout servers, by their names; None for those that are left out."""
    if not copies:
        return {}
    inference, lora = config.inference_model, config.train_model.lora
    settings: dict[str, object] = {
        "model": config.model.name,
        "revision": config.model.revision,
        "trust_remote_code": config.model.trust_remote_code or None,
        "dtype": inference.torch_dtype or _computed_dtype(run),
        "max_model_len": inference.max_model_len,
        "max_num_seqs": at_once_of_each(config, copies),
        "secret_env": SECRET_VARIABLE,
    }
    engine = sampler(config, plan, has_vllm=has_vllm)
    if engine != "vllm":
        return {**settings, "engine": engine}
    return {
        **settings,
        "gpu_memory_utilization": served_share(config, plan),
        "enforce_eager": inference.enforce_eager,
        "tensor_parallel_size": inference.tensor_parallel_size,
        "max_lora_rank": lora.r if lora.enabled else None,
    }


def _computed_dtype(run: GRPORunConfig) -> str:
    """Precision that the trained model computes in."""
    computed = {"bf16": "bfloat16", "fp16": "float16"}
    return computed.get(run.train.mixed_precision or "no", run.model.dtype)


def addresses(servers: Sequence[Server]) -> dict[str, object]:
    """What the trainer is told of the servers: full name of a setting -> value."""
    samplers = ",".join(server.url for server in servers if server.verb == "rollout-server")
    references = ",".join(server.url for server in servers if server.verb == "reference-server")
    told: dict[str, object] = {}
    if samplers:
        told |= {"rollout.urls": samplers, "rollout.auth.secret_env": SECRET_VARIABLE}
    if references:
        told |= {"reference.urls": references, "reference.auth.secret_env": SECRET_VARIABLE}
    return told


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def environment(plan: DevicePlan, devices: Sequence[int], secret: str) -> dict[str, str]:
    """The environment of a process that may use these devices alone.

    secret: of the run's servers.
    """
    shared = {**os.environ, SECRET_VARIABLE: secret}
    if not plan.on_gpus:
        return {**shared, "CUDA_VISIBLE_DEVICES": ""}
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = [visible[device] if visible else str(device) for device in devices]
    return {**shared, "CUDA_VISIBLE_DEVICES": ",".join(names)}


# ---------------------------------------------------------------------------------------------------- servers


@contextmanager
def running(servers: Sequence[Server], plan: DevicePlan, logs: Path, secret: str) -> Iterator[None]:
    """All servers ready; they end with the context.

    logs: folder of their output.
    secret: that they ask for.

    Raises:
        ServerStartError: one ended, or was not ready in time; with the end of its log.
    """
    guards: list[_Guarded] = []
    try:
        for server in servers:
            logs.mkdir(parents=True, exist_ok=True)
            env = environment(plan, server.devices, secret)
            guards.append(_Guarded(server, env, logs / f"{server.name}.log"))
            _log.info("starting %s on port %d, log: %s", server.name, server.port, guards[-1].log)
        deadline = time.monotonic() + READY_WITHIN_S
        for guarded in guards:
            guarded.wait_until_ready(deadline)
        yield
    finally:
        for guarded in guards:
            guarded.ask_to_end()
        for guarded in guards:
            guarded.wait_for_end()


class _Guarded:
    """A server and its guard."""

    def __init__(self, server: Server, environment: Mapping[str, str], log: Path) -> None:
        self.server, self.log = server, log
        self._secret = environment[SECRET_VARIABLE]
        log.unlink(missing_ok=True)
        self._scratch = tempfile.mkdtemp(prefix="conch-grpo-")
        settings = {
            "command": server.command(),
            "end_command": [],
            "log": str(log),
            "log_max_bytes": _LOG_MAX_BYTES,
            "log_keep": _LOG_KEEP,
            "shm_prefix": Path(self._scratch).name,
            "scratch": self._scratch,
            "grace_s": _GRACE_S,
            "parent_pid": os.getpid(),
        }
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", process_guard.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the servers
                env=dict(environment),
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()

    def wait_until_ready(self, deadline: float) -> None:
        """Wait for the server's health."""
        while not _is_healthy(self.server.url, self._secret):
            if self._process.poll() is not None:
                raise ServerStartError(f"{self.server.name} ended before it was ready: {self._tail()}")
            if time.monotonic() > deadline:
                raise ServerStartError(
                    f"{self.server.name} is not ready after {READY_WITHIN_S:.0f} s: {self._tail()}"
                )
            time.sleep(_POLL_S)

    def ask_to_end(self) -> None:
        """Tell the guard, which tells the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait_for_end(self) -> None:
        """Wait for the guard, which waits for the server."""
        try:
            self._process.wait(2 * _GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the kernel then ends the server
            self._process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return f"the end of {self.log} says\n" + "\n".join(lines)


def _is_healthy(url: str, secret: str) -> bool:
    """True where a server answers that lets in who knows this secret, and nobody else: another program's, on
    a port that was free a moment ago, does not."""
    return _status(url, {}) == _UNAUTHORIZED and _status(url, {"authorization": f"Bearer {secret}"}) == _OK


def _status(url: str, headers: Mapping[str, str]) -> int | None:
    """Status of what is told of a server's health; None without an answer."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(f"http://{url}/health", headers=dict(headers)), timeout=5.0):
            return _OK
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------- training


def training_command(config: ExampleConfig, plan: DevicePlan, task: Path) -> list[str]:
    """The command line that trains on the plan's devices.

    task: file for `training.py`.

    Raises:
        ConfigError: `train_model.accelerate_config` names no file.
    """
    program, number = [str(TRAINING), str(task)], len(plan.train)
    if number == 1:
        return [sys.executable, *program]
    logs = ["--log_dir", str(task.parent)]  # torchrun leaves a folder there, which goes with the task's file
    if not plan.on_gpus:
        alone = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", *logs]
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(number),
            *alone,
            *program,
        ]
    file = accelerate_file(config.train_model.accelerate_config)
    port = ["--main_process_port", str(free_ports(1)[0])]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launch, "--num_processes", str(number), *logs, *port, *program]


def accelerate_file(name: str) -> Path:
    """The configuration of `accelerate launch` that a setting names.

    Raises:
        ConfigError: there is no such file.
    """
    folder = default_config_dir() / "accelerate"
    for file in (folder / f"{name}.yaml", Path(name)):
        if file.is_file():
            return file
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise ConfigError(f"`train_model.accelerate_config` = {name}: there is no such file; there are: {names}")


def devices_of_training(config: ExampleConfig, plan: DevicePlan) -> tuple[int, ...]:
    """Devices that the training processes may use: each its own, in order, and Ray's samplers, which these
    start, those behind."""
    return plan.train + (plan.inference if uses_ray(config) else ())


def run_training(command: Sequence[str], plan: DevicePlan, devices: Sequence[int], secret: str) -> None:
    """Run the training processes; Ctrl-C and SIGTERM are handed on to them, and waited for.

    A launcher is passed over: it would end its ranks after 30 s, in the middle of a long step.

    Raises:
        KeyboardInterrupt, SystemExit: as the signal, or the processes, ended it.
    """
    env = environment(plan, devices, secret)
    if not plan.on_gpus:
        env |= {"ACCELERATE_USE_CPU": "true"}
    # torchrun ends its ranks on SIGTERM; a process without a launcher would wait for servers that are gone.
    on_death = signal.SIGTERM if len(plan.train) > 1 else signal.SIGKILL
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, on_death)
        if os.getppid() != parent:
            os._exit(1)

    received: list[int] = []
    process = subprocess.Popen(list(command), env=env, start_new_session=True, preexec_fn=die_with_parent)

    def hand_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        ranks = _children(process.pid) if len(plan.train) > 1 else []
        for pid in ranks or [process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code and signal.SIGINT in received:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(128 + signal.SIGTERM if received else code if code > 0 else 128 - code)


def _children(pid: int) -> list[int]:
    """Processes that a process has started, by whichever of its threads."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in lists for child in file.read_text().split()]
