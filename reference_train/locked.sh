#!/bin/sh
# Compares losses on a pretrained image tower, and writes a table and a .csv for each cell. On two
# quiet CPU cores the features take 15 minutes, a run of 256 half a minute, and one of 1,024 or 4,096
# one or two minutes. The same command again resumes where it stopped.
# Run from the repository: sh reference_train/locked.sh
# Before it: SEEDS="5 6" for fewer seeds; CLONES=DIR if there are clones; PACKAGE=FILE if there is
# what `npm pack @iconify/json@2.2.535` downloads.
set -eu
out=${OUT:-runs/locked}
[ -d "$out/photos" ] ||
    python -m reference_train.data.photos --out "$out/photos" --clones "${CLONES:-runs/clones}"
[ -d "$out/icons" ] ||
    python -m reference_train.data.icons --out "$out/icons" --part 60000 90000 \
        ${PACKAGE:+--package "$PACKAGE"}

compare() { # DATA FOLDER BATCH STEPS TEXT SETTINGS
    python -m reference_train locked "$1" "$2" --batch-size "$3" --steps "$4" --text "$5" \
        --settings $6 --seeds ${SEEDS:-5 6 7 8 9} --out "$out/$1-$3-$5"
}

four="clip recommended inmodal strong"
compare products "$out/photos" 256 670 words "$four crossmodal strong-inmodal"
compare icons "$out/icons" 256 670 words "$four"
compare emoji . 256 670 words "$four"
compare products "$out/photos" 1024 330 words "$four"
compare icons "$out/icons" 1024 330 words "$four"
compare emoji . 1024 330 words "$four"
compare products "$out/photos" 4096 80 words "$four"
compare products "$out/photos" 256 670 transformer "$four"
for cell in "$out"/*/evaluation.json; do
    cell=$(dirname "$cell")
    python -m reference_train report "$cell" --csv "$cell.csv"
done
