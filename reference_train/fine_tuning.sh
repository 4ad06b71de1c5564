#!/bin/sh
# What do the penalties do in fine-tuning? Trains the demonstration's model on emoji with CLIP's
# loss, and fine-tunes it on emoji of another style with four losses, three seeds each. Then it
# fine-tunes the first model of icons.sh on emoji in the same way, and writes runs.csv and
# icons.csv into $OUT, the records of results/fine_tuning. Takes an hour on one quiet CPU core. The
# same command again resumes where it stopped.
# Run from the repository: sh reference_train/fine_tuning.sh
set -eu
export CUDA_VISIBLE_DEVICES= # on a GPU the model trains in another precision
out=${OUT:-runs/fine_tuning}
icons=${ICONS_OUT:-runs/icons} # the OUT of icons.sh
icons_model=$icons/logs/clip-0/checkpoints/epoch_latest.pt
[ -f "$icons_model" ] || {
    echo "no $icons_model: first sh reference_train/icons.sh" >&2
    exit 2
}

python -m reference_train --loss clip --seeds 3 --out "$out/short"

fine_tune() { # NAME CONFIG CHECKPOINT SHARDS [FLAGS], with $seed
    name=$1 config=$2 checkpoint=$3 shards=$4
    shift 4
    paper="--penalties paper --lambda-warmup 0.1"
    for setting in "clip --penalties none" \
        "32-cyclip $paper --reference-batch-size 32" \
        "128-cyclip $paper --reference-batch-size 128" \
        "128-c-cyclip $paper --reference-batch-size 128 --lambda-inmodal 0"; do
        # $setting has a name and flags, which are separate words.
        python -m cyclip_loss.open_clip_train --model-config "$config" \
            --model "$(basename "$config" .json)" --pretrained "$checkpoint" \
            --dataset-type webdataset --train-data "$shards" --batch-size 128 --epochs 10 \
            --precision fp32 --workers 1 --seed $seed --logs "$out/logs" \
            --name "$name-${setting%% *}-$seed" --save-frequency 0 --save-most-recent \
            --resume latest ${setting#* } "$@"
    done
}

# The demonstration's model of each seed learns a new style.
for seed in 0 1 2; do
    model=$out/short/clip-$seed
    fine_tune tuned "$model/emoji-rn-32.json" "$model/checkpoint.pt" \
        reference_train/emoji/openmoji.tar.xz --train-num-samples 1536 --lr 3e-4 --warmup 12
done

# The model of icons, which `sh reference_train/icons.sh` trains first, learns emoji: those that the
# demonstration trains on.
python - "$out/emoji.tar" <<'END'
import random, sys

import webdataset as wds

from reference_train.data.emoji import EMOJI_FOLDER, TRAIN_STYLES
from reference_train.data.samples import read_samples

shards = [str(EMOJI_FOLDER / f"{style}.tar.xz") for style in TRAIN_STYLES]
samples = [sample for sample in read_samples(shards) if sample.info["split"] == "train"]
random.Random(0).shuffle(samples)
with wds.TarWriter(sys.argv[1]) as tar:
    for number, sample in enumerate(samples):
        tar.write({"__key__": str(number), "png": sample.image, "txt": sample.caption})
END
for seed in 0 1 2; do
    fine_tune icons-tuned reference_train/pretrain/models/icons-rn-32.json "$icons_model" \
        "$out/emoji.tar" --train-num-samples 3072 --lr 1e-3 --warmup 24
done

record() { # FILE RUNS DATASETS [FLAGS]: evaluates, and writes a row for each run
    file=$1
    shift
    python -m reference_train evaluate --workers 0 --out "$out/$file" "$@"
    python -m reference_train report "$out/$file" --csv "$out/$file.csv"
}
record runs "$out"/short/clip-? "$out"/logs/tuned-* \
    --only "trained concepts, new styles" "new concepts, trained styles"
record icons "$icons_model" "$out"/logs/icons-tuned-* --data "$icons/icons" \
    --only icons "trained concepts, new styles" "new concepts, trained styles"
