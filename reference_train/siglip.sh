#!/bin/sh
# Which penalty weight suits SigLIP's loss? Trains the demonstration's model with SigLIP's loss and
# several weights, three seeds each, and writes $OUT/runs.csv, the record of results/siglip. A run
# of 620 steps in batches of 256 takes 4 to 5 minutes on one quiet CPU core, so all 51 runs take 5 to
# 6 hours. The same command again resumes where it stopped.
# Run from the repository: sh reference_train/siglip.sh
set -eu
export CUDA_VISIBLE_DEVICES= # on a GPU the model trains in another precision
out=${OUT:-runs/siglip}
runs() { # FOLDER [FLAGS]
    folder=$1
    shift
    python -m reference_train --seeds 3 --out "$out/$folder" "$@"
}

# Both penalties, and the cross-modal one alone. 0.00390625 = 1/256, 0.015625 = 1/64, 0.0625 = 1/16
runs 620 --loss siglip
for weight in 0.00390625 0.015625 0.0625 0.125 0.25; do
    runs "620-$weight" --lambda $weight --loss cysiglip
done
for weight in 0.00390625 0.015625; do
    runs "620-$weight" --lambda $weight --loss c-cysiglip
done
# Other batch sizes. Penalties are as strong as at 256, because the reference batch size is 256.
for batch in 128 512; do
    runs "620-batch-$batch" --batch-size $batch --loss siglip
    for weight in 0.015625 0.25; do
        runs "620-batch-$batch-$weight" --batch-size $batch --lambda $weight --loss cysiglip
    done
done
# Longer training
runs 1500 --preset long --loss siglip
for weight in 0.015625 0.25; do
    runs "1500-$weight" --preset long --lambda $weight --loss cysiglip
done

python -m reference_train report "$out"/[0-9]*/ --csv "$out/runs.csv"
