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

baseline() {  # ROW FILE CKPT [flags of eval_probe.py]: keeps FILE, which that writes, as ROW's metrics
    local to=$OUT/$1 from=$2
    shift 2
    if [ -e "$to/metrics.json" ]; then return; fi
    python eval_probe.py --ckpt "$@" $EVAL_ARGS
    mkdir -p "$to"
    cp "$from" "$to/metrics.json"
}

setting() {  # NAME: a setting of the joint run
    python -c "import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])" "$OUT/joint-$seed/config.json" "$1"
}

for seed in $SEEDS; do
    row joint "$@"
    row reconstruction "$@" --w-und 0
    row understanding "$@" --w-rec 0
    row decoder "$@" --steps $((STEPS / 2)) --w-und 0 --freeze-encoder --init-from "$OUT/understanding-$seed"
    row pixels "$@" --vae pixels
    baseline "random-$seed" "$OUT/joint-$seed/metrics_random.json" "$OUT/joint-$seed" --random-init
    data=$(setting data) file=metrics.json
    if [ "$data" != shapes ]; then file=metrics_$(basename "$data").json; fi  # see metrics_path
    baseline latents "runs/latents/$file" latents --vae "$(setting vae)" --data "$data" \
        --resolution "$(setting resolution)"
done
python eval_probe.py --compare "$OUT"/random-* "$OUT"/latents "$OUT"/reconstruction-* "$OUT"/understanding-* \
    "$OUT"/decoder-* "$OUT"/pixels-* "$OUT"/joint-*
