"""DDP waits for no part that text never reaches."""

from __future__ import annotations

from pathlib import Path

from tests.launches import finish, start, torchrun


def test_a_model_of_texts_and_images_trains_on_two_ranks(tmp_path: Path) -> None:
    output = finish(start([*torchrun(2), "-m", "tests.integration.images_run", str(tmp_path)]))
    assert output.count("done on 2 ranks") == 2
