#!/bin/sh
# What do the penalties do in fine-tuning? Trains the demonstration's model on emoji with CLIP's
# loss, three seeds, and fine-tunes each on emoji in black and white with four losses. Then it makes
# the record and the table of results/fine_tuning. Takes an hour on one quiet CPU core. The same
# command again resumes where it stopped.
# Run from the repository: sh reference_train/fine_tuning.sh
set -eu
export CUDA_VISIBLE_DEVICES= # on a GPU the model trains in another precision
out=${OUT:-runs/fine_tuning}

python -m reference_train --loss clip --seeds 3 --out "$out/short"

tune() { # NAME [FLAGS]
    name=$1
    shift
    for seed in 0 1 2; do
        model=$out/short/clip-$seed
        python -m cyclip_loss.open_clip_train --model-config "$model/emoji-rn-32.json" \
            --model emoji-rn-32 --pretrained "$model/checkpoint.pt" --dataset-type webdataset \
            --train-data reference_train/emoji/fluent-emoji-high-contrast.tar.xz \
            --train-num-samples 1536 --batch-size 128 --epochs 20 --lr ${LR:-3e-4} --warmup 24 \
            --precision fp32 --workers 1 --seed $seed --logs "$out/logs" --name "$name-$seed" \
            --save-frequency 0 --save-most-recent --resume latest "$@"
    done
}
tune tuned-clip --lambda-inmodal 0 --lambda-crossmodal 0
tune tuned-32-cyclip --reference-batch-size 32 --lambda-warmup 0.1
tune tuned-128-cyclip --reference-batch-size 128 --lambda-warmup 0.1
tune tuned-128-c-cyclip --lambda-inmodal 0 --reference-batch-size 128 --lambda-warmup 0.1

python -m reference_train evaluate "$out"/short/clip-? "$out"/logs/* --out "$out/evaluation" \
    --workers 0 --only "new concepts, trained styles" "new concepts, new styles" \
    "trained concepts, new styles" "trained concepts, black and white"
