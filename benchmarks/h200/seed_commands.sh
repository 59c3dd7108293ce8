#!/bin/sh
# The commands of the attention suite's own documentation, word for word but for `mlakit bench`.
#
#     benchmarks/h200/seed_commands.sh [FOLDER]     # on a GPU; PYTHON picks the interpreter
#
# Each leaves its record in FOLDER (default: seed-commands). One that fails does not keep the others from running.
# The exit code is the number of commands that failed; a command whose one backend cannot run here fails, and says why.
folder=${1:-seed-commands}
mkdir -p "$folder" && cd "$folder" || exit 1
failed=0
mlakit() {
    echo "== mlakit $*"
    "${PYTHON:-python3}" -m mlakit "$@" || failed=$((failed + 1))
}

# Quick start
mlakit bench --config configs/mla_decode.yaml
mlakit bench --config configs/mla_mixed_batch.yaml
mlakit bench --config configs/speculative_decode.yaml
mlakit bench --config configs/standard_attention.yaml
mlakit bench --config configs/reorder_threshold.yaml

mlakit bench \
    --backends flash flashinfer \
    --batch-specs "q2k" "8q1s1k" "2q2k_32q1s1k" \
    --output-csv results.csv

# Standard attention
mlakit bench \
    --backends flash triton flashinfer \
    --batch-specs "q2k" "8q1s1k" "2q2k_32q1s1k" \
    --num-layers 10 \
    --repeats 5 \
    --output-csv results.csv

# MLA backends
mlakit bench \
    --backends cutlass_mla flashinfer_mla flashattn_mla flashmla \
    --batch-specs "64q1s1k" "64q1s4k" \
    --output-csv mla_results.csv

# Parameter sweeps
mlakit bench \
    --backend cutlass_mla \
    --batch-specs "64q1s1k" "64q1s4k" "64q1s16k" \
    --sweep-param num_kv_splits \
    --sweep-values 1 2 4 8 16 \
    --output-json optimal_splits.json

mlakit bench \
    --backend flashmla \
    --batch-specs "q4s1k" "q8s2k" \
    --sweep-param reorder_batch_threshold \
    --sweep-values 1 4 16 64 256 512 \
    --output-csv threshold_sweep.csv

exit $failed
