#!/usr/bin/env bash
# Measures weights/smol, or the folders that are named, on dev photos: the tables of its model card.
#
#     DATA=research/ training_scripts/evaluate_smol.sh [FOLDER ...]
#
# DATA, WORDNET and PYTHON are as in train_smol.sh, whose first two steps embed the photos. Results go to runs/evaluation.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${DATA:?Name the folder with the data sets: DATA=research/ training_scripts/evaluate_smol.sh}"
PYTHON="${PYTHON:-.venv/bin/python}"
WORDNET="${WORDNET:-/usr/share/wordnet}"
FLICKR="--captions $DATA/flickr8k/captions.json --splits $DATA/flickr8k/splits.json --split dev --folder flickr8k"
WORLD="--splits $DATA/world/splits.json --split dev --folder world"
WEIGHTS=("$@")
[ $# -gt 0 ] || WEIGHTS=(weights/smol)
mkdir -p runs/evaluation

prepare() { # the name of a file of questions, then prepare_data.py's arguments
    "$PYTHON" training_scripts/prepare_data.py "${@:2}" --out "data/dev-$1.json"
}

evaluate() { # the name of the table, then evaluate.py's arguments
    "$PYTHON" training_scripts/evaluate.py --weights "${WEIGHTS[@]}" --features data/features-lite2 --no-perplexity \
        --table "runs/evaluation/$1.md" --out "runs/evaluation/$1.json" "${@:2}"
}

prepare labels labels --labels "$DATA/world/labels.json" --wordnet "$WORDNET" $WORLD --make questions
prepare daquar labels --labels "$DATA/world/questions.json" $WORLD --make questions
prepare captions captions --captions "$DATA/world/captions.json" $WORLD --make descriptions
prepare details captions --captions "$DATA/world/captions.json" $WORLD --make details
prepare flickr-captions captions $FLICKR --limit 400 --make descriptions
prepare flickr-presence captions $FLICKR --limit 170 --make questions --kinds presence
prepare flickr-colors captions $FLICKR --make questions --kinds color
prepare easy easy-vqa --split test --images data/pictures/easy-vqa/test --folder easy-vqa/test --limit 40 \
    --make questions
"$PYTHON" training_scripts/embed_images.py --images data/pictures --image-encoder efficientnet-lite2 \
    --out data/features-lite2

evaluate everyday --questions data/dev-{labels,daquar}.json
evaluate others --conditions real --questions data/dev-{captions,details,flickr-captions,flickr-presence,flickr-colors,easy}.json
evaluate repeating --questions data/dev-{captions,details}.json --conditions real --no-repeat-ngram-size 0
