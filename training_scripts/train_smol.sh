#!/usr/bin/env bash
# Trains what is in weights/smol, step by step, in runs/smol-2. Run it again after an interruption: finished steps are
# skipped, an interrupted one resumes.
#
#     DATA=research/ training_scripts/train_smol.sh
#
# DATA holds flickr8k/ (images/, captions.json, splits.json), world/ (images/, captions.json, labels.json,
# questions.json, splits.json) and imagenet_classes.json. world/ is a selection from the sources that the model card
# names; it is not published, so elsewhere this shows how the weights were made. WORDNET is the folder of WordNet 3.0's
# files, which Debian's package wordnet-base installs. Needs a full clone, a C++ compiler, and mmchat with its extra
# "train". All results go to data/ and runs/.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${DATA:?Name the folder with the data sets: DATA=research/ training_scripts/train_smol.sh}"
PYTHON="${PYTHON:-.venv/bin/python}"
WORDNET="${WORDNET:-/usr/share/wordnet}"
FLICKR="--captions $DATA/flickr8k/captions.json --splits $DATA/flickr8k/splits.json --folder flickr8k"
WORLD="--splits $DATA/world/splits.json --folder world"
EASY="--images data/pictures/easy-vqa/train --folder easy-vqa/train --split train"

stage() { # what it makes, then the command
    local made="$1"
    shift
    if [ -e "$made.done" ]; then # what an interrupted command made is there, too, but not whole
        echo "== $made is there"
        return
    fi
    echo "== $made"
    "$@"
    touch "$made.done"
}

prepare() { # the file to write, then prepare_data.py's arguments
    stage "$1" "$PYTHON" training_scripts/prepare_data.py "${@:2}" --out "$1"
}

finetune() { # a recipe's name, and the folder that it writes
    stage "$2" "$PYTHON" training_scripts/finetune_qlora.py --resume \
        --recipe "training_scripts/recipes/smol/$1.yaml"
}

link() { # a folder of pictures, and its name below data/pictures
    mkdir -p data/pictures
    [ -e "data/pictures/$2" ] || ln -s "$(realpath "$1")" "data/pictures/$2"
}

# 1. Pictures, and conversations about them: counts twice, in other wordings
link "$DATA/flickr8k/images" flickr8k
link "$DATA/world/images" world
prepare data/flickr-train.json captions $FLICKR --split train --agreement 1 --per-image 5 --apart --per-number 180 \
    --limit 2400 --seed 61
prepare data/world-captions-train.json captions --captions "$DATA/world/captions.json" $WORLD --split train \
    --agreement 1 --per-image 5 --apart --details --per-number 40 --seed 62
LABELS="--labels $DATA/world/labels.json --wordnet $WORDNET $WORLD --split train"
prepare data/world-labels-train.json labels $LABELS --per-image 4 --seed 64
prepare data/world-counts.json labels $LABELS --kinds "how many" --seed 65
prepare data/world-counts-again.json labels $LABELS --kinds "how many" --seed 66
prepare data/world-daquar-train.json labels --labels "$DATA/world/questions.json" $WORLD --split train --per-image 4 \
    --seed 67
prepare data/world-adversarial.json labels $LABELS --kinds "presence adversarial" --seed 71
prepare data/flickr-colors.json captions $FLICKR --split train --make questions --kinds color --seed 70
prepare data/easy-train.json easy-vqa $EASY --per-image 5 --turns 1 --limit 400 --seed 68

# 2. Features of all pictures
stage data/features-lite2 "$PYTHON" training_scripts/embed_images.py --images data/pictures \
    --image-encoder efficientnet-lite2 --out data/features-lite2

# 3. The tagger
stage runs/tagger "$PYTHON" training_scripts/fit_tagger.py --features data/features-lite2 \
    --classes "$DATA/imagenet_classes.json" --out runs/tagger \
    --captions flickr8k="$DATA/flickr8k/captions.json" world="$DATA/world/captions.json" \
    --labels world="$DATA/world/labels.json" world="$DATA/world/questions.json" \
    --splits flickr8k="$DATA/flickr8k/splits.json" world="$DATA/world/splits.json"

# 4. SCST on captions and cross-entropy on questions, from the projector and adapter of commit abf3a16
stage runs/previous bash -c \
    'mkdir -p runs/previous && git archive abf3a16 weights/smol | tar -x --strip-components=2 -C runs/previous'
finetune 1-whole runs/smol-1
finetune 2-questions runs/smol-2
echo "Chat with the weights: make run OPTIONS=\"--weights runs/smol-2\""
echo "Measure them: training_scripts/evaluate_smol.sh runs/smol-2"
