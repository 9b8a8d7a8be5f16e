"""The report of the GPU suite as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.measuring import cell

_HOW = (
    "Tokens are sampled ones (SFT: all that are read). MFU is the arithmetic that a step needs, without "
    "padding and with a group's prompt read once, over time and the card's peak: the same numerator on "
    "every side. Peak is that of tensors on the GPU, weights and optimizer included. Idle is the share of "
    "the profiled step in which no kernel, copy or fill ran; on a CPU that in which no operator of torch's "
    "did, and peak is that of the process."
)


def markdown(report: Mapping[str, Any]) -> str:
    """All of it."""
    parts = [_head(report), _checks(report), _speed(report), _phases(report), _rest(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(report: Mapping[str, Any]) -> str:
    card = report.get("card", {})
    lines = ["# GPU suite", ""]
    if report["small"]:
        lines += ["**Tiny shapes: this tries the program, its figures say nothing of speed.**", ""]
    if not report.get("complete"):
        lines += ["**Not all parts have run: the suite was ended, or is still running.**", ""]
    lines.append(f"- `{report['command']}`, {report['date']}, {report['seconds']:.0f} s")
    memory = f", {card['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in card else ""
    driver = f", driver {report['driver']}" if report["driver"] else ""
    cuda = f", CUDA {card['cuda']}" if card.get("cuda") else ""
    lines.append(f"- card: {card.get('name', 'unknown')}{memory}{driver}{cuda}")
    if "peak_flops" in card:
        lines.append(f"- peak: {card['peak_flops'] / 1e12:g} TFLOP/s in bfloat16 ({card['peak_source']})")
    else:
        lines.append(
            "- peak: unknown for this device, so MFU is left out; TFLOP/s are those of the arithmetic needed"
        )
    machine = report["machine"]
    lines.append(f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['platform']}")
    lines.append("- " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    return "\n".join(lines)


def _checks(report: Mapping[str, Any]) -> str:
    if not report["checks"]:
        return ""
    lines = ["## Checks", "", "| check | result | figures |", "|---|---|---|"]
    for name, found in report["checks"].items():
        for line in found.get("lines", ()):
            lines.append(f"| {line['name']} | {line['result']} | {_figures(line['figures'])} |")
        if "error" in found:
            lines.append(f"| {name} | failed | {_plain(found['error'])} |")
        elif found.get("cut_off"):
            lines.append(f"| {name} | cut off | after {found['seconds']:.0f} s the time was over |")
    return "\n".join(lines)


def _figures(figures: Mapping[str, Any]) -> str:
    told = []
    for name, value in figures.items():
        if name.endswith(" at most"):
            continue
        bound = figures.get(f"{name} at most")
        shown = f"{value:.3g}" if isinstance(value, float) else _plain(str(value))
        told.append(f"{name} {shown}" + ("" if bound is None else f" (at most {bound:g})"))
    return ", ".join(told)


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _timed(report: Mapping[str, Any]) -> list[tuple[str, str, str, Mapping[str, Any]]]:
    """Shape, algorithm, side and figures, those of one step together."""
    rows = [(*reversed(name.split("-")), found) for name, found in report["speed"].items()]
    order = [(shape, algorithm) for shape, algorithm, _, _ in rows]
    return sorted(rows, key=lambda row: order.index((row[0], row[1])))


def _speed(report: Mapping[str, Any]) -> str:
    rows = _timed(report)
    if not rows:
        return ""
    peak = report.get("card", {}).get("peak_flops")
    used = "TFLOP/s" if peak is None else "MFU"
    lines = ["## Steps", "", _HOW, ""]
    lines.append(f"| shape | step | side | step, s | tokens/s | over plain | {used} | peak, GiB | idle |")
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for shape, algorithm, side, found in rows:
        head = f"| {shape} | {algorithm} | {side} |"
        if "step_s" not in found:
            lines.append(f"{head} {_why(found)} | | | | | |")
            continue
        plain = report["speed"].get(f"plain-{algorithm}-{shape}", {}).get("tokens_per_s")
        over = "" if plain is None else f"{found['tokens_per_s'] / plain:.2f}"
        flops = found["flops_per_s"]
        share = f"{flops / 1e12:.3g}" if peak is None else f"{flops / peak:.1%}"
        idle = _share(found["profiled"]["idle_share"]) if "profiled" in found else _why(found)
        speed = f"{cell(found['step_s'], 3)} | {found['tokens_per_s']:.0f} | {over}"
        lines.append(f"{head} {speed} | {share} | {found['peak_bytes'] / 2**30:.2f} | {idle} |")
    return "\n".join(lines)


def _share(share: float | None) -> str:
    return "nothing seen" if share is None else f"{share:.0%}"


def _why(found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"failed: {_plain(found['error'])}"
    return "cut off: the time was over" if found.get("cut_off") else ""


def _phases(report: Mapping[str, Any]) -> str:
    lines = [
        "## Phases",
        "",
        "Seconds are those of the profiled step, which waits for the GPU after each phase.",
        "",
    ]
    lines += ["| shape | step | side | phase | s | share | idle | launches | what took longest |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    count = len(lines)
    for shape, algorithm, side, found in _timed(report):
        whole = found.get("profiled", {}).get("seconds")
        for name, phase in found.get("phases", {}).items():
            head = f"| {shape} | {algorithm} | {side} | {name} | {phase['seconds']:.3f}"
            figures = f"{phase['seconds'] / whole:.0%} | {_share(phase['idle_share'])} | {phase['launches']}"
            lines.append(f"{head} | {figures} | {'; '.join(_kernels(phase['top'][:3]))} |")
    return "\n".join(lines) if len(lines) > count else ""


def _kernels(top: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in top:
        name = _plain(each["name"])
        yield f"`{name if len(name) <= 60 else name[:57] + '...'}` {each['share']:.0%} ({each['calls']})"


def _rest(report: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {why}" for name, why in report["not_run"].items()]
    for name, left in report["left_out"].items():
        lines.append(
            f"- {name}: left out; it would have needed about {left['needs_s']:.0f} s (a guess), and "
            f"{left['left_s']:.0f} s of {report['budget_s']:.0f} were left"
        )
    return "\n".join(["## Not run", "", *lines]) if lines else ""
