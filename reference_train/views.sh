#!/bin/sh
# Compares losses with and without two views of each pair, at the same number of steps and in the
# same time, with the demonstration, its long preset, and 250,000 icons: 39 short runs (six with the
# default settings, without views), 9 long runs and 30 runs on icons, a day or more on two CPU cores;
# the records in results/views have the seconds of each. The same command again resumes where it
# stopped.
# Run from the repository: sh reference_train/views.sh
set -eu
export CUDA_VISIBLE_DEVICES= # on a GPU the presets train larger models or in another precision
out=${OUT:-runs/views}
demonstration() { # FOLDER [FLAGS]
    folder=$1
    shift
    python -m reference_train --seeds 3 --out "$out/$folder" "$@"
}

# A step with views takes 1.8 to 1.9 times as long, so 1,178 steps without views take about as long
# as 620 with views.
demonstration time --steps 1178 --loss cyclip clip c-cyclip
demonstration views --loss clip-views cyclip-views c-cyclip-views i-cyclip-views
demonstration pairs --loss clip cyclip c-cyclip i-cyclip
demonstration default --loss clip cyclip --lambda 0.03125 --lambda-progress
demonstration long --preset long --loss clip-views cyclip-views c-cyclip-views

icons=${ICONS_OUT:-runs/icons}/icons # ICONS_OUT is the OUT of icons.sh, which draws them
[ -d "$icons" ] || python -m reference_train.data.icons --out "$icons"
pretrain() { # NAME EPOCHS LOSS SEED [FLAGS]
    name=$1-$4 epochs=$2 loss=$3 seed=$4 penalties="--penalties paper --reference-batch-size 128"
    shift 4
    [ "$loss" != clip ] || penalties=
    python -m reference_train pretrain --preset icons --data "$icons" --out "$out/logs" \
        --name "$name" --loss "$loss" --seed "$seed" $penalties "$@" -- --torchcompile \
        --epochs "$epochs"
}

for seed in 0 1 2; do
    pretrain 15-epochs-clip 15 clip $seed
    pretrain 15-epochs-c-cyclip 15 c-cyclip $seed
    pretrain 15-epochs-rising-cyclip 15 cyclip $seed --lambda-warmup 512
    pretrain 8-epochs-clip-views 8 clip $seed --views own
    pretrain 8-epochs-c-cyclip-views 8 c-cyclip $seed --views own
    pretrain 8-epochs-clip 8 clip $seed
    pretrain 8-epochs-cyclip 8 cyclip $seed
    pretrain 8-epochs-rising-cyclip 8 cyclip $seed --lambda-warmup 512
    pretrain 8-epochs-c-cyclip 8 c-cyclip $seed
    pretrain 8-epochs-rising-c-cyclip 8 c-cyclip $seed --lambda-warmup 512
done
python -m reference_train evaluate "$out"/logs/*/checkpoints/epoch_latest.pt \
    --data "$icons" --only icons emoji --out "$out/evaluation"
