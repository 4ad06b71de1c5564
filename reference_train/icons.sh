#!/bin/sh
# Pretrains on 250,000 icons, and asks about names and emoji that training never saw:
# CLIP and CyCLIP in three seeds, C-CyCLIP and I-CyCLIP in one, then λ at four batch sizes.
# On two CPU cores: data in 8 minutes, each of 8 runs in about 30 (EPOCHS=8: 12), each of 11 in 12.
# Given again, it goes on where it stopped. Run from the repository: sh reference_train/icons.sh
set -eu
out=${OUT:-runs/icons}

[ -d "$out/icons" ] || python -m reference_train.data.icons --out "$out/icons"

pretrain() { # NAME LOSS, then more
    name=$1 loss=$2
    shift 2
    python -m reference_train pretrain --preset icons --data "$out/icons" --out "$out/logs" \
        --name "$name" --loss "$loss" "$@"
}

# NAME is LOSS-SEED.
for run in clip-0 cyclip-0 clip-1 cyclip-1 clip-2 cyclip-2 c-cyclip-0 i-cyclip-0; do
    pretrain $run "${run%-*}" --seed "${run##*-}" -- ${EPOCHS:+--epochs "$EPOCHS"}
done

# 524,288 pairs in batches of another size, the learning rate by its square root, a fifth of the
# steps to warm up. NAME is lambda-LOSS-BATCH-REFERENCE; 0 is the paper's formula.
over_batches() { # BATCH LR WARMUP
    for run in clip-$1-0 cyclip-$1-0 cyclip-$1-128; do
        [ $run = cyclip-128-128 ] || # the same formula as cyclip-128-0
            pretrain lambda-$run "${run%%-*}" --batch-size "$1" -- --epochs 8 --lr "$2" \
                --warmup "$3" --reference-batch-size "${run##*-}"
    done
}
over_batches 128 7e-4 820
over_batches 512 1.4e-3 205
over_batches 2048 2.8e-3 51
over_batches 4096 4e-3 26

python -m reference_train evaluate "$out"/logs/[ci]* --data "$out/icons" --only icons emoji \
    --out "$out/evaluation"
python -m reference_train evaluate "$out"/logs/lambda-* --data "$out/icons" --only icons emoji \
    --out "$out/evaluation-lambda"
