#!/usr/bin/env bash
# claims.sh: trains and evaluates every row of the claims table (RESULTS.md) over seeds 0 to 2.
#
#   bash recipes/claims.sh
#   OUT=runs/fashion bash recipes/claims.sh --data path/to/folder --min-crop-scale 0.8 --flip
#
# Arguments are flags of train.py for all rows. After an interruption run the same command again:
# what is finished is skipped, an interrupted training resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/claims} SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-450} EVAL_ARGS=${EVAL_ARGS:---n-test 2000}

row() {  # ROW [flags of train.py]: trains and evaluates $OUT/ROW-$seed
    local run=$OUT/$1-$seed resume=
    shift
    if [ -e "$run/config.json" ]; then resume=--resume; fi
    python train.py --steps "$STEPS" "$@" --seed "$seed" --out "$run" $resume
    if [ ! "$run/metrics.json" -nt "$run/last.pt" ]; then python eval_probe.py --ckpt "$run" $EVAL_ARGS; fi
}

for seed in $SEEDS; do
    row joint "$@"
    row reconstruction "$@" --w-und 0
    row understanding "$@" --w-rec 0
    row decoder "$@" --steps $((STEPS / 2)) --w-und 0 --freeze-encoder --init-from "$OUT/understanding-$seed"
    row pixels "$@" --vae pixels
    baseline=$OUT/random-$seed
    if [ ! -e "$baseline/metrics.json" ]; then
        python eval_probe.py --ckpt "$OUT/joint-$seed" --random-init $EVAL_ARGS
        mkdir -p "$baseline"
        cp "$OUT/joint-$seed/metrics_random.json" "$baseline/metrics.json"
    fi
done
for name in random reconstruction understanding decoder pixels joint; do
    python eval_probe.py --compare "$OUT/$name"-*
done
