"""Which devices train, sample and hold the reference.

`num_devices` allots devices that nobody else has, to training first, then to sampling, then to the reference;
`devices` names them by hand. Who is given none works where the model is trained, except for sampling that
goes on meanwhile: it takes a device of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conch.errors import ConfigError

ROLES: Mapping[str, str] = {
    "train_model": "training",
    "inference_model": "sampling",
    "ref_model": "the reference",
}
"""Section -> what its devices do, in the order in which they are allotted."""


@dataclass(frozen=True)
class Wish:
    """What a section asks for; None for what it does not name."""

    num_devices: int | None = None
    devices: Sequence[int] | None = None

    @property
    def count(self) -> int:
        """Devices asked for."""
        return self.num_devices or len(self.devices or ())


@dataclass(frozen=True)
class DevicePlan:
    """Who computes where. A device is its number among those that this program may use.

    train: devices to train on, a process each.
    inference, reference: devices of their own; empty where the training processes do that as well.
    has_reference: False where the run keeps no reference.
    on_gpus: False where devices are simulated by processes on the CPU.
    apart: False where all happens in this very process.
    """

    train: tuple[int, ...]
    inference: tuple[int, ...]
    reference: tuple[int, ...]
    has_reference: bool
    on_gpus: bool
    apart: bool

    def lines(self) -> list[str]:
        """What to print before anything is loaded."""
        kind = "GPU" if self.on_gpus else "simulated device"
        own = {"train_model": self.train, "inference_model": self.inference, "ref_model": self.reference}
        rows = []
        for section, task in ROLES.items():
            numbers = ", ".join(map(str, own[section]))
            where = (
                f"{kind}{'s' * (len(own[section]) > 1)} {numbers}"
                if numbers
                else "where the model is trained"
            )
            if section == "ref_model" and not self.has_reference:
                where = "none: policy.kl_coef is 0"
            elif section == "train_model" and not self.apart:
                where = ("GPU 0" if self.on_gpus else "the CPU") + ", in this process"
            rows.append(f"  {task:14}{where}")
        if self.apart and not self.on_gpus:
            total = len(self.train) + len(self.inference) + len(self.reference)
            rows.append(f"  no GPU here: the {total} devices are simulated by processes on the CPU")
        return ["devices", *rows]


def plan_devices(
    wishes: Mapping[str, Wish], *, has_reference: bool, num_gpus: int, overlaps: bool = False
) -> DevicePlan:
    """Allot devices.

    wishes: section -> what it asks for.
    has_reference: False leaves the reference out, whatever it asks for.
    num_gpus: GPUs that this program may use; with 0, devices are simulated, as many as are asked for.
    overlaps: sampling goes on while the model is trained, and takes one device where it asks for none.

    Raises:
        ConfigError: a device is asked for twice, or there are too few; with the arithmetic.
    """
    asked = {section: wishes.get(section, Wish()) for section in ROLES}
    if not has_reference:
        asked["ref_model"] = Wish()
    if overlaps and not asked["inference_model"].count:
        if num_gpus == 1:
            raise ConfigError(
                "there is 1 GPU, and sampling while the model is trained takes another: run `grpo.py`, where "
                "both take turns on one, or make more visible (CUDA_VISIBLE_DEVICES)"
            )
        asked["inference_model"] = Wish(num_devices=1)
    named = _named_by_hand(asked, num_gpus)
    if not overlaps and not any(wish.count for wish in asked.values()):
        return DevicePlan((0,), (), (), has_reference, num_gpus > 0, apart=False)
    if not asked["train_model"].count:
        asked["train_model"] = Wish(num_devices=1)
    _check_number(asked, num_gpus)
    taken = {device for devices in named.values() for device in devices}
    most = num_gpus or sum(wish.count for wish in asked.values()) + len(taken)
    free = [device for device in range(most) if device not in taken]
    allotted: dict[str, tuple[int, ...]] = {}
    for section, wish in asked.items():
        count = 0 if section in named else wish.count
        allotted[section], free = named.get(section, tuple(free[:count])), free[count:]
    return DevicePlan(
        allotted["train_model"],
        allotted["inference_model"],
        allotted["ref_model"],
        has_reference,
        num_gpus > 0,
        apart=True,
    )


def _named_by_hand(asked: Mapping[str, Wish], num_gpus: int) -> dict[str, tuple[int, ...]]:
    """Section -> devices that it names, each once and each there."""
    named: dict[str, tuple[int, ...]] = {}
    holders: dict[int, str] = {}
    for section, wish in asked.items():
        if wish.devices is None:
            continue
        setting = f"`{section}.devices` = {list(wish.devices)}"
        if not wish.devices:
            raise ConfigError(f"{setting} names no device: leave it out, or name some")
        if wish.num_devices is not None and wish.num_devices != len(wish.devices):
            raise ConfigError(
                f"{setting} names {len(wish.devices)} devices, but `{section}.num_devices` = "
                f"{wish.num_devices}: give one of them"
            )
        for device in wish.devices:
            if device < 0 or (num_gpus and device >= num_gpus):
                there = f"0 to {num_gpus - 1}" if num_gpus else "0, 1, 2, ..."
                raise ConfigError(f"{setting}: there is no device {device}, they are {there}")
            if device in holders:
                other = "itself" if holders[device] == section else f"`{holders[device]}.devices`"
                raise ConfigError(f"{setting}: device {device} is taken twice, also by {other}")
            holders[device] = section
        named[section] = tuple(wish.devices)
    return named


def _check_number(asked: Mapping[str, Wish], num_gpus: int) -> None:
    wanted = [(section, wish.count) for section, wish in asked.items() if wish.count]
    total = sum(count for _, count in wanted)
    if not num_gpus or total <= num_gpus:
        return
    arithmetic = " + ".join(f"{count} ({section})" for section, count in wanted)
    raise ConfigError(
        f"{arithmetic} = {total} devices are asked for, and there {'is' if num_gpus == 1 else 'are'} "
        f"{num_gpus}: ask for {total - num_gpus} fewer, or make more visible (CUDA_VISIBLE_DEVICES)"
    )
