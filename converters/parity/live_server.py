"""Hold a running server's scores against a checkpoint: the cases of a conversion, asked over gRPC."""

from __future__ import annotations

from dataclasses import replace

from conch.converters.checkpoints.reader import check_dense, read_checkpoint
from conch.converters.options import ReadOptions
from conch.converters.parity.compare import compare
from conch.converters.parity.reference import expected_scores
from conch.converters.parity.report import ParityReport
from conch.converters.parity.samples import build_cases, requests_of
from conch.converters.pipeline import quiet_transformers
from conch.errors import ConversionError
from conch.store.manifest import ServedDtype
from conch.triton.client import ServedModel


def verify(endpoint: str, checkpoint: str, dtype: ServedDtype, reading: ReadOptions) -> ParityReport:
    """Compare a served model with the checkpoint that it should have been made from.

    endpoint: `host:port/model`. dtype: whose tolerance counts. reading: as at the conversion; a length that
    it leaves open is the server's, and so is the granularity.

    Raises:
        ServingError: the server does not answer, or serves no reward model there.
        ConversionError: the checkpoint cannot be read, or has other rewards than are served.
    """
    with ServedModel(endpoint) as server, quiet_transformers():
        spec = server.spec()
        length = reading.max_length or spec.max_length or None
        reading = replace(reading, max_length=length, granularity=spec.granularity)
        original = read_checkpoint(checkpoint, reading)
        check_dense(original, spec.form)
        if len(spec.reward_names) != len(original.reward_names):
            raise ConversionError(
                f"{endpoint} serves the rewards {', '.join(spec.reward_names)}, the checkpoint has "
                f"{', '.join(original.reward_names)}: say with --reward which were served"
            )
        cases = build_cases(original, spec.form, max_batch_size=spec.max_batch_size)
        expected = expected_scores(original, cases)
        replies = server.score(requests_of(cases, spec.form, original.pad_token_id), spec)
    return compare(cases, replies, expected, dtype)
