"""Who logs what: rank 0 everything, the others their warnings, with their number."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator

import pytest

from conch.log import get_logger, is_main_process, progress, rank, setup_logging


@pytest.fixture(autouse=True)
def former_loggers() -> Iterator[None]:
    """Put the `conch` logger and the warning filters back as they were."""
    root = logging.getLogger("conch")
    before = (root.handlers[:], root.level, root.propagate)
    with warnings.catch_warnings():
        yield
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


def logged(capsys: pytest.CaptureFixture[str]) -> list[str]:
    setup_logging()
    logger = get_logger("conch.part")
    logger.debug("detail")
    logger.info("news")
    logger.warning("trouble")
    return capsys.readouterr().err.splitlines()


def test_main_process_logs_from_info_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    news, trouble = logged(capsys)

    assert (rank(), is_main_process()) == (0, True)
    assert news.endswith(" I conch.part: news") and trouble.endswith(" W conch.part: trouble")


def test_other_ranks_log_warnings_with_their_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    [trouble] = logged(capsys)

    assert (rank(), is_main_process()) == (3, False)
    assert trouble.startswith("[rank 3] ") and trouble.endswith("trouble")


def test_second_setup_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()

    assert len(logged(capsys)) == 2


class Terminal(io.StringIO):
    """A stderr that a person watches."""

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress(total=4, desc="ppo") as bar:
        bar.update(1)
        bar.refresh()

    assert "ppo" in terminal.getvalue() and "1/4" in terminal.getvalue()


@pytest.mark.parametrize(("stream", "rank_number"), [(io.StringIO, "0"), (Terminal, "1")])
def test_progress_is_silent_elsewhere(
    stream: type[io.StringIO], rank_number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank_number)
    monkeypatch.setattr(sys, "stderr", output := stream())

    assert list(progress(range(3), desc="ppo")) == [0, 1, 2]
    assert output.getvalue() == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "transformers.tokenization_utils_base",
            "Token indices sequence length is longer than the specified maximum sequence length (99 > 16).",
        ),
        ("transformers.modeling_utils", "GPT2Model LOAD REPORT from: x"),
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, ..."),
    ],
)
def test_what_libraries_say_of_what_is_checked_here_is_left_out(name: str, message: str) -> None:
    setup_logging()
    setup_logging()
    heard: list[str] = []
    logger, handler = logging.getLogger(name), logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    try:
        logger.warning(message)
        logger.warning("the disk is full")
    finally:
        logger.removeHandler(handler)
    assert heard == ([] if name == "DeepSpeed" else ["the disk is full"])


def test_deepspeed_warns_on_stderr_since_programs_print_results_on_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    setup_logging()
    logging.getLogger("DeepSpeed").warning("the disk is full")
    said = capsys.readouterr()
    assert said.err == "WARNING DeepSpeed: the disk is full\n" and not said.out


def test_transformers_itself_is_silent_about_lengths(capfd: pytest.CaptureFixture[str]) -> None:
    from tests.tiny import char_tokenizer

    setup_logging()
    tokenizer = char_tokenizer("abc")
    tokenizer.model_max_length = 4
    assert len(tokenizer("abcabc")["input_ids"]) > 4  # pyright: ignore[reportArgumentType]
    assert "Token indices" not in capfd.readouterr().err
