#!/bin/sh
# What do the penalties do in fine-tuning? Trains the demonstration's model on emoji with CLIP's
# loss, and fine-tunes it on emoji of another style with four losses, three seeds each. Then it
# makes the record of results/fine_tuning. Takes 40 minutes on one quiet CPU core. The same command
# again resumes where it stopped.
# Run from the repository: sh reference_train/fine_tuning.sh
set -eu
export CUDA_VISIBLE_DEVICES= # on a GPU the model trains in another precision
out=${OUT:-runs/fine_tuning}

python -m reference_train --loss clip --seeds 3 --out "$out/short"

fine_tune() { # NAME [FLAGS]
    name=$1
    shift
    for seed in 0 1 2; do
        model=$out/short/clip-$seed
        python -m cyclip_loss.open_clip_train --model-config "$model/emoji-rn-32.json" \
            --model emoji-rn-32 --pretrained "$model/checkpoint.pt" \
            --dataset-type webdataset --train-data reference_train/emoji/openmoji.tar.xz \
            --train-num-samples 1536 --batch-size 128 --epochs 10 --lr 3e-4 --warmup 12 \
            --precision fp32 --workers 1 --seed $seed --logs "$out/logs" --name "$name-$seed" \
            --save-frequency 0 --save-most-recent --resume latest "$@"
    done
}
fine_tune tuned-clip --lambda-inmodal 0 --lambda-crossmodal 0
fine_tune tuned-32-cyclip --reference-batch-size 32 --lambda-warmup 0.1
fine_tune tuned-128-cyclip --reference-batch-size 128 --lambda-warmup 0.1
fine_tune tuned-128-c-cyclip --lambda-inmodal 0 --reference-batch-size 128 --lambda-warmup 0.1

python -m reference_train evaluate "$out"/short/clip-? "$out"/logs/* --out "$out/evaluation" \
    --workers 0 --only "trained concepts, new styles" "new concepts, trained styles"
python - "$out/evaluation/evaluation.json" >reference_train/results/fine_tuning/runs.csv <<'END'
import csv, json, sys

rows = []
for run, measured in json.load(open(sys.argv[1]))["results"].items():
    row = {"run": run}
    for data, found in measured.items():
        for style, numbers in {"mean": found["numbers"], **found["groups"]}.items():
            for metric in ("top1", "subgroup_top1", "text_to_image_r1"):
                row[f"{data}, {style}: {metric}"] = round(numbers[metric], 5)
    rows.append(row)
writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
writer.writeheader()
writer.writerows(rows)
END
