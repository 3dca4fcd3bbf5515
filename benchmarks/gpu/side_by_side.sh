#!/usr/bin/env bash
# Every check of first contact side by side, then what a decision takes: bash benchmarks/gpu/side_by_side.sh FOLDER [SECONDS]
# FOLDER gets a file for each part, which may take SECONDS (280). Needs some 16 cores; benchmarks/latency.py is not among them.
set -u
cd "$(dirname "$0")/../.."
folder=${1:?the folder for the results}
most=${2:-280}
mkdir -p "$folder"
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=3 PYTHONPATH=$PWD

part() { # NAME COMMAND...: its output into a file, and whether it ended well onto the screen
    local name=$1
    shift
    timeout "$most" "$@" > "$folder/$name.txt" 2>&1
    echo "$name: exit $?"
}

python=$(command -v python || command -v python3)
contact="$python benchmarks/gpu/first_contact.py"
for one in env kernels safety package cost "engine resnet18" "engine bert" "engine tnt" "engine vit-bf16"; do
    part "${one// /-}" $contact $one &
done
part tests "$python" -m pytest -q -m cuda tests &
wait
part decision "$python" benchmarks/decision.py --device cuda
grep -h -A99 -e "--- summary ---" "$folder"/*.txt
