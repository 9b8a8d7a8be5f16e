#!/usr/bin/env bash
# The whole of Helpful & Harmless on two CPU processes: DeepSpeed ZeRO-2 in bf16, the bundled Triton, a real file.
#   ./smoke.sh harmless-base.jsonl.gz [folder]      (or HH_DATA=... ./smoke.sh)
# SFT -> reward model -> to_triton -> Triton -> PPO, ILQL and SFT, measured by the same served reward; then a table.
# Leaves with code 1, and a sentence for each, where figures fall short of what the table promises. STEPS=0.1 takes a
# tenth of all steps, to see that it runs; its figures fall short.
set -euo pipefail

data=${1:-${HH_DATA:-}}
[[ -n $data ]] || { echo "usage: smoke.sh DATA.jsonl[.gz] [FOLDER]" >&2; exit 2; }
data=$(realpath "$data")
out=$(realpath -m "${2:-outputs/hh/smoke}")
[[ ! -e $out/sft ]] || { echo "error: $out holds former runs: delete it, or name another folder" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")"

export CONFIG_NAME=tiny DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
unset TRITON_HOST
share=${STEPS:-1}
python=${PYTHON:-python}
# Port 0 takes a free one: the usual one may be another run's.
launch=("$python" -m accelerate.commands.launch --num_processes 2 --main_process_port 0
	--config_file ../../configs/accelerate/zero2-bf16.yaml)

steps() { # the given number of steps, or a share of them
	"$python" -c "import sys; print(max(2, round(int(sys.argv[1]) * float(sys.argv[2]))))" "$1" "$share"
}

phase() { # name, script, steps, overrides...
	local name=$1 script=$2 count
	count=$(steps "$3")
	shift 3
	echo "== $name: $count steps ($(date +%T))"
	"${launch[@]}" "$script" data.train="$data" train.num_processes=2 train.run_dir="$out/$name" \
		train.total_steps="$count" train.eval_every="$count" "$@"
}

mkdir -p "$out"
policy=$out/sft
phase sft sft_hh.py 300 measure_reward=false
phase reward_model train_reward_hh.py 49 model.path="$policy"

echo "== to_triton ($(date +%T))"
"$python" to_triton.py --checkpoint "$out/reward_model" --name hh-tiny --model_store "$out/model_store" \
	--instance_kind cpu --quiet

# Each of these hosts the reward model by itself, as no TRITON_HOST is set.
hosted=(hosted.model_store="$out/model_store" model.path="$policy")
phase ppo ppo_hh.py 20 "${hosted[@]}"
phase ilql ilql_hh.py 60 "${hosted[@]}"
phase sft_more sft_hh.py 30 "${hosted[@]}" model.architecture=null

times >"$out/times.txt" # the second line: user and system time of all that was started here
echo "== took $SECONDS s, CPU time $(tail -n 1 "$out/times.txt")"
"$python" smoke_table.py "$data" "$out"
