#!/bin/sh
# Compile the trained digits network into the built-in bundle. Needs tta-runtime[export].
set -eu
cd "$(dirname "$0")/../.."
rm -rf edge/tta_edge/builtin/digits/bundle
tta-export build examples/train_digits/model.py:digits_cnn \
    --weights examples/train_digits/digits.safetensors \
    --methods source,norm,tent --set tent.lr=0.05 \
    --input 1x8x8 --classes 10 --class-names 0,1,2,3,4,5,6,7,8,9 --id digits --default-method tent \
    -o edge/tta_edge/builtin/digits/bundle
