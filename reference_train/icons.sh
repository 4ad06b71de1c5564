#!/bin/sh
# Pretrains on 250,000 icons, and evaluates on names and emoji that training never saw: CLIP,
# CyCLIP and C-CyCLIP with three seeds, I-CyCLIP with one, then λ at five batch sizes: constant,
# with a warm-up, and as the launcher has it by default. On two CPU cores the data take 8 minutes, a run of
# 20 epochs about 30, and a run of 8 epochs 12. The same command again resumes where it stopped.
# Run from the repository: sh reference_train/icons.sh
set -eu
export CUDA_VISIBLE_DEVICES= # on a GPU the presets train larger models, with other settings
out=${OUT:-runs/icons}

[ -d "$out/icons" ] || python -m reference_train.data.icons --out "$out/icons"

pretrain() { # NAME LOSS [FLAGS]
    name=$1 loss=$2
    shift 2
    python -m reference_train pretrain --preset icons --data "$out/icons" --out "$out/logs" \
        --name "$name" --loss "$loss" --reference-batch-size 128 --no-lambda-progress "$@"
}

# NAME is LOSS-SEED.
for run in clip-0 cyclip-0 clip-1 cyclip-1 clip-2 cyclip-2 c-cyclip-0 c-cyclip-1 c-cyclip-2 \
    i-cyclip-0; do
    pretrain $run "${run%-*}" --seed "${run##*-}" -- ${EPOCHS:+--epochs "$EPOCHS"}
done

# 524,288 pairs in batches of other sizes. The learning rate is proportional to the square root of
# the batch size.
settings() { # BATCH, or 1024x20 for 20 epochs of 1,024
    case $1 in
    128) echo --epochs 8 --lr 7e-4 --warmup 820 ;;
    512) echo --epochs 8 --lr 1.4e-3 --warmup 205 ;;
    1024) echo --epochs 8 ;;
    1024x20) echo --epochs 20 ;;
    2048) echo --epochs 8 --lr 2.8e-3 --warmup 51 ;;
    4096) echo --epochs 8 --lr 4e-3 --warmup 26 ;;
    esac
}

# NAME is lambda-LOSS-BATCH-REFERENCE. Reference 0 is the paper's formula; in batches of 128, so is
# 128.
for batch in 128 512 2048 4096; do
    for run in clip-$batch-0 cyclip-$batch-0 cyclip-$batch-128; do
        [ $run = cyclip-128-128 ] ||
            pretrain lambda-$run "${run%%-*}" --batch-size $batch -- $(settings $batch) \
                --reference-batch-size "${run##*-}"
    done
done

# R = 32, and R = 128 with a warm-up of 512 steps, where R is the reference batch size. NAME is
# SETTING-BATCH-SEED. With 512 steps in batches of 1,024, the warm-up is a share of 1.0. The runs of
# 20 epochs are SETTING-SEED.
for seed in 0 1 2; do
    pretrain clip-1024-$seed clip --seed $seed -- $(settings 1024)
    pretrain cyclip-1024-$seed cyclip --seed $seed -- $(settings 1024)
    pretrain quarter-$seed cyclip --seed $seed --reference-batch-size 32
done
for setting in 1024-0 1024-1 1024-2 2048-0 4096-0; do
    batch=${setting%-*} seed=${setting#*-}
    pretrain quarter-$setting cyclip --batch-size $batch --seed $seed --reference-batch-size 32 \
        -- $(settings $batch)
done
for setting in 1.0-1024-0 1.0-1024-1 1.0-1024-2 512-2048-0 512-2048-1 512-4096-0 512-4096-1; do
    length=${setting%%-*} seed=${setting##*-}
    batch=${setting%-*} batch=${batch#*-}
    pretrain warmup-$setting cyclip --batch-size $batch --seed $seed --lambda-warmup $length \
        -- $(settings $batch)
done
for setting in 2048-0 2048-1 4096-0 4096-1; do
    batch=${setting%-*}
    pretrain clip-$setting clip --batch-size $batch --seed ${setting#*-} -- $(settings $batch)
done

# Again with a later version of the code: CLIP, the launcher's defaults, and the warm-up. NAME is
# defaults-LOSS-TASK-SEED or again-warmup-512-TASK-SEED.
for task in 128 512 1024 1024x20 2048 4096; do
    for seed in 0 1 2; do
        same="--batch-size ${task%x20} --seed $seed"
        for loss in clip cyclip; do
            python -m reference_train pretrain --preset icons --data "$out/icons" \
                --out "$out/logs" --name defaults-$loss-$task-$seed --loss $loss $same \
                -- $(settings $task) --torchcompile
        done
        # For 512 steps of 1,024 pairs, warmup-1.0-1024-SEED above is the same.
        [ $task = 1024 ] ||
            pretrain again-warmup-512-$task-$seed cyclip $same --lambda-warmup 512 \
                -- $(settings $task) --torchcompile
    done
done

# SigLIP's loss, alone and with the weight that results/siglip found: 1/32, for batches of 128
for run in siglip-0 cysiglip-0 siglip-1 cysiglip-1 siglip-2 cysiglip-2; do
    pretrain $run "${run%-*}" --seed "${run##*-}" -- --epochs 8
done

python -m reference_train evaluate "$out"/logs/*clip-? --data "$out/icons" --only icons emoji \
    --out "$out/evaluation"
python -m reference_train evaluate "$out"/logs/[adlqw]* "$out"/logs/clip-*-? "$out"/logs/cyclip-*-? \
    --data "$out/icons" --only icons emoji --out "$out/evaluation-lambda"
python -m reference_train evaluate "$out"/logs/*siglip-? --data "$out/icons" --only icons emoji \
    --out "$out/evaluation-siglip"
