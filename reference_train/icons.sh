#!/bin/sh
# Pretrains on 250,000 icons, and evaluates on names and emoji that training never saw: first the
# settings of settings.sh at five batch sizes, then the losses with a constant λ. On two CPU cores
# the data take 8 minutes, a run of 20 epochs about 30, and a run of 8 epochs 12. The same command
# again resumes where it stopped.
# Run from the repository: sh reference_train/icons.sh
# Before it: TASKS="128 128x20", SEEDS="0 1 2 3 4", SETTINGS="clip recommended" for a part of the
# first runs, or for more of them.
set -eu
. reference_train/settings.sh
export CUDA_VISIBLE_DEVICES= # on a GPU the presets train larger models, with other settings
out=${OUT:-runs/icons}

[ -d "$out/icons" ] || python -m reference_train.data.icons --out "$out/icons"

pretrain() { # NAME FLAGS
    name=$1
    shift
    python -m reference_train pretrain --preset icons --data "$out/icons" --out "$out/logs" \
        --name "$name" "$@"
}

# An epoch has 65,536 pairs. The learning rate is proportional to the square root of the batch size.
schedule() { # BATCH for 8 epochs, or BATCHx20 for 20 epochs, which are 10,240 steps of 128
    case $1 in
    128) echo --epochs 8 --lr 7e-4 --warmup 820 ;;
    128x20) echo --epochs 20 --lr 7e-4 --warmup 820 ;;
    512) echo --epochs 8 --lr 1.4e-3 --warmup 205 ;;
    1024) echo --epochs 8 ;;
    1024x20) echo --epochs 20 ;;
    2048) echo --epochs 8 --lr 2.8e-3 --warmup 51 ;;
    4096) echo --epochs 8 --lr 4e-3 --warmup 26 ;;
    esac
}

# NAME is SETTING-TASK-SEED. The last epoch is evaluated, as in the tables of R@10.
runs=
for seed in ${SEEDS:-0 1 2}; do
    for task in ${TASKS:-128 128x20 512 1024 1024x20 2048 4096}; do
        for setting in ${SETTINGS:-clip recommended warmup recommended-centered warmup-centered}; do
            case $setting-$task in *-centered-[!1]* | *-centered-1024*) continue ;; esac
            pretrain $setting-$task-$seed $(loss_flags $setting) --batch-size ${task%x20} \
                --seed $seed -- $(schedule $task) --torchcompile
            runs="$runs $out/logs/$setting-$task-$seed/checkpoints/epoch_latest.pt"
        done
    done
done
python -m reference_train evaluate $runs --data "$out/icons" --only icons emoji \
    --out "$out/evaluation-settings"

# Constant λ. NAME is LOSS-SEED.
constant() { # LOSS
    case $1 in
    clip | siglip) ;; # no penalties
    cysiglip) echo "--reference-batch-size 128" ;;
    *) echo "--penalties paper --reference-batch-size 128" ;;
    esac
}
for run in clip-0 cyclip-0 clip-1 cyclip-1 clip-2 cyclip-2 c-cyclip-0 c-cyclip-1 c-cyclip-2 \
    i-cyclip-0; do
    loss=${run%-*}
    pretrain $run --loss $loss $(constant $loss) --seed "${run##*-}" -- ${EPOCHS:+--epochs "$EPOCHS"}
done

# NAME is lambda-LOSS-BATCH-REFERENCE. Reference 0 is the paper's formula; in batches of 128, so is
# 128.
for batch in 128 512 2048 4096; do
    pretrain lambda-clip-$batch-0 --loss clip --batch-size $batch -- $(schedule $batch)
    for reference in 0 128; do
        [ $batch-$reference = 128-128 ] ||
            pretrain lambda-cyclip-$batch-$reference --loss cyclip --batch-size $batch \
                --penalties paper --reference-batch-size $reference -- $(schedule $batch)
    done
done

# SigLIP's loss, alone and with the weight that results/siglip found: 1/32, for batches of 128
for run in siglip-0 cysiglip-0 siglip-1 cysiglip-1 siglip-2 cysiglip-2; do
    loss=${run%-*}
    pretrain $run --loss $loss $(constant $loss) --seed "${run##*-}" -- --epochs 8
done

# Not best.pt, which was chosen on the icons that are evaluated.
last=checkpoints/epoch_latest.pt
evaluate() { # OUT CHECKPOINTS
    table=$1
    shift
    python -m reference_train evaluate "$@" --data "$out/icons" --only icons emoji --out "$table"
}
evaluate "$out/evaluation" "$out"/logs/clip-?/$last "$out"/logs/*cyclip-?/$last
evaluate "$out/evaluation-lambda" "$out"/logs/lambda-*/$last
evaluate "$out/evaluation-siglip" "$out"/logs/*siglip-?/$last
