#!/usr/bin/env bash
# The numbers of docs/gpu.md that only a GPU can give, on one GPU, in an evening:
#     bash docs/gpu.sh [FOLDER OF X-RAYS]       results in $OUT (default runs/gpu), a summary in $OUT/summary.txt
#     SMALL=1 bash docs/gpu.sh                  the same script at reduced size, in minutes, also on a CPU
# Nothing is downloaded: all nets have random weights of the public sizes, all images but FOLDER's are phantoms.
set -euo pipefail
cd "$(dirname "$0")/.."
export SMALL=${SMALL:-0} OUT=${OUT:-runs/gpu} PYTHONPATH=$PWD
XRAYS=${1:-phantom}
[ ! -e "$OUT" ] || { echo "$OUT is there already: remove it, or name another by OUT=…"; exit 1; }
mkdir -p "$OUT"
say() { printf '\n== %s\n' "$*" | tee -a "$OUT/summary.txt"; }
keep() { tee -a "$OUT/summary.txt"; }
failed() { echo "FAILED: $(tail -1 "$OUT/err.txt" | cut -c1-200)" | keep; }  # and the script goes on with the next part

say "machine"
python - <<'P' | keep
import os, torch
print("torch", torch.__version__, "cores", os.cpu_count(), "SMALL", os.environ["SMALL"])
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no CUDA device: nothing below is a GPU's number")
P

# 1. Every part of the work, eager and compiled, at several micro-batches; what does not fit says so.
if [ "$SMALL" = 1 ]; then presets="tiny"; micros="2 4"; dtype=fp32; else presets="paper paper-v2 mini"; micros="16 32 64 128"; dtype=bf16; fi
for preset in $presets; do for micro in $micros; do for how in --no-compile --compile; do
    say "bench $preset, $micro images a pass, $how"
    python dinodiff.py bench --preset $preset --micro-batch $micro --dtype $dtype $how 2>"$OUT/bench.txt" | keep \
        || { grep -m1 -i "out of memory" "$OUT/bench.txt" || tail -1 "$OUT/bench.txt"; } | cut -c1-200 | keep
done; done; done

# 2. 200 steps of preset paper on phantoms of 512 px, online and from views. Nets that lie in RUN/vae and RUN/vit are taken as they are.
cat > "$OUT/full.py" <<'P'
"""full.py RUN VIEWS VIT: train the preset at full size with random VAE and DINO; print rate and memory."""
import dataclasses, json, os, statistics, sys
from pathlib import Path
import torch
import dinodiff
from vae import VAE
from vit import ViT, ViTConfig

def main():
    folder, views, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    v1, v2 = ViTConfig(), ViTConfig("timm", 518, 14, registers=4, layer_scale=True, cls_position=False)
    preset = dataclasses.replace(dinodiff.PAPER if kind == "v1" else dinodiff.PAPER_V2, batch=128, steps=200, checkpoint_every=100)
    if os.environ["SMALL"] == "1":
        v1 = v2 = dinodiff.TINY.vit_config
        preset = dataclasses.replace(dinodiff.TINY, steps=20, batch=4, micro_batch=2, checkpoint_every=10, workers=1,
                                     optimizer="adam8bit")
    preset = dataclasses.replace(preset, vae="", vit="", data="phantom", run_dir=str(folder), warmup=20, sample_every=10**6, views=views)
    torch.manual_seed(0)
    for name, net in (("vae", VAE(preset.vae_config)), ("vit", ViT(v1 if kind == "v1" else v2))):
        if not (folder / name).is_dir():
            net.save_pretrained(folder / name)
    dinodiff.train(preset)
    if os.environ.get("RANK", "0") != "0":
        return
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    rate = statistics.median(row["images_per_s"] for row in rows[len(rows) // 2:])
    tflop = 2.40 + (0 if views else 1.12 + (0.035 if kind == "v1" else 0.304))
    print(f"{folder.name}: {rate:.1f} images/s, median of the last {len(rows) - len(rows) // 2} steps")
    if os.environ["SMALL"] != "1":
        print(f"{folder.name}: {rate * tflop:.0f} TFLOP/s of counted work")
    if torch.cuda.is_available():
        print(f"{folder.name}: largest memory in use {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")

if __name__ == "__main__":
    main()
P
for run in "online 0 v1" "views 1 v1" "online-v2 0 v2"; do
    set -- $run
    say "train at full size: $1"
    python "$OUT/full.py" "$OUT/$1" "$2" "$3" 2>>"$OUT/err.txt" | grep -vE "^(next|UNet)" | keep || failed
done

# 3. Kill and resume: the same run, killed once it has its first checkpoint, ends in the same weights (on a GPU to rounding).
say "killed and resumed against uninterrupted"
mkdir -p "$OUT/killed"; cp -r "$OUT/views/vae" "$OUT/views/vit" "$OUT/killed/" || failed
python "$OUT/full.py" "$OUT/killed" 1 v1 >"$OUT/killed.txt" 2>&1 & victim=$!
until ls "$OUT"/killed/checkpoints/step-*/progress.json >/dev/null 2>&1 || ! kill -0 $victim 2>/dev/null; do sleep 1; done
kill -9 $victim 2>/dev/null || true; wait $victim 2>/dev/null || true
python "$OUT/full.py" "$OUT/killed" 1 v1 2>>"$OUT/err.txt" | grep -v "^next" | keep || failed
cat > "$OUT/compare.py" <<'P'
import os, dinodiff
from data import load_tensors
ends = []
for name in ("views", "killed"):
    folder = os.path.join(os.environ["OUT"], name)
    place = dinodiff.checkpoint_folder(folder, dinodiff.checkpoint_steps(folder)[-1])
    ends.append(load_tensors(place / "unet" / "diffusion_pytorch_model.safetensors"))
far = sum((ends[0][k] - ends[1][k]).double().square().sum() for k in ends[0]) ** 0.5
size = sum(ends[0][k].double().square().sum() for k in ends[0]) ** 0.5
print(f"relative difference of the UNet's weights: {float(far / size):.1e}")
P
python "$OUT/compare.py" 2>>"$OUT/err.txt" | keep || failed

# 4. mini on real X-rays, where a folder is given (else on phantoms): the target is 25 minutes.
say "mini on $XRAYS"
small=(); if [ "$SMALL" = 1 ]; then small=(--size 64 --steps 4 --vae-steps 2 --vit-steps 2 --batch 2 --micro-batch 2 --workers 0 --dtype fp32); fi
SECONDS=0
python dinodiff.py train --preset mini --data "$XRAYS" --run-dir "$OUT/mini" "${small[@]}" 2>>"$OUT/err.txt" | keep || failed
echo "mini: $SECONDS s" | keep

# 5. Sampling: the command prints images/s.
say "sampling"
steps=50; variants=32; if [ "$SMALL" = 1 ]; then steps=2; variants=2; fi
for run in online online-v2; do for batch in 16 64; do
    python dinodiff.py sample --run-dir "$OUT/$run" --data phantom --keys phantom-00000-0 phantom-00001-0 phantom-00002-0 phantom-00003-0 \
        --variants $variants --steps $steps --batch $batch --out "$OUT/samples" 2>>"$OUT/err.txt" | keep || failed
done; done

# 6. The rest of the house once: attention maps and the four protocols on the run of mini, and two ranks where there are two GPUs.
say "segments and evaluation of mini"
python dinodiff.py sample --run-dir "$OUT/mini" --data phantom --keys phantom-00000-0 --variants 1 --steps 2 --out "$OUT/one" 2>>"$OUT/err.txt" | keep || failed
python diffseg.py "$OUT/one/reconstruct.png" --run-dir "$OUT/mini" --out "$OUT/one" 2>>"$OUT/err.txt" | keep || failed
small=(); if [ "$SMALL" = 1 ]; then small=(--count 8 --checkpoints one --timesteps 300); fi
python evaluate.py segment --run-dir "$OUT/mini" --data phantom "${small[@]}" 2>>"$OUT/err.txt" | grep -v "^!" | keep || failed
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true); [ "$SMALL" = 1 ] && gpus=2
if [ "$gpus" -gt 1 ]; then
    say "train at full size on $gpus ranks, from views"
    mkdir -p "$OUT/ranks"; cp -r "$OUT/views/vae" "$OUT/views/vit" "$OUT/ranks/" || failed
    torchrun --nproc_per_node="$gpus" "$OUT/full.py" "$OUT/ranks" 1 v1 2>>"$OUT/err.txt" | grep -vE "^(next|UNet)" | keep || failed
fi

# 7. The UNet alone beside diffusers' (if it is installed): gradients compiled and eager, a training step, 50 sampling steps.
cat > "$OUT/beside.py" <<'P'
import functools, os, time
import torch
import dinodiff
from unet import UNet, UNetConfig

SMALL = os.environ["SMALL"] == "1"
device = dinodiff.pick_device("auto")
config = dict(block_out_channels=(32, 64), cross_attention_dim=64, norm_num_groups=8, down_block_types=(dinodiff.CROSS, dinodiff.CROSS)) if SMALL else {}
config = UNetConfig(**config)
micro, side, calls, warm = (2, 8, 2, 1) if SMALL else (32, 64, 10, 3)
if device.type == "cuda":
    dinodiff.start_ranks(device)  # TF32 and cuDNN's search, as in training
torch.manual_seed(0)
zt = torch.randn(micro, 4, side, side, device=device).contiguous(memory_format=torch.channels_last)
eps = torch.randn(micro, 4, side, side, device=device)
t = torch.randint(0, 1000, (micro,), device=device)
c = torch.randn(micro, 1, config.cross_attention_dim, device=device)

def seconds(work):
    for k in range(warm + calls):
        if k == warm:
            finish(); start = time.perf_counter()
        work()
    finish()
    return (time.perf_counter() - start) / calls

def finish():
    if device.type == "cuda":
        torch.cuda.synchronize()

def gradients(call, net):
    with dinodiff.autocast(device, "bf16"):
        loss = (eps - call(zt, t, c).float()).square().mean()
    loss.backward()
    return [p.grad for p in net.parameters()]

def sample_of(net, zt, t, c):
    return net(zt, t, c).sample

def measure(title, net, call, optimizer):
    def step():
        gradients(call, net); optimizer.step(); optimizer.zero_grad(set_to_none=True)
    rate = micro / seconds(step)
    @torch.no_grad()
    def predict():
        with dinodiff.autocast(device, "bf16"):
            return call(zt, t, c)
    print(f"{title:<46} training {rate:8.2f} images/s   50 passes {micro / (50 * seconds(predict)):8.3f} images/s", flush=True)

ours = UNet(config).to(device, memory_format=torch.channels_last)
theirs = None
try:
    from diffusers import UNet2DConditionModel
    ours.save_pretrained(os.path.join(os.environ["OUT"], "unet"))
    theirs = UNet2DConditionModel.from_pretrained(os.path.join(os.environ["OUT"], "unet")).to(device, memory_format=torch.channels_last)
except ImportError:
    print("diffusers is not installed: only ours is measured")

eager = [g.clone() for g in gradients(ours, ours)]
ours.zero_grad(set_to_none=True)
for how in ("eager", "compiled") if device.type == "cuda" else ("eager",):
    if how == "compiled":
        torch._dynamo.config.optimize_ddp = False
        ours.compile()
        both = [(a.double(), b.double()) for a, b in zip(eager, gradients(ours, ours))]
        far = sum((a - b).square().sum() for a, b in both) ** 0.5 / sum(a.square().sum() for a, _ in both) ** 0.5
        print(f"gradients, compiled against eager: relative difference {float(far):.1e}")
        ours.zero_grad(set_to_none=True); del both
        eager = None
    for title, optimizer in (("AdamW", torch.optim.AdamW), ("Adam8bit", dinodiff.Adam8bit)):
        # On a copy of the weights: with lr 0 a step costs the same and changes nothing.
        options = dict(lr=0.0, fused=True) if title == "AdamW" else dict(lr=0.0)
        measure(f"ours, {how}, {title}", ours, ours, optimizer(ours.parameters(), **options))
    if theirs is not None:
        net = torch.compile(theirs) if how == "compiled" else theirs
        measure(f"diffusers, {how}, AdamW", theirs, functools.partial(sample_of, net), torch.optim.AdamW(theirs.parameters(), lr=0.0, fused=True))
P
say "the UNet beside diffusers', $([ "$SMALL" = 1 ] && echo 2 || echo 32) images a pass, bf16"
python "$OUT/beside.py" 2>>"$OUT/err.txt" | keep || failed
say "done: $OUT/summary.txt; what went wrong, if anything, is in $OUT/err.txt"
