#!/usr/bin/env bash
# A whole deployment on one machine: a SuperLink, three SuperNodes in three processes, TLS with certificates made on the
# spot, registered keys, one run of SPIRE on digits to its report, and then a fourth person at one of the nodes.
#   examples/deploy_local.sh [FOLDER] [--set KEY=VALUE ...]      about four minutes on two cores
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(realpath -m "${1:-$root/runs/deployed}")"
[ $# -eq 0 ] || shift
[ ! -e "$work" ] || { echo "$work exists; choose another folder" >&2; exit 2; }
bin="${BIN:-$root/.venv/bin}"
export PATH="$bin:$PATH" PORT="${SUPERLINK_PORT:-19092}" OMP_NUM_THREADS=1
mkdir -p "$work/log"

pids=()
stop() {
    for pid in "${pids[@]}"; do kill -- "-$pid" 2> /dev/null || true; done
    wait 2> /dev/null || true
}
trap stop EXIT
start() { # each in a process group of its own, so that what it starts ends with it
    local name="$1"; shift
    setsid "$@" > "$work/log/$name.log" 2>&1 &
    pids+=($!)
}

python "$root/examples/digit_folders.py" "$work/photos" anna ben cem
python "$root/examples/digit_folders.py" "$work/later" dora
personae deploy "$root/recipes/digits/deployed.toml" --to "$work/app" "$@"
"$work/app/keys.sh" server "$(hostname)"
start server env HOST=127.0.0.1 "$work/app/server.sh"
for _ in $(seq 60); do
    curl --silent --output /dev/null --cacert "$work/app/keys/ca.crt" "https://127.0.0.1:$PORT/" && break
    sleep 1
done

port=$((PORT + 1))
for name in anna ben cem; do
    "$work/app/keys.sh" node "$name"
    "$work/app/start.sh" register "$work/app/keys/$name.pub"
    start "$name" env PORT=$port "$work/app/node.sh" "$name" "$work/photos/$name" "$work/state/$name" "127.0.0.1:$PORT"
    port=$((port + 1))
done

"$work/app/start.sh" run "$work/run" 2>&1 | tee "$work/log/run.log"
[ -f "$work/run/report.html" ] || { echo "no report; see $work/log" >&2; exit 1; }

# A fourth person, at anna's machine: needs neither the server nor anybody's images.
node="$(dirname "$(find "$work/state/anna" -name server.safetensors)")"
personae personalize "$node" --data "$work/later/dora" --name dora
personae sample "$node" --client dora -n 16 --out "$work/dora"
echo "report: $work/run/report.html"
