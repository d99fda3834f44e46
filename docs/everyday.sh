#!/usr/bin/env bash
# The README's everyday commands, one after another, in a temporary folder. Everything is made tiny by the settings
# below, so that the commands are the README's own words and the whole takes about a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

head -c 120000 "$root/recipes/data/austen.txt" >novel.txt
tail -c 20000 "$root/recipes/data/austen.txt" >other.txt
zcat "$root/recipes/data/heart-disease.jsonl.gz" | sed -n 1,400p >patients.jsonl
zcat "$root/recipes/data/heart-disease.jsonl.gz" | tail -n 100 >new.jsonl

tiny=(--set train.steps=5 --set train.batch=2 --set train.context=32 --set model.size=1x64
  --set data.tokenizer.vocab_size=512 --set evaluate.bootstrap=100 --set generate.max_tokens=8)

tiny_rows=(--set train.epochs=1 --set train.context=64 --set model.size=1x64 --set evaluate.bootstrap=100)

formary() {
  printf '\n$ formary %s\n' "$*"
  case "$1 ${2-}" in
    "run patients.yaml"* | "search patients.yaml"*) "$root/.venv/bin/formary" "$@" "${tiny_rows[@]}" ;;
    *) run_text "$@" ;;
  esac
}
run_text() {
  case "$1" in
    run | prepare | train | report) "$root/.venv/bin/formary" "$@" "${tiny[@]}" ;;
    evaluate) if [[ $2 == *.yaml ]]; then "$root/.venv/bin/formary" "$@" "${tiny[@]}"; else "$root/.venv/bin/formary" "$@"; fi ;;
    *) "$root/.venv/bin/formary" "$@" ;;
  esac
}

# Begin
formary doctor
formary recipes
formary recipes --presets
formary recipes --copy demo my-demo
formary init novel.txt --out novel.yaml

# A run
formary run novel.yaml
formary run novel.yaml --set train.steps=2000 --set train.seed=7 --folder runs/longer

# Its single steps
formary prepare novel.yaml
formary train novel.yaml
formary evaluate novel.yaml
formary report novel.yaml

# A model
formary generate runs/novel/model "It was" --temperature 0.7 --top-p 0.9 --seed 7
formary generate runs/novel/model "It was" --n 3 --max-tokens 60 --stop "."
formary generate runs/novel/model "It was" --beams 4 --max-tokens 40 --json
formary evaluate runs/novel/model other.txt --documents paragraph

# Rows with answers
formary init patients.jsonl --out patients.yaml
formary run patients.yaml
formary predict runs/patients/model "Age: 40 years, Sex: Male"
formary predict runs/patients/model new.jsonl --out answered.jsonl
formary evaluate runs/patients/model new.jsonl
cp -r runs/patients runs/other
formary compare runs/patients/model runs/other/model new.jsonl
formary run patients.yaml --seeds 3
formary run patients.yaml --folds 4
formary search patients.yaml --trials 3
formary evaluate runs/novel/model english-proverbs --shots 2

test -s answered.jsonl
test -s runs/patients/report.html
test -s runs/novel/report.html
test -s runs/novel/model/README.md
test -s my-demo/demo.yaml
printf '\nall everyday commands ran\n'
