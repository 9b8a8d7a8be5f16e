from __future__ import annotations

import io

from rich.console import Console

from conch.serving.deployment.status import (
    Counters,
    ServerStatus,
    gpu_load,
    model_statuses,
    pending_requests,
    status_table,
)

METRICS = """# HELP nv_inference_pending_request_count Instantaneous number of pending requests
nv_inference_pending_request_count{model="walks",version="2"} 3
nv_gpu_utilization{gpu_uuid="GPU-1"} 0.5
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 2e+09
nv_cpu_utilization 0.1
"""
BEFORE = Counters(100, 1, 200, 100, queue_ns=50_000_000, compute_ns=300_000_000)
NOW = Counters(140, 2, 360, 120, queue_ns=130_000_000, compute_ns=700_000_000)
KEY = ("walks", "2")


def test_status_counts_what_happened_between_two_looks() -> None:
    (status,) = model_statuses({KEY: BEFORE}, {KEY: NOW}, 2.0, {KEY: True}, METRICS)
    # 40 requests in 2 s, 160 rows in 20 batches, 80 ms of waiting and 400 ms of work over 40 requests.
    assert status.requests_per_s == 20.0 and status.mean_batch == 8.0
    assert status.queue_ms == 2.0 and status.compute_ms == 10.0
    assert (status.requests, status.failures, status.pending, status.ready) == (140, 2, 3, True)


def test_status_falls_back_to_the_whole_time_when_nothing_came() -> None:
    (status,) = model_statuses({KEY: BEFORE}, {KEY: BEFORE}, 2.0, {}, "")
    assert status.requests_per_s == 0.0 and status.mean_batch == 2.0
    assert status.queue_ms == 0.5 and status.compute_ms == 3.0
    assert status.pending is None and not status.ready


def test_status_of_a_model_that_was_loaded_between_the_looks_starts_from_zero() -> None:
    (status,) = model_statuses({KEY: NOW}, {KEY: BEFORE}, 10.0, {}, "")
    assert status.requests_per_s == 10.0


def test_status_of_a_model_without_requests_has_no_averages() -> None:
    (status,) = model_statuses({}, {KEY: Counters(0, 0, 0, 0, 0, 0)}, 1.0, {}, "")
    assert (status.mean_batch, status.queue_ms, status.compute_ms) == (None, None, None)


def test_prometheus_page_gives_waiting_requests_and_gpus() -> None:
    assert pending_requests(METRICS) == {KEY: 3} and gpu_load(METRICS) == {"GPU-1": (50.0, 2.0)}


def test_table_shows_every_server_with_its_models_and_problems() -> None:
    models = tuple(model_statuses({KEY: BEFORE}, {KEY: NOW}, 2.0, {KEY: True}, METRICS))
    servers = [
        ServerStatus(url="h:1", phase="ready", restarts=2, heals=1, models=models),
        ServerStatus(url="h:2", phase="failed", problem="port taken"),
    ]
    page = Console(file=io.StringIO(), width=160)
    page.print(status_table("walks", servers))
    assert isinstance(page.file, io.StringIO)
    text = page.file.getvalue()
    assert "0  h:1  ready, 2 restarts, 1 heals" in text and "1: port taken" in text
    assert [word for word in text.splitlines()[4].split("│")][2:6] == [
        " walks ",
        "       2 ",
        " yes   ",
        "      140 ",
    ]
