#!/bin/sh
# Trains small models on photographs, evaluates them, and writes the tables into $OUT. On two quiet
# CPU cores a run takes 3 to 5 minutes. The same command again resumes where it stopped.
# Run from the repository: sh reference_train/photos.sh
# Before it: SEEDS=0 EPOCHS=1 PAIRS=4096 for a trial; SETTINGS="clip recommended" to train, but not
# evaluate, some settings of settings.sh; CLONES=DIR if there are clones.
set -eu
. reference_train/settings.sh
export CUDA_VISIBLE_DEVICES= # on a GPU the preset trains a larger model, with other settings
# glibc keeps freed memory, which saves a sixth of the time.
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=268435456
# Each kind of trial has a folder of its own, because finished runs are not trained again.
out=${OUT:-runs/photos${EPOCHS:+-epochs-$EPOCHS}${PAIRS:+-pairs-$PAIRS}}

[ -d "$out/data" ] ||
    python -m reference_train.data.photos --out "$out/data" --clones "${CLONES:-runs/clones}"

# The run is called DATA-BATCH-SETTING-SEED. What it printed, first its command, is in
# $out/printed. Flags are the trainer's.
pretrain() { # DATA BATCH SETTING SEED FLAGS
    name=${1%-imagenet}-$2-$3-$4 data=$1 batch=$2 loss=$(loss_flags "$3") seed=$4
    shift 4
    mkdir -p "$out/printed"
    ! grep -qs ": finished, " "$out/printed/$name.txt" || return 0
    python -m reference_train pretrain --preset icons --data "$out/data/$data" --out "$out/logs" \
        --name "$name" $loss --batch-size "$batch" --seed "$seed" -- "$@" \
        ${EPOCHS:+--epochs "$EPOCHS"} ${PAIRS:+--train-num-samples "$PAIRS"} \
        >"$out/printed/$name.txt"
}

# The learning rate was chosen for CLIP in batches of 256, and grows with the square root of their
# size. There are 34,413 pairs to train on. OpenCLIP begins them again where an epoch has more: 6
# epochs of 36,013 are 846 steps of 256, and in each 1,793 pairs come twice.
for seed in ${SEEDS:-0 1 2 3 4}; do
    for setting in ${SETTINGS:-clip recommended warmup constant c-cyclip-warmup i-cyclip-warmup \
        recommended-centered warmup-centered i-cyclip-warmup-centered \
        i-cyclip-recommended-centered}; do
        pretrain products 256 $setting "$seed" --train-num-samples 36013 --epochs 6 --lr 2e-3 \
            --warmup 85
    done
    # One caption for each class: a pair has 1.6 false negatives in its batch, unless ids leave them out.
    for setting in ${SETTINGS:-clip recommended warmup recommended-centered warmup-centered \
        clip-ids recommended-ids}; do
        pretrain tiny-imagenet 256 $setting "$seed" --train-num-samples 79955 --epochs 2 --lr 2e-3 \
            --warmup 62
    done
done
[ -z "${SETTINGS:-}" ] || exit 0
# Not best.pt, which was chosen on pictures that are evaluated.
last=checkpoints/epoch_latest.pt
python -m reference_train evaluate "$out"/logs/products-256-*/$last --data "$out/data" \
    --only products-validation products products-new-types --out "$out/evaluation-products"
python -m reference_train evaluate "$out"/logs/tiny-*/$last --data "$out/data" \
    --only tiny-imagenet tiny-imagenet-new --linear-probe --out "$out/evaluation-tiny"

# Batches of 1,024 take 144 steps, and those of 2,048 take 108. In these the warm-up of λ reaches 28
# and 21% of it.
for seed in ${SEEDS:-0 1 2 3 4}; do
    for setting in clip recommended warmup constant; do
        pretrain products 1024 $setting "$seed" --train-num-samples 36013 --epochs 4 --lr 4e-3 \
            --warmup 15
        pretrain products 2048 $setting "$seed" --train-num-samples 36013 --epochs 6 --lr 5.6e-3 \
            --warmup 11
    done
done
python -m reference_train evaluate "$out"/logs/products-1024-*/$last \
    "$out"/logs/products-2048-*/$last --data "$out/data" --only products products-new-types \
    --out "$out/evaluation-batches"
