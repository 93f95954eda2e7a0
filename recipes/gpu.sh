#!/usr/bin/env bash
# gpu.sh: does everything work on this GPU, and how fast? Ends with a table to paste into an issue.
#
#   bash recipes/gpu.sh                  # one CUDA GPU, about 10 minutes
#   PRESET=smoke bash recipes/gpu.sh     # the same steps at tiny sizes on a CPU: tests this script
#
# Images are drawn, and --bench takes random weights for FLUX's VAE and for LPIPS: nothing is downloaded.
# BATCH: images per step of paper-b at 128 px. A failing step is reported and the next one runs.
set -uo pipefail
cd "$(dirname "$0")/.."
PRESET=${PRESET:-gpu} OUT=${OUT:-runs/gpu-check} BATCH=${BATCH:-256}
if [ "$PRESET" != smoke ] && ! python -c "import torch; torch.zeros(1).cuda()" 2> /dev/null; then
    echo "error: no CUDA GPU here; PRESET=smoke runs the same steps at tiny sizes on a CPU" >&2
    exit 1
fi
rm -rf "$OUT" && mkdir -p "$OUT"

if [ "$PRESET" = smoke ]; then
    BATCH=8
    tiny="--device cpu --resolution 32 --size Nano --vae tiny --num-workers 0"
    train="--preset smoke $tiny" steps=6 fast="--dtype bfloat16 --no-compile"
    bench="$tiny --steps 1" bench_gpu="--batch-size 8" largest=16
    evaluate="--device cpu --n-train 64 --n-test 16"
    generate="--device cpu --steps 2 --n-train-images 32 --n-samples 8 --sampling-steps 2"
else
    train="--preset $PRESET --batch-size 256 --warmup 50 --log-every 5" steps=200 fast=
    bench= bench_gpu= largest=8192
    evaluate= generate="--size S --batch-size 1024 --lr 2e-4 --steps 200 --n-samples 128"
fi

run() {  # NAME COMMAND...: output to $OUT/NAME.log, status and seconds to the table
    local name=$1 start=$SECONDS status=ok
    shift
    echo "$name: $*"
    if ! "$@" > "$OUT/$name.log" 2>&1; then status="FAILED: $(tail -n 1 "$OUT/$name.log")"; fi
    echo "| $name | $status | $((SECONDS - start)) |" >> "$OUT/steps.md"
    [ "$status" = ok ]
}

largest_batch() {  # NAME FLAGS...: doubles the batch until memory runs out, which is no failure
    local name=$1 batch=$BATCH
    shift
    while [ "$batch" -le "$largest" ]; do
        echo "largest batch: $batch"
        python train.py "$@" $bench --bench --steps 1 --no-compile --batch-size "$batch" \
            > "$OUT/$name-batch-$batch.log" 2>&1 || break
        echo "$batch" > "$OUT/$name.largest"
        batch=$((2 * batch))
    done
}

# 1. The same 200 steps in fp32 without compilation, and with the defaults: bf16, compiled
run parity-fp32 python train.py $train --steps $steps --tau 0 --dtype float32 --no-compile --out "$OUT/fp32"
run parity-fast python train.py $train --steps $steps --tau 0 $fast --out "$OUT/fast"

# 2. Speed and memory
run bench-gpu python train.py --preset gpu $bench --bench $bench_gpu
run bench-paper-b-128px python train.py --preset paper-b $bench --bench --batch-size "$BATCH"
run bench-paper-b-256px-lpips python train.py --preset paper-b-finetune $bench --bench --batch-size $((BATCH / 4))
largest_batch bench-paper-b-128px --preset paper-b
run loader python data.py --data shapes --resolution 128 --out "$OUT/samples.png"

# 3. Evaluation and generation, from the run of step 1
run evaluate python eval_probe.py --ckpt "$OUT/fast" $evaluate
run generate python generate.py --ckpt "$OUT/fast" $generate

echo
python - "$OUT" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch

out = Path(sys.argv[1])
gpu = torch.cuda.is_available()
device = torch.cuda.get_device_name() if gpu else "CPU"
commits = [json.loads(path.read_text())["commit"] for path in out.glob("*/config.json")]
print(f"{device}, torch {torch.__version__}, commit {commits[0] if commits else 'unknown'}\n")
print("| step | status | seconds |\n|---|---|---|\n" + (out / "steps.md").read_text())

logs = {}
for name in ("fp32", "fast"):
    path = out / name / "log.jsonl"
    logs[name] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
print("| loss at step | fp32, eager | default | difference |\n|---|---|---|---|")
records = list(zip(logs["fp32"], logs["fast"]))
for a, b in records[:: -max(1, len(records) // 5)][::-1]:
    print(f"| {a['step']} | {a['loss']:.4f} | {b['loss']:.4f} | {b['loss'] / a['loss'] - 1:+.2%} |")

loader = (out / "loader.log").read_text()
print("\nloader, one process, drawn images at 128 px: " + loader.split("images, ")[-1].split("\n")[0])
print("\n| --bench | images/s | peak memory, GB | largest batch | MFU |")
print("|---|---|---|---|---|")
for name in ("bench-gpu", "bench-paper-b-128px", "bench-paper-b-256px-lpips"):
    lines = (out / f"{name}.log").read_text().splitlines()
    if not lines or not lines[-1].startswith("{"):
        continue
    r, largest = json.loads(lines[-1]), out / f"{name}.largest"
    print(f"| {name} | {r['images_per_s']:.1f} | {r['peak_memory_gb']:.2f} | "
          f"{largest.read_text().strip() if largest.exists() else ''} | {r['tflops'] / r['peak_tflops']:.0%} |")

print("\n| short run | |\n|---|---|")
for file, keys in (("metrics.json", ("linear_probe_top1", "i2t_r1", "psnr", "psnr_vae", "seconds")),
                   ("generate.json", ("class_accuracy", "fd", "seconds"))):
    path = out / "fast" / file
    result = json.loads(path.read_text()) if path.exists() else {}
    for key in keys:
        print(f"| {file} {key} | {result.get(key)} |")
PYTHON
if grep -q FAILED "$OUT/steps.md"; then exit 1; fi
