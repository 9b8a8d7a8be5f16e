#!/usr/bin/env bash
# Of several samples a prompt `gather_for_metrics` drops most of the last batch, on one process too.
#
# Seen with accelerate 1.15.0 and torch 2.13.0 (CPU, one process and two).
# Guess: it gathers, and drops what a loader added to make its last batch even; on one process nothing is added, so
#   what comes out is what went in, be it four samples for each prompt or the results of a whole evaluation.
# Seen: in the last batch of the loader that is being read, whatever is gathered is cut to as many rows as that batch,
#   over all processes, has rows of the data set, unless it is full. Of 13 prompts with 4 samples each, in batches of
#   4, 49 of the 52 rewards come out on one process, 37 on two; of texts as many. A loader that is through no longer
#   counts, but the one around it does: 16 rewards of an evaluation whose own loop is over come out whole inside the
#   first steps of training, and 2 of them inside the epoch's last step, for which 2 examples were left. There is no
#   warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==1.26.4 accelerate==1.15.0
cat > "$folder/check.py" <<'PY'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

SAMPLES = 4
accelerator = Accelerator(cpu=True)
num_processes = accelerator.num_processes


def loader(num_rows, batch_size):
    return accelerator.prepare(DataLoader(range(num_rows), batch_size=batch_size))


def count_samples(num_prompts, batch_size):
    """Rows that come out: of prompts, of rewards of their samples, of texts of their samples."""
    counts = [0, 0, 0]
    for prompts in loader(num_prompts, batch_size):
        rewards = prompts.repeat_interleave(SAMPLES)
        texts = [f"answer to {prompt}" for prompt in rewards.tolist()]
        for place, rows in enumerate((prompts, rewards, texts)):
            counts[place] += len(accelerator.gather_for_metrics(rows))
    return counts


def count_after_evaluation():
    """Of 16 prompts, what an evaluation within each training step gathers once its own loop is over."""
    counts = []
    for _ in loader(10, 4 // num_processes):
        rewards = torch.cat(list(loader(16, 4 // num_processes)))
        counts.append(len(accelerator.gather_for_metrics(rewards)))
    return counts


uneven, even, inside = count_samples(13, 4), count_samples(16, 4), count_after_evaluation()
if accelerator.is_main_process:
    print(f"{num_processes} process(es): of 13 prompts and {13 * SAMPLES} samples {uneven} come out,", end=" ")
    print(f"of 16 prompts and {16 * SAMPLES} samples {even}; of 16 rewards inside steps of training {inside}")
# One process: batches of 4, 4, 4 and 1 prompts. Two: of 8 and 5, which three copies make 8.
last, last_size = (1, 1) if num_processes == 1 else (5, 8)
assert uneven == [13, (13 - last) * SAMPLES + last, (13 - last) * SAMPLES + last], uneven
assert even == [16, 16 * SAMPLES, 16 * SAMPLES], even
assert inside == [16, 16, 2], inside
accelerator.end_training()
PY
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true
"$folder/venv/bin/python" "$folder/check.py"
"$folder/venv/bin/torchrun" --standalone --nproc_per_node 2 "$folder/check.py"
echo "as stated"
