"""From a verifier's name in a configuration to the verifier."""

from __future__ import annotations

from typing import Any, get_args

from conch.config import GSM8KConfig, IFEvalConfig, VerifierName
from conch.errors import ConfigError
from conch.rewards.verifiers.base import Verifier


def named_verifier(name: str, gsm8k: GSM8KConfig, ifeval: IFEvalConfig) -> Verifier[Any]:
    """Make the verifier of this name with its settings.

    Raises:
        ConfigError: there is none of that name, or a package that it needs is not installed.
    """
    # Only a run with a verifier needs its libraries.
    if name == "gsm8k":
        from conch.rewards.verifiers.gsm8k import GSM8K

        return GSM8K(gsm8k)
    if name == "ifeval":
        from conch.rewards.verifiers.ifeval.verifier import IFEval

        return IFEval(ifeval)
    raise ConfigError(f"there is no verifier `{name}`; there are {', '.join(get_args(VerifierName))}")
