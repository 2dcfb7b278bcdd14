#!/usr/bin/env bash
# The GPU rows of docs/performance.md, in one call of some eight minutes: the step of transformers'
# Llama under torch, then ours. Needs torch with CUDA beside the project's own packages.
#
#   tests/beside_gpu.sh [DIRECTORY]     what each row printed goes there; default gpu
set -uo pipefail
into=$(mkdir -p "${1:-gpu}" && cd "${1:-gpu}" && pwd)
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}

row() { # SECONDS NAME COMMAND...: one row; the next one comes whatever becomes of it
  local limit=$1 name=$2 from=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$into/$name.txt" 2>&1
  printf '\n== %s: exit %s after %s s\n' "$name" $? $((SECONDS - from))
  tail -n 12 "$into/$name.txt"
}
ours() { # NAME FLAGS...: eight steps of two towers in bfloat16, every token of every row real
  row 160 "$1" "$python" -m cosup_jax.main --mode=preflight --steps=8 --config=configs/base.py \
    --workdir="$into/$1" --config.{gen,ctx}.arch.dtype=bfloat16 \
    --config.{gen,ctx}.arch.scan_unroll=1 --config.data.{max_ctx_tokens=128,passage_slots=8,vocab_size=32000} \
    "${@:2}"
}
rows() { echo "--config.batch_size=$1 --config.data.ctx_rows=$1"; }
of_1024="--config.data.max_gen_tokens=1024 --config.data.ctx_row_tokens=1024"
large="$of_1024 --config.gen.arch.layers=16 --config.gen.arch.width=2048
  --config.gen.arch.mlp_width=5632"
heads_of_64="--config.gen.arch.heads=32 --config.gen.arch.kv_heads=32 --config.gen.arch.head_dim=64"
heads_of_128="--config.gen.arch.heads=16 --config.gen.arch.kv_heads=16
  --config.gen.arch.head_dim=128"
small="$of_1024 --config.gen.arch.layers=30 --config.gen.arch.width=576 --config.gen.arch.heads=9
  --config.gen.arch.kv_heads=3 --config.gen.arch.head_dim=64 --config.gen.arch.mlp_width=1536"

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" -c 'import jax, torch, transformers as t; print(jax.__version__, torch.__version__, t.__version__)'
# shellcheck disable=SC2046,SC2086 # several flags each
{
  row 90 theirs "$python" tests/beside_transformers.py
  row 90 theirs_heads_of_128 "$python" tests/beside_transformers.py 16 2048 5632 16 16
  ours rows_8 $large $heads_of_64 $(rows 8)
  ours heads_of_128 $large $heads_of_128 $(rows 16)
  ours small $small $(rows 32)
  ours small_passage_bank $small $(rows 32) --config.bank.{kind=passage,size=65536}
  ours small_dual_bank $small $(rows 32) --config.bank.{kind=dual,size=65536,queries=4096}
  ours heads_of_128_dots $large $heads_of_128 $(rows 16) --config.{gen,ctx}.arch.remat=dots
  ours heads_of_128_unrolled $large $heads_of_128 $(rows 16) --config.{gen,ctx}.arch.scan_unroll=16
}
