"""The GRPO example's plan of devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from conch.errors import ConfigError
from examples.grpo.devices import DevicePlan, Wish, plan_devices

SECTIONS = {"train": "train_model", "infer": "inference_model", "ref": "ref_model"}


def plan(
    num_gpus: int = 8, *, has_reference: bool = True, overlaps: bool = False, **asked: Any
) -> DevicePlan:
    """A plan of wishes by short names: a number, a list, or both."""
    wishes: dict[str, Wish] = {}
    for name, value in asked.items():
        number, devices = value if isinstance(value, tuple) else (value, None)
        if isinstance(value, list):
            number, devices = None, value
        wishes[SECTIONS[name]] = Wish(number, devices)
    return plan_devices(wishes, has_reference=has_reference, num_gpus=num_gpus, overlaps=overlaps)


@pytest.mark.parametrize(
    ("asked", "num_gpus", "train", "inference", "reference"),
    [
        # in the order training, sampling, reference
        ({"train": 2, "infer": 2, "ref": 2}, 6, (0, 1), (2, 3), (4, 5)),
        ({"ref": 2, "infer": 1, "train": 3}, 8, (0, 1, 2), (3,), (4, 5)),
        # by hand
        ({"train": [0, 1], "infer": [4, 5], "ref": [2, 3]}, 6, (0, 1), (4, 5), (2, 3)),
        ({"train": [3], "infer": [0]}, 4, (3,), (0,), ()),
        # numbers take what no hand has taken
        ({"train": 2, "infer": [0]}, 4, (1, 2), (0,), ()),
        ({"train": [1], "infer": 2, "ref": 1}, 4, (1,), (0, 2), (3,)),
        # a number that says the same as the list
        ({"train": (2, [2, 3])}, 4, (2, 3), (), ()),
        # who asks for none works where the model is trained, and training takes one
        ({"infer": 1}, 2, (0,), (1,), ()),
        ({"ref": 1}, 2, (0,), (), (1,)),
        ({"train": 4}, 4, (0, 1, 2, 3), (), ()),
        # simulated: as many as are asked for
        ({"train": 2, "infer": 2, "ref": 2}, 0, (0, 1), (2, 3), (4, 5)),
        ({"train": [7], "infer": 1}, 0, (7,), (0,), ()),
    ],
)
def test_devices_are_disjoint_and_in_order(
    asked: Mapping[str, Any],
    num_gpus: int,
    train: tuple[int, ...],
    inference: tuple[int, ...],
    reference: tuple[int, ...],
) -> None:
    made = plan(num_gpus, **asked)
    assert (made.train, made.inference, made.reference) == (train, inference, reference)
    assert made.apart and made.on_gpus == (num_gpus > 0)


@pytest.mark.parametrize(
    ("asked", "num_gpus", "message"),
    [
        (
            {"train": 2, "infer": 2, "ref": 2},
            4,
            r"2 \(train_model\) \+ 2 \(inference_model\) \+ 2 \(ref_model\) = 6 devices are asked for, "
            r"and there are 4: ask for 2 fewer",
        ),
        (
            {"infer": 1},
            1,
            r"1 \(train_model\) \+ 1 \(inference_model\) = 2 devices .* there is 1: ask for 1 fewer",
        ),
        ({"train": [0, 1], "infer": [1]}, 4, r"device 1 is taken twice, also by `train_model.devices`"),
        ({"train": [0, 0]}, 4, r"device 0 is taken twice, also by itself"),
        ({"train": [0, 4]}, 4, r"`train_model.devices` = \[0, 4\]: there is no device 4, they are 0 to 3"),
        ({"train": [-1]}, 0, r"there is no device -1, they are 0, 1, 2"),
        ({"train": []}, 4, r"`train_model.devices` = \[\] names no device"),
        ({"infer": (1, [2, 3])}, 4, r"names 2 devices, but `inference_model.num_devices` = 1: give one"),
        ({"train": [0, 1], "infer": 3}, 4, r"2 \(train_model\) \+ 3 \(inference_model\) = 5"),
    ],
)
def test_conflicts_are_one_sentence_with_the_arithmetic(
    asked: Mapping[str, Any], num_gpus: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        plan(num_gpus, **asked)
    assert "\n" not in str(raised.value)


def test_nothing_asked_is_one_process() -> None:
    for num_gpus in (0, 1, 8):
        made = plan(num_gpus)
        assert (made.train, made.inference, made.reference, made.apart) == ((0,), (), (), False)
    assert "the CPU, in this process" in "\n".join(plan(0).lines())
    assert "GPU 0, in this process" in "\n".join(plan(8).lines())


def test_a_reference_without_a_kl_takes_no_device() -> None:
    made = plan(2, has_reference=False, train=1, infer=1, ref=4)
    assert made.reference == ()
    assert "the reference none: policy.kl_coef is 0" in "\n".join(made.lines())


def test_simulated_devices_say_so() -> None:
    shown = "\n".join(plan(0, train=2, infer=1, ref=1).lines())
    assert "training      simulated devices 0, 1" in shown
    assert "sampling      simulated device 2" in shown
    assert "no GPU here: the 4 devices are simulated by processes on the CPU" in shown
    assert "simulated" not in "\n".join(plan(4, train=2, infer=1, ref=1).lines())


# ------------------------------------------------------------------------- sampling that goes on meanwhile


@pytest.mark.parametrize(
    ("asked", "num_gpus", "train", "inference", "reference"),
    [
        ({}, 8, (0,), (1,), ()),
        ({}, 0, (0,), (1,), ()),
        ({"train": 2}, 4, (0, 1), (2,), ()),
        ({"train": [0, 1]}, 4, (0, 1), (2,), ()),
        ({"ref": 1}, 4, (0,), (1,), (2,)),
        ({"infer": 3}, 4, (0,), (1, 2, 3), ()),
        ({"infer": [0]}, 2, (1,), (0,), ()),
        ({"train": 2, "infer": 2, "ref": 2}, 6, (0, 1), (2, 3), (4, 5)),
    ],
)
def test_sampling_meanwhile_has_a_device_of_its_own(
    asked: Mapping[str, Any],
    num_gpus: int,
    train: tuple[int, ...],
    inference: tuple[int, ...],
    reference: tuple[int, ...],
) -> None:
    made = plan(num_gpus, overlaps=True, **asked)
    assert (made.train, made.inference, made.reference) == (train, inference, reference)
    assert made.apart


@pytest.mark.parametrize(
    ("asked", "num_gpus", "message"),
    [
        ({}, 1, r"there is 1 GPU, and sampling while the model is trained takes another: run `grpo.py`"),
        ({"train": 1}, 1, r"there is 1 GPU"),
        ({"train": 4}, 4, r"4 \(train_model\) \+ 1 \(inference_model\) = 5 devices are asked for"),
        ({"train": [0], "infer": [0]}, 2, r"device 0 is taken twice, also by `train_model.devices`"),
    ],
)
def test_sampling_meanwhile_shares_no_device(asked: Mapping[str, Any], num_gpus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        plan(num_gpus, overlaps=True, **asked)
    assert "\n" not in str(raised.value)
