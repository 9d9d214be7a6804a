#!/usr/bin/env bash
# One swarm, five processes, one answer: a node to meet at, three hosts, and somebody who asks.
# A host is killed in mid-answer; the answer comes out the same. Everything is stopped and removed at the end.
#
#   examples/five_processes.sh ["a question"]
#
# Needs daaswarm on the PATH, or DAASWARM set to the program: DAASWARM=.venv/bin/daaswarm examples/five_processes.sh
set -euo pipefail

daaswarm=${DAASWARM:-daaswarm}
model=${MODEL:-smollm2-135m-instruct}
question=${1:-Explain what a distributed hash table is.}
ready_s=180 # the first run downloads and converts the default model

folder=$(mktemp -d)
pids=()

clean_up() {
    trap - EXIT INT TERM
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start NAME COMMAND...: a node in the background, its output in $folder/NAME.log. Sets pid.
start() {
    local name=$1
    shift
    "$daaswarm" "$@" --data-dir "$folder/$name" --json >"$folder/$name.log" 2>"$folder/$name.err" &
    pid=$!
    pids+=("$pid")
}

# await NAME PID EVENT: until that event is in the node's output.
await() {
    local i
    for ((i = 0; i < ready_s * 5; i++)); do
        grep -q "\"event\": \"$3\"" "$folder/$1.log" && return
        kill -0 "$2" 2>/dev/null || break
        sleep 0.2
    done
    echo "$1 did not get to '$3':" >&2
    cat "$folder/$1.log" "$folder/$1.err" >&2
    exit 1
}

if [ "$model" = smollm2-135m-instruct ]; then
    halves=(0-14 15-29 15-29)
else
    halves=(${LAYERS:?say how the model is cut, one range per host: LAYERS="0-7 8-15 8-15"})
fi

start meet join
await meet "$pid" ready
address=$(sed -n 's|.*"addrs": \["\([^"]*\)".*|\1|p' "$folder/meet.log" | head -n 1)
echo "meeting point   $address"

hosts=()
for i in "${!halves[@]}"; do
    start "host$i" host-expert "$model" --layers "${halves[$i]}" --bootstrap "$address"
    hosts+=("$pid")
done
for i in "${!halves[@]}"; do
    await "host$i" "${hosts[$i]}" ready
    echo "host $i          layers ${halves[$i]}, process ${hosts[$i]}"
done

echo
echo "question        $question"
last=$((${#hosts[@]} - 1))
start ask infer "$question" --temperature 0 --max-tokens 64 --bootstrap "$address"
asking=$pid
await ask "$asking" text
echo "the answer has begun: killing host $last"
{ kill -KILL "${hosts[$last]}" && wait "${hosts[$last]}"; } 2>/dev/null || true
code=0
wait "$asking" || code=$?
echo
tail -n 1 "$folder/ask.log"
echo
echo "exit code       $code (0: the other replica did the rest)"
echo "                retries counts the calls that were repeated; 0 if the killed host had none in flight"
exit "$code"
