#!/bin/sh
# From a GGUF file (or a Hugging Face folder) to a narrow model folder, its perplexity and some text.
#   sh examples/quantize_and_generate.sh MODEL TEXT OUT
set -eu
model=$1 text=$2 out=$3

narrowgauge quantize "$model" "$out" --format fp6 --map down_proj=int8 --scale-search mse
narrowgauge eval "$model" --text "$text" --window 64 --windows 2
narrowgauge eval "$out" --text "$text" --window 64 --windows 2
narrowgauge generate "$out" "Once upon a time" --max-tokens 20
