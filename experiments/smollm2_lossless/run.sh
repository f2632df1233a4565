#!/bin/bash
# An arm of one seed of experiments/smollm2_lossless: run.sh <none|dense|lrsa|hybrid> <seed> [train|untouched|suite|prose|uniform|controls|2048|8192 ...]
#   M: folder of the base model, R: of the runs; TRAIN, EVAL: further overrides of lrsa-train, of lrsa-eval; ARM: another name for the arm,
#   e.g. ARM=lrsa-lm TRAIN=data=recipe_lm run.sh lrsa 0
# Called again it skips what is finished and goes on where a killed run was.
set -euo pipefail
recipe=$1 seed=$2
arm=${ARM:-${recipe#lrsa_}}
run=$R/$arm-seed$seed
base=(model=smollm2 model.name="$M")
if compgen -G "$M/*.gguf" > /dev/null; then base=(model=smollm2_gguf model.name="$M"); fi
model=(model=smollm2 model.name="$run/model")
kept="checkpoints/*.ckpt" # what a killed run can go on from
if [ "$recipe" = none ]; then model=("${base[@]}") kept=journal.jsonl; fi

go() { # <folder> <what a killed run can go on from> <command> <overrides>...
  local folder=$1 left=$2
  if grep -qs '"status": "finished"' "$folder/record.json"; then return; fi
  local resume=()
  if compgen -G "$folder/$left" > /dev/null; then resume=(resume="$folder"); fi
  "${@:3}" logger=none hydra.run.dir="$folder" "${resume[@]}"
}
evaluate() { # <stage> <overrides>...
  go "$run-$1" journal.jsonl lrsa-eval run.study=smollm2_lossless run.arm="$arm" run.seed="$seed" "${model[@]}" trainer=gpu \
    "${@:2}" ${EVAL:-}
}
budget=(evaluation.attention.budget=concentrated 'evaluation.attention.dense_layers=${model.retrieval_layers}')
window=(attention@evaluation.attention=recency "${budget[@]}")
if [ "$recipe" = hybrid ]; then budget=("${window[@]}"); fi # tested as it was trained
lengths=('task=[needles,xquad]' 'evaluation.compressions=[1,4,8]' evaluation.tasks.needles.limit=160 evaluation.tasks.xquad.limit=400)

stages=("${@:3}")
if [ ${#stages[@]} = 0 ]; then stages=(train untouched suite prose uniform controls 2048 8192); fi
for stage in "${stages[@]}"; do
  case $stage in
    train) go "$run" "$kept" lrsa-train experiment=smollm2_lossless recipe="$recipe" run.arm="$arm" run.seed="$seed" \
      "${base[@]}" trainer.compile=true ${TRAIN:-} ;;
    untouched) evaluate untouched "${budget[@]}" mode=generate 'task=[untouched]' 'evaluation.compressions=[1,2,4,8]' evaluation.batch_size=55 \
      model.dtype=bfloat16 trainer.precision=32-true ;;
    suite) # more that was not trained on, of those tasks of the suite that the model can do at all
      evaluate suite "${budget[@]}" mode=generate 'task=[ruler_niah_single_2,ruler_niah_single_3,ruler_niah_multikey_2,babi_qa1]' \
        'evaluation.compressions=[1,4,8]' evaluation.batch_size=50 model.dtype=bfloat16 trainer.precision=32-true ;;
    prose) evaluate prose "${budget[@]}" mode=perplexity perplexity.text=Salesforce/wikitext:wikitext-2-raw-v1@validation \
      'evaluation.compressions=[1,4,8]' evaluation.batch_size=20 ;;
    uniform) # the same model where every layer keeps as much as every other
      evaluate uniform run.arm="$arm-uniform" 'task=[needles,xquad,hotpotqa]' 'evaluation.compressions=[2,4,8]' evaluation.floor=false \
        evaluation.batch_size=10 evaluation.tasks.needles.limit=320
      evaluate untouched-uniform run.arm="$arm-uniform" mode=generate 'task=[untouched]' 'evaluation.compressions=[4,8]' \
        evaluation.floor=false evaluation.batch_size=55 model.dtype=bfloat16 trainer.precision=32-true ;;
    controls) # the same budget, the other layers' few tokens chosen blindly: at random, the newest of each partition, a wider window
      for rule in random recency; do
        evaluate "$rule" "${budget[@]}" run.arm="$arm-$rule" attention@evaluation.attention="$rule" evaluation.attention.keep_ratio=0.25 \
          evaluation.attention.top_k=null evaluation.attention.equal_bytes_at=null 'task=[needles,xquad]' 'evaluation.compressions=[4,8]' \
          evaluation.floor=false evaluation.batch_size=10 evaluation.tasks.needles.limit=320
      done
      evaluate window "${window[@]}" run.arm="$arm-window" 'task=[needles,xquad]' 'evaluation.compressions=[4,8]' evaluation.floor=false \
        evaluation.batch_size=10 evaluation.tasks.needles.limit=320 ;;
    2048) evaluate 2048 "${budget[@]}" "${lengths[@]}" evaluation.length=2048 evaluation.batch_size=20 ;;
    8192) evaluate 8192 "${budget[@]}" "${lengths[@]}" evaluation.length=8192 evaluation.batch_size=5 ;;
    *) echo "no stage '$stage': train, untouched, suite, prose, uniform, controls, 2048, 8192" >&2; exit 1 ;;
  esac
done
