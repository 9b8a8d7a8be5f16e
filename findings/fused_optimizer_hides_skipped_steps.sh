#!/usr/bin/env bash
# With a fused optimizer accelerate says that no step was skipped where one was, and the learning rate moves on.
#
# Seen with accelerate 1.15.0 and torch 2.13.0 (CPU).
# Guess: after an overflow `step_was_skipped` is True and a prepared scheduler waits, whichever implementation of AdamW
#   is used: `fused=True` changes the speed and no result.
# Seen: accelerate takes a step for skipped if the gradient scaler has not called `optimizer.step`. For optimizers that
#   unscale by themselves, and fused ones do, the scaler always calls it, and their kernel leaves the weights alone if
#   it is told of an overflow. So `step_was_skipped` is False after a step that moved nothing and halved the scale, and
#   the schedule goes on: 0.1 becomes 0.05. Without `fused` it is True, and the rate stays. (The script makes the
#   wrappers that `prepare` makes for fp16 on a GPU by itself, with a scaler for the CPU.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4 accelerate==1.15.0
"$folder/venv/bin/python" - <<'PY'
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler

Accelerator(cpu=True)
seen = {}
for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
    for fused in (False, True):
        torch.manual_seed(0)
        module, scaler = torch.nn.Linear(4, 2), torch.amp.GradScaler("cpu", init_scale=1024.0)
        plain = kind(module.parameters(), lr=0.1, fused=fused)
        optimizer = AcceleratedOptimizer(plain, scaler=scaler)
        scheduler = AcceleratedScheduler(torch.optim.lr_scheduler.ExponentialLR(plain, 0.5), optimizer)
        for step, value in enumerate((float("inf"), 1.0)):
            before = module.weight.detach().clone()
            scaler.scale(module(torch.full((3, 4), value)).sum()).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            moved = not torch.equal(module.weight, before)
            rate = round(plain.param_groups[0]["lr"], 6)
            seen[kind.__name__, fused, step] = optimizer.step_was_skipped, moved, scaler.get_scale(), rate
for (name, fused, step), (skipped, moved, scale, rate) in seen.items():
    print(f"{name}, fused={fused}, {'finite' if step else 'overflow'}:", end=" ")
    print(f"step_was_skipped {skipped}, weights moved {moved}, scale {scale:.0f}, learning rate {rate}")
for (name, fused, step), result in seen.items():
    rates = (0.05, 0.025) if fused else (0.1, 0.05)
    expected = (step == 0 and not fused, step == 1, 512.0, rates[step])
    assert result == expected, (name, fused, step, result, expected)
print("as stated")
PY
