"""Compare a running server's scores with a checkpoint's, over gRPC, on the cases of a conversion."""

from __future__ import annotations

from conch.converters.checkpoints.reader import read_checkpoint
from conch.converters.checkpoints.rules import check_dense
from conch.converters.options import ReadOptions
from conch.converters.parity.compare import compare
from conch.converters.parity.reference import reference_of, rounding_of_failures
from conch.converters.parity.report import ParityReport
from conch.converters.pipeline import quiet_transformers
from conch.errors import ConversionError
from conch.store.manifest import ServedDtype
from conch.triton.client import ServedModel


def verify(endpoint: str, checkpoint: str, requested: ReadOptions, dtype: ServedDtype) -> ParityReport:
    """Compare a served model with the checkpoint that it should have been made from.

    endpoint: `host:port/model`.
    checkpoint: folder, file of tensors, or hub id.
    requested: as at the conversion; the granularity is the server's, and so is a length left open.
    dtype: whose tolerance counts.

    Raises:
        ServingError: the server does not answer, or serves no reward model there.
        ConversionError: the checkpoint cannot be read, or has other rewards than are served.
    """
    with ServedModel(endpoint) as server, quiet_transformers():
        spec = server.spec()
        length = requested.max_length or spec.max_length or None
        settings = {"max_length": length, "granularity": spec.granularity}
        original = read_checkpoint(checkpoint, requested.model_copy(update=settings))
        check_dense(original.rules, original.tokenizer, spec.form)
        reward_names = original.rules.reward_names
        if len(spec.reward_names) != len(reward_names):
            raise ConversionError(
                f"{endpoint} serves the rewards {', '.join(spec.reward_names)}, the checkpoint has "
                f"{', '.join(reward_names)}: say with --reward which were served"
            )
        reference = reference_of(original, spec.form, max_batch_size=spec.max_batch_size)
        # A server is asked for scores alone.
        asked = [
            (case, request)
            for case, request in zip(reference.cases, reference.requests, strict=True)
            if not case.only_ids
        ]
        replies = server.score([request for _, request in asked], spec)
        compared = [case for case, _ in asked], replies, reference.expected, dtype
        report = compare(*compared)
        if report.ok:
            return report
        return compare(*compared, rounding=rounding_of_failures(*compared, lambda: original))
